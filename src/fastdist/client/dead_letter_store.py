"""Where dead letters are, as the commands see it: in files here, or in a stream (``dead_letter_stream``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from fastdist.client import purge, replay
from fastdist.storage.dead_letter_format import Line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastdist.client.connection import Target
    from fastdist.client.progress import ReplayView
    from fastdist.client.purge import Census
    from fastdist.client.replay import Summary
    from fastdist.storage.dead_letter_format import Found, Selection

Stored: TypeAlias = tuple[dict[str, object], Line]  # where it is, as members of JSON; the dead letter


class Store(Protocol):
    """Dead letters as they were when they were looked for; what is added after that is left for the next time."""

    peer: str  # what a replay sends to, for people

    def selected(self, selection: Selection) -> Iterator[Stored]:
        """Yield what is selected, oldest first."""

    def purge(self, selection: Selection, note: Callable[[str], None]) -> Census:
        """Remove what is selected; return what is gone. ``note`` gets what was skipped."""

    def replay(
        self, selection: Selection, target: Target, view: ReplayView, connections: int, limit: int | None
    ) -> Summary:
        """Send what is selected again, and remove what was accepted. ``target``: a distributor, if need be."""


class Files:
    """Files of dead letters. Their methods raise OSError."""

    peer = "the distributor"

    def __init__(self, files: list[Found]) -> None:
        self.files = files

    def selected(self, selection: Selection) -> Iterator[Stored]:
        """Yield what is selected, each with its file."""
        return (({"file": str(found.path)}, line) for found, line in purge.selected(self.files, selection))

    def purge(self, selection: Selection, note: Callable[[str], None]) -> Census:
        """Remove what is selected, but for files that a worker writes to."""
        return purge.purge(self.files, selection, note)

    def replay(
        self, selection: Selection, target: Target, view: ReplayView, connections: int, limit: int | None
    ) -> Summary:
        """Post what is selected to a distributor."""
        return replay.Replay(self.files, selection, target, view).run(connections, limit)
