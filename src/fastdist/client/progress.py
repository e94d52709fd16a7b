"""How a command goes, for a person, on stderr: a bar at a terminal, else a line every now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Task

    from fastdist.client.connection import Response
    from fastdist.storage.dead_letter_format import DeadLetter

LINE_EVERY = 10.0  # seconds between the lines that stand for a bar
MAX_REFUSALS = 20  # shown one by one


def stderr_console() -> Console:
    """Return what prints on stderr, as it is."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class View:
    """A bar with one task, and lines above it; ``quiet``: nothing but notes is shown. ``peer``: what is sent to."""

    def __init__(self, bar: Progress, *, quiet: bool = False, peer: str = "the distributor") -> None:
        self.bar, self._quiet, self._peer = bar, quiet, peer
        self._task = bar.add_task("", total=None, messages=0, state="")
        self._last_reason = ""  # why nothing is sent
        self._next_line = time.monotonic() + LINE_EVERY

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Show a line above the bar."""
        self.bar.console.out(text, highlight=False)

    def waiting(self, why: str, seconds: float) -> None:
        """Show why nothing is sent; as a line only when that is new."""
        self.bar.update(self._task, state=f"{why}; again in {seconds:.1f} s")
        if why != self._last_reason:
            self._last_reason = why
            self.note(f"{self._peer} {why}; trying again")

    def take_line(self) -> bool:
        """Return whether it is time for a line that stands for the bar; if so, the next one is due later."""
        if not self.bar.disable or self._quiet or time.monotonic() < self._next_line:
            return False
        self._next_line = time.monotonic() + LINE_EVERY
        return True


class _Rate(ProgressColumn):
    """Dead letters a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f}/s", style="progress.data.speed")


class ReplayView(View):
    """Shows how a replay goes. Called by several threads, but by one at a time."""

    def __init__(self, peer: str) -> None:
        columns = "replaying", BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
        console = stderr_console()
        super().__init__(Progress(*columns, console=console, disable=not console.is_terminal), peer=peer)
        self._total = self._settled = self._refused = 0

    def begin(self, total: int) -> None:
        """Set how many dead letters there are."""
        self._total = total
        self.bar.update(self._task, total=total)

    def replayed(self) -> None:
        """Count one more."""
        self._settled += 1
        self.bar.advance(self._task)
        if self.take_line():
            self.note(f"{self._settled} of {self._total}")

    def refused(self, dead_letter: DeadLetter, response: Response) -> None:
        """Show a refusal, unless there were many."""
        self._refused += 1
        if self._refused <= MAX_REFUSALS:
            self.note(f"refused {dead_letter.id}: {response.text}")
        elif self._refused == MAX_REFUSALS + 1:
            self.note("refused: more, which are not shown one by one")
        self.replayed()
