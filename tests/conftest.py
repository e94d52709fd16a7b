"""What all tests need of the process they run in."""

from __future__ import annotations

import signal


def pytest_configure():
    """Hear Ctrl-C, and let children hear it, also where the run was begun in the background: it is ignored there."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
