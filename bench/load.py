"""Load fastdist with wrk or ab, wait until all of it is delivered, and say what became of it.

``make load``, or ``python bench/load.py [options] [NAME=VALUE ...]``: starts a distributor of its own, with four
analyzers behind it that answer at once and count (``sink.c``; weights 10, 40, 20, 30). Names are settings as variables
of the environment, with or without their prefix: ``DELIVERY__MODE=batch QUEUE__DURABILITY=memory``. Those that are set
there hold too. With ``make load URL=http://host:port`` it loads a distributor that runs already. If that asks for a
token, it is taken from FASTDIST_TOKEN.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from closed_loop import PROGRAMS, TYPE, Answers, Order
from contestants import Fastdist
from measure import held_back, started
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tools import DIRECT, WEIGHTS, Sink, compile_tools, free_ports, idle_seconds, packet

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "FASTDIST_"
INSTALL = "apt-get install wrk apache2-utils, or sh scripts/peers.sh"
Stats = dict[str, Any]


class CannotError(Exception):
    """Why there is nothing to tell, and what to do about it."""


class Target:
    """A distributor at ``url``, which is what stands before /logs. ``token``: "" if it needs none."""

    def __init__(self, url: str, token: str = "") -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            known = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            known = False
        if not known or parts.query or parts.fragment or parts.path.rstrip("/") not in {"", "/logs"}:
            raise CannotError(f"{url!r} is not the address of a distributor, such as http://127.0.0.1:3000")
        if not (token.isascii() and token.isprintable()):
            raise CannotError("the token in FASTDIST_TOKEN must be of visible ASCII characters")
        self.base = f"{parts.scheme}://{parts.netloc}"
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def stats(self) -> Stats:
        """Return GET /stats."""
        try:
            document: Stats = json.loads(self._ask("/stats"))
            return document if {"packets", "analyzers", "rejected"} <= document.keys() else self._is_no_fastdist()
        except (ValueError, AttributeError, urllib.error.HTTPError):
            return self._is_no_fastdist()

    def _is_no_fastdist(self) -> Stats:
        raise CannotError(f"{self.base} answers GET /stats, but not as fastdist does: is it one?")

    def offer(self, body: bytes) -> None:
        """Send one packet: what is wrong with the address, the token or the packet is seen before the load."""
        try:
            self._ask("/logs", body, {"Content-Type": TYPE, **self.headers})
        except urllib.error.HTTPError as error:
            if error.code == 401:
                why = "that in FASTDIST_TOKEN is not one of them" if self.headers else "put one into FASTDIST_TOKEN"
                raise CannotError(f"{self.base} asks for a token (security.tokens): {why}") from None
            text = error.read(300).decode(errors="replace").strip()
            raise CannotError(f"{self.base} answers a packet of this load with {error.code}: {text}") from None

    def _ask(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        try:
            request = urllib.request.Request(self.base + path, body, headers or {})
            with DIRECT.open(request, timeout=10) as response:
                return bytes(response.read())
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise CannotError(f"{self.base} cannot be reached: {reason or type(error).__name__}") from None


class Outcome(NamedTuple):
    """What was seen: by the load generator, and in /stats before the load, at its end, and when nothing was left.

    ``drained``: seconds from the end of the load until then; ``counted``: packets that the analyzers have counted,
    where they are ours; ``idle_cores``: processors that had nothing to do during the load.
    """

    answers: Answers
    before: Stats
    at_end: Stats
    after: Stats
    drained: float
    counted: int | None
    idle_cores: float

    def packets(self, name: str, until: Stats | None = None) -> int:
        """Return by how much a count of packets has grown."""
        return int((until or self.after)["packets"][name] - self.before["packets"][name])

    def left(self) -> int:
        """Return how many packets of the load are still there.

        Where others may send too there can always be some: then what has been handled since counts for what was left.
        """
        handled = sum(self.packets(name) - self.packets(name, self.at_end) for name in ("delivered", "deadLettered"))
        theirs = self.counted is None
        return min(undone(self.after), max(0, undone(self.at_end) - handled)) if theirs else undone(self.after)


def undone(stats: Stats) -> int:
    """Return how many packets are stored and neither delivered nor dead letters."""
    return int(stats["packets"]["queued"] + stats["packets"]["inFlight"])


def drain(target: Target, at_end: Stats, patience: float) -> Stats:
    """Return /stats once nothing is left, or so many seconds have passed in which it did not become less."""
    least, since = undone(at_end), time.monotonic()
    while undone(stats := target.stats()) and time.monotonic() - since < patience:
        if undone(stats) < least:
            least, since = undone(stats), time.monotonic()
        time.sleep(0.05)
    return stats


def load(target: Target, order: Order, tool: str, sink: Sink | None, patience: float) -> Outcome:
    """Load it and wait until nothing is left, or for so many seconds for nothing."""
    before, idle = target.stats(), idle_seconds()
    target.offer(order.body)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        answers = PROGRAMS[tool](Path(folder), order)
    idle, at_end, ended = idle_seconds() - idle, target.stats(), time.monotonic()
    after = drain(target, at_end, patience)
    if after["uptimeSeconds"] < before["uptimeSeconds"]:
        raise CannotError(f"{target.base} was started again meanwhile, and its figures with it")
    drained, counted = time.monotonic() - ended, sink.packets() if sink else None
    return Outcome(answers, before, at_end, after, drained, counted, idle / answers.seconds)


# -------------------------------------------------------------------------------------------------------------- report


def rows(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    """Yield the figures: name, value, what is behind it."""
    answers, in_time = outcome.answers, outcome.packets("delivered", outcome.at_end)
    yield "accepted/s", f"{answers.taken / answers.seconds:,.0f}", f"{answers.taken:,} in {answers.seconds:.1f} s"
    later = outcome.packets("delivered") - in_time
    more = f", {later:,} in the {outcome.drained:.1f} s after" if later else ""
    yield "delivered/s", f"{in_time / answers.seconds:,.0f}", f"{in_time:,} in the same time{more}"
    yield "p50", f"{answers.p50:.2f} ms", "until the answer"
    yield "p99", f"{answers.p99:.2f} ms", ""
    yield "errors", f"{answers.refused + sum(answers.errors.values()):,}", ", ".join(errors(outcome))


def errors(outcome: Outcome) -> Iterator[str]:
    """Yield what went wrong with requests."""
    if outcome.answers.refused:
        before = outcome.before["rejected"]
        reasons = {name: count - before.get(name, 0) for name, count in outcome.after["rejected"].items()}
        why = ", ".join(f"{name} {count:,}" for name, count in reasons.items() if count > 0)
        yield f"{outcome.answers.refused:,} answers other than 202" + (f" ({why})" if why else "")
    for kind, count in outcome.answers.errors.items():
        yield f"{count:,} {kind}"


def shares(outcome: Outcome) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield each analyzer's id, state, share as it should be and as it was, and packets."""
    before = {row["id"]: row["delivered"] for row in outcome.before["analyzers"]}
    analyzers = outcome.after["analyzers"]
    gained = [row["delivered"] - before.get(row["id"], 0) for row in analyzers]
    for row, count in zip(analyzers, gained, strict=True):
        actual = count / max(1, sum(gained))
        yield str(row["id"]), str(row["state"]), f"{row['targetShare']:.1%}", f"{actual:.1%}", f"{count:,}"


