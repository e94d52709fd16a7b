"""What commands print: tables for a person at a terminal, plain lines and JSON for all else."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING

import msgspec
import typer

from fastdist.client.purge import Census

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from fastdist.client.dead_letter_store import Stored
    from fastdist.client.replay import Summary
    from fastdist.http.models import Analyzer
    from fastdist.storage.dead_letter_format import Line
    from fastdist.storage.inspect import QueueView, RingReport

MAX_DAMAGES = 20  # of a file
ECHO_LINES = 1000
WIDE = 104  # columns of a terminal

DEAD_LETTER_COLUMNS = ("id", "reason", "analyzer", "status", "attempts>", "accepted", "dead since", "size>", "response")
SHOWN_RESPONSE = 60  # characters
PACKET_COLUMNS = ("id", "accepted", "age>", "attempts>", "messages>", "size>", "file")
FILE_COLUMNS = ("file", "packets>", "in use>", "capacity>", "")
ANALYZER_COLUMNS = (
    "id",
    "state",
    "weight>",
    "target>",
    "effective>",
    "actual>",
    "delivered>",
    "failed>",
    "in flight>",
    "last error",
)


# ---- figures


def size_text(size: float) -> str:
    """Return bytes as a person reads them: ``452 B``, ``1.4 KiB``."""
    for factor, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def age_text(seconds: float) -> str:
    """Return an age in its largest unit: ``5 s``, ``3 h``."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def time_text(moment: datetime) -> str:
    """Return a moment to the second, in UTC; as two words for a person, as one for programs that split lines."""
    return f"{moment:%Y-%m-%d %H:%M:%SZ}" if sys.stdout.isatty() else f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def plural(count: int, what: str) -> str:
    """Return ``1 packet`` or ``2 packets``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# ---- tables


def print_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows below their columns' names; those of a name that ends in ``>`` are aligned to the right."""
    names = [name.removesuffix(">") for name in columns]
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415  (rich takes a while, and only a terminal needs it)
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = Console(highlight=False)
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        for i, (name, column) in enumerate(zip(names, columns, strict=True)):
            # Where there is room, let times be wrapped (at their space) before ids are.
            whole = i == 0 and console.width >= WIDE
            table.add_column(name, justify="left" if name == column else "right", overflow="fold", no_wrap=whole)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    grid = [tuple(map(str.upper, names)), *rows]
    widths = [max(map(len, cells)) for cells in zip(*grid, strict=True)]
    aligned = zip(names, columns, widths, strict=True)
    line = "  ".join(f"{{:{'<' if name == column else '>'}{width}}}" for name, column, width in aligned)
    _echo_all(line.format(*row).rstrip() for row in grid)


def _echo_all(lines: Iterable[str]) -> None:
    """Print lines, many at a time (echo flushes what it prints)."""
    lines = iter(lines)
    while batch := list(itertools.islice(lines, ECHO_LINES)):
        typer.echo("\n".join(batch))


# ---- dead letters


def print_dead_letters(found: Iterable[Stored]) -> None:
    """Print dead letters and a line that sums them up."""
    census, rows = Census(), []
    for _, line in found:
        census.add(line)
        rows.append(_dead_letter_row(line))
    if not rows:
        typer.echo("no dead letters")
        return
    print_table(DEAD_LETTER_COLUMNS, rows)
    typer.echo(census_text(census))


def lines_text(census: Census) -> str:
    """Return how many dead letters and unreadable lines there are."""
    unreadable = census.lines - census.dead_letters
    counts = [plural(census.dead_letters, "dead letter")] if census.dead_letters or not unreadable else []
    return " and ".join([*counts, plural(unreadable, "unreadable line")] if unreadable else counts)


def census_text(census: Census) -> str:
    """Return a line about dead letters: how many, how large, since when."""
    since = f", the oldest of {time_text(census.oldest)}" if census.oldest else ""
    return f"{lines_text(census)}, {size_text(census.size)}{since}"


def _dead_letter_row(line: Line) -> tuple[str, ...]:
    dead_letter = line.dead_letter
    if dead_letter is None:
        return ("-", line.reason, "-", "-", "-", "-", time_text(line.time), size_text(line.size), "-")
    return (
        dead_letter.id,
        dead_letter.reason,
        dead_letter.analyzer or "-",
        str(dead_letter.status or "-"),
        str(dead_letter.attempts),
        time_text(dead_letter.accepted_at),
        time_text(dead_letter.dead_lettered_at),
        size_text(line.size),
        _beginning(dead_letter.response or "-"),
    )


def _beginning(response: str) -> str:
    """Return the beginning of an analyzer's response on one line, fit for a terminal."""
    text = "".join(char if char.isprintable() else "?" for char in " ".join(response.split()))
    return text if len(text) <= SHOWN_RESPONSE else f"{text[: SHOWN_RESPONSE - 1]}…"


