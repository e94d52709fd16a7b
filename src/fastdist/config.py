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
import functools
import ipaddress
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from fastdist.errors import ConfigError
from fastdist.units import format_duration, format_size, parse_duration, parse_size

_DEFAULT_PORTS = {"http": 80, "https": 443}
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")
_HOSTNAME = re.compile(r"(?=.{1,254}$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")  # docker's names have a "_"
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # in no path, host or header; surrogates are undecodable bytes


class Endpoint(Struct, frozen=True):
    """An http(s) URL taken apart: what it takes to connect, and to write a request head.

    ``host`` is what to resolve (no brackets), ``path_and_query`` begins with a slash, ``host_header`` has brackets
    around an IPv6 address and no default port.
    """

    scheme: str
    host: str
    port: int
    path_and_query: str
    host_header: str

    @property
    def origin(self) -> str:
        """Scheme, host and port as browsers write an origin."""
        return f"{self.scheme}://{self.host_header}"


@functools.lru_cache(maxsize=1024)
def parse_endpoint(url: str) -> Endpoint:
    """Take an absolute http(s) URL apart; ValueError (which never shows the URL: it may hold a password) if it is none."""
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    if scheme not in _DEFAULT_PORTS or not rest:
        raise ValueError("must be an http:// or https:// URL")
    return _endpoint(scheme, rest)


def _endpoint(scheme: str, rest: str) -> Endpoint:
    if not _VISIBLE.fullmatch(rest):
        raise ValueError("must be visible ASCII characters only (percent-encode the others)")
    if "#" in rest:
        raise ValueError("must have no fragment (#)")
    authority, target = re.fullmatch(r"([^/?]*)(.*)", rest).groups()  # type: ignore[union-attr]  # it matches anything
    if "@" in authority:
        raise ValueError("must have no user name or password")
    if not (match := _AUTHORITY.fullmatch(authority)):
        raise ValueError("must have a host, as in http://host:port/path")
    host, default = _host(match[1]), _DEFAULT_PORTS.get(scheme, 0)
    port = int(match[2]) if match[2] else default
    if match[2] and not 1 <= port <= 65535:  # noqa: PLR2004  (the range of TCP ports)
        raise ValueError("must have a port from 1 to 65535")
    shown = f"[{host}]" if ":" in host else host
    header = shown if port == default else f"{shown}:{port}"
    return Endpoint(scheme, host, port, target if target.startswith("/") else f"/{target}", header)


def _host(text: str) -> str:
    """Return the host without brackets, in its normal form."""
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError("must have a valid IPv6 address in its brackets") from None
    if not _HOSTNAME.fullmatch(text):
        raise ValueError("must have a valid host name")
    return text.lower()


def _spill_after(value: object) -> float:
    if value == "never":
        return math.inf
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(str(error).replace("1.5m,", '1.5m, or "never",')) from None


def _identifier(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value):
        raise ValueError("must be 1..64 characters of A-Z a-z 0-9 . _ -")
    return value


def _url(value: str) -> str:
    parse_endpoint(value)
    return value


def _health(value: str) -> str:
    if "://" not in value and not value.startswith("/"):
        raise ValueError("must be a path such as /health, or an http(s) URL")
    return _url(f"http://host{value}" if value.startswith("/") else value) and value


def _cors_origin(value: str) -> str:
    """Return the origin as browsers send it (lower case, no default port): the comparison is exact."""
    scheme, mark, rest = value.lower().partition("://")
    if value == "*":
        return value
    if not mark or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or re.search(r"[/?#]", rest):
        raise ValueError('must be "*" or scheme://host[:port], with no path and no slash at its end')
    return _endpoint(scheme, rest).origin


def _token(value: str) -> str:
    if not _VISIBLE.fullmatch(value):
        raise ValueError("must be one or more visible ASCII characters, without spaces")
    return value


def _text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


