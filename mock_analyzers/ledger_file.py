"""The ledger on disk: one line ``id analyzer attempt`` for each acknowledged packet of all analyzers.

Lines are collected and written ten times a second and at the end, so a killed mock has lost a tenth of a second.
A file that cannot be written is reported once and does not stop the analyzers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from pathlib import Path

_FLUSH_INTERVAL = 0.1  # seconds


class LedgerFile:
    """Appends to ``path``; raises ``OSError`` when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lines: list[bytes] = []
        self._failed = False

    def note(self, ids: Sequence[bytes], analyzer: bytes, attempt: bytes) -> None:
        """Note acknowledged packets."""
        tail = b" %s %s\n" % (analyzer, attempt or b"0")
        self._lines.extend([packet_id + tail for packet_id in ids])

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write what was noted, from now on regularly."""
        self.flush()
        loop.call_later(_FLUSH_INTERVAL, self.start, loop)

    def flush(self) -> None:
        """Write what was noted."""
        if not self._lines:
            return
        rest = memoryview(b"".join(self._lines))
        self._lines.clear()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if not self._failed:
                sys.stderr.write(f"mock_analyzers: the ledger file cannot be written: {error}\n")
            self._failed = True

    def close(self) -> None:
        """Write the last lines."""
        self.flush()
        self._file.close()
