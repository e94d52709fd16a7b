"""Examples of what is turned away and given up, for the log: one of each kind from each worker, in the shared block.

Workers only note them, once a second for each kind at most; the supervisor, which knows all counts, logs. An example is
a client's address with a JSON pointer, or an analyzer with a status: never content.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

import msgspec

from fastdist.shm.snapshot import CONNECTIONS, DEAD_LETTERS, REJECTIONS, UNCONFIRMED

if TYPE_CHECKING:
    from fastdist.shm.block import SharedBlock

KINDS = (*REJECTIONS, UNCONFIRMED, CONNECTIONS, *DEAD_LETTERS)
PLACE = 256  # bytes of an example
INTERVAL_NS = 1_000_000_000
_HEAD = struct.Struct("=qH")  # when it was noted (monotonic ns), how long it is
_ROOM = PLACE - _HEAD.size


class Examples:
    """A worker's examples, in the bytes ``area``."""

    def __init__(self, area: memoryview) -> None:
        self._area = area
        self._next = dict.fromkeys(KINDS, 0)  # monotonic ns

    def note(self, kind: str, **what: str | int | None) -> None:
        """Note an example, unless there was one of its kind within the last second; empty members are left out."""
        now = time.monotonic_ns()
        if now < self._next[kind]:
            return
        self._next[kind] = now + INTERVAL_NS
        text = msgspec.json.encode({name: value for name, value in what.items() if value not in ("", None)})
        if len(text) <= _ROOM:
            at = KINDS.index(kind) * PLACE
            self._area[at : at + _HEAD.size + len(text)] = _HEAD.pack(now, len(text)) + text


def latest_example(block: SharedBlock, kind: str, since_ns: int) -> dict[str, object]:
    """Return the last example of a kind that any worker has noted since then; empty without one."""
    at, found = KINDS.index(kind) * PLACE, (since_ns, b"")
    for index in range(block.workers):
        area = block.examples(index)
        noted, length = _HEAD.unpack_from(area, at)
        found = max(found, (noted, bytes(area[at + _HEAD.size : at + _HEAD.size + min(length, _ROOM)])))
    try:
        return msgspec.json.decode(found[1], type=dict[str, object]) if found[1] else {}
    except (msgspec.MsgspecError, UnicodeDecodeError):  # just being written
        return {}