# Bounds without a reason at hand keep sums and products of settings inside 64 bits (a year of nanoseconds does).
_YEAR, _GIB = 365 * 86_400, 2**30
_DURATION = {"parse": parse_duration, "show": format_duration}
_SIZE = {"parse": parse_size, "show": format_size}
Duration = Annotated[float, Meta(ge=0, le=_YEAR, extra=_DURATION)]
Interval = Annotated[float, Meta(ge=0.001, le=_YEAR, extra=_DURATION)]  # a duration where zero is meaningless
Count = Annotated[int, Meta(ge=1, le=10_000)]
Rate = Annotated[float, Meta(ge=0, le=10**9)]
Burst = Annotated[int, Meta(ge=0, le=10**9)]
Text = Annotated[str, Meta(extra={"parse": _text})]
Url = Annotated[str, Meta(extra={"parse": _url})]
Token = Annotated[str, Meta(extra={"parse": _token})]
CorsOrigin = Annotated[str, Meta(extra={"parse": _cors_origin})]


class Server(Struct, frozen=True, kw_only=True):
    """``[server]``: the listening side.

    - ``host``, ``port``: the address to listen on; port 0 is any free one
    - ``workers``: processes; 0 is one per core
    - ``max_body``, ``max_header``: bytes; a longer body is answered 413, a longer request head 431
    - ``header_timeout``: seconds for a whole request head
    - ``body_timeout``: seconds without progress on a body
    - ``keepalive_timeout``: seconds a connection may be idle between requests
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

    id: Annotated[str, Meta(extra={"parse": _identifier})]
    endpoint: Url
    weight: Annotated[float, Meta(ge=0)]
    health: Annotated[str, Meta(extra={"parse": _health})] = "/health"

    @property
    def address(self) -> Endpoint:
        """The endpoint, taken apart."""
        return parse_endpoint(self.endpoint)

    @property
    def health_url(self) -> str:
        """The absolute URL of the health check."""
        return f"{self.address.origin}{self.health}" if self.health.startswith("/") else self.health

    @property
    def health_address(self) -> Endpoint:
        """The URL of the health check, taken apart."""
        return parse_endpoint(self.health_url)


class Distribution(Struct, frozen=True, kw_only=True):
    """``[distribution]``: who gets which packet.

    - ``strategy``: ``even`` (low discrepancy), ``random`` or ``sticky`` (by emitterId)
    - ``by``: the unit whose shares follow the weights: ``packets``, ``messages`` or ``bytes``
    """

    strategy: Literal["even", "random", "sticky"] = "even"
    by: Literal["packets", "messages", "bytes"] = "packets"


class Queue(Struct, frozen=True, kw_only=True):
    """``[queue]``: where accepted packets are kept until they are delivered.

    - ``durability``: what they survive: ``memory`` a worker's death, ``disk`` kill -9 of everything, ``fsync`` also
      a crash of the operating system
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
    - ``timeout``, ``connect_timeout``: seconds for an answer, and for a connection
    """

    mode: Literal["single", "batch"] = "single"
    batch_packets: Count = 64
    batch_bytes: Annotated[int, Meta(ge=1, le=_GIB, extra=_SIZE)] = 2**20
    linger: Duration = 0.002
    connections: Count = 32
    pipeline: Count = 1
    spill_after: Annotated[float, Meta(ge=0, extra={"parse": _spill_after})] = 1.0
    timeout: Interval = 5.0
    connect_timeout: Interval = 1.0


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
    cors_origins: tuple[CorsOrigin, ...] = ()
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
_SECRET = ("security.tokens", "security.admin_tokens")
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
        """Read the same file again under the same environment and flags; raises ConfigError as ``load`` does."""
        return load(self.path, self.environ, self.flags)


def load(path: str | Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Loaded:
    """Return the configuration out of file, environment and flags (``host``, ``port``, ``workers``; None: not given).

    Without a ``path`` the file is the one FASTDIST_CONFIG names; without that there is none. Raises ConfigError.
    """
    named = environ.get("FASTDIST_CONFIG") if path is None else None
    file = Path(path or named) if path or named else None
    document = _read_file(file, " (environment FASTDIST_CONFIG)" if named else "") if file else {}
    sources = dict.fromkeys(_SETTINGS, "default") | dict.fromkeys(_paths_in(document), f"file {file}")
    problems: list[_Problem] = []
    for setting, value, origin in (*_from_environment(environ, problems), *_from_flags(flags)):
        section, key = setting.split(".")
        table = document.setdefault(section, {})
        if isinstance(table, dict):  # what is none is a problem of its own
            table[key] = value
            sources[setting] = origin
    return Loaded(_build(document, sources, problems), sources, file, environ, flags)


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


def _read_file(file: Path, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}{origin}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file}: byte {error.start + 1}: not UTF-8"]) from None
    except RecursionError:
        raise ConfigError([f"{file}: nested too deeply"]) from None
    except ValueError as error:  # TOMLDecodeError, and what tomllib lets through of int() and datetime()
        where = re.fullmatch(r"(.*) \((?:at line (\d+), column (\d+)|at (end of document))\)", str(error), re.DOTALL)
        what, line, column, _ = where.groups() if where else (str(error), None, None, None)
        place = f"line {line}, column {column}" if line else "end of document" if where else "not TOML"
        raise ConfigError([f"{file}: {place}: {what}"]) from None


def _paths_in(document: Mapping[str, Any]) -> Iterator[str]:
    for name, table in document.items():
        yield from (path for path in ([f"{name}.{key}" for key in table] if isinstance(table, dict) else [name]))


class _Problem(NamedTuple):
    path: str
    text: str


def _from_environment(environ: Mapping[str, str], problems: list[_Problem]) -> Iterator[tuple[str, Any, str]]:
    """Yield setting, value and origin; a later one wins. An empty variable counts as not set, as composers pass it."""
    for name, path in _VARIABLES.items():
        if not (text := environ.get(name)):
            continue
        if get_origin(_SETTINGS[path]) is tuple:
            problems.append(_Problem(name, "a list cannot be set in the environment, only in the file"))
        else:
            yield path, _number_in(text) if _is_number(_SETTINGS[path]) else text, f"environment {name}"
    unknown = (name for name in environ if re.match("FASTDIST_.*__", name) and name not in _VARIABLES)
    problems.extend(_Problem(name, f"unknown setting{_hint(name, _VARIABLES)}") for name in unknown)


def _from_flags(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, path in _FLAGS.items():
        if flags.get(name) is not None:
            yield path, flags[name], f"flag --{name}"


def _build(document: Mapping[str, Any], sources: Mapping[str, str], problems: list[_Problem]) -> Config:
    reader = _Reader(sources, problems)
    config = reader.table(Config, document, "")
    _check_together(reader)
    if problems:
        ranks = {name: rank for rank, name in enumerate(_SECTIONS)}
        problems.sort(key=lambda problem: ranks.get(re.split(r"[.\[]", problem.path)[0], len(ranks)))
        raise ConfigError([f"{problem.path}: {problem.text}" for problem in problems])
    return cast("Config", config)


class _Reader:
    """Reads a document into structs and notes every problem on its way instead of stopping at the first."""

    def __init__(self, sources: Mapping[str, str], problems: list[_Problem]) -> None:
        self.sources = sources
        self.problems = problems
        self.valid: dict[str, Any] = {}  # path -> value of all settings that are in order by themselves

    def report(self, path: str, text: str) -> None:
        origin = self.sources.get(path, "")
        blame = f" ({origin})" if origin.startswith(("environment", "flag")) else ""
        self.problems.append(_Problem(path, text + blame))

    def read(self, kind: Any, raw: Any, path: str) -> Any:
        """Return ``raw`` as ``kind``; what comes out after a problem is never used."""
        if get_origin(kind) is tuple:
            value: Any = self.list(get_args(kind)[0], raw, path)
        elif isinstance(kind, type) and issubclass(kind, Struct):
            return self.table(kind, raw, path)
        else:
            try:
                value = _scalar(kind, raw, secret=path.startswith(_SECRET))
            except ValueError as error:
                return self.report(path, str(error))
        self.valid[path] = value
        return value

    def list(self, kind: Any, raw: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(raw, list | tuple):
            self.report(path, f"expected a list, got {_describe(raw, secret=True)}")
            return ()
        return tuple(self.read(kind, item, f"{path}[{index}]") for index, item in enumerate(raw))

    def table(self, kind: type[Struct], raw: Any, path: str) -> Struct | None:
        if not isinstance(raw, dict):
            return self.report(path, f"expected a table, got {_describe(raw, secret=True)}")
        before, values = len(self.problems), {}
        prefix = f"{path}." if path else ""
        fields = {info.name: info for info in msgspec.structs.fields(kind)}
        for name, info in fields.items():
            if name in raw or not info.required:
                # A section that is not there is read as an empty one, so that its defaults are checked with the rest.
                absent = {} if isinstance(info.default, Struct) else info.default
                values[name] = self.read(info.type, raw.get(name, absent), prefix + name)
            else:
                self.report(prefix + name, "missing")
        for key, value in raw.items():
            if key not in fields:
                what = "section" if not path and isinstance(value, dict | list) else "key"
                self.report(prefix + _key(key), f"unknown {what}{_hint(key, fields)}")
        return kind(**values) if len(self.problems) == before else None


def _scalar(kind: Any, raw: Any, *, secret: bool) -> Any:
    """Return ``raw`` as the plain, annotated or enumerated type ``kind``; ValueError says what is wrong with it."""
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            raise ValueError(f"must be one of {', '.join(get_args(kind))}; got {_describe(raw, typed=False)}")
        return raw
    base, meta = get_args(kind) if get_origin(kind) is Annotated else (kind, Meta())
    extra = meta.extra or {}
    if base is not str:
        value = extra["parse"](raw) if extra else _integer(raw) if base is int else _float(raw)
        show = extra.get("show", str)
        if meta.ge is not None and value < meta.ge:
            raise ValueError(f"must be >= {show(meta.ge)}")
        if meta.le is not None and value > meta.le:
            raise ValueError(f"must be <= {show(meta.le)}")
        return value
    if not isinstance(raw, str):
        raise ValueError(f"expected a string, got {_describe(raw, secret=secret)}")
    if _UNFIT.search(raw):
        raise ValueError("must have no control characters, and be valid UTF-8")
    return extra["parse"](raw) if extra else raw


def _integer(raw: Any) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool):
        raise ValueError(f"expected an integer, got {_describe(raw)}")
    return raw


def _float(raw: Any) -> float:
    if not isinstance(raw, int | float) or isinstance(raw, bool):
        raise ValueError(f"expected a number, got {_describe(raw)}")
    try:
        value = float(raw)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


def _check_together(reader: _Reader) -> None:
    """Check what spans several settings, each rule only where those are in order by themselves."""
    valid, report = reader.valid, reader.report
    if "retry.base" in valid and "retry.cap" in valid and valid["retry.base"] > valid["retry.cap"]:
        report("retry.base", "must be <= retry.cap")
    if valid.get("server.validation") == "none":
        needs = 'needs server.validation = "schema" or "strict"'
        if valid.get("distribution.strategy") == "sticky":
            report("distribution.strategy", f'"sticky" {needs}: the emitterId is read there')
        if valid.get("distribution.by") == "messages":
            report("distribution.by", f'"messages" {needs}: they are counted there')
    if "*" in valid.get("security.cors_origins", ()) and len(valid["security.cors_origins"]) > 1:
        report("security.cors_origins", '"*" must be alone')
    for key, other in (("security.tls_cert", "security.tls_key"), ("security.tls_key", "security.tls_cert")):
        if valid.get(key) == "" and valid.get(other):
            report(key, f"missing, as {other} is set: TLS needs both")
    _check_analyzers(reader)


def _check_analyzers(reader: _Reader) -> None:
    listed = [(path, value) for path, value in reader.valid.items() if path.startswith("analyzers[")]
    first: dict[str, str] = {}
    for path, value in listed:
        if path.endswith(".id") and first.setdefault(value, path) != path:
            reader.report(path, f'duplicate of {first[value]}, "{value}"')
    if any(problem.path.startswith("analyzers") and not problem.path.endswith(".id") for problem in reader.problems):
        return  # the sum of the weights is not known
    total = sum(value for path, value in listed if path.endswith(".weight"))
    if not reader.valid.get("analyzers", _ANALYZERS):
        reader.report("analyzers", "at least one is needed")
    elif total == 0:
        reader.report("analyzers", "at least one weight must be > 0")
    elif total == math.inf:
        reader.report("analyzers", "the sum of the weights must be finite")
