"""What ``fastdist top`` shows: one frame, made of what /health, /stats, /queue and /analyzers answered.

Nothing here asks a server or waits; a frame is values in, text out. The figures are those of the server, only rounded
for reading; counts are whole. Colours repeat what words say, so that nothing is lost without them.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastdist.client.output import age_text, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import RenderableType

    from fastdist.http.models import Analyzer, Health, Latencies, Queue, Stats, Stream, Worker

BLOCKS = " ▏▎▍▌▋▊▉█"  # eighths of a cell
SPARKS = "▁▂▃▄▅▆▇█"
BAR, MIN_BAR, QUEUE_BAR = 26, 14, 12  # cells
FLOW_INDENT = 10  # columns before figures
FIXED_LINES = 21  # of a frame: all but warnings, analyzers, workers, what is rejected and what log agents sent
RECENT = 10.0  # seconds over which records are counted for their rate
MARK, GAP = "┃", "░"
BETWEEN = 2  # cells between columns
STATE_WIDTH = len("draining")
ROOM_FOR_ERRORS, MIN_ERROR = 100, 14  # cells: of a terminal that shows last errors, and of their column
NAMED = 3  # problems of one kind
STATES = {"online": "green", "running": "green", "draining": "yellow", "offline": "bold red"}
COUNTERS = {
    "received": "received",
    "accepted": "accepted",
    "rejected": "rejected",
    "delivered": "delivered",
    "retried": "retried",
    "spilled": "spilled",
    "dead_lettered": "dead letters",
    "recovered": "recovered",
    "corrupt": "corrupt",
    "lost": "lost",
    "duplicates": "duplicates",
}
WRONG = {"rejected", "dead_lettered", "corrupt", "lost"}  # coloured when there are any


class Responses(NamedTuple):
    """What the server said: its responses, asked for one after another."""

    health: Health
    stats: Stats
    queue: Queue
    analyzers: list[Analyzer]


class Frame(NamedTuple):
    """What is known at a moment. ``responses``: the last that came, at ``seen``; ``trouble``: why none came since."""

    url: str
    at: datetime
    responses: Responses | None = None
    seen: datetime | None = None
    trouble: str | None = None


class History:
    """The rates of the last frames, for lines that show where they go, and log agents' records of the last seconds."""

    def __init__(self, length: int = 40) -> None:
        self._length = length
        self.accepted: list[float] = []
        self.delivered: list[float] = []
        self._records: list[tuple[float, dict[str, int]]] = []  # by protocol, at that uptime

    def add(self, responses: Responses) -> None:
        """Remember the rates."""
        rates, uptime = responses.stats.rates, responses.stats.uptime_seconds
        self.accepted = [*self.accepted, rates.accepted_per_second][-self._length :]
        self.delivered = [*self.delivered, rates.delivered_per_second][-self._length :]
        records = {name: counts.records for name, counts in responses.stats.protocols.items()}
        before = [sample for sample in self._records if sample[0] < uptime]  # not what was before a restart
        recent = [sample for sample in before if sample[0] >= uptime - RECENT]
        self._records = [*(recent or before[-1:]), (uptime, records)]

    def records_per_second(self, protocol: str) -> float | None:
        """Return how many records were accepted lately in a protocol; None before there are two samples."""
        if not self._records:
            return None
        (begin, first), (end, last) = self._records[0], self._records[-1]
        return (last.get(protocol, 0) - first.get(protocol, 0)) / (end - begin) if end > begin else None


def render(frame: Frame, width: int, lines: int | None = None, history: History | None = None) -> RenderableType:
    """Return a frame for a terminal of that size; without ``lines`` it may be as long as it is.

    What does not fit in: columns of the analyzers that matter least, and workers, which are then counted.
    """
    parts: list[RenderableType] = [_head(frame)]
    if warnings := list(_warnings(frame)):
        parts.append(Text("\n".join(f" {warning} " for warning in warnings), style=_style(warnings[0])))
    if (responses := frame.responses) is not None:
        rows = None
        if lines is not None:
            lists = bool(_rejected(responses.stats)) + bool(_agents(responses.stats, history))
            rows = max(1, lines - FIXED_LINES - len(warnings) - len(responses.analyzers) - lists)
        parts += [
            _analyzers(responses.analyzers, width, frame.at),
            _flow(responses, width, history),
            _latencies(responses.stats.latency_ms),
            _workers(responses.stats.workers, rows, frame.at),
        ]
    return Group(*parts)