def verdict(outcome: Outcome) -> tuple[bool, str]:
    """Return whether all that was accepted is delivered, and say so."""
    accepted, delivered = outcome.packets("accepted"), outcome.packets("delivered")
    dead, left = outcome.packets("deadLettered"), outcome.left()
    answers = outcome.answers
    if not answers.taken:
        return False, "Nothing was accepted."
    if accepted < answers.taken and not answers.errors:
        return False, f"{answers.taken:,} were answered 202, but /stats counts {accepted:,} as accepted."
    if outcome.counted is not None and outcome.counted < outcome.after["packets"]["delivered"]:
        return False, f"{delivered:,} are said to be delivered, but the analyzers have counted {outcome.counted:,}."
    if not dead and not left:
        if undone(outcome.after):
            return True, "As many packets have been delivered as were left when the load ended; others go on sending."
        return True, f"All {accepted:,} packets that were accepted have been delivered."
    parts = [f"{delivered:,} of {accepted:,} accepted packets have been delivered"]
    parts += [f"{dead:,} are dead letters"] * (dead > 0)
    parts += [f"{left:,} are still queued or in flight"] * (left > 0)
    return False, "; ".join(parts) + "."


def show(outcome: Outcome, tool: str) -> bool:
    """Print it. Return whether all that was accepted is delivered."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    figures = Table(box=None, show_header=False)
    for justify in ("left", "right", "left"):
        figures.add_column(justify=justify)
    for row in rows(outcome):
        figures.add_row(*row)
    analyzers = Table("analyzer", "state", box=None)
    for name in ("target", "actual", "delivered"):
        analyzers.add_column(name, justify="right")
    for each in shares(outcome):
        analyzers.add_row(*map(escape, each))
    good, said = verdict(outcome)
    for part in ("", figures, "", analyzers, "", said):
        console.print(part)
    if held_back({"wrk_busy": outcome.answers.busy, "idle_cores": outcome.idle_cores}):
        more = "--threads for more of them" if tool == "wrk" else "wrk loads more"
        console.print(f"{tool} was busy all the time while processors were idle: fastdist may do better ({more}).")
    return good


# ---------------------------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    """Read the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("setting", nargs="*", metavar="NAME=VALUE")
    options.add_argument("--url", help="load the distributor that runs there, not one of its own")
    options.add_argument("--tool", choices=PROGRAMS, help="what to load with (wrk where it is installed, else ab)")
    options.add_argument("--seconds", type=int, default=10, help="how long (10)")
    options.add_argument("--connections", type=int, default=64, help="how many (64)")
    options.add_argument("--threads", type=int, default=1, help="of wrk (1)")
    options.add_argument("--messages", type=int, default=2, help="in each packet (2: 452 bytes, 100: 18 KB)")
    options.add_argument("--packet", type=Path, metavar="FILE", help="send this packet instead")
    options.add_argument("--port", type=int, help="where its own distributor listens (a free port)")
    options.add_argument(
        "--patience", type=float, default=10, metavar="SECONDS", help="wait for packets while some are delivered (10)"
    )
    chosen = options.parse_args()
    if wrong := [pair for pair in chosen.setting if "=" not in pair]:
        options.error(f"a setting is NAME=VALUE, this is not: {wrong[0]}")
    if chosen.url and (chosen.setting or chosen.port):
        options.error("settings and --port are for a distributor of its own, not for one that runs")
    if min(chosen.seconds, chosen.connections, chosen.threads, chosen.messages) < 1:
        options.error("there is at least one second, connection, thread and message")
    if chosen.tool != "ab" and chosen.threads > chosen.connections:
        options.error("wrk needs a connection for each of its threads")
    return chosen


