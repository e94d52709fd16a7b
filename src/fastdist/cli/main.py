"""The command line: options in, exit status out; what the commands do lives elsewhere and is imported when needed.

Exit status: 0 done; 1 not all of it, or not sound; 2 a configuration, a command line or a path that cannot be used;
3 the service cannot start, or is running and has what was asked for (``send`` has more). An error that is expected is
printed as it is, without a traceback; an unexpected one shows no local variables (they may hold tokens).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastdist import __version__
from fastdist.cli import admin, clients
from fastdist.cli.dead_letters import dead_letters_at
from fastdist.cli.options import (
    CANNOT_START,
    DEFAULT_URL,
    IN_USE,
    INCOMPLETE,
    CaFile,
    Json,
    Token,
    ago,
    exit_for,
    fail,
    jetstream_problems,
    load_or_exit,
    problems_shown,
    setting_option,
    target_or_exit,
    token_or_environment,
)
from fastdist.errors import ConfigError, StartError

if TYPE_CHECKING:
    from fastdist.config import Loaded
    from fastdist.ipc import Pair
    from fastdist.settings import Config
    from fastdist.storage.inspect import QueueView

app = typer.Typer(
    name="fastdist",
    no_args_is_help=True,
    rich_markup_mode=None,  # examples keep their line breaks
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
dead_letters = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
queue = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

DeadLettersPath = Annotated[
    Path | None,
    typer.Argument(metavar="[PATH]", help="The queue's folder (queue.path), that of dead letters, or one file."),
]
DeadLettersConfig = Annotated[
    str | None,
    typer.Option(
        "--config", metavar="FILE", help="In place of PATH: the configuration whose queue, or stream, has them."
    ),
]
QueuePath = Annotated[Path, typer.Argument(metavar="PATH", help="The queue's folder (queue.path), or one file of it.")]
Reason = Literal["refused", "exhausted", "oversized", "shutdown"]  # why a packet is a dead letter
LineReason = Literal[Reason, "unreadable"]  # the same, and that of a line that is not one
REASONS_HELP = (
    "Only those with this reason: an analyzer refused it; retry.max_attempts is used up; too large for the queue as it "
    "is now; left in memory at the end"
)
DeadLetterReasonOption = Annotated[Reason | None, typer.Option(help=f"{REASONS_HELP}.")]
LineReasonOption = Annotated[LineReason | None, typer.Option(help=f"{REASONS_HELP}; a line that is not a dead letter.")]
FILE_HELP = "TOML file to read; else the one FASTDIST_CONFIG names; else none."
ConfigFile = Annotated[str | None, typer.Option("--config", metavar="FILE", help=FILE_HELP)]
Host = Annotated[str | None, setting_option("server.host")]
Port = Annotated[int | None, setting_option("server.port")]
Workers = Annotated[int | None, setting_option("server.workers")]


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
    Examples:
      fastdist serve --config fastdist.toml
      fastdist top
      fastdist send access.log
      fastdist --install-completion
    """


