"""The configuration: loading it, the source of each value, and validation.

The settings are defined in ``settings``: the annotations there hold type, bounds and parser, and one generic reader
applies them. The rules:

- A value comes from a flag, else the environment, else the file, else the default. There is no search for a file.
- All problems are reported at once, each on one line that begins with its path; an unknown key is one of them.
- A ``Config`` is complete and normalised: durations are float seconds, sizes int bytes, enumerations checked. It is
  frozen: a change while running is a new ``Config``.
- Tokens never appear in a message or a ``repr``.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct

from fastdist import config_rules, credentials, tomlfile, tomllines, units
from fastdist.errors import ConfigError, Fault
from fastdist.facts import SETTINGS, facts, fields
from fastdist.settings import Config, Header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from fastdist.facts import Facts

SAFE_BATCH = 120  # with as many ids of 64 characters the head of a request is below 8 KiB
QUIET = 0.05  # seconds that a file must stay unchanged after it was read, for a reload


# Settings that a reload must not reset to their default by leaving them out, and what to do.
_KEPT = {"analyzers": "write them into the file again (to have the default ones, restart)"} | {
    path: f"write them into the file again, or {path.partition('.')[2]} = [] to have none"
    for path, about in SETTINGS.items()
    if about.secret and about.changes == "reload"
}
# Settings of the ring, and what is there instead where the queue is a stream.
_RING_ONLY = {
    "queue.capacity": "the size of the stream is jetstream.max_bytes",
    "queue.durability": "packets are as safe as jetstream.replicas and the servers' own settings make them",
    "queue.sync_interval": "when the servers sync is their own setting",
    **dict.fromkeys(
        ("dead_letters.max_bytes", "dead_letters.max_age", "dead_letters.path"),
        "the stream of dead letters is as large as jetstream.max_bytes says, and discards none",
    ),
}
_VARIABLES = {"PORT": "server.port", "WORKER_COUNT": "server.workers"} | {
    f"FASTDIST_{path.replace('.', '__').upper()}": path for path in SETTINGS if "." in path
}
_TOKEN_FILES = {f"security.{key}_file": f"security.{key}" for key in ("tokens", "admin_tokens")}
_FLAGS = {"host": "server.host", "port": "server.port", "workers": "server.workers"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, with what is needed to load it again.

    ``sources`` maps every dotted path to ``default``, ``file FILE``, ``environment NAME`` or ``flag --name``; ``path``
    is the file that was read, if any.
    """

    config: Config
    sources: dict[str, str] = field(repr=False)
    path: Path | None
    environ: Mapping[str, str] = field(repr=False)
    flags: Mapping[str, Any]

    def reload(self) -> Loaded:
        """Read the same file again under the same environment and flags; raises ConfigError as ``load`` does.

        It also raises one when analyzers or tokens are left out that are given now: their defaults would be other
        analyzers, and open to all. The file may not be complete yet, so this waits until it stays unchanged.
        """
        loaded = load(self.path, self.environ, self.flags, quiet=QUIET)
        given = [path for path in _KEPT if self.sources[path] != "default" and attrgetter(path)(self.config)]
        missing = [path for path in given if loaded.sources[path] == "default"]
        if missing:
            file = str(loaded.path or "")
            raise ConfigError(
                Fault(f"{path}: left out, and in force; {_KEPT[path]}", pointer(path), file) for path in missing
            )
        return loaded


def load(
    path: str | Path | None, environ: Mapping[str, str], flags: Mapping[str, Any], *, quiet: float = 0.0
) -> Loaded:
    """Return the configuration out of file, environment and flags (``host``, ``port``, ``workers``; None: not given).

    Without a ``path`` the file is the one FASTDIST_CONFIG names; without that no file is read. The file must not have
    changed for ``quiet`` seconds after it was read. Raises ConfigError.
    """
    named = environ.get("FASTDIST_CONFIG") if path is None else None
    file = Path(path or named or "") if path is not None or named else None
    document, text = tomlfile.read(file, " (environment FASTDIST_CONFIG)" if named else "", quiet) if file else ({}, "")
    written = {f"{name}.{key}" for name, table in document.items() if isinstance(table, dict) for key in table}
    sources = {name: f"file {file}" if name in written or name in document else "default" for name in SETTINGS}
    origins: dict[str, str] = {}  # of what is not in the file
    problems: list[str] = []
    given = ((path, flags[name], f"flag --{name}") for name, path in _FLAGS.items() if flags.get(name) is not None)
    for setting, value, origin in (*_from_environment(environ, problems), *given):
        section, key = setting.split(".")
        table = document.setdefault(section, {})
        if isinstance(table, dict):  # what is not a table is a problem of its own
            table[key] = value
            origins[setting] = origin
    config = _Reader(origins, environ, file, text, quiet).config(document, problems)
    sources |= origins
    for setting, held in _TOKEN_FILES.items():
        if name := attrgetter(setting)(config):
            sources[held] = f"file {name}" if sources[held] == "default" else f"{sources[held]}; file {name}"
    return Loaded(config, sources, file, environ, flags)


