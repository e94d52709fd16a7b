"""The configuration: its settings and defaults, where each value came from, and every reason not to start with it.

The structs below are the one table of settings: their annotations hold type, bounds and parser, and one generic
reader applies them. A new setting is a new field. The rules the module keeps:

- A value comes from a flag, else the environment, else the file, else the default. No file is ever looked for.
- All problems are reported at once, each on one line that begins with its path; an unknown key is one of them.
- What is loaded is complete and normalised: durations are float seconds, sizes int bytes, enumerations checked. It is
  frozen: a change while running is a new ``Config``.
- Tokens show up in no message and no ``repr``.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from fastdist import tomlfile, units
from fastdist.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


def _url(value: str) -> str:
    units.parse_endpoint(value)
    return value


def _health(value: str) -> str:
    if not re.match("/|https?://", value, re.IGNORECASE):
        raise ValueError("must be a path such as /health, or an http:// or https:// URL")
    units.parse_endpoint(f"http://host{value}" if value.startswith("/") else value)
    return value


def _spill_after(value: object) -> float:
    try:
        return math.inf if value == "never" else units.parse_duration(value)
    except ValueError as error:
        raise ValueError(str(error).replace("1.5m,", '1.5m, or "never",')) from None


# Bounds without a reason at hand keep sums and products of settings inside 64 bits (a year of nanoseconds does).
_YEAR, _GIB = 365 * 86_400, 2**30
LEAST_PART = 2**16  # bytes of queue.capacity that a worker needs; its part is a multiple of that
_DURATION = {"parse": units.parse_duration, "show": units.format_duration}
_SIZE = {"parse": units.parse_size, "show": units.format_size}
Duration = Annotated[float, Meta(ge=0, le=_YEAR, extra=_DURATION)]
Interval = Annotated[float, Meta(ge=0.001, le=_YEAR, extra=_DURATION)]  # a duration where zero is meaningless
Count = Annotated[int, Meta(ge=1, le=10_000)]
_IDS = ": X-Packet-Ids has the id of each, and servers refuse long heads"
BatchCount = Annotated[int, Meta(ge=1, le=1000, extra={"why": _IDS})]
Rate = Annotated[float, Meta(ge=0, le=10**9)]
Burst = Annotated[int, Meta(ge=0, le=10**9)]
Text = Annotated[str, Meta(pattern=".", description="must not be empty")]
Id = Annotated[  # a segment of a path, which "." and ".." are not: clients take those out of it
    str,
    Meta(
        pattern=r"^(?!\.\.?\Z)[A-Za-z0-9._-]{1,64}\Z",
        description='must be 1..64 characters of A-Z a-z 0-9 . _ -, and neither "." nor ".."',
    ),
]
Url = Annotated[str, Meta(extra={"parse": _url})]
Token = Annotated[str, Meta(pattern=r"^[!-~]+\Z", description="must be visible ASCII without spaces, and not empty")]
Origin = Annotated[str, Meta(extra={"parse": lambda value: value if value == "*" else units.parse_origin(value)})]


class Server(Struct, frozen=True, kw_only=True):
    """``[server]``: the listening side.

    - ``host``, ``port``: the address to listen on; port 0 is any free one
    - ``workers``: processes; 0 is one per core
    - ``max_body``, ``max_header``: bytes of a body (else 413) and of a request head (else 431)
    - ``header_timeout``, ``body_timeout``, ``keepalive_timeout``: seconds for a whole request head, that a body or the
      reading of answers may be behind 1 KiB/s, between requests
    - ``max_connections``: per worker; past it a connection is answered 503 and closed
    - ``drain_timeout``: seconds that SIGTERM leaves the queue to drain
    - ``validation``: ``none`` (any bytes), ``schema`` or ``strict`` (timestamp and level required)
    """

    host: Text = "0.0.0.0"  # noqa: S104  (a service for other machines)
    port: Annotated[int, Meta(ge=0, le=65535)] = 3000
    workers: Annotated[int, Meta(ge=0, le=256)] = 0
    max_body: Annotated[int, Meta(ge=1, le=_GIB, extra=_SIZE)] = 10 * 2**20
    max_header: Annotated[int, Meta(ge=1024, le=2**20, extra=_SIZE)] = 16 * 1024
    header_timeout: Interval = 10.0
    body_timeout: Interval = 30.0
    keepalive_timeout: Interval = 75.0
    max_connections: Annotated[int, Meta(ge=1, le=10**6)] = 10_000
    drain_timeout: Duration = 30.0
    validation: Literal["none", "schema", "strict"] = "schema"


class Analyzer(Struct, frozen=True, kw_only=True):
    """``[[analyzers]]``: one of the servers that packets go to.

    - ``id``: its name in figures and admin requests, unique
    - ``endpoint``: the URL that packets are posted to
    - ``weight``: its share relative to the others'; 0 gets packets only while no other is online
    - ``health``: what to GET to see whether it is well: a path on the endpoint's origin, or a whole URL
    """

    id: Id
    endpoint: Url
    weight: Annotated[float, Meta(ge=0)]
    health: Annotated[str, Meta(extra={"parse": _health})] = "/health"

    @property
    def address(self) -> units.Endpoint:
        """The endpoint, taken apart."""
        return units.parse_endpoint(self.endpoint)

    @property
    def health_url(self) -> str:
        """The absolute URL of the health check."""
        return f"{self.address.origin}{self.health}" if self.health.startswith("/") else self.health

    @property
    def health_address(self) -> units.Endpoint:
        """The URL of the health check, taken apart."""
        return units.parse_endpoint(self.health_url)


class Distribution(Struct, frozen=True, kw_only=True):
    """``[distribution]``: who gets which packet.

    - ``strategy``: ``even`` (low discrepancy), ``random`` or ``sticky`` (by emitterId)
    - ``by``: the unit whose shares follow the weights: ``packets``, ``messages`` or ``bytes``
    """

    strategy: Literal["even", "random", "sticky"] = "even"
    by: Literal["packets", "messages", "bytes"] = "packets"


class Queue(Struct, frozen=True, kw_only=True):
    """``[queue]``: where accepted packets are kept until they are delivered.

    - ``durability``: what they survive: ``memory`` a worker's death, ``disk`` kill -9, ``fsync`` a system crash
    - ``path``: the directory that all files are written under
    - ``capacity``: bytes, over all workers
    - ``sync_interval``: seconds; what an operating-system crash may cost at most with ``disk``
    """

    durability: Literal["memory", "disk", "fsync"] = "disk"
    path: Text = "fastdist-data"
    capacity: Annotated[int, Meta(ge=2**20, le=2**46, extra=_SIZE)] = 256 * 2**20
    sync_interval: Interval = 0.5


class Delivery(Struct, frozen=True, kw_only=True):
    """``[delivery]``: how packets travel to analyzers.

    - ``mode``: ``single`` (a packet a request) or ``batch`` (a JSON array of packets a request)
    - ``batch_packets``, ``batch_bytes``: a batch is sent when it has this many of either
    - ``linger``: seconds that a batch may wait to fill while the analyzer is busy
    - ``connections``: keep-alive connections per analyzer and worker
    - ``pipeline``: requests in flight per connection
    - ``spill_after``: seconds a packet waits for its busy analyzer before another takes it; ``"never"`` is infinity
    - ``timeout``: seconds an analyzer may neither take nor send anything while a reply is awaited
    - ``connect_timeout``: seconds for a connection, to each address of a name
    - ``max_age``: seconds until a kept connection is replaced, at most
    """

    mode: Literal["single", "batch"] = "single"
    batch_packets: BatchCount = 64
    batch_bytes: Annotated[int, Meta(ge=1, le=_GIB, extra=_SIZE)] = 2**20
    linger: Duration = 0.002
    connections: Count = 32
    pipeline: Count = 1
    spill_after: Annotated[float, Meta(ge=0, le=_YEAR, extra=_DURATION | {"parse": _spill_after})] = 1.0
    timeout: Interval = 5.0
    connect_timeout: Interval = 1.0
    max_age: Interval = 60.0


class Retry(Struct, frozen=True, kw_only=True):
    """``[retry]``: exponential back-off with full jitter, for a packet that no analyzer could take.

    - ``base``, ``cap``: seconds; the first and the longest wait
    - ``max_attempts``: sendings before a packet becomes a dead letter; 0 is until delivered
    """

    base: Interval = 0.1
    cap: Interval = 30.0
    max_attempts: Annotated[int, Meta(ge=0, le=10**6)] = 0


class Health(Struct, frozen=True, kw_only=True):
    """``[health]``: when an analyzer counts as online.

    - ``interval``, ``timeout``: seconds between checks, and for one
    - ``rise``, ``fall``: successes in a row to come online, failures (checks or deliveries) in a row to go offline
    - ``slow_start``: seconds over which its weight ramps up after recovery
    """

    interval: Interval = 2.0
    timeout: Interval = 1.0
    rise: Count = 2
    fall: Count = 3
    slow_start: Duration = 0.0


class Limits(Struct, frozen=True, kw_only=True):
    """``[limits]``: POST /logs requests a second, over all workers; 0 is off.

    - ``rate``, ``burst``: for everybody together; a burst of 0 is one second's worth
    - ``client_rate``, ``client_burst``: for each client address
    """

    rate: Rate = 0.0
    burst: Burst = 0
    client_rate: Rate = 0.0
    client_burst: Burst = 0


class Security(Struct, frozen=True, kw_only=True):
    """``[security]``: who may do what.

    - ``tokens``: bearer tokens for POST /logs; empty is open
    - ``admin_tokens``: bearer tokens for changes; empty is loopback clients only
    - ``cors_origins``: exact origins, or only ``"*"``
    - ``tls_cert``, ``tls_key``: PEM files; both or neither
    """

    tokens: tuple[Token, ...] = ()
    admin_tokens: tuple[Token, ...] = ()
    cors_origins: tuple[Origin, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""

    def __repr__(self) -> str:
        return f"Security({len(self.tokens)} tokens, {len(self.admin_tokens)} admin tokens, {self.cors_origins!r})"


_ANALYZERS = tuple(
    Analyzer(id=f"A{number}", endpoint=f"http://127.0.0.1:{3000 + number}/analyze", weight=weight)
    for number, weight in enumerate((0.1, 0.4, 0.2, 0.3), 1)
)


class Config(Struct, frozen=True, kw_only=True):
    """Everything that can be set; ``Config()`` is the default configuration."""

    server: Server = Server()
    analyzers: tuple[Analyzer, ...] = _ANALYZERS
    distribution: Distribution = Distribution()
    queue: Queue = Queue()
    delivery: Delivery = Delivery()
    retry: Retry = Retry()
    health: Health = Health()
    limits: Limits = Limits()
    security: Security = Security()


# Dotted path -> annotation of every setting; the analyzers are one setting, as every list is.
_SECTIONS = {section.name: section.type for section in msgspec.structs.fields(Config)}
_SETTINGS: dict[str, Any] = {"analyzers": _SECTIONS["analyzers"]} | {
    f"{name}.{key.name}": key.type
    for name, kind in _SECTIONS.items()
    if name != "analyzers"
    for key in msgspec.structs.fields(kind)
}
_LIVE = ("analyzers", "limits.", "security.")
SAFE_BATCH = 120  # with as many ids of 64 characters the head of a request is below 8 KiB
_SECRET = ("security.tokens", "security.admin_tokens")
# What a reload does not take for left to its default, and what to do.
_KEPT = {"analyzers": "write them into the file again (to have the default ones, restart)"} | {
    path: f"write them into the file again, or {path.partition('.')[2]} = [] to have none" for path in _SECRET
}
QUIET = 0.05  # seconds that a file must stay as it was read, for a reload
_VARIABLES = {"PORT": "server.port", "WORKER_COUNT": "server.workers"} | {
    f"FASTDIST_{path.replace('.', '__').upper()}": path for path in _SETTINGS if "." in path
}
_FLAGS = {"host": "server.host", "port": "server.port", "workers": "server.workers"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, with what it takes to load it again.

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

        It raises one also where analyzers or tokens are left out that are given now: their defaults would be other
        analyzers, and open to all. The file may just be being written, so this waits for who does; it takes a moment.
        """
        loaded = load(self.path, self.environ, self.flags, quiet=QUIET)
        given = [path for path in _KEPT if self.sources[path] != "default" and attrgetter(path)(self.config)]
        missing = [path for path in given if loaded.sources[path] == "default"]
        if missing:
            raise ConfigError([f"{path}: left out, and in force; {_KEPT[path]}" for path in missing])
        return loaded


