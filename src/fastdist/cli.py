"""The command line: options in, exit status out; what the commands do lives elsewhere and is imported when needed.

Exit status: 0 done; 2 a configuration or a command line that cannot be used; 3 the service cannot start. An error that
is expected is printed as it is, without a traceback; an unexpected one shows no local variables (they may hold tokens).
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fastdist import __version__
from fastdist.config import Config, Loaded, load
from fastdist.errors import ConfigError, StartError

BAD_CONFIG = 2
CANNOT_START = 3

app = typer.Typer(
    name="fastdist",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # examples keep their line breaks
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; never returns."""
    app()


def _print_version(wanted: bool) -> None:  # noqa: FBT001  (the shape of a Typer callback)
    if wanted:
        typer.echo(f"fastdist {__version__}")
        raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take packets of log messages over HTTP and split them over analyzers by weight, without losing any.

    \b
    Example:
      fastdist serve --config fastdist.toml
    """  # noqa: D301  (\b is Typer's mark for lines to be left alone)


@app.command()
def serve(
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="TOML file to read; else the one FASTDIST_CONFIG names; else none."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on  [0.0.0.0]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 is any free one  [3000]")] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; 0 is one per core  [0]")] = None,
) -> None:
    """Run the distributor until SIGTERM or SIGINT.

    A setting comes from its option here, else from the environment (PORT, WORKER_COUNT, FASTDIST_<SECTION>__<KEY>),
    else from the file, else it has its default. Without a file there are four analyzers, on ports 3001 to 3004 of
    this machine.

    \b
    Examples:
      fastdist serve
      fastdist serve --config fastdist.toml --port 8080
      FASTDIST_QUEUE__DURABILITY=fsync fastdist serve
    """  # noqa: D301  (\b is Typer's mark for lines to be left alone)
    loaded = _load_or_exit(config, {"host": host, "port": port, "workers": workers})
    from fastdist import supervisor  # noqa: PLC0415  (check and --help need neither event loop nor extension)

    try:
        status = supervisor.serve(loaded)
    except StartError as error:
        typer.echo(f"fastdist: {error}", err=True)
        status = CANNOT_START
    raise typer.Exit(status)


@app.command()
def check(file: Annotated[str, typer.Argument(metavar="FILE", help="TOML file to check.")]) -> None:
    """Check a configuration file and print every problem.

    What is checked is what `serve --config FILE` would use here and now, the environment included.

    \b
    Example:
      fastdist check fastdist.toml
    """  # noqa: D301  (\b is Typer's mark for lines to be left alone)
    loaded = _load_or_exit(file, {})
    typer.echo(f"{file}: ok ({_describe_analyzers(loaded.config)})")


def _load_or_exit(path: str | None, flags: dict[str, str | int | None]) -> Loaded:
    try:
        return load(path, dict(os.environ), flags)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(problem, err=True)
        raise typer.Exit(BAD_CONFIG) from None


def _describe_analyzers(config: Config) -> str:
    """Return how many analyzers there are and what share each gets while all are online."""
    total = sum(analyzer.weight for analyzer in config.analyzers)
    shares = ", ".join(f"{analyzer.id} {analyzer.weight / total * 100:.4g} %" for analyzer in config.analyzers)
    return f"{len(config.analyzers)} analyzer{'s' if len(config.analyzers) > 1 else ''}: {shares}"