def warnings(config: Config) -> list[str]:
    """Return what is allowed but perhaps not intended, each on one line that begins with its path."""
    delivery = config.delivery
    if not batches(config):
        return []
    found = []
    if delivery.batch_packets > SAFE_BATCH:
        problem = f"with more than {SAFE_BATCH} the head of a batch may be over 8 KiB, which many servers refuse (431)"
        found.append(f"delivery.batch_packets: {problem}; all packets of such a batch are sent again one by one")
    if config.retry.max_attempts == 1:
        problem = "with 1 nothing of a refused batch is sent again one by one: all of its packets become dead letters"
        found.append(f"retry.max_attempts: {problem}")
    return found


def without_effect(loaded: Loaded) -> list[str]:
    """Return which settings were given but mean nothing beside others, as ``warnings`` does."""
    if loaded.config.queue.backend != "jetstream":
        return []
    given = [path for path in _RING_ONLY if loaded.sources[path] != "default"]
    return [f'{path}: has no effect with queue.backend = "jetstream"; {_RING_ONLY[path]}' for path in given]


def batches(config: Config) -> bool:
    """Whether any analyzer gets batches."""
    return any(analyzer.delivery(config.delivery).mode == "batch" for analyzer in config.analyzers)


def reloadable(old: Config, new: Config) -> list[str]:
    """Return the dotted paths of the settings that differ and need a restart to change; the others change at once."""
    restart = (path for path, about in SETTINGS.items() if about.changes == "restart")
    return [path for path in restart if attrgetter(path)(old) != attrgetter(path)(new)]


class _Problem(NamedTuple):
    path: str
    text: str


def pointer(path: str) -> str:
    """Return a path as a JSON pointer (RFC 6901): ``/analyzers/2/weight``."""
    names = re.findall(r'"(?:[^"\\]|\\.)*"|[^.\[\]]+', path)
    parts = [json.loads(name) if name.startswith('"') else name for name in names]
    return "".join(f"/{part.replace('~', '~0').replace('/', '~1')}" for part in parts)


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield setting, value and origin; a later one wins. An empty variable counts as not set (as in Compose files)."""
    for name, path in _VARIABLES.items():
        if not (text := environ.get(name)):
            continue
        base = SETTINGS[path].base
        if get_origin(base) is tuple:
            problems.append(f"{name}: a list cannot be set in the environment, only in the file")
        else:
            yield path, _from_text(base, text), f"environment {name}"
    unknown = (name for name in environ if re.match("FASTDIST_.*__", name) and name not in _VARIABLES)
    problems.extend(f"{tomllines.shown(name)}: unknown setting{_hint(name, _VARIABLES)}" for name in unknown)


def _from_text(base: Any, text: str) -> Any:
    """Return what a variable's text stands for; text that is no number or no ``true`` or ``false`` stays as it is."""
    if base is bool:
        return {"true": True, "false": False}.get(text, text)
    return units.number(text) if base in {int, float} else text