def load(
    path: str | Path | None, environ: Mapping[str, str], flags: Mapping[str, Any], *, quiet: float = 0.0
) -> Loaded:
    """Return the configuration out of file, environment and flags (``host``, ``port``, ``workers``; None: not given).

    Without a ``path`` the file is the one FASTDIST_CONFIG names; without that there is none. The file must not have
    changed for ``quiet`` seconds after it was read. Raises ConfigError.
    """
    named = environ.get("FASTDIST_CONFIG") if path is None else None
    file = Path(path or named or "") if path is not None or named else None
    document = tomlfile.read(file, " (environment FASTDIST_CONFIG)" if named else "", quiet) if file else {}
    written = {f"{name}.{key}" for name, table in document.items() if isinstance(table, dict) for key in table}
    sources = {name: f"file {file}" if name in written or name in document else "default" for name in _SETTINGS}
    problems: list[_Problem] = []
    given = ((path, flags[name], f"flag --{name}") for name, path in _FLAGS.items() if flags.get(name) is not None)
    for setting, value, origin in (*_from_environment(environ, problems), *given):
        section, key = setting.split(".")
        table = document.setdefault(section, {})
        if isinstance(table, dict):  # what is none is a problem of its own
            table[key] = value
            sources[setting] = origin
    return Loaded(_build(document, sources, problems), sources, file, environ, flags)


