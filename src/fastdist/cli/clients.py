"""The commands that talk to a running distributor over HTTP: ``send`` and ``top``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastdist.cli.options import (
    DEFAULT_URL,
    IN_USE,
    INCOMPLETE,
    REFUSED,
    SIGNALLED,
    CaFile,
    Token,
    fail,
    problems_shown,
    target_or_exit,
    token_or_environment,
)
from fastdist.units import format_size, number, parse_duration, parse_duration_or_never, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from fastdist.client.logfile import Log, Stream
    from fastdist.client.offsets import OffsetFile
    from fastdist.client.send import Shipper
    from fastdist.client.send_view import SendView

    Sources = Callable[[OffsetFile | None], Iterator[Log | Stream]]

MIN_INTERVAL = 0.1  # seconds
MAX_TEXT = 256  # characters of an emitterId
MAX_PACKET_BYTES = 1 << 30  # bytes


def send(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Log file to send; - is standard input.")],
    *,
    url: Annotated[str, typer.Option(help="The distributor to send to.")] = DEFAULT_URL,
    emitter: Annotated[str | None, typer.Option(help="The emitterId of all packets  [this machine's name]")] = None,
    log_format: Annotated[
        Literal["auto", "text", "ndjson"], typer.Option("--format", help="What the lines are; auto sees for each.")
    ] = "auto",
    level: Annotated[str | None, typer.Option(help="The level of messages that have none.")] = None,
    source: Annotated[str | None, typer.Option(help="The source of messages that have none.")] = None,
    stamp: Annotated[bool, typer.Option("--stamp", help="Give messages without a timestamp the present time.")] = False,
    batch: Annotated[int, typer.Option(min=1, max=100_000, help="Messages in a packet, at most.")] = 500,
    batch_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of a packet, at most.")] = "1MiB",
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Packets to send at the same time.")] = 8,
    offset_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Note here how far the log is sent, and go on from there.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more lines at the end, also over rotations.")
    ] = False,
    patience: Annotated[
        str, typer.Option(metavar="DURATION", help="Give up when nothing is accepted for that long; or never.")
    ] = "5m",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    token: Token = None,
    ca_file: CaFile = None,
) -> None:
    """Send a log file, or standard input, as packets.

    A line that is a JSON object with the members of a log message travels on as it is; any other JSON object becomes
    the metadata of a message, any other line its text. Only empty lines are left out. Lines that are not UTF-8 are
    sent with their bytes beside them, and lines longer than an eighth of --batch-bytes in parts.

    Each packet has an id made from the log, the place in it and the bytes: analyzers can recognise what is sent again
    after a failure, or after kill -9 with --offset-file. Busy or unreachable distributors are tried again, as
    Retry-After says; what a distributor refuses ends it.

    \b
    Exit status:
      0    all is accepted (--follow: all that was there when it was stopped)
      1    given up: unreachable or busy for too long, or the offset file cannot be written or has become another's
      2    a file or an option cannot be used
      3    the offset file is in use by another fastdist send
      4    refused: what the distributor answers will not get better by trying again
      130  stopped by Ctrl-C (143: by SIGTERM); what was under way is settled and the offset noted

    \b
    Examples:
      fastdist send access.log
      fastdist send app.ndjson --url https://logs.example:3000 --emitter web-42 --source shop
      fastdist send /var/log/app.log --follow --offset-file /var/lib/app.offset
      journalctl -o json -f | FASTDIST_TOKEN=secret fastdist send - --format ndjson
    """
    from fastdist.client import logfile, packing, send, send_view

    target = target_or_exit(url, token_or_environment(token), ca_file)
    with problems_shown():
        style = packing.Style(
            emitter=_text("--emitter", emitter if emitter is not None else socket.gethostname()),
            file="stdin" if file == "-" else os.fsencode(Path(file).name).decode(errors="replace"),
            format=packing.Format(log_format),
            level=_level(level),
            source=None if source is None else _text("--source", source),
            stamp=stamp,
        )
    with problems_shown("--batch-bytes: "):
        recipe = packing.Recipe(style, batch, _packet_size(batch_bytes))
    with problems_shown("--patience: "):
        trying = parse_duration_or_never(number(patience))
    if offset_file and file == "-":
        fail("--offset-file: standard input cannot be read again; send a file")
    if Path(file).is_dir():
        fail(f"{file}: is a folder")
    view = send_view.SendView(quiet=quiet, follow=follow)
    shipper = send.Shipper(target, concurrency, trying, view)
    trail = None if file == "-" else logfile.Trail(Path(file), recipe, view.note)

    def sources(offsets: OffsetFile | None) -> Iterator[Log | Stream]:
        return trail.sources(offsets, shipper.is_stopping) if trail else iter([logfile.Stream(os.dup(0), recipe)])

    raise typer.Exit(_send(shipper, sources, offset_file, view, follow=follow))


def _send(shipper: Shipper, sources: Sources, offset_file: Path | None, view: SendView, *, follow: bool) -> int:
    """Send, and say how it went; return the exit status."""
    from fastdist.client import offsets

    started = time.monotonic()
    caught: list[int] = []
    held = None
    try:
        with problems_shown(), contextlib.ExitStack() as stack:
            held = stack.enter_context(offsets.OffsetFile(offset_file)) if offset_file else None
            stack.enter_context(_signals_noted(shipper, caught))
            stack.enter_context(view)
            shipper.run(sources(held), held, follow=follow)
    except offsets.InUseError as error:
        fail(str(error), IN_USE)
    except KeyboardInterrupt:
        typer.echo("ended at once", err=True)
    summary = shipper.summary
    for line in summary.lines(time.monotonic() - started):
        typer.echo(line)
    if held is not None:
        typer.echo(f"all is accepted up to byte {held.offset}, as {typer.format_filename(held.path)} says")
    if summary.stopped:
        typer.echo(f"stopped: {summary.stopped}", err=True)
        return REFUSED if summary.permanent else INCOMPLETE
    if caught and not (follow and len(caught) == 1):
        return SIGNALLED + caught[0]
    return 0


@contextlib.contextmanager
def _signals_noted(shipper: Shipper, caught: list[int]) -> Iterator[None]:
    """Make SIGINT and SIGTERM end it in good order, and a second one at once."""

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt
        shipper.stopping = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(option: str, value: str) -> str:
    """Return what may be a member of a packet. Raises ValueError, which names the option."""
    if not 1 <= len(value) <= MAX_TEXT or not value.isprintable():
        raise ValueError(f"{option}: expected 1 to {MAX_TEXT} printable characters of UTF-8")
    return value


def _level(value: str | None) -> str | None:
    from fastdist.packet import LEVELS

    if value is not None and value.lower() not in LEVELS:
        raise ValueError(f"--level: expected one of {', '.join(LEVELS)}")
    return value


def _packet_size(value: str) -> int:
    """Return bytes. Raises ValueError."""
    from fastdist.client.packing import MIN_PACKET_BYTES

    size = parse_size(number(value))
    if not MIN_PACKET_BYTES <= size <= MAX_PACKET_BYTES:
        raise ValueError(f"must be from {format_size(MIN_PACKET_BYTES)} to {format_size(MAX_PACKET_BYTES)}")
    return size


def top(
    *,
    url: Annotated[str, typer.Option(help="The distributor to look at.")] = DEFAULT_URL,
    interval: Annotated[str, typer.Option(metavar="DURATION", help="Time between two looks.")] = "1s",
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame and exit; plain text unless a terminal.")
    ] = False,
    ca_file: CaFile = None,
) -> None:
    """Watch a running distributor: shares, rates, queue, latencies, analyzers and workers.

    The bars show each analyzer's actual share of all deliveries, the mark its target share. What is wrong stands at the
    top. When the distributor goes away the last figures stay until it is back. Ends on q or Ctrl-C.

    \b
    Exit status: 0; with --once, 1 when there is no answer; 2 when an option cannot be used.

    \b
    Examples:
      fastdist top
      fastdist top --url https://logs.example:3000 --interval 5s
      fastdist top --once
    """
    from fastdist.client import top

    target = target_or_exit(url, None, ca_file)
    with problems_shown("--interval: "):
        seconds = max(MIN_INTERVAL, parse_duration(number(interval)))
    if once:
        shown = top.print_once(target)
    elif sys.stdout.isatty() and sys.stdin.isatty():
        shown = top.watch(target, seconds)
    else:
        fail("this is no terminal; say --once for one frame")
    raise typer.Exit(0 if shown else INCOMPLETE)
