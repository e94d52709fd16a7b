"""A part of the shared block that one process replaces as a whole: bytes behind their length and checksum."""

from __future__ import annotations

import struct

from fastdist._core import checksum

_HEAD = struct.Struct("=QQ")
READINGS = 1000  # of one that is being written


class Document:
    """The bytes in ``part``. Readers have all of what was written, or know that they have not."""

    def __init__(self, part: memoryview) -> None:
        self._part = part
        self.room = len(part) - _HEAD.size  # bytes

    def write(self, body: bytes) -> None:
        """Replace it; one for which there is no room is dropped."""
        if len(body) <= self.room:
            self._part[_HEAD.size : _HEAD.size + len(body)] = body
            _HEAD.pack_into(self._part, 0, len(body), checksum(body))

    def read(self) -> bytes | None:
        """Return what was written last, b"" if nothing was; None where it is just being written, and goes on to be."""
        for _ in range(READINGS):
            length, expected = _HEAD.unpack_from(self._part)
            body = bytes(self._part[_HEAD.size : _HEAD.size + length])
            if not length or checksum(body) == expected:
                return body
        return None