def _status(frame: Frame) -> str:
    if frame.trouble or frame.responses is None:
        return "unreachable" if frame.trouble else "connecting"
    return frame.responses.health.status


def _head(frame: Frame) -> Text:
    head = Text.assemble(("fastdist top", "bold"), f"  {frame.url}  ")
    status = _status(frame)
    head.append(status, style={"ok": "bold green", "degraded": "bold yellow"}.get(status, "bold red"))
    if (responses := frame.responses) is not None:
        health = responses.health
        head.append(f"  version {health.version}  up {age_text(health.uptime_seconds)}")
        head.append(f"  workers {health.workers.running}/{health.workers.configured}")
        head.append(f"  analyzers {health.analyzers.online}/{health.analyzers.total}")
    head.append(f"  {frame.at:%H:%M:%SZ}", style="dim")
    return head


def _style(worst: str) -> str:
    """Return the style of what is wrong, by its first line."""
    if worst.startswith("NOTICE"):
        return "bold black on cyan"
    return "bold black on yellow" if worst.startswith(("WARNING", "DEGRADED")) else "bold white on red"


def _warnings(frame: Frame) -> Iterable[str]:
    """Yield what needs attention, the worst first."""
    responses = frame.responses
    if frame.trouble:
        last = f"; the figures are of {frame.seen:%H:%M:%SZ}" if frame.seen else ""
        yield f"UNREACHABLE: {frame.trouble}{last}"
    if responses is None:
        return
    listed = responses.health.problems
    counts = Counter(problem.code for problem in listed)
    shown: Counter[str] = Counter()
    for problem in listed:
        shown[problem.code] += 1
        if shown[problem.code] <= NAMED or counts[problem.code] == NAMED + 1:  # one more takes no more room
            age = _age(problem.since, frame.at)
            yield f"{problem.level.upper()}: {problem.detail}" + (f" ({age})" if age else "")
        elif shown[problem.code] == counts[problem.code]:
            yield f"{problem.level.upper()}: {counts[problem.code] - NAMED} more like the last one"
    if not listed and responses.health.status != "ok":  # a server of another version
        yield responses.health.status.upper()


def _age(moment: str | None, now: datetime) -> str:
    """Return how long ago a moment of the server was; nothing if that is not known."""
    try:
        return age_text((now - datetime.fromisoformat(moment or "")).total_seconds())
    except (ValueError, TypeError):  # TypeError: without a time zone
        return ""


# ---- analyzers


def _shown_state(row: Analyzer) -> str:
    """Return the state, or that it is online but on probation, or asks for a pause."""
    if row.state == "online" and row.probation:
        return "on trial"
    return "paused" if row.state == "online" and row.paused_for_seconds else row.state


def share_bar(actual: float, target: float, scale: float, width: int = BAR) -> Text:
    """Return a bar of the actual share with a mark at the target share, and what lies between them shaded."""
    per_cell = scale / width
    mark = min(width - 1, int(target / per_cell)) if scale else 0
    bar = Text()
    for cell in range(width):
        filled = min(1.0, max(0.0, (actual - cell * per_cell) / per_cell)) if scale else 0.0
        if cell == mark and target:
            bar.append(MARK, style="bold cyan")
        elif filled:
            bar.append(BLOCKS[max(1, round(filled * 8))], style="yellow" if cell > mark else "green")
        else:
            bar.append(GAP if cell < mark else " ", style="yellow")
    return bar


class _Column(NamedTuple):
    """A column of the analyzers' table; where there is no room, those that need a wide terminal go first."""

    name: str
    cell: Callable[[Analyzer], str]
    width: int = 0  # of a terminal


COLUMNS = (
    _Column("actual", lambda row: f"{row.actual_share * 100:.1f} %"),
    _Column("target", lambda row: f"{row.target_share * 100:.1f} %", 50),
    _Column("effective", lambda row: f"{row.effective_share * 100:.1f} %", 140),
    _Column("delivered", lambda row: f"{row.delivered:,}", 60),
    _Column("failed", lambda row: f"{row.failed:,}", 72),
    _Column("retried", lambda row: f"{row.retried:,}", 130),
    _Column("in flight", lambda row: f"{row.in_flight:,}", 110),
    _Column("p50 ms", lambda row: _milliseconds(row.latency_ms.p50), 120),
    _Column("p99 ms", lambda row: _milliseconds(row.latency_ms.p99), 100),
)


