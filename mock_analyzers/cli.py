"""The command line: flags, their checks, and nothing else. What each fault does stands in ``options.py``."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path  # noqa: TC003 - Typer resolves annotations at run time
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from msgspec.structs import fields
from typer import Option

from mock_analyzers.options import Options, OptionsError
from mock_analyzers.service import Settings, run

if TYPE_CHECKING:
    from collections.abc import Callable

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # fit for a path and for a line of the ledger file
_MAX_PORT = 65_535
_FAULTS = "Faults (of all analyzers; each can be changed later by POST /control)"


def serve(  # noqa: PLR0913 - Typer makes one flag of each parameter
    *,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    ports: Annotated[str, Option(help="One port per analyzer, separated by commas; 0 = any.")] = "3001,3002,3003,3004",
    ids: Annotated[str, Option(help="Their ids; A1,A2,... unless given.")] = "",
    control_port: Annotated[int, Option(min=0, max=_MAX_PORT, help="Port of /control for all; 0 = any.")] = 3100,
    ledger: Annotated[Path | None, Option(help="File to append 'id analyzer attempt' to.")] = None,
    quiet: Annotated[bool, Option("--quiet", help="Print nothing but errors.")] = False,
    seed: Annotated[int | None, Option(help="Makes the faults repeatable.")] = None,
    **faults: object,
) -> None:
    """Start mock analyzers that count what is delivered to them, and fail on request."""
    try:
        options = Options().changed({field.encode_name: faults[field.name] for field in fields(Options)})
    except OptionsError as error:
        raise typer.BadParameter(str(error)) from None
    numbers = _ports(ports)
    settings = Settings(host, numbers, _ids(ids, len(numbers)), control_port, ledger, quiet, seed, options)
    raise typer.Exit(run(settings))


def _ports(text: str) -> list[int]:
    ports = text.split(",")
    if not all(port.isdecimal() and int(port) <= _MAX_PORT for port in ports):
        raise typer.BadParameter(f"{text!r} is no list of ports such as 3001,3002")
    return [int(port) for port in ports]


def _ids(text: str, count: int) -> list[str]:
    if not text:
        return [f"A{number}" for number in range(1, count + 1)]
    ids = text.split(",")
    if len(ids) != count or len(set(ids)) != count:
        raise typer.BadParameter(f"{text!r} has to be {count} different ids, one for each port")
    if not all(_ID.fullmatch(name) for name in ids):
        raise typer.BadParameter("an id is made of the characters A-Z a-z 0-9 . _ -")
    return ids


def _flags_added() -> Callable[..., None]:
    """Return ``serve`` with a parameter for each of the options, instead of any."""
    parameters = [*inspect.signature(serve, eval_str=True).parameters.values()][:-1]
    kinds = get_type_hints(Options)
    for field in fields(Options):
        kind, description = kinds[field.name], get_args(field.type)[-1].description
        names = [f"--{field.name.replace('_', '-')}"] if kind is bool else []  # no flag --no-...
        flag = Annotated[kind, Option(*names, help=description, rich_help_panel=_FAULTS)]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=flag)
        )

    @functools.wraps(serve)
    def command(**values: Any) -> None:
        serve(**values)

    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def main() -> None:
    """Run the command line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(_flags_added())
    app(prog_name="python -m mock_analyzers")
