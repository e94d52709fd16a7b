"""The progress of ``send``: a bar with rates and why nothing moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from fastdist.client.progress import View, stderr_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task

    from fastdist.client.logfile import Log, Stream
    from fastdist.client.packing import Packet

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


def _columns(width: int) -> list[ProgressColumn | str]:
    """Return what fits into one line of a terminal."""
    whole = Column(no_wrap=True)
    rates = _Rates(whole)
    rates.with_messages = width >= ROOM_FOR_MESSAGES
    state = TextColumn("{task.fields[state]}", style="yellow", table_column=Column(no_wrap=True, ratio=1))
    columns: list[ProgressColumn | str] = [
        "sending",
        TaskProgressColumn(),
        rates,
        "ETA",
        TimeRemainingColumn(table_column=whole),
        state,
    ]
    if width >= ROOM_FOR_BYTES:
        columns.insert(2, DownloadColumn(binary_units=True, table_column=whole))
    if width >= ROOM_FOR_BAR:
        columns.insert(1, BarColumn(bar_width=30 if width >= ROOM_FOR_LONG_BAR else 12))
    return columns


class SendView(View):
    """Shows what a ``send.Shipper`` reports. ``follow``: it is not known how much there will be.

    Called by several threads, but by one at a time.
    """

    def __init__(self, *, quiet: bool = False, follow: bool = False, console: Console | None = None) -> None:
        console = console or stderr_console()
        bar = Progress(
            *_columns(console.width),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
            expand=True,
            speed_estimate_period=RATE_WINDOW,
        )
        super().__init__(bar, quiet=quiet)
        self._follow = follow
        self._messages = 0
        self._done = 0  # bytes of this log
        self._source: Log | Stream

    def begin(self, source: Log | Stream) -> None:
        """Begin a bar for a log."""
        self._source, self._done, self._messages = source, source.start, 0
        self.bar.reset(self._task, total=self._total(), completed=self._done, messages=0, state="")

    def accepted(self, packet: Packet) -> None:
        """Move the bar."""
        self._done += packet.end - packet.offset
        self._messages += packet.messages
        self._last_reason = ""
        total = self._total()
        self.bar.update(self._task, completed=self._done, total=total, messages=self._messages, state="")
        if self.take_line():
            of = f" of {size_text(total)} ({self._done / total:.0%})" if total else ""
            self.note(f"{plural(self._messages, 'message')}, {size_text(self._done)}{of}")

    def stopping(self) -> None:
        """Show that what is in flight is waited for."""
        self.note("stopping when the requests in flight are answered; once more ends it at once")

    def _total(self) -> int | None:
        """Return how long the log is, as far as it has been written."""
        return None if self._follow else self._source.size
