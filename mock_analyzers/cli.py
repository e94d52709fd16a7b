"""The command line: flags, their checks, and nothing else. What each fault does stands in ``options.py``."""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003 - Typer resolves annotations at run time
from typing import Annotated

import msgspec
import typer
from typer import Option

from mock_analyzers.options import Options, OptionsError
from mock_analyzers.service import Settings, run

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # fit for a path and for a line of the ledger file
_LARGEST_PORT = 65_535
_FAULTS = "Faults (of all analyzers; each can be changed later by POST /control)"


def _fault(text: str) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = Option(help=text, rich_help_panel=_FAULTS)
    return info


def serve(  # noqa: PLR0913 - Typer makes one flag of each parameter
    *,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    ports: Annotated[str, Option(help="One port per analyzer, separated by commas; 0 = any.")] = "3001,3002,3003,3004",
    ids: Annotated[str, Option(help="Their ids; A1,A2,... unless given.")] = "",
    control_port: Annotated[
        int, Option(min=0, max=_LARGEST_PORT, help="Port of /control for all analyzers; 0 = any.")
    ] = 3100,
    ledger: Annotated[Path | None, Option(help="File to append 'id analyzer attempt' to.")] = None,
    quiet: Annotated[bool, Option("--quiet", help="Print nothing but errors.")] = False,
    seed: Annotated[int | None, Option(help="Makes the faults repeatable.")] = None,
    latency: Annotated[float, _fault("Seconds before each answer.")] = 0.0,
    jitter: Annotated[float, _fault("Up to so many seconds more, at random.")] = 0.0,
    failure_rate: Annotated[float, _fault("Part of the requests answered with --failure-status, 0..1.")] = 0.0,
    failure_status: Annotated[int, _fault("The status of those.")] = 500,
    status: Annotated[int | None, _fault("Answer every request with this status.")] = None,
    rejects: Annotated[str, _fault("Answer 422 where this regular expression is found in the body.")] = "",
    retry_after: Annotated[float | None, _fault("Seconds in the Retry-After of 429 and 503.")] = None,
    hang: Annotated[bool, _fault("Read, never answer.")] = False,
    reset_rate: Annotated[float, _fault("Part of the requests met with a connection reset, 0..1.")] = 0.0,
    truncate_rate: Annotated[float, _fault("Part of the answers cut in half by a reset, 0..1.")] = 0.0,
    garbage_rate: Annotated[float, _fault("Part of the answers that are not HTTP, 0..1.")] = 0.0,
    wrong_length_rate: Annotated[float, _fault("Part of the answers that promise more than they send, 0..1.")] = 0.0,
    close_every: Annotated[int, _fault("Close a connection after every n-th answer, saying so.")] = 0,
    silent_close: Annotated[int, _fault("Close a connection after its n-th answer, not saying so.")] = 0,
    chunked: Annotated[bool, _fault("Answer with the chunked coding, in two writes.")] = False,
    interim: Annotated[bool, _fault("Send a 1xx before each answer.")] = False,
    unhealthy: Annotated[bool, _fault("GET /health answers 503.")] = False,
    health_hang: Annotated[bool, _fault("GET /health is not answered.")] = False,
    refuse: Annotated[bool, _fault("Refuse connections until told otherwise on the control port.")] = False,
    verify: Annotated[bool, _fault("Check that bodies are JSON and keep a digest of each packet.")] = False,
    keep: Annotated[bool, _fault("The same, and keep the packets themselves.")] = False,
) -> None:
    """Start mock analyzers that count what is delivered to them, and fail on request."""
    options = Options(
        latency=latency,
        jitter=jitter,
        failure_rate=failure_rate,
        failure_status=failure_status,
        status=status,
        rejects=rejects,
        retry_after=retry_after,
        hang=hang,
        reset_rate=reset_rate,
        truncate_rate=truncate_rate,
        garbage_rate=garbage_rate,
        wrong_length_rate=wrong_length_rate,
        close_every=close_every,
        silent_close=silent_close,
        chunked=chunked,
        interim=interim,
        unhealthy=unhealthy,
        health_hang=health_hang,
        refuse=refuse,
        verify=verify,
        keep=keep,
    )
    numbers = _ports(ports)
    settings = Settings(host, numbers, _ids(ids, len(numbers)), control_port, ledger, quiet, seed, _checked(options))
    raise typer.Exit(run(settings))


def _ports(text: str) -> list[int]:
    ports = text.split(",")
    if not all(port.isdecimal() and int(port) <= _LARGEST_PORT for port in ports):
        raise typer.BadParameter(f"{text!r} is no list of ports such as 3001,3002")
    return [int(port) for port in ports]


def _ids(text: str, count: int) -> list[str]:
    if not text:
        return [f"A{number}" for number in range(1, count + 1)]
    ids = text.split(",")
    if len(ids) != count or len(set(ids)) != count:
        raise typer.BadParameter(f"{text!r} has to be {count} different ids, one for each port")
    if not all(_ID.fullmatch(name) for name in ids):
        raise typer.BadParameter("an id is made of letters, digits, dots, dashes and underscores")
    return ids


def _checked(options: Options) -> Options:
    """Return the options if their values are in range, which a constructor does not look at."""
    try:
        return Options().changed(msgspec.to_builtins(options))
    except OptionsError as error:
        raise typer.BadParameter(str(error)) from None


def main() -> None:
    """Run the command line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    app(prog_name="python -m mock_analyzers")
