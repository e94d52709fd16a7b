"""Dead letters counted, and deleted for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from fastdist.client.held_file import HeldFile, tidy
from fastdist.storage.dead_letter_format import read_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

    from fastdist.storage.dead_letter_format import Found, Line, Selection


class Census(msgspec.Struct):
    """What there is of a selection: all lines, the dead letters among them, bytes of packets, the oldest time."""

    lines: int = 0
    dead_letters: int = 0
    size: int = 0
    oldest: datetime | None = None

    def add(self, line: Line) -> None:
        """Count a line."""
        self.lines += 1
        self.dead_letters += line.dead_letter is not None
        self.size += line.size
        self.oldest = min(self.oldest or line.time, line.time)


def selected(files: list[Found], selection: Selection) -> Iterator[tuple[Found, Line]]:
    """Yield the selected lines, each with its file. Raises OSError."""
    return ((found, line) for found in files for line in read_file(found) if line in selection)


def count(files: list[Found], selection: Selection) -> Census:
    """Return what there is of a selection. Raises OSError."""
    return census_of(line for _, line in selected(files, selection))


def census_of(lines: Iterable[Line]) -> Census:
    """Return what there is of some lines."""
    census = Census()
    for line in lines:
        census.add(line)
    return census


def purge(files: list[Found], selection: Selection, note: Callable[[str], None]) -> Census:
    """Remove what is selected; return what is gone. ``note`` gets the files that were skipped. Raises OSError."""
    tidy(files)
    removed = Census()
    for found in files:
        held = HeldFile.hold_or_skip(found.path, note)
        if held is None:
            continue
        with held:
            gone = set()
            for line in held.lines(found.size):
                if line in selection:
                    gone.add(line.offset)
                    removed.add(line)
            held.rewrite(gone)
    return removed