def print_dead_letters_json(found: Iterable[Stored]) -> None:
    """Print a JSON object for each dead letter, without its packet."""
    _echo_all(
        msgspec.json.encode(_dead_letter_members(line) | where | {"bytes": line.size}).decode() for where, line in found
    )


def _dead_letter_members(line: Line) -> dict[str, object]:
    if line.dead_letter is None:
        return {"id": None, "reason": line.reason}
    members: dict[str, object] = msgspec.to_builtins(line.dead_letter)
    return {name: value for name, value in members.items() if name not in {"body", "bodyBase64"}}


def print_summary(summary: Summary) -> None:
    """Print how a replay went."""
    if summary.stopped:
        typer.echo(f"stopped: {summary.stopped}", err=True)
    if summary.replayed or summary.refused or summary.left:
        typer.echo(f"replayed {summary.replayed}, refused {summary.refused}, left {summary.left}")
    else:
        typer.echo("no dead letters")


# ---- queues


def print_verdict(view: QueueView) -> None:
    """Print, file by file, whether a queue is sound and what is wrong with it."""
    for report in view.files:
        typer.echo(f"{report.file}: {_verdict(report)}")
        for damage in report.damage[:MAX_DAMAGES]:
            typer.echo(f"  at byte {damage.offset}: {damage.what}")
        if len(report.damage) > MAX_DAMAGES:
            typer.echo(f"  and {len(report.damage) - MAX_DAMAGES} more")
        for note in report.notes:
            typer.echo(f"  note: at byte {note.offset}: {note.what}, half written by a process that was killed")
    for name in view.set_aside:
        typer.echo(f"{name}: set aside by an earlier start, which could not read it; no part of the queue")
    packets = plural(sum(report.packets for report in view.files), "packet")
    if view.sound:
        typer.echo(f"sound: {plural(len(view.files), 'file')}, {packets} to be delivered")
        return
    damaged = sum(not report.sound for report in view.files)
    corrupt = sum(report.corrupt for report in view.files)
    lost = f"{plural(corrupt, 'corrupt record')}, {packets} intact and to be delivered"
    typer.echo(f"DAMAGED: {damaged} of {plural(len(view.files), 'file')}, {lost}")


def _verdict(report: RingReport) -> str:
    if report.error is not None:
        return f"DAMAGED: {report.error}"
    packets = f"{plural(report.packets, 'packet')}, {size_text(report.bytes)} of {size_text(report.capacity_bytes)}"
    return (
        f"sound: {packets}"
        if report.sound
        else f"DAMAGED: {plural(report.corrupt, 'corrupt record')}; intact: {packets}"
    )


def print_queue(view: QueueView, now: datetime) -> None:
    """Print what waits in a queue."""
    if view.packets:
        print_table(
            PACKET_COLUMNS,
            (
                (
                    packet.id,
                    time_text(packet.accepted_at),
                    age_text((now - packet.accepted_at).total_seconds()),
                    str(packet.attempts),
                    str(packet.messages),
                    size_text(packet.bytes),
                    packet.file,
                )
                for packet in view.packets
            ),
        )
        more = sum(report.packets for report in view.files) - len(view.packets)
        typer.echo(f"… and {more} more\n" if more else "")
    print_table(
        FILE_COLUMNS,
        (
            (
                report.file,
                str(report.packets),
                size_text(report.bytes),
                size_text(report.capacity_bytes),
                "" if report.sound else "DAMAGED; see fastdist queue verify",
            )
            for report in view.files
        ),
    )


def print_queue_json(view: QueueView, now: datetime) -> None:
    """Print the same as one JSON object."""
    packets = [
        msgspec.to_builtins(packet) | {"ageSeconds": round((now - packet.accepted_at).total_seconds(), 3)}
        for packet in view.packets
    ]
    total = sum(report.packets for report in view.files)
    typer.echo(msgspec.json.encode({"total": total, "packets": packets, "files": view.files}))


# ---- analyzers


def print_analyzers(analyzers: list[Analyzer]) -> None:
    """Print a row for each analyzer; a weight that was set while the service ran has a star."""
    print_table(ANALYZER_COLUMNS, map(_analyzer_row, analyzers))


def _analyzer_row(row: Analyzer) -> tuple[str, ...]:
    is_set = row.override is not None and row.override.weight is not msgspec.UNSET
    state = f"{row.state}, on probation" if row.probation is not None and row.state == "online" else row.state
    if row.paused_for_seconds:
        state = f"{state}, paused for {age_text(row.paused_for_seconds)}"
    shares = (row.target_share, row.effective_share, row.actual_share)
    return (
        row.id,
        state,
        f"{row.weight:g}{'*' if is_set else ''}",
        *(f"{share * 100:.1f} %" for share in shares),
        str(row.delivered),
        str(row.failed),
        str(row.in_flight),
        " ".join((row.last_error or "-").split()),
    )


def print_analyzers_json(analyzers: list[Analyzer]) -> None:
    """Print the same, and all else that is known, as one JSON object."""
    typer.echo(msgspec.json.encode({"analyzers": analyzers}))
