"""How sending goes, for a person: a bar on stderr at a terminal, else a line now and then; a summary at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from fastdist.client.output import plural, size_text
from fastdist.client.packing import TALLIES

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Task

    from fastdist.client.logfile import Log, Stream
    from fastdist.client.packing import Packet
    from fastdist.client.send import Summary

LINE_EVERY = 10.0  # seconds between the lines that stand for a bar
ROOM_FOR_MESSAGES, ROOM_FOR_BYTES, ROOM_FOR_BAR, ROOM_FOR_LONG_BAR = 60, 70, 80, 110  # cells of a terminal
RATE_WINDOW = 10.0  # seconds over which rates are taken


class _Rates(ProgressColumn):
    """Bytes a second, lately, and messages a second since the start."""

    with_messages = True

    def render(self, task: Task) -> Text:
        rates = f"{size_text(task.speed or 0)}/s"
        if self.with_messages:
            messages = task.fields["messages"] / task.elapsed if task.elapsed else 0
            rates += f" {messages:,.0f} messages/s"
        return Text(rates, style="progress.data.speed")


def _columns(width: int) -> list[ProgressColumn]:
    """Return what fits into one line of a terminal."""
    rates = _Rates(table_column=Column(no_wrap=True))
    rates.with_messages = width >= ROOM_FOR_MESSAGES
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        TaskProgressColumn(table_column=Column(no_wrap=True)),
        rates,
        TextColumn("ETA", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[state]}", style="yellow", table_column=Column(no_wrap=True, ratio=1)),
    ]
    if width >= ROOM_FOR_BYTES:
        columns.insert(2, DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)))
    if width >= ROOM_FOR_BAR:
        columns.insert(1, BarColumn(bar_width=30 if width >= ROOM_FOR_LONG_BAR else 12))
    return columns


class SendView:
    """Shows what a ``sending.Shipper`` tells. ``follow``: nobody knows how much there will be."""

    def __init__(self, *, quiet: bool = False, follow: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self.bar = Progress(
            *_columns(self.console.width),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
            expand=True,
            speed_estimate_period=RATE_WINDOW,
        )
        self._task = self.bar.add_task("sending", total=None, messages=0, state="")
        self._quiet, self._follow = quiet, follow
        self._messages = 0
        self._done = 0  # bytes of this log
        self._source: Log | Stream | None = None
        self._waits_until = 0.0
        self._told = ""  # why it waits
        self._next_line = time.monotonic() + LINE_EVERY

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, source: Log | Stream) -> None:
        """Begin a bar for a log."""
        self._source = source
        self._done = source.start
        self.bar.reset(self._task, total=self._total(), completed=self._done, messages=0, state="")
        self._messages = 0

    def accepted(self, packet: Packet) -> None:
        """Move the bar."""
        self._done += packet.end - packet.offset
        self._messages += packet.messages
        self._told = ""
        self.bar.update(self._task, completed=self._done, total=self._total(), messages=self._messages, state="")
        if self.bar.disable and not self._quiet and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            total = self._total()
            of = f" of {size_text(total)} ({self._done / total:.0%})" if total else ""
            typer.echo(f"{plural(self._messages, 'message')}, {size_text(self._done)}{of}", err=True)

    def waiting(self, why: str, seconds: float) -> None:
        """Show why nothing moves; as a line only when that is new."""
        self.bar.update(self._task, state=f"{why}; again in {seconds:.1f} s")
        if why != self._told:
            self._told = why
            self.note(f"the distributor {why}; trying again")

    def stopping(self) -> None:
        """Show that what is under way is awaited."""
        self.note("stopping when the requests under way are answered; once more ends it at once")

    def note(self, text: str) -> None:
        """Show a line above the bar."""
        if self.bar.disable:
            typer.echo(text, err=True)
        else:
            self.console.print(text)

    def _total(self) -> int | None:
        """Return how long the log is, as far as it has been written."""
        return None if self._follow or self._source is None or self._source.size is None else self._source.size


def summary_lines(summary: Summary, seconds: float) -> list[str]:
    """Return how it went, as lines for a person."""
    rate = summary.messages / seconds if seconds else 0
    packets = f"{plural(summary.messages, 'message')} in {plural(summary.packets, 'packet')}"
    lines = [
        f"sent {packets}, {size_text(summary.bytes)} in {seconds:.1f} s ({rate:,.0f} messages/s)",
    ]
    if summary.retries:
        lines.append(f"retries: {summary.retries}")
    lines += [f"{what}: {summary.tally[name]}" for name, what in TALLIES.items() if summary.tally[name]]
    if summary.unsent:
        lines.append(f"read but NOT sent: {plural(summary.unsent, 'message')} at least")
    return lines