@app.command()
def serve(
    config: ConfigFile = None,
    host: Host = None,
    port: Port = None,
    workers: Workers = None,
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
    """
    loaded, pair = _read_files(load_or_exit(config, {"host": host, "port": port, "workers": workers}))
    from fastdist.supervisor import main

    try:
        status = main.serve(loaded, pair)
    except StartError as error:
        typer.echo(f"fastdist: {error}", err=True)
        status = CANNOT_START
    raise typer.Exit(status)


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="TOML file to check.")],
    *,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also resolve, connect to and check the health of each analyzer, once.")
    ] = False,
) -> None:
    """Check a configuration file and print every problem.

    What is checked is what `serve --config FILE` would use here and now: the environment, and the files that are named.
    Exit status: 0 when it can be used, with warnings of what may not be meant; 2 when it cannot; with --probe, 1 when
    an analyzer cannot be reached or does not say that it is healthy.

    \b
    Examples:
      fastdist check fastdist.toml
      fastdist check fastdist.toml --probe
    """
    from fastdist.cli import effective
    from fastdist.config import without_effect
    from fastdist.net import tls

    loaded, pair = _read_files(load_or_exit(file, {}))
    config = loaded.config
    for warning in (*effective.warnings(config), *without_effect(loaded), *tls.date_warnings(pair, config)):
        typer.echo(f"{file}: warning: {warning}", err=True)
    typer.echo(f"{file}: ok ({_describe_analyzers(config)})")
    if probe:
        raise typer.Exit(0 if _print_probes(config) else INCOMPLETE)


@app.command("config")
def show_config(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help=FILE_HELP)] = None,
    *,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not left at its default.")] = False,
    host: Host = None,
    port: Port = None,
    workers: Workers = None,
) -> None:
    """Print the configuration that `serve` would use here and now, and where each value comes from.

    It is TOML that can be read again, but for what is masked: tokens, passwords, values of headers, queries of URLs. A
    running distributor may differ in the weights and states that were set by PATCH /analyzers/{id}. Exit status: 0; 2
    when the configuration cannot be used.

    \b
    Examples:
      fastdist config
      fastdist config fastdist.toml --changed
      FASTDIST_QUEUE__DURABILITY=fsync fastdist config fastdist.toml --port 8080
    """
    from fastdist.cli import effective

    loaded = load_or_exit(file, {"host": host, "port": port, "workers": workers})
    typer.echo(effective.as_toml(loaded, changed=changed), nl=False)


app.command()(clients.send)
app.command()(clients.top)
app.command()(admin.reload)
app.add_typer(admin.analyzers, name="analyzers")
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(queue, name="queue")


@dead_letters.callback()
def dead_letters_group() -> None:
    """List, replay and purge dead letters.

    Those are packets that no analyzer would take, or that could not be delivered before the service ended. They are in
    files below the queue's folder, or with queue.backend = "jetstream" in a stream that all replicas share: any machine
    that has their configuration can name it by --config FILE.

    \b
    Examples:
      fastdist dead-letters list fastdist-data
      fastdist dead-letters list --config fastdist.toml
      fastdist dead-letters replay fastdist-data
      fastdist dead-letters purge fastdist-data --older-than 30d
    """


@dead_letters.command("list")
def dead_letters_list(
    path: DeadLettersPath = None,
    *,
    config: DeadLettersConfig = None,
    reason: LineReasonOption = None,
    since: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Only those that became dead letters this recently.")
    ] = None,
    json: Json = False,
) -> None:
    """List dead letters, the oldest files first.

    A line that is not a dead letter, such as one torn by a crash, is listed with the reason "unreadable". With --json,
    each dead letter is an object on a line of its own; the packets themselves are in the files, which are NDJSON too.

    \b
    Examples:
      fastdist dead-letters list fastdist-data
      fastdist dead-letters list fastdist-data --reason refused --since 1h
      fastdist dead-letters list fastdist-data --json | jq -r .error | sort | uniq -c
      fastdist dead-letters list --config fastdist.toml
    """
    from fastdist.client import output
    from fastdist.storage.dead_letter_format import Selection

    with problems_shown(), dead_letters_at(path, config) as store:
        selection = Selection(reason=reason, since=ago(since, "--since"))
        show = output.print_dead_letters_json if json else output.print_dead_letters
        show(store.selected(selection))


@dead_letters.command("replay")
def dead_letters_replay(
    path: DeadLettersPath = None,
    *,
    config: DeadLettersConfig = None,
    url: Annotated[str, typer.Option(help="The distributor to post those of files to.")] = DEFAULT_URL,
    token: Token = None,
    ca_file: CaFile = None,
    connections: Annotated[int, typer.Option(min=1, max=256, help="How many to post at the same time.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Post no more than this many.")] = None,
    reason: DeadLetterReasonOption = None,
) -> None:
    """Send dead letters again, under the ids they had.

    Those of files are posted to a running distributor. What it accepts is removed from the files, what it refuses
    stays. Those of a stream are published to the stream of packets, whether a distributor runs or not; --url, --token
    and --ca-file do not matter then. If this is interrupted, even killed, call it again: at worst the few packets that
    were under way are sent twice, under the same ids (of a stream: not within jetstream.dedup_window). Exit status: 0
    when none is left, 1 otherwise.

    \b
    Examples:
      fastdist dead-letters replay fastdist-data
      fastdist dead-letters replay fastdist-data --url http://logs.example:3000 --limit 10
      FASTDIST_TOKEN=secret fastdist dead-letters replay fastdist-data --connections 16
      fastdist dead-letters replay --config fastdist.toml
    """
    from fastdist.client import output, progress
    from fastdist.storage.dead_letter_format import Selection

    target = target_or_exit(url, token_or_environment(token), ca_file)
    with problems_shown(), dead_letters_at(path, config) as store, progress.ReplayView(store.peer) as view:
        summary = store.replay(Selection(reason=reason), target, view, connections, limit)
    output.print_summary(summary)
    raise typer.Exit(INCOMPLETE if summary.left or summary.stopped else 0)


@dead_letters.command("purge")
def dead_letters_purge(
    path: DeadLettersPath = None,
    *,
    config: DeadLettersConfig = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    reason: LineReasonOption = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Only those that became dead letters before that.")
    ] = None,
) -> None:
    """Delete dead letters for good.

    \b
    Examples:
      fastdist dead-letters purge fastdist-data
      fastdist dead-letters purge fastdist-data --older-than 30d --yes
      fastdist dead-letters purge fastdist-data --reason unreadable
      fastdist dead-letters purge --config fastdist.toml
    """
    from fastdist.client import output, purge
    from fastdist.storage.dead_letter_format import Selection

    if not yes and not sys.stdin.isatty():
        fail("cannot ask for confirmation (stdin is no terminal); say --yes to delete them")
    with problems_shown(), dead_letters_at(path, config) as store:
        selection = Selection(reason=reason, until=ago(older_than, "--older-than"))
        census = purge.census_of(line for _, line in store.selected(selection))
        if census.lines and not yes and not typer.confirm(f"Delete {output.census_text(census)}?", err=True):
            fail("nothing was deleted", INCOMPLETE)
        skipped: list[str] = []

        def skip(note: str) -> None:
            skipped.append(note)
            typer.echo(note, err=True)

        removed = store.purge(selection, skip)
    typer.echo(f"removed {output.lines_text(removed)}" if removed.lines else "no dead letters removed")
    raise typer.Exit(INCOMPLETE if skipped else 0)


@queue.callback()
def queue_group() -> None:
    """Verify or show a queue that is not in use.

    Nothing is changed. What a running fastdist has queued is in its GET /queue.

    \b
    Examples:
      fastdist queue verify fastdist-data
      fastdist queue show fastdist-data
    """


@queue.command()
def verify(path: QueuePath) -> None:
    """Check every record of a queue.

    Exit status: 0 sound; 1 damaged, with what is; 2 no queue there; 3 in use by a running fastdist. Damage is nothing
    to be mended by hand: the next start skips what is corrupt and delivers all that is intact.

    \b
    Examples:
      fastdist queue verify fastdist-data
      fastdist queue verify fastdist-data/ring-0.fdq
    """
    from fastdist.client import output

    view = _look_or_exit(path, 0)
    output.print_verdict(view)
    raise typer.Exit(0 if view.sound else INCOMPLETE)


@queue.command()
def show(
    path: QueuePath,
    *,
    limit: Annotated[int, typer.Option(min=0, help="Show no more packets than this, the oldest.")] = 20,
    json: Json = False,
) -> None:
    """Show the packets that wait in a queue, and how full its files are.

    Exit status: 0 shown; 1 a file cannot be read as a queue; 2 no queue there; 3 in use by a running fastdist.

    \b
    Examples:
      fastdist queue show fastdist-data
      fastdist queue show fastdist-data --limit 1000 --json | jq -r '.packets[].id'
    """
    from fastdist.client import output

    view = _look_or_exit(path, limit)
    (output.print_queue_json if json else output.print_queue)(view, datetime.now(UTC))
    raise typer.Exit(INCOMPLETE if any(report.error for report in view.files) else 0)


def _look_or_exit(path: Path, limit: int) -> QueueView:
    from fastdist.storage import inspect

    try:
        with problems_shown():
            return inspect.look(path, limit)
    except inspect.NoQueueError as error:
        fail(str(error))
    except inspect.InUseError as error:
        fail(str(error), IN_USE)


def _read_files(loaded: Loaded) -> tuple[Loaded, Pair | None]:
    """Return the configuration with what its analyzers' TLS files say, and certificate and key of its own.

    Exit if any that it names cannot be used: files are part of a configuration.
    """
    from fastdist.net.named_files import read_files

    problems = jetstream_problems(loaded.config)
    try:
        config, pair = read_files(loaded.config)
    except ConfigError as error:
        exit_for(error.problems + problems)
    if problems:
        exit_for(problems)
    return replace(loaded, config=config), pair


def _print_probes(config: Config) -> bool:
    """Probe each analyzer and print a line about it; return whether all are well."""
    from fastdist.supervisor.probe import probe

    findings = probe(config)
    for found in findings:
        typer.echo(f"{found.analyzer}: {'ok' if found.ok else 'FAILED'}: {found.text}", err=not found.ok)
    return all(found.ok for found in findings)


def _describe_analyzers(config: Config) -> str:
    """Return how many analyzers there are and what share each gets while all are online."""
    total = sum(analyzer.weight for analyzer in config.analyzers)
    shares = ", ".join(f"{analyzer.id} {analyzer.weight / total * 100:.4g} %" for analyzer in config.analyzers)
    return f"{len(config.analyzers)} analyzer{'s' if len(config.analyzers) > 1 else ''}: {shares}"