class Setting(NamedTuple):
    """A setting for a person to look at; ``kind`` is its annotation, ``origin`` as in ``Loaded.sources``."""

    path: str
    kind: Any
    value: Any
    origin: str
    secret: bool


def settings(loaded: Loaded) -> Iterator[Setting]:
    """Yield every setting of a configuration, in the order of the table above."""
    for name in _SECTIONS:
        for path in (path for path in _SETTINGS if path.partition(".")[0] == name):
            value, origin = attrgetter(path)(loaded.config), loaded.sources[path]
            yield Setting(path, _SETTINGS[path], value, origin, path in _SECRET)


def warnings(config: Config) -> list[str]:
    """Return what is allowed but may not be what was meant, each on one line that begins with its path."""
    delivery = config.delivery
    if delivery.mode != "batch":
        return []
    found = []
    if delivery.batch_packets > SAFE_BATCH:
        problem = f"with more than {SAFE_BATCH} the head of a batch may be over 8 KiB, which many servers refuse (431)"
        found.append(f"delivery.batch_packets: {problem}; all packets of such a batch are sent again one by one")
    if config.retry.max_attempts == 1:
        problem = "with 1 nothing of a refused batch is sent again one by one: all of its packets become dead letters"
        found.append(f"retry.max_attempts: {problem}")
    return found


