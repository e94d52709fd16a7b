"""What the commands have in common: exit statuses, options that several have, and how they fail."""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fastdist.config import Loaded, load
from fastdist.errors import ConfigError
from fastdist.facts import SETTINGS
from fastdist.units import number, parse_duration, parse_endpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastdist.client.connection import Target
    from fastdist.errors import Fault
    from fastdist.settings import Config

INCOMPLETE = 1
UNUSABLE = 2
CANNOT_START = 3
IN_USE = 3
REFUSED = 4
SIGNALLED = 128  # and the signal's number

DEFAULT_URL = "http://127.0.0.1:3000"

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Token = Annotated[
    str | None,
    typer.Option(help="Bearer token (else that in FASTDIST_TOKEN, which other users of the machine cannot see)."),
]
CaFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Certificates (PEM) to trust for https instead of the system's."),
]


def setting_option(path: str) -> Any:
    """Return the option that stands for a setting."""
    about = SETTINGS[path]
    return typer.Option(help=f"{about.summary}  [{about.default}]")


def fail(text: str, status: int = UNUSABLE) -> NoReturn:
    """Say what is wrong and exit."""
    typer.echo(f"fastdist: {text}", err=True)
    raise typer.Exit(status)


@contextlib.contextmanager
def problems_shown(prefix: str = "") -> Iterator[None]:
    """End with a line that says what is wrong with a path or a value that was given."""
    try:
        yield
    except BrokenPipeError:  # the reader closed the pipe
        raise
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        fail(f"{prefix}{error}")


def load_or_exit(path: str | None, flags: dict[str, str | int | None]) -> Loaded:
    """Return the configuration; if it cannot be used, print every problem and exit."""
    try:
        return load(path, dict(os.environ), flags)
    except ConfigError as error:
        exit_for(error.faults)


def exit_for(problems: Iterable[Fault | str]) -> NoReturn:
    """Print problems of a configuration, and exit."""
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(UNUSABLE)


def jetstream_problems(config: Config) -> list[str]:
    """Return what is wrong with the files of [jetstream], where that is in use."""
    if config.queue.backend != "jetstream":
        return []
    from fastdist.storage.jetstream import login

    return login.problems(config.jetstream)


def token_or_environment(token: str | None) -> str | None:
    """Return the token to use, if any."""
    return token or os.environ.get("FASTDIST_TOKEN") or None


def target_or_exit(url: str, token: str | None, ca_file: str | None) -> Target:
    """Return the distributor to talk to; if an option cannot be used, say so and exit."""
    from fastdist.client import connection

    with problems_shown("--url: "):
        parse_endpoint(url)
    with problems_shown():
        return connection.Target.parse(url, token, ca_file)


def ago(duration: str | None, option: str) -> datetime | None:
    """Return the moment that was this long ago; if the option cannot be used, say so and exit."""
    if duration is None:
        return None
    with problems_shown(f"{option}: "):
        seconds = parse_duration(number(duration))
    try:
        return datetime.now(UTC) - timedelta(seconds=seconds)
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)
