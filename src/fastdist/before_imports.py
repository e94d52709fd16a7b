"""Signals and descriptors 0 to 2: handled before the imports, which take a third of a second.

- A signal to end during a start ends it at once, with exit status 0: there is nothing to drain yet, and the queue may
  be left at any moment. A signal to reload is kept until the service can act on it.
- A file opened later must not become standard input, output or error: the event loop aborts if one of its own does.
"""

from __future__ import annotations

import os
import signal
import sys

_asked: list[int] = []  # signals to reload


def open_standard_streams() -> None:
    """Open ``/dev/null`` for those of descriptors 0 to 2 that are closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003  (the lowest free descriptor: this one)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def watch_signals() -> None:
    """Handle signals until the service does."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, lambda number, _: _asked.append(number))


def asked_to_reload() -> bool:
    """Whether SIGHUP has arrived since ``watch_signals``."""
    return bool(_asked)
