"""Dead letters: packets no analyzer will ever take, kept as NDJSON files for a person to look at and to send again.

A packet is written here (and, with durability fsync, synced) before it leaves the queue; what cannot be written stays
queued. Every worker writes files of its own, so none needs a lock, and starts a new one when one has grown.
"""

from __future__ import annotations

import base64
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from fastdist._core.ring import Packet

FOLDER = "dead-letters"
LARGEST_FILE = 64 << 20  # bytes


def iso_time(ns: int) -> str:
    """Return wall-clock nanoseconds as RFC 3339, to the microsecond."""
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class DeadLetters:
    """The files that the process ``owner`` (a word fit for a file name) writes below ``queue_path``."""

    def __init__(self, queue_path: str | Path, owner: str, *, sync: bool = False) -> None:
        self._folder = Path(queue_path) / FOLDER
        self._owner, self._sync = owner, sync
        self._fd = -1
        self._size = 0

    def write(self, packet: Packet, reason: str, analyzer: str | None, status: int | None, error: str | None) -> None:
        """Append a packet: why it is here, and the last analyzer that saw it with what it said. Raises OSError."""
        letter: dict[str, object] = {
            "id": packet.id,
            "reason": reason,
            "analyzer": analyzer,
            "status": status,
            "error": error,
            "attempts": packet.attempts,
            "messages": packet.messages,
            "acceptedAt": iso_time(packet.accepted_ns),
            "deadLetteredAt": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        }
        try:
            letter["body"] = packet.body.decode()
        except UnicodeDecodeError:
            letter["bodyBase64"] = base64.b64encode(packet.body).decode()
        line = orjson.dumps(letter, option=orjson.OPT_APPEND_NEWLINE)
        self._append(line)

    def _append(self, line: bytes) -> None:
        if self._fd < 0 or self._size + len(line) > LARGEST_FILE:
            self._open()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
            if self._sync:
                os.fdatasync(self._fd)
        except OSError:
            # No half of a line stays behind: the packet is still queued, and will be written again.
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    def _open(self) -> None:
        self.close()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{self._owner}.ndjson"
        self._fd = os.open(
            self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._size = 0
        if self._sync:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def close(self) -> None:
        """Close the present file, if one is open."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
