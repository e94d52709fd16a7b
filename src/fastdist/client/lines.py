"""Bytes cut into lines, each with its offset; a line that is too long comes in parts.

The rules:

1. Nothing is lost: the lines' bytes, put one after another with their line ends, are the bytes that came.
2. Where a line or a part ends depends on the bytes alone, not on the pieces in which they came. A cutter that starts
   at the end of a line or a part finds the same lines and parts behind it.
3. A line ends with LF or CR LF. One that is longer than ``max_line`` bytes comes in parts of at most that length, cut
   between characters where it is UTF-8.
4. A last line without an end is a line once ``finish`` says that no more will come.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_LINE = 4  # bytes; a character of UTF-8 has no more
_MAX_TAIL = 3  # bytes of a character behind its first one


class Line(NamedTuple):
    """A line, or a part of one.

    ``offset`` and ``end`` say where it lies, its line end included; ``raw`` is without the line end; ``whole``: a line,
    not a part. The parts of a line follow each other: where one has ended (``offset`` + the length of ``raw``)
    the next begins.
    """

    offset: int
    end: int
    raw: bytes
    whole: bool


class LineCutter:
    """Cuts a stream of bytes that begins at ``offset``, which is the start of a line or in the middle of one."""

    def __init__(self, max_line: int, offset: int = 0, *, at_start: bool = True) -> None:
        if max_line < MIN_LINE:
            raise ValueError(f"lines of at most {max_line} bytes cannot be cut between characters")
        self.max_line = max_line
        self._rest = b""  # the start of the next line; never longer than ``max_line`` between two calls
        self._offset = offset  # of the rest
        self._at_start = at_start  # the rest begins a line

    @property
    def pending(self) -> int:
        """Bytes of a line or part whose end is not known yet."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[Line]:
        """Return the lines and parts whose end is known with these bytes."""
        *ended, self._rest = (self._rest + data).split(b"\n")
        lines: list[Line] = []
        for text in ended:
            left = self._parts(text, lines)
            end = self._offset + len(left) + 1
            lines.append(Line(self._offset, end, left.removesuffix(b"\r"), self._at_start))
            self._offset, self._at_start = end, True
        self._rest = self._parts(self._rest, lines)
        return lines

    def finish(self) -> list[Line]:
        """Return the rest as a last line: there are no more bytes.

        Bytes that may as well be the first part of a long line count as a part: later they cannot be distinguished.
        """
        rest, self._rest = self._rest, b""
        if not rest:
            return []
        whole = self._at_start and len(rest) < self.max_line - _MAX_TAIL
        line = Line(self._offset, self._offset + len(rest), rest, whole)
        self._offset, self._at_start = line.end, False
        return [line]

    def _parts(self, text: bytes, lines: list[Line]) -> bytes:
        """Add the parts of a text that is too long; return what is left of it."""
        start = 0
        while len(text) - start > self.max_line:
            end = start + self.max_line
            # 10xxxxxx is inside a character, which has at most three of them.
            end -= next((back for back in range(_MAX_TAIL + 1) if text[end - back] & 0xC0 != 0x80), 0)  # noqa: PLR2004
            lines.append(Line(self._offset, self._offset + end - start, text[start:end], whole=False))
            self._offset, self._at_start = lines[-1].end, False
            start = end
        return text[start:] if start else text