class _Reader:
    """Reads a document into structs and collects all problems instead of stopping at the first.

    ``file`` and ``text``: what the document was read from, if anything; ``origins``: of values that are not from there.
    ``quiet`` is for the files that it names, as ``tomlfile.read`` has it.
    """

    def __init__(
        self,
        origins: Mapping[str, str],
        environ: Mapping[str, str],
        file: Path | None = None,
        text: str = "",
        quiet: float = 0.0,
    ) -> None:
        self.origins, self.environ, self.file, self.text, self.quiet = origins, environ, file, text, quiet
        self.problems: list[_Problem] = []
        self.valid: dict[str, Any] = {}  # path -> value, of all that is valid by itself

    def config(self, document: Mapping[str, Any], others: Sequence[str] = ()) -> Config:
        """Return the configuration in a document. Raises ConfigError, with the ``others`` (of variables) at the end."""
        config = self.table(Config, document, "")
        tokens = self.tokens()
        config_rules.check(self.valid, self.report)
        if self.problems or others:
            ranks = {name: rank for rank, name in enumerate(Config.__struct_fields__)}
            self.problems.sort(key=lambda problem: ranks.get(re.split(r"[.\[]", problem.path)[0], len(ranks)))
            lines = tomllines.lines(self.text)
            raise ConfigError([*(self.fault(each, lines) for each in self.problems), *others])
        config = cast("Config", config)
        security = config.security
        both = {name: tuple(dict.fromkeys((*getattr(security, name), *more))) for name, more in tokens.items()}
        return msgspec.structs.replace(config, security=msgspec.structs.replace(security, **both))

    def tokens(self) -> dict[str, list[str]]:
        """Return the tokens in files, by the name of the setting they add to."""
        found: dict[str, list[str]] = {}
        for path, held in _TOKEN_FILES.items():
            if file := self.valid.get(path):
                try:
                    found[held.partition(".")[2]] = credentials.tokens(file, self.quiet)
                except ValueError as error:
                    self.report(path, str(error))
        return found

    def report(self, path: str, text: str) -> None:
        origin = self.origins.get(path)
        self.problems.append(_Problem(path, f"{text} ({origin})" if origin else text))

    def fault(self, problem: _Problem, lines: Mapping[str, int]) -> Fault:
        """Return a problem with its place: the line of what is at fault, or of the table that it belongs into."""
        detail, path = f"{problem.path}: {problem.text}", problem.path
        if self.file is None or path in self.origins:
            return Fault(detail, pointer(path))
        while path and path not in lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return Fault(detail, pointer(problem.path), str(self.file), lines.get(path, 0))

    def read(self, about: Facts, raw: Any, path: str) -> Any:
        """Return ``raw`` as a setting; what it returns after a problem is never used."""
        before = len(self.problems)
        value: Any = None
        if isinstance(about.base, type) and issubclass(about.base, Struct):
            value = self.table(about.base, raw, path)
        elif about.base == tuple[Header, ...]:
            value = self.headers({} if raw in ([], ()) else raw, path)
        elif get_origin(about.base) is tuple:
            value = self.items(get_args(about.base)[0], raw, path)
        else:
            try:
                value = _scalar(about, raw)
            except ValueError as error:
                self.report(path, str(error))
        if len(self.problems) == before:
            self.valid[path] = value
        return value

    def items(self, kind: Any, raw: Any, path: str) -> tuple[Any, ...]:
        if isinstance(raw, list | tuple):
            about = facts(kind)
            return tuple(self.read(about, item, f"{path}[{index}]") for index, item in enumerate(raw))
        self.report(path, f"expected a list, got {_describe(raw, secret=True)}")
        return ()

    def headers(self, raw: Any, path: str) -> tuple[Header, ...]:
        if not isinstance(raw, dict):
            self.report(path, f"expected a table, got {_describe(raw, secret=True)}")
            return ()
        found: dict[str, Header] = {}
        for name, value in raw.items():
            at = f"{path}.{tomllines.shown(name)}"
            try:
                header = credentials.header(name, value, self.environ, self.quiet)
            except ValueError as error:
                self.report(at, str(error))
                continue
            if found.setdefault(name.lower(), header) is not header:
                self.report(at, "is there twice: upper and lower case make no other name")
        return tuple(found.values())

    def table(self, kind: type[Struct], raw: Any, path: str) -> Struct | None:
        known = fields(kind)
        if isinstance(raw, kind):  # a default, which is read as if it was written, so that the rules see it too
            raw = {name: value for name in known if (value := getattr(raw, name)) is not None}
        if not isinstance(raw, dict):
            self.report(path, f"expected a table, got {_describe(raw, secret=True)}")
            return None
        before, values, prefix = len(self.problems), {}, f"{path}." if path else ""
        for name, about in known.items():
            if name in raw:
                values[name] = self.read(about, raw[name], prefix + name)
            elif about.default is NODEFAULT:
                self.report(prefix + name, "missing")
            elif about.default is not None:
                values[name] = self.read(about, about.default, prefix + name)
        for key in [key for key in raw if key not in known]:
            what = "key" if path else "section"
            self.report(prefix + tomllines.shown(key), f"unknown {what}{_hint(key.lower(), known)}")
        return kind(**values) if len(self.problems) == before else None


def _scalar(about: Facts, raw: Any) -> Any:
    """Return ``raw`` as the number, text or word of a list that it has to be; raises ValueError."""
    base, shown = about.base, _describe(raw, secret=about.secret)
    if get_origin(base) is Literal:
        if raw not in get_args(base):
            raise ValueError(f"must be one of {', '.join(get_args(base))}; got {shown.removeprefix('string ')}")
        return raw
    expected, types = _TYPES[base]
    if (base is str or not about.parse) and (not isinstance(raw, types) or isinstance(raw, bool) != (base is bool)):
        raise ValueError(f"expected {expected}, got {shown}")
    if base is str and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", raw):  # surrogates stand for invalid bytes
        raise ValueError("must have no control characters, and be valid UTF-8")
    value = about.parse(raw) if about.parse else raw
    if about.check:
        about.check(raw)
    if about.pattern and not re.search(about.pattern, raw):
        raise ValueError(about.refusal)
    if base is float and not about.parse and not abs(value) <= sys.float_info.max:
        raise ValueError("must be finite")
    if about.ge is not None and value < about.ge:
        raise ValueError(f"must be >= {about.show(about.ge)}")
    if about.le is not None and about.le < value < math.inf:  # the one infinity here is "never"
        raise ValueError(f"must be <= {about.show(about.le)}{about.why}")
    return base(value)


_TYPES: dict[Any, Any] = {
    int: ("an integer", int),
    float: ("a number", int | float),
    str: ("a string", str),
    bool: ("true or false", bool),
}
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "a list", dict: "a table"}


def _describe(raw: Any, *, secret: bool = False) -> str:
    """Return how a problem describes a value: its type, and for short ones also the value."""
    kind = _KINDS.get(type(raw), f"a {type(raw).__name__}")
    if secret or not isinstance(raw, int | float | str) or (isinstance(raw, int) and abs(raw) > sys.maxsize):
        return kind
    return f"{kind} {json.dumps(raw[:60] if isinstance(raw, str) else raw, ensure_ascii=not str(raw).isprintable())}"


def _hint(key: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(key[:60], names, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
