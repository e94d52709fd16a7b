"""The commands that change a running distributor over HTTP: ``reload`` and ``analyzers``."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Annotated

import typer

from fastdist.cli.options import (
    DEFAULT_URL,
    INCOMPLETE,
    REFUSED,
    CaFile,
    Json,
    Token,
    fail,
    target_or_exit,
    token_or_environment,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.client.admin import Admin

analyzers = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Url = Annotated[str, typer.Option(help="The distributor to change.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The analyzer's id, as in the configuration.")]


@contextlib.contextmanager
def _asked(url: str, token: str | None, ca_file: str | None) -> Iterator[Admin]:
    """Yield what asks the distributor; if that does not do what it is asked, print why and exit."""
    from fastdist.client import admin

    target = target_or_exit(url, token_or_environment(token), ca_file)
    try:
        yield admin.Admin(target)
    except admin.NotDoneError as error:
        for line in (f"{target.url}: {error.lines[0]}", *error.lines[1:]):
            typer.echo(f"fastdist: {line}", err=True)
        raise typer.Exit(REFUSED if error.permanent else INCOMPLETE) from None


def reload(*, url: Url = DEFAULT_URL, token: Token = None, ca_file: CaFile = None) -> None:
    """Have a running distributor read its configuration again.

    What can change while it runs is in force when this returns, and is printed: before and after. So is what needs a
    restart, and what has no effect because it was set while the distributor ran. A file with a fault changes nothing:
    every problem is printed, as by `check`.

    \b
    Exit status: 0 when it is in force; 1 when there is no answer; 2 when an option cannot be used; 4 when the
    configuration or the token was refused.

    \b
    Examples:
      fastdist reload
      FASTDIST_TOKEN=secret fastdist reload --url https://logs.example:3000
    """
    with _asked(url, token, ca_file) as admin:
        reloaded = admin.reload()
    typer.echo("the configuration was read again")
    for each in reloaded.changed:
        typer.echo(f"changed: {each.setting}: {_or_nothing(each.before)} -> {_or_nothing(each.after)}")
    for name in reloaded.masked:
        typer.echo(f"masked: the weight of {name} in the file; `fastdist analyzers reset {name}` puts it in force")
    for path in reloaded.needs_restart:
        typer.echo(f"needs a restart: {path}")


def _or_nothing(value: str | None) -> str:
    return "nothing" if value is None else value


@analyzers.callback()
def analyzers_group() -> None:
    """List and change the analyzers of a running distributor.

    Changes are kept over restarts, until they are reset.

    \b
    Examples:
      fastdist analyzers list
      fastdist analyzers drain A2
      fastdist analyzers reset A2
    """


@analyzers.command("list")
def analyzers_list(*, url: Url = DEFAULT_URL, token: Token = None, ca_file: CaFile = None, json: Json = False) -> None:
    """List the analyzers: state, weight, shares, and what went wrong last.

    A weight that was set while the distributor ran is marked with a star.

    \b
    Examples:
      fastdist analyzers list
      fastdist analyzers list --json | jq -r '.analyzers[] | select(.state != "online") | .id'
    """
    from fastdist.client import output

    with _asked(url, token, ca_file) as admin:
        found = admin.analyzers()
    (output.print_analyzers_json if json else output.print_analyzers)(found)


@analyzers.command()
def drain(name: Id, *, url: Url = DEFAULT_URL, token: Token = None, ca_file: CaFile = None) -> None:
    """Give an analyzer no new packets; what it has is finished, and its share goes to the others.

    \b
    Example:
      fastdist analyzers drain A2
    """
    _change(name, url, token, ca_file, state="draining")


@analyzers.command()
def online(name: Id, *, url: Url = DEFAULT_URL, token: Token = None, ca_file: CaFile = None) -> None:
    """End draining, or a pause that the analyzer has asked for. It does not overrule health checks.

    \b
    Example:
      fastdist analyzers online A2
    """
    _change(name, url, token, ca_file, state="online")


@analyzers.command()
def weight(
    name: Id,
    value: Annotated[float, typer.Argument(metavar="WEIGHT", help="Its new weight, relative to those of the others.")],
    *,
    url: Url = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
) -> None:
    """Set the weight of an analyzer; 0 makes it a reserve.

    \b
    Examples:
      fastdist analyzers weight A2 0.5
      fastdist analyzers weight A2 0
    """
    if not (value >= 0 and math.isfinite(value)):
        fail("WEIGHT: must be a finite number >= 0")
    _change(name, url, token, ca_file, weight=value)


@analyzers.command()
def reset(name: Id, *, url: Url = DEFAULT_URL, token: Token = None, ca_file: CaFile = None) -> None:
    """Undo what was changed of an analyzer: weight and state are those of the configuration again.

    \b
    Example:
      fastdist analyzers reset A2
    """
    _change(name, url, token, ca_file)


def _change(name: str, url: str, token: str | None, ca_file: str | None, **changes: float | str) -> None:
    """Change an analyzer, without changes undo those that were made, and print what it is then."""
    from fastdist.client import output

    with _asked(url, token, ca_file) as admin:
        changed = admin.change(name, **changes) if changes else admin.reset(name)
    output.print_analyzers([changed])