def usable_cores() -> int:
    """Return how many workers there are by default."""
    return min(256, len(os.sched_getaffinity(0)))


def reloadable(old: Config, new: Config) -> list[str]:
    """Return the dotted paths of the settings that differ and need a restart to change; the others change at once."""
    restart = (path for path in _SETTINGS if not path.startswith(_LIVE))
    return [path for path in restart if attrgetter(path)(old) != attrgetter(path)(new)]


def to_wire(config: Config) -> bytes:
    """Return the configuration as JSON for another process; only ``from_wire`` reads it back whole."""
    document = msgspec.to_builtins(config)
    if config.delivery.spill_after == math.inf:  # JSON has no infinity
        document["delivery"]["spill_after"] = "never"
    return msgspec.json.encode(document)


def from_wire(data: bytes) -> Config:
    """Return what ``to_wire`` was given; raises ConfigError as ``load`` does."""
    return _build(msgspec.json.decode(data), {}, [])


class _Problem(NamedTuple):
    path: str
    text: str


def _from_environment(environ: Mapping[str, str], problems: list[_Problem]) -> Iterator[tuple[str, Any, str]]:
    """Yield setting, value and origin; a later one wins. An empty variable counts as not set: composers pass those."""
    for name, path in _VARIABLES.items():
        if not (text := environ.get(name)):
            continue
        kind = _SETTINGS[path]
        if get_origin(kind) is tuple:
            problems.append(_Problem(name, "a list cannot be set in the environment, only in the file"))
        else:
            is_text = get_origin(kind) is Literal or kind is str or get_args(kind)[:1] == (str,)
            yield path, text if is_text else _number(text), f"environment {name}"
    unknown = (name for name in environ if re.match("FASTDIST_.*__", name) and name not in _VARIABLES)
    problems.extend(_Problem(_shown(name), f"unknown setting{_hint(name, _VARIABLES)}") for name in unknown)