def settings_of(pairs: list[str]) -> dict[str, str]:
    """Return the settings of the environment and of the command line, without prefix."""
    given = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and "__" in name}
    given |= dict(pair.partition("=")[::2] for pair in pairs)
    settings = {name.removeprefix(PREFIX): value for name, value in given.items()}
    if wrong := settings.keys() & {"SERVER__HOST", "SERVER__PORT", "SECURITY__TLS_CERT", "SECURITY__TLS_KEY"}:
        raise CannotError(f"{min(wrong)}: it listens on 127.0.0.1, without TLS, at --port; use URL= to load another")
    return settings


def tool_of(wanted: str | None) -> str:
    """Return the load generator to use."""
    found = [name for name in PROGRAMS if shutil.which(name)]
    if not found:
        raise CannotError(f"this needs wrk or ab ({INSTALL})")
    if wanted and wanted not in found:
        raise CannotError(f"{wanted} is not installed ({INSTALL}); {found[0]} is: --tool {found[0]}")
    return wanted or found[0]


@contextlib.contextmanager
def own(folder: Path, settings: dict[str, str], port: int | None) -> Iterator[tuple[Target, Sink]]:
    """Start a distributor with its analyzers."""
    compile_tools(folder)
    ports = free_ports(len(WEIGHTS))
    fastdist = Fastdist(folder, folder / "fastdist", ports, settings)
    if port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                other = f"take another --port, or load what runs there: URL=http://127.0.0.1:{port}"
                raise CannotError(f"port {port} cannot be had ({error}): {other}") from None
        fastdist.port = port
    with Sink(folder, ports) as sink, started(fastdist):
        yield Target(f"http://127.0.0.1:{fastdist.port}"), sink


def run(chosen: argparse.Namespace) -> bool:
    """Load what is to be loaded and show what came of it."""
    tool, settings = tool_of(chosen.tool), {} if chosen.url else settings_of(chosen.setting)
    body = chosen.packet.read_bytes() if chosen.packet else packet(chosen.messages)
    with contextlib.ExitStack() as stack:
        sink = None
        if chosen.url:
            target = Target(chosen.url, os.environ.get("FASTDIST_TOKEN", ""))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="load-")))
            target, sink = stack.enter_context(own(folder, settings, chosen.port))
        order = Order(f"{target.base}/logs", body, chosen.seconds, chosen.connections, chosen.threads, target.headers)
        what = f"{order.connections} connections, packets of {len(body):,} bytes, to {order.url}"
        print(f"{tool} for {order.seconds} s: {what}", *(f"{k}={v}" for k, v in settings.items()), flush=True)
        return show(load(target, order, tool, sink, chosen.patience), tool)


def main() -> int:
    """Return 0 if all that was accepted was delivered, 1 if not, 2 if nothing could be loaded."""
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started is ended
    try:
        return 0 if run(chosen) else 1
    except (CannotError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