OVERRIDE = _Column("override", lambda row: _override(row), 55)  # noqa: PLW0108  (defined below); where there is one


def _override(row: Analyzer) -> str:
    """Return what was set while the service ran, over what the configuration says."""
    if row.override is None:
        return "-"
    weight = [] if row.override.weight is UNSET else [f"weight {row.override.weight:g}"]
    return ", ".join([*weight, *([] if row.override.state is UNSET else [row.override.state])])


def _error(text: str | None, moment: str | None, now: datetime, *, bad: bool) -> Text:
    """Return a last error and how long ago that was."""
    age = _age(moment, now)
    style = "red" if bad else "dim"
    return Text(f"{age} ago: {text}" if text and age else text or "-", style=style)


def _analyzers(rows: list[Analyzer], width: int, now: datetime) -> Table:
    cells = max(MIN_BAR, min(BAR, width // 6))
    longest_id = max(min(max(map(len, (row.id for row in rows)), default=0), width // 4), len("analyzer"))
    room = width - longest_id - STATE_WIDTH - cells - 4 * BETWEEN
    with_errors = width >= ROOM_FOR_ERRORS  # else the lines on top say what is wrong
    columns = _that_fit(rows, width, room - with_errors * MIN_ERROR)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False, expand=True)
    table.add_column("analyzer", no_wrap=True, overflow="ellipsis", max_width=longest_id)
    table.add_column("state", no_wrap=True)
    table.add_column(f"share {MARK} target", no_wrap=True)
    for column in columns:
        table.add_column(column.name, justify="right", no_wrap=True)
    if with_errors:
        table.add_column("last error", ratio=1, no_wrap=True, overflow="ellipsis")
    scale = max([share for row in rows for share in (row.actual_share, row.target_share)], default=0) or 1.0
    for row in rows:
        error = _error(row.last_error, row.last_error_at, now, bad=row.state != "online")
        table.add_row(
            row.id,
            _state(_shown_state(row)),
            share_bar(row.actual_share, row.target_share, scale, cells),
            *(column.cell(row) for column in columns),
            *([error] if with_errors else []),
        )
    return table


def _that_fit(rows: list[Analyzer], width: int, room: int) -> list[_Column]:
    """Return the columns that fit into ``room``, those that matter least left out."""
    known = (*COLUMNS, OVERRIDE) if any(row.override for row in rows) else COLUMNS
    columns = [column for column in known if column.width <= width]
    needed = {
        column: max(len(column.name), *(len(column.cell(row)) for row in rows), 0) + BETWEEN for column in columns
    }
    while columns and sum(needed[column] for column in columns) > room:
        columns.remove(max(columns, key=lambda column: column.width))
    return columns


def _state(state: str) -> Text:
    return Text(state, style=STATES.get(state, "yellow"))


# ---- flow, queue, latencies


def _flow(responses: Responses, width: int, history: History | None) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    stats, queue = responses.stats, responses.queue
    rates = Text()
    for name, rate, past in (
        ("accepted", stats.rates.accepted_per_second, history.accepted if history else []),
        ("delivered", stats.rates.delivered_per_second, history.delivered if history else []),
    ):
        rates.append(f"{name} {rate:,.1f}/s {sparkline(past)}  ")
    grid.add_row(Text("rates", style="bold"), rates)
    counts = [(key, name, getattr(stats.packets, key)) for key, name in COUNTERS.items()]
    counts = [each for each in counts if each[2] is not UNSET]
    packets = [(f"{name} {count:,}", "bold red" if key in WRONG and count else "") for key, name, count in counts]
    grid.add_row(Text("packets", style="bold"), _wrapped(packets, width - FLOW_INDENT))
    if rejected := _rejected(stats):
        grid.add_row(Text("rejected", style="bold"), _wrapped(rejected, width - FLOW_INDENT))
    if agents := _agents(stats, history):
        grid.add_row(Text("agents", style="bold"), _wrapped(agents, width - FLOW_INDENT))
    grid.add_row(Text("queue", style="bold"), _queue(queue))
    if stats.stream:
        grid.add_row(Text("stream", style="bold"), _stream(stats.stream))
    return grid


def _rejected(stats: Stats) -> list[tuple[str, str]]:
    """Return why requests were rejected, and how many, each with its style."""
    counts = msgspec.structs.asdict(stats.rejected)
    return [(f"{reason.replace('_', ' ')} {count:,}", "red") for reason, count in counts.items() if count]


def _agents(stats: Stats, history: History | None) -> list[tuple[str, str]]:
    """Return what log agents sent in each protocol that had a request, each with its style."""
    found = []
    for name, counts in stats.protocols.items():
        if counts.requests:
            rate = history.records_per_second(name) if history else None
            found.append((f"{name} {counts.records:,} records" + ("" if rate is None else f" {rate:,.1f}/s"), ""))
        if counts.refused:
            found.append((f"{name} refused {counts.refused:,}", "red"))
    return found


def _queue(queue: Queue) -> Text:
    drained = queue.estimated_drain_seconds
    text = Text.assemble(
        f"waiting {queue.packets:,}  in flight {queue.in_flight:,}  oldest {age_text(queue.oldest_age_seconds)}  ",
        "▕",
        share_bar(queue.bytes, 0, queue.capacity_bytes, QUEUE_BAR),
        f"▏ {size_text(queue.bytes)} of {size_text(queue.capacity_bytes)}  {queue.durability}  ",
    )
    if queue.packets:
        text.append("nothing is delivered" if drained is None else f"drained in {age_text(drained)}")
    return text


def _stream(stream: Stream) -> Text:
    """Return whose figures those of the queue are: all replicas'; the others are of this one."""
    text = Text(f"{stream.name}, shared by all replicas  ")
    if not stream.connected:
        text.append("not connected  ", style="bold red")
    current, total = stream.replicas.current, stream.replicas.total
    text.append(f"copies {current}/{total}  ", style="" if current == total else "yellow")
    text.append(f"leader {stream.leader or '-'}  claimed {stream.in_flight:,}  dead letters {stream.dead_letters:,}")
    return text


def _wrapped(items: Iterable[tuple[str, str]], width: int) -> Text:
    """Return texts (with their styles) side by side, on as many lines as it takes."""
    text, column = Text(), 0
    for item, style in items:
        if column and column + len(item) > width:
            text.append("\n")
            column = 0
        text.append(item, style=style).append("  ")
        column += len(item) + 2
    return text


def sparkline(values: Sequence[float]) -> str:
    """Return a character for each value, as high as it is compared with the highest."""
    highest = max(values, default=0)
    return "".join(SPARKS[round(value / highest * (len(SPARKS) - 1))] if highest else SPARKS[0] for value in values)


def _latencies(latencies: Latencies) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("latency, ms", no_wrap=True)
    for name in ("p50", "p90", "p99", "p99.9", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, of in (
        ("ingest", latencies.ingest),
        ("queue wait", latencies.queue_wait),
        ("delivery", latencies.delivery),
    ):
        table.add_row(name, *map(_milliseconds, (of.p50, of.p90, of.p99, of.p999, of.max)))
    return table


def _milliseconds(value: float | None) -> str:
    """Return milliseconds with three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004  (three digits)


# ---- workers


def _workers(workers: list[Worker], rows: int | None, now: datetime) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("worker", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("pid", "restarts", "CPU", "memory", "accepted", "delivered"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last error", no_wrap=True, overflow="ellipsis")
    shown = workers if rows is None or len(workers) <= rows else workers[: max(1, rows - 1)]
    for worker in shown:
        table.add_row(
            str(worker.id),
            _state(worker.state),
            str(worker.pid or "-"),
            f"{worker.restarts:,}",
            f"{worker.cpu_percent:.1f} %",
            size_text(worker.rss_bytes),
            f"{worker.accepted:,}",
            f"{worker.delivered:,}",
            _error(worker.last_error, worker.last_error_at, now, bad=worker.state != "running"),
        )
    hidden = len(workers) - len(shown)
    return Group(table, Text(f"… and {hidden} more", style="dim")) if hidden else table