def _number(text: str) -> object:
    """Return the number that a variable holds; other text as it is, to be refused (or parsed) as in a file."""
    if re.fullmatch(r"\s*[+-]?[0-9]{1,300}\s*", text):
        return int(text)
    return float(text) if re.fullmatch(r"\s*[+-]?[0-9]+\.[0-9]+\s*", text) else text


def _build(document: Mapping[str, Any], sources: Mapping[str, str], others: list[_Problem]) -> Config:
    reader = _Reader(sources)
    config = reader.table(Config, document, "")
    _check_together(reader)
    _check_analyzers(reader)
    if sources:  # else it comes from a process that has checked this, and may have had other cores to use
        _check_capacity(reader)
    if problems := reader.problems + others:
        ranks = {name: rank for rank, name in enumerate(_SECTIONS)}
        problems.sort(key=lambda problem: ranks.get(re.split(r"[.\[]", problem.path)[0], len(ranks)))
        raise ConfigError([f"{problem.path}: {problem.text}" for problem in problems])
    return cast("Config", config)


class _Reader:
    """Reads a document into structs and notes every problem on its way instead of stopping at the first."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources
        self.problems: list[_Problem] = []
        self.valid: dict[str, Any] = {}  # path -> value, of all that is in order by itself

    def report(self, path: str, text: str) -> None:
        origin = self.sources.get(path, "")
        blame = f" ({origin})" if origin.startswith(("environment", "flag")) else ""
        self.problems.append(_Problem(path, text + blame))

    def read(self, kind: Any, raw: Any, path: str) -> Any:
        """Return ``raw`` as ``kind``; what it returns after a problem is never used."""
        before = len(self.problems)
        value: Any = None
        if isinstance(kind, type) and issubclass(kind, Struct):
            value = self.table(kind, raw, path)
        elif get_origin(kind) is tuple:
            value = self.items(get_args(kind)[0], raw, path)
        else:
            try:
                value = _scalar(kind, raw, _describe(raw, secret=path.startswith(_SECRET)))
            except ValueError as error:
                self.report(path, str(error))
        if len(self.problems) == before:
            self.valid[path] = value
        return value

    def items(self, kind: Any, raw: Any, path: str) -> tuple[Any, ...]:
        if isinstance(raw, list | tuple):
            return tuple(self.read(kind, item, f"{path}[{index}]") for index, item in enumerate(raw))
        self.report(path, f"expected a list, got {_describe(raw, secret=True)}")
        return ()

    def table(self, kind: type[Struct], raw: Any, path: str) -> Struct | None:
        if not isinstance(raw, dict):
            self.report(path, f"expected a table, got {_describe(raw, secret=True)}")
            return None
        before, values, prefix = len(self.problems), {}, f"{path}." if path else ""
        fields = {info.name: info for info in msgspec.structs.fields(kind)}
        for name, info in fields.items():
            if name in raw or not info.required:
                # Defaults are read as if they were written, so that the rules below see them too.
                value = raw[name] if name in raw else msgspec.to_builtins(info.default)
                values[name] = self.read(info.type, value, prefix + name)
            else:
                self.report(prefix + name, "missing")
        for key in [key for key in raw if key not in fields]:
            what = "key" if path else "section"
            self.report(prefix + _shown(key), f"unknown {what}{_hint(key.lower(), fields)}")
        return kind(**values) if len(self.problems) == before else None


def _scalar(kind: Any, raw: Any, shown: str) -> Any:
    """Return ``raw`` as the plain, annotated or enumerated type ``kind``; ValueError says what is wrong with it."""
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise ValueError(f"must be one of {', '.join(get_args(kind))}; got {shown.removeprefix('string ')}")
        return raw
    base, meta = get_args(kind) if get_origin(kind) is Annotated else (kind, Meta())
    extra = meta.extra or {}
    expected, types = _TYPES[base]
    if (base is str or "parse" not in extra) and (not isinstance(raw, types) or isinstance(raw, bool)):
        raise ValueError(f"expected {expected}, got {shown}")
    if base is str and re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", raw):  # surrogates stand for bytes out of place
        raise ValueError("must have no control characters, and be valid UTF-8")
    value = extra["parse"](raw) if "parse" in extra else raw
    if meta.pattern and not re.search(meta.pattern, raw):
        raise ValueError(meta.description)
    if base is float and "parse" not in extra and not abs(value) <= sys.float_info.max:
        raise ValueError("must be finite")
    show = extra.get("show", str)
    if meta.ge is not None and value < meta.ge:
        raise ValueError(f"must be >= {show(meta.ge)}")
    if meta.le is not None and meta.le < value < math.inf:  # the one infinity here is "never"
        raise ValueError(f"must be <= {show(meta.le)}{extra.get('why', '')}")
    return base(value)


_TYPES: dict[Any, Any] = {int: ("an integer", int), float: ("a number", int | float), str: ("a string", str)}
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "a list", dict: "a table"}


def _describe(raw: Any, *, secret: bool = False) -> str:
    """Return what a problem says about a value: its type, and for short enough ones also the value."""
    kind = _KINDS.get(type(raw), f"a {type(raw).__name__}")
    if secret or not isinstance(raw, int | float | str) or (isinstance(raw, int) and abs(raw) > sys.maxsize):
        return kind
    return f"{kind} {json.dumps(raw[:60] if isinstance(raw, str) else raw, ensure_ascii=not str(raw).isprintable())}"


def _shown(key: str) -> str:
    """Return a key as TOML has it: quoted unless it is a bare one, so that a problem stays on its line."""
    return key if re.fullmatch("[A-Za-z0-9_-]{1,60}", key) else json.dumps(key[:60])


def _hint(key: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(key[:60], names, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _check_together(reader: _Reader) -> None:
    """Check what spans several settings, each rule only where those are in order by themselves."""
    at, report = reader.valid.get, reader.report
    if at("retry.base", 0) > at("retry.cap", math.inf):
        report("retry.base", "must be <= retry.cap")
    needs = 'needs server.validation = "schema" or "strict"'
    if at("distribution.strategy") == "sticky" and at("server.validation") == "none":
        report("distribution.strategy", f'"sticky" {needs}: the emitterId is read there')
    if at("distribution.by") == "messages" and at("server.validation") == "none":
        report("distribution.by", f'"messages" {needs}: they are counted there')
    if "*" in at("security.cors_origins", ())[:-1] or "*" in at("security.cors_origins", ())[1:]:
        report("security.cors_origins", '"*" must be alone')
    for key, other in (("security.tls_cert", "security.tls_key"), ("security.tls_key", "security.tls_cert")):
        if at(key) == "" and at(other):
            report(key, f"missing: {other} is set, and TLS needs both")


def _check_capacity(reader: _Reader) -> None:
    if "queue.capacity" not in reader.valid or "server.workers" not in reader.valid:
        return
    set_to = reader.valid["server.workers"]
    workers = set_to or usable_cores()
    if reader.valid["queue.capacity"] < workers * LEAST_PART:
        least, part = units.format_size(workers * LEAST_PART), units.format_size(LEAST_PART)
        whose = "server.workers" if set_to else "one per core here"
        reader.report("queue.capacity", f"must be >= {least}: {part} for each of {workers} workers ({whose})")


def _check_analyzers(reader: _Reader) -> None:
    first: dict[str, str] = {}
    for path, value in reader.valid.items():
        if re.fullmatch(r"analyzers\[\d+\]\.id", path) and first.setdefault(value, path) != path:
            reader.report(path, f'duplicate of {first[value]}, "{value}"')
    if "analyzers" not in reader.valid:
        return  # neither their number nor the sum of their weights is known
    total = sum(analyzer.weight for analyzer in reader.valid["analyzers"])
    if not reader.valid["analyzers"]:
        reader.report("analyzers", "at least one is needed")
    elif total == 0:
        reader.report("analyzers", "at least one weight must be > 0")
    elif total == math.inf:
        reader.report("analyzers", "the sum of the weights must be finite")
