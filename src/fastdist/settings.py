"""Every setting: its type, bounds and default, what it does, and when a new value takes effect.

This is the one place for all of that. ``make generated`` writes ``fastdist.example.toml`` and ``docs/settings.md`` from
it, the command line takes help texts from it, and ``config`` checks values by it. The annotation of a setting holds

- ``about(text)``: a summary on a line of its own, without a link, and then the details. It is Markdown,
  with links as in a page of ``docs/``. So is the docstring of a section, which stands above its settings;
- ``Meta``: bounds or a pattern, ``examples`` where the default shows nothing, and in ``extra`` other ``facts.Facts``.

Durations are float seconds, sizes int bytes. Whatever is not marked RELOAD needs a restart to change.
"""

import json
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args
from urllib.parse import unquote_to_bytes

import msgspec
from msgspec import Meta, Struct

from fastdist import units


def about(text: str) -> Meta:
    """Return the description of a setting."""
    return Meta(description=text)


# Bounds without a reason at hand keep sums and products of settings inside 64 bits (a year of nanoseconds does).
_YEAR, _GIB = 365 * 86_400, 2**30
_DURATION = {"type": "duration", "parse": units.parse_duration, "show": units.format_duration}
_SIZE = {"type": "size", "parse": units.parse_size, "show": units.format_size}
_NEVER = {"type": "duration, `never`", "parse": units.parse_duration_or_never, "show": units.format_duration}

Duration = Annotated[float, Meta(ge=0, le=_YEAR, extra=_DURATION)]
Interval = Annotated[float, Meta(ge=0.001, le=_YEAR, extra=_DURATION)]  # a duration where zero is meaningless
DurationOrNever = Annotated[float, Meta(ge=0, extra=_NEVER | {"le": _YEAR})]  # infinity, "never", is over no bound
BodySize = Annotated[int, Meta(ge=1, le=_GIB, extra=_SIZE)]
Count = Annotated[int, Meta(ge=1, le=10_000)]
Rate = Annotated[float, Meta(ge=0, le=10**9)]
Burst = Annotated[int, Meta(ge=0, le=10**9)]
Text = Annotated[str, Meta(pattern=".", extra={"range": "not empty", "refusal": "must not be empty"})]
Id = Annotated[  # a segment of a path, which "." and ".." are not: clients take those out of it
    str,
    Meta(
        pattern=r"^(?!\.\.?\Z)[A-Za-z0-9._-]{1,64}\Z",
        extra={
            "type": "text",
            "range": "1 to 64 characters of `A-Z a-z 0-9 . _ -`; not `.` or `..`",
            "refusal": 'must be 1..64 characters of A-Z a-z 0-9 . _ -, and neither "." nor ".."',
        },
    ),
]
Url = Annotated[str, Meta(extra={"type": "URL", "range": "`http://` or `https://`", "check": units.parse_endpoint})]
UrlOrPath = Annotated[
    str,
    Meta(
        extra={
            "type": "path or URL",
            "range": "begins with `/`, `http://` or `https://`",
            "check": units.check_url_or_path,
        }
    ),
]
Token = Annotated[
    str,
    Meta(
        pattern=r"^[!-~]+\Z",
        extra={
            "type": "text",
            "range": "visible ASCII, no spaces",
            "refusal": "must be visible ASCII without spaces, and not empty",
            "secret": True,
        },
    ),
]
Network = Annotated[
    str,
    Meta(
        extra={
            "type": "text",
            "range": "an address, or a network such as `10.0.0.0/8`",
            "parse": units.parse_network,
        }
    ),
]
Listen = Annotated[
    str,
    Meta(
        extra={
            "type": "address and port",
            "range": "`address:port`, `[address]:port`, or empty",
            "parse": units.parse_listen,
        }
    ),
]
Origin = Annotated[
    str,
    Meta(
        extra={
            "type": "text",
            "range": "`scheme://host[:port]`, or only `*`",
            "parse": units.parse_origin_or_any,
        }
    ),
]
PemFile = Annotated[
    str,
    Meta(extra={"type": "path", "range": "a file; both or neither", "changes": "reload; on or off: restart"}),
]
NatsUrl = Annotated[
    str,
    Meta(
        pattern=".",
        extra={"type": "URL", "range": "`nats://` or `tls://`, host and port", "check": units.parse_nats_url},
    ),
]
NatsSecret = Annotated[str, Meta(extra={"type": "text", "range": "any", "secret": True})]
File = Annotated[str, Meta(extra={"type": "path", "range": "a file, or empty"})]
Flag = Annotated[bool, Meta(extra={"type": "boolean", "range": "`true`, `false`"})]
ServerName = Annotated[
    str, Meta(extra={"type": "name", "range": "a host name, or empty", "parse": units.check_server_name})
]
Mode = Literal["single", "batch"]
Protocol = Literal["json", "otlp", "loki", "splunk", "elasticsearch"]
MIN_SECRET = 6  # bytes: the shorter parts of a header's value are found in any text
MASKED = "***"
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)  # of log agents; their places here are their numbers
RELOAD = Meta(extra={"changes": "reload"})  # of a setting, or of a whole section


class Header(Struct, frozen=True):
    """A header of requests to an analyzer; ``source``: the variable or file its value comes from, as TOML has it."""

    name: str
    value: bytes
    source: str = ""

    def __repr__(self) -> str:
        return f"Header({self.name!r}, ...)"


Headers = Annotated[
    tuple[Header, ...],
    Meta(extra={"type": "table", "range": "a name and a value each", "secret": True}),
]


class ClientTls(Struct, frozen=True):
    """What the files say that are for TLS with an analyzer, as PEM; empty where none is named."""

    authorities: bytes = b""
    certificate: bytes = b""
    key: bytes = b""

    def __repr__(self) -> str:
        return "ClientTls(...)"


class Server(Struct, frozen=True, kw_only=True):
    """The listening side: where to listen, what to take, how long to wait."""

    host: Annotated[
        Text,
        Meta(extra={"type": "address", "check": units.check_host}),
        about("""The address to listen on.
        It is one of this machine, or a name that resolves to one. `0.0.0.0` is all of IPv4, `::` all of IPv6 too,
        whatever `net.ipv6.bindv6only` says (IPv4 clients then have addresses such as `::ffff:192.0.2.1`). Set
        `127.0.0.1` where only a proxy on this machine may reach it."""),
    ] = "0.0.0.0"  # noqa: S104  (a service for other machines)
    port: Annotated[
        int,
        Meta(ge=0, le=65535),
        about("""The port to listen on; 0 is any free one.
        The log names it."""),
    ] = 3000
    workers: Annotated[
        int,
        Meta(ge=0, le=256),
        about("""Worker processes; 0 is one per core.
        Those are the cores this process may use (256 at most). Lower it where something else needs the cores, or in a
        container, where a limit on processor time is not seen; see [sizing](operations.md#sizing). The queue is divided
        among the workers."""),
    ] = 0
    max_body: Annotated[
        BodySize,
        about("""The largest body; a larger one is 413, as is a packet over half of a part of `queue.capacity`.
        It is not read if its length is known. What a part is stands at [`queue.capacity`](#queuecapacity). As low as
        your packets allow is best."""),
    ] = 10 * 2**20
    max_header: Annotated[
        int,
        Meta(ge=1024, le=2**20, extra=_SIZE),
        about("""The largest head of a request (request line and headers); a larger one is 431.
        This is exact to the byte. Raise it for emitters behind proxies that add much."""),
    ] = 16 * 1024
    header_timeout: Annotated[
        Interval,
        about("""How long a whole request head may take, from its first byte to its last; then 408.
        The same holds for a TLS handshake. Protects against clients that are slow on purpose."""),
    ] = 10.0
    body_timeout: Annotated[
        Interval,
        about("""How far a body may fall behind 1 KiB/s; then 408.
        So that is how long it may make no progress, and what comes more slowly all the time is cut off after about that
        time, however far it has got; a body that keeps up may take as long as it needs. The same holds for an emitter
        that reads its responses too slowly: then the connection is closed."""),
    ] = 30.0
    keepalive_timeout: Annotated[
        Interval,
        about("""How long a connection may be idle between requests; then it is closed.
        There is no response then. Longer than the keep-alive time of a proxy in front, so that it never writes to a
        connection that is being closed."""),
    ] = 75.0
    max_connections: Annotated[
        int,
        Meta(ge=1, le=10**6),
        about("""Connections from emitters, for each worker; one more is answered 503 and closed.
        If the limit on open files does not allow as many it is lowered, with a warning; see
        [file descriptors](operations.md#file-descriptors)."""),
    ] = 10_000
    drain_timeout: Annotated[
        Duration,
        about("""How long the queue may drain after SIGTERM.
        What is left then stays on disk (`memory`: goes to the dead letters). Until then requests on connections that
        are open are accepted, each as the last of its connection; connections that are idle are closed after a second.
        What stops the service must wait longer than that before killing it: systemd is notified, Docker and
        Kubernetes must be configured ([containers](operations.md#containers))."""),
    ] = 30.0
    validation: Annotated[
        Literal["none", "schema", "strict"],
        about("""What a packet has to be: `none` (any bytes), `schema`, or `strict` (with timestamps and levels).
        With `none` it is passed on unread, and must only not be empty (then neither `sticky` nor `by = "messages"`, and
        in batch mode emitters answer for its being JSON). `schema`: `emitterId`, and messages with a `message`, and
        known members of the right type. `strict`: each message also has a `timestamp` (RFC 3339) and a `level`. See
        [the packet](api.md#post-logs)."""),
    ] = "schema"
    protocols: Annotated[
        tuple[Protocol, ...],
        about("""Protocols of log agents that are served besides `POST /logs`; `[]` for none of them.
        `json` is `/ingest` (Fluent Bit, Vector, Fluentd, Logstash, syslog-ng, rsyslog), `otlp` is `/v1/logs`
        (OpenTelemetry), `loki` is `/loki/api/v1/push` (Alloy, promtail), `splunk` is `/services/collector` (HEC), and
        `elasticsearch` is `/_bulk` and what its clients ask for besides (Filebeat). What is not listed is 404."""),
    ] = PROTOCOLS
    trusted_proxies: Annotated[
        tuple[Network, ...],
        about("""Networks of proxies that are believed when they say who the client is; empty: none are.
        From these, `X-Forwarded-For` names the client of each request: from its end, the first address that is no
        trusted proxy's. `limits.client_rate`, the rule that changes come from this machine, and the log go by that
        client. From all others the header means nothing. List proxies only, and only such as add the address of their
        client to the header, or set it; see [behind a proxy](operations.md#behind-a-proxy)."""),
        Meta(examples=[["127.0.0.1", "10.1.2.0/24"]]),
    ] = ()
    proxy_protocol: Annotated[
        Literal["off", "on"],
        about("""Whether connections from `server.trusted_proxies` begin with a header of the PROXY protocol (1 or 2).
        With `on` they all have to, within `server.header_timeout`, also before TLS; one without it is closed, and
        logged. The client that the header names is that of the connection. Connections from elsewhere have no header,
        and one that is sent all the same is broken HTTP (400); so it is at the address of `admin.listen`."""),
    ] = "off"


class Analyzer(Struct, frozen=True, kw_only=True):
    """Where packets go: a table `[[analyzers]]` for each analyzer, any number of them.

    All of this changes on reload: an analyzer that is new gets packets, one that is gone gets no more (what waited for
    it goes to others), and one with a new endpoint starts afresh. There is room for 64, or for twice as many as there
    were at the start if that is more; beyond that a restart is needed.
    """

    id: Annotated[
        Id,
        about("""Its name in figures, requests and dead letters; unique.
        An analyzer keeps its figures and its override over a reload by its id."""),
        Meta(examples=["A1"]),
    ]
    endpoint: Annotated[
        Url,
        about("""The URL that packets are posted to.
        Names are resolved when a connection is opened. For https the system's certificates are trusted, or those of
        [`ca_file`](#analyzersca_file). A query is shown as `?...` wherever the endpoint is, as it may hold a key."""),
        Meta(examples=["http://127.0.0.1:3001/analyze"]),
    ]
    weight: Annotated[
        float,
        Meta(ge=0),
        about("""Its share, relative to the weights of the others; 0 is a reserve.
        A reserve gets packets, retries included, only while no other is online. All weights 0 is an error. To change
        one for the moment use [`PATCH /analyzers/{id}`](api.md#patch-analyzersid)."""),
        Meta(examples=[0.1]),
    ]
    health: Annotated[
        UrlOrPath,
        about("""What to GET to see whether it is healthy (any 2xx): a path on the endpoint's origin, or a URL.
        A whole URL may be of any host. A check that exercises what packets need is worth more than one that always says
        yes. It has the TLS settings and the [`headers`](#analyzersheaders) of the analyzer, with its credentials,
        whatever the host is."""),
    ] = "/health"
    headers: Annotated[
        Headers,
        about("""Headers of each request to it, health checks too, such as its credentials.
        It is a table of names and values. A value is text, which is sent byte for byte; or `{ env = "A1_TOKEN" }`, the
        value of that variable; or `{ file = "/run/credentials/a1" }`, what that file holds, without the line end behind
        it. Variables and files are read at the start and again by each reload. Values are in no log, no response and no
        output of `fastdist config`.

        Not allowed is what fastdist itself sends (`Host`, `Content-Type`, `Content-Length`, `X-Packet-Id`,
        `X-Packet-Ids`, `X-Packet-Count`, `X-Attempt`, and with checks `Accept` and `User-Agent`), and what is about the
        connection or the form of the body (`Connection`, `Transfer-Encoding`, `Upgrade`, `TE`, `Expect`,
        `Content-Encoding` and the like)."""),
        Meta(examples=['{ Authorization = { env = "A1_AUTHORIZATION" } }']),
    ] = ()
    timeout: Annotated[
        Interval | None,
        about("""How long it may make no progress while a response is awaited; else `delivery.timeout`.
        What counts as progress is said at [`delivery.timeout`](#deliverytimeout)."""),
        Meta(examples=[20.0]),
    ] = None
    connections: Annotated[
        Count | None,
        about("""Keep-alive connections to it, for each worker; else `delivery.connections`.
        When it is lowered, those beyond it are closed once their responses are there."""),
        Meta(examples=[4]),
    ] = None
    pipeline: Annotated[
        Count | None,
        about("""Requests in flight on each of its connections; else `delivery.pipeline`.
        When it changes, its connections are replaced once their responses are there."""),
        Meta(examples=[8]),
    ] = None
    mode: Annotated[
        Mode | None,
        about("""`single` (a packet a request) or `batch` (an array of packets a request); else `delivery.mode`.
        Both are described at [`delivery.mode`](#deliverymode). Size and `linger` of batches are those of `[delivery]`.
        """),
        Meta(examples=["batch"]),
    ] = None
    ca_file: Annotated[
        File,
        about("""Certificates (PEM) to trust for it over https, instead of the system's: those of a private authority.
        This and the next two files are read at the start and by each reload; workers that are replaced later use what
        was read then. A file that is renewed is used for new connections from a reload on, and those that are open are
        replaced once their responses are there. Files that cannot be used are a fault of the configuration."""),
        Meta(examples=["/etc/fastdist/analyzers-ca.pem"]),
    ] = ""
    client_cert: Annotated[
        File,
        about("""The certificate, with its chain, as PEM, that fastdist shows it; with `client_key` (both or neither).
        An analyzer that asks for a certificate and gets none ends the connection with a TLS alert, which is then its
        last error."""),
        Meta(examples=["/etc/fastdist/client.pem"]),
    ] = ""
    client_key: Annotated[
        File,
        about("The key of that certificate, as PEM, not encrypted; both or neither."),
        Meta(examples=["/etc/fastdist/client-key.pem"]),
    ] = ""
    server_name: Annotated[
        ServerName,
        about("""The name it is asked for over TLS (SNI) and that its certificate has to have; else the endpoint's host.
        For an endpoint that is an address, or that leads there through a proxy or a port of this machine. A health
        check of another host or port is made under that host's own name."""),
        Meta(examples=["analyzer.example"]),
    ] = ""
    tls: Annotated[ClientTls, Meta(extra={"internal": True})] = ClientTls()  # what the files said when they were read

    def __repr__(self) -> str:
        return f"Analyzer({self.id!r}, {self.shown_endpoint!r}, {self.weight!r}, ...)"

    @property
    def shown_endpoint(self) -> str:
        """The endpoint as it is shown: a query may hold a key."""
        return units.without_query(self.endpoint)

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

    @property
    def tls_name(self) -> str:
        """The name that the endpoint is asked for over TLS."""
        return self.server_name or self.address.host

    @property
    def health_tls_name(self) -> str:
        """The name that the health check asks for over TLS."""
        return self.tls_name if self.health_address.origin == self.address.origin else self.health_address.host

    def without_secrets(self, text: str) -> str:
        """Return text of the analyzer's with what it may have sent back masked: values of headers, and of queries.

        The text may end in the midst of one: of a response only the beginning is kept.
        """
        if not self.has_secrets:
            return text
        secrets = _secrets(self.headers, self.endpoint, self.health)
        cut = max((_overlap(text, secret) for secret in secrets), default=0)
        text, end = (text[:-cut], MASKED) if cut else (text, "")
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, MASKED)
        return text + end

    @property
    def has_secrets(self) -> bool:
        """Whether there is anything in its requests that is not to be shown."""
        return bool(self.headers) or "?" in self.endpoint or "?" in self.health

    @property
    def header_lines(self) -> bytes:
        """Its headers as they stand in a head."""
        return b"".join(b"%s: %s\r\n" % (header.name.encode("ascii"), header.value) for header in self.headers)

    def delivery(self, of_all: "Delivery") -> "Delivery":
        """Return ``of_all`` with what is set for this analyzer in the place of it."""
        own = {name: getattr(self, name) for name in ("timeout", "connections", "pipeline", "mode")}
        given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        return msgspec.structs.replace(of_all, **given) if given else of_all


@lru_cache(maxsize=256)
def _secrets(headers: tuple[Header, ...], *urls: str) -> frozenset[str]:
    """Return what is not to be shown, in the forms that an analyzer may send it back in."""
    parts = {part for header in headers for part in (header.value, *header.value.split())}
    for url in urls:
        values = [pair.rpartition("=")[2] for pair in url.partition("?")[2].split("&")]
        parts |= {form for value in values for form in (value.encode(), unquote_to_bytes(value))}
    long_enough = [part for part in parts if len(part) >= MIN_SECRET]
    plain = {part.decode(encoding, "replace") for part in long_enough for encoding in ("latin-1", "utf-8")}
    escaped = {json.dumps(each, ensure_ascii=False)[1:-1] for each in plain}
    return frozenset(plain | escaped | {each.replace("/", r"\/") for each in escaped})


def _overlap(text: str, secret: str) -> int:
    """Return how many characters of ``secret`` a text ends with, 0 for fewer than ``MIN_SECRET``."""
    lengths = range(min(len(text), len(secret)), MIN_SECRET - 1, -1)
    return next((length for length in lengths if text.endswith(secret[:length])), 0)


class Distribution(Struct, frozen=True, kw_only=True):
    """Which analyzer gets which packet."""

    strategy: Annotated[
        Literal["even", "random", "sticky"],
        about("""How an analyzer is picked: `even`, `random`, or `sticky` (by emitterId; needs validation).
        `even`: every run of packets is split by weight, not only the long run; right for nearly all. `random`:
        independent draws, where a pattern in the order of packets must not meet a pattern in ours. `sticky`: all
        packets of one `emitterId` go to one analyzer while it is online, for analyzers that keep state of an emitter;
        nothing spills then, and shares are those of emitters. `server.validation` then has to be `schema` or `strict`.
        """),
    ] = "even"
    by: Annotated[
        Literal["packets", "messages", "bytes"],
        about("""Whose shares follow the weights (`even` and `random`): those of `packets`, `messages` or `bytes`.
        `messages` or `bytes` where packets differ much in size, so that an analyzer does not get few but huge ones.
        `messages` needs `server.validation` to be `schema` or `strict`."""),
    ] = "packets"


class Queue(Struct, frozen=True, kw_only=True):
    """Where accepted packets are kept until they are delivered."""

    backend: Annotated[
        Literal["ring", "jetstream"],
        about("""Where the queue is: `ring` (files of this machine), or `jetstream` (a stream that replicas share).
        `jetstream` is for [more than one machine](cluster.md) and has its own section,
        [`[jetstream]`](#jetstream); `capacity`, `durability` and `sync_interval` have no effect then. It needs the
        extra `fastdist[jetstream]`."""),
    ] = "ring"
    durability: Annotated[
        Literal["memory", "disk", "fsync"],
        about("""What an accepted packet survives: `memory` a worker's death, `disk` kill -9, `fsync` a system crash.
        With `disk` that is kill -9 of everything; a crash of the system costs at most the last
        [`queue.sync_interval`](#queuesync_interval). With `fsync` each response waits for a sync, which all that wait
        at the time share. What each is worth is in [reliability](reliability.md#what-is-promised), what it costs in
        [performance](performance.md)."""),
    ] = "disk"
    path: Annotated[
        Text,
        Meta(extra={"type": "path"}),
        about("""The folder for queue, dead letters and overrides; the only place that is written to.
        [`dead_letters.path`](#dead_letterspath) may name another one for dead letters.
        Relative to where the service is started. On a local file system. With `memory` dead letters and overrides are
        still written there."""),
    ] = "fastdist-data"
    capacity: Annotated[
        int,
        Meta(ge=2**20, le=2**46, extra=_SIZE),
        about("""The size of the queue, allocated at the start; each worker has a part, half of which a packet may take.
        Its files are a sixteenth larger. Parts are equal, and of at least 64 KiB. With 16 workers the default leaves
        each 16 MiB, so that no packet over 8 MiB is taken, whatever [`server.max_body`](#servermax_body) says.
        How much you need is a [matter of arithmetic](operations.md#sizing)."""),
    ] = 256 * 2**20
    sync_interval: Annotated[
        Interval,
        about("""With `disk`: how often what has changed is synced, and so what a crash of the system may cost.
        Below 2 ms it is 2 ms. It is synced sooner when the queue is short of room and that would free some.
        Dead letters are synced as often, at least once a second, and only then leave the queue.
        No effect with `memory` and `fsync`."""),
    ] = 0.5


class Jetstream(Struct, frozen=True, kw_only=True):
    """The stream of NATS JetStream that is the queue where [`queue.backend`](#queuebackend) is `"jetstream"`.

    [More than one machine](cluster.md) says what that is for. Nothing of this has an effect with `"ring"`.
    """

    servers: Annotated[
        tuple[NatsUrl, ...],
        about("""The NATS servers: one that answers is enough, the others of its cluster are learnt from it.
        List all that you know, for the case that one is away at a start. With `tls://` nothing is sent before the
        connection is encrypted; with `nats://` it is encrypted where the server asks for it. Without a port it is 4222.
        How to log in is below, not in the URL."""),
    ] = ("nats://127.0.0.1:4222",)
    stream: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9_-]{1,64}\Z",
            extra={
                "type": "text",
                "range": "1 to 64 characters of `A-Z a-z 0-9 _ -`",
                "refusal": "must be 1..64 characters of A-Z a-z 0-9 _ -",
            },
        ),
        about("""The stream's name; services that share a queue have the same.
        Dead letters are in the stream of this name with `_DEAD` behind it, overrides of analyzers in the key-value
        bucket with `_STATE` behind it. Another service on the same NATS servers needs another name."""),
    ] = "FASTDIST"
    replicas: Annotated[
        int,
        Meta(extra={"type": "number", "range": "1, 3 or 5", "parse": units.check_replicas}),
        about("""How many NATS servers have a copy of each packet: 1, 3 or 5.
        With 3 any one of them may be lost, with its disk; with 1 none. A first start needs as many servers."""),
    ] = 3
    create: Annotated[
        Flag,
        about("""Whether streams that do not exist are made at the start.
        `false` where the account may not make any; they have to be as [the page](cluster.md#what-is-kept-where) says.
        """),
    ] = True
    max_bytes: Annotated[
        int,
        Meta(ge=2**20, le=2**50, extra=_SIZE),
        about("""The size of the stream, and so of the queue; when it is full packets are answered 503.
        It replaces [`queue.capacity`](#queuecapacity), and is for all replicas together. Nothing is dropped to make
        room. Each copy takes as much of its server's disk. A packet larger than all of it is answered 413."""),
    ] = 2**30
    ack_wait: Annotated[
        float,
        Meta(ge=1, le=86_400, extra=_DURATION),
        about("""After how long the packets of a replica that has died go to the others.
        A live one keeps its packets for as long as it takes. Well above ten seconds, which an election among the NATS
        servers may take, or else packets are delivered twice when one is lost."""),
    ] = 30.0
    dedup_window: Annotated[
        float,
        Meta(ge=1, le=86_400, extra=_DURATION),
        about("""How long an `Idempotency-Key` is remembered, by all replicas.
        A packet whose key was sent within this time is stored once and answered `"duplicate": true`. Longer takes
        memory of the servers for each packet. Not below
        [`jetstream.publish_timeout`](#jetstreampublish_timeout)."""),
    ] = 120.0
    publish_timeout: Annotated[
        float,
        Meta(ge=0.1, le=3600, extra=_DURATION),
        about("""How long storing a packet may take; then its emitter is answered 503.
        Within that time it is tried again, always under the same id. An election takes up to ten seconds: longer than
        that, and emitters wait instead of being refused."""),
    ] = 5.0
    claim: Annotated[
        int,
        Meta(ge=64, le=10**6),
        about("""How many packets a worker takes from the stream at most, to deliver them.
        Fewer where that is more than it delivers in about a second, but 64 at least: what one replica has taken, the
        others cannot deliver."""),
    ] = 4096
    bundle_packets: Annotated[
        int,
        Meta(ge=1, le=1000),
        about("""How many packets without an `Idempotency-Key` may share a message of the stream; 1 is one each.
        Those that wait while messages are under way are sent together, and none ever waits for others. It saves most
        of the work of all servers. A replica or a server that is killed may cause all of a message's packets to be
        delivered twice."""),
    ] = 64
    bundle_bytes: Annotated[
        BodySize,
        about("""How large a message of several packets may be.
        Well below the servers' `max_payload`. A larger packet travels alone."""),
    ] = 256 * 1024
    user: Annotated[
        str,
        Meta(extra={"type": "text", "range": "any; with `password`"}),
        about("""The user name to log in with.
        One way to log in at most: this, `token`, `credentials` or `nkey`."""),
        Meta(examples=["fastdist"]),
    ] = ""
    password: Annotated[
        NatsSecret,
        about("""The password of `user`.
        Better in the environment, as `FASTDIST_JETSTREAM__PASSWORD`, than in a file that others may read. It is shown
        nowhere."""),
        Meta(examples=["a-password"]),
    ] = ""
    token: Annotated[
        NatsSecret,
        about("""A token to log in with.
        As for the password: better as `FASTDIST_JETSTREAM__TOKEN`."""),
        Meta(examples=["a-token"]),
    ] = ""
    credentials: Annotated[
        File,
        about("A file of credentials (`.creds`: JWT and seed) to log in with, as `nsc` writes it."),
        Meta(examples=["/etc/fastdist/nats.creds"]),
    ] = ""
    nkey: Annotated[
        File,
        about("A file with the seed (`SU…`) of the NKey to log in with."),
        Meta(examples=["/etc/fastdist/nats.nk"]),
    ] = ""
    tls_ca: Annotated[
        File,
        about("Certificates (PEM) to trust as the servers' instead of the system's."),
        Meta(examples=["/etc/fastdist/nats-ca.pem"]),
    ] = ""
    tls_cert: Annotated[
        File,
        about("A certificate (PEM) to show to servers that ask for one; both or neither of the next."),
        Meta(examples=["/etc/fastdist/nats-client.pem"]),
    ] = ""
    tls_key: Annotated[
        File,
        about("The key of `tls_cert`, as PEM, not encrypted."),
        Meta(examples=["/etc/fastdist/nats-client-key.pem"]),
    ] = ""

    @property
    def subject(self) -> str:
        """The subject of the packets."""
        return f"{self.stream}.packets"

    @property
    def dead_stream(self) -> str:
        """The name of the stream of dead letters."""
        return f"{self.stream}_DEAD"

    @property
    def dead_subject(self) -> str:
        """The subject of dead letters."""
        return f"{self.stream}.dead"

    @property
    def bucket(self) -> str:
        """The name of the key-value bucket."""
        return f"{self.stream}_STATE"

    def __repr__(self) -> str:
        return f"Jetstream({self.stream!r}, {self.servers!r})"


class Delivery(Struct, frozen=True, kw_only=True):
    """How packets travel to analyzers.

    `mode`, `connections`, `pipeline` and `timeout` may be set for [single analyzers](#analyzers) too, and change on
    reload there.
    """

    mode: Annotated[
        Mode,
        about("""`single` (a packet a request) or `batch` (a JSON array of packets a request).
        `single`: as it came. `batch` saves most of the work on both sides; analyzers have to take arrays. See
        [what an analyzer receives](api.md#what-an-analyzer-receives)."""),
    ] = "single"
    batch_packets: Annotated[
        int,
        Meta(ge=1, le=1000, extra={"why": ": X-Packet-Ids has the id of each, and servers refuse long heads"}),
        about("""A batch is sent when it has this many packets: at most 1000; over 120 make long heads.
        Above 120 the head, with an id for each packet, may be over 8 KiB, which many servers refuse."""),
    ] = 64
    batch_bytes: Annotated[
        BodySize,
        about("""A batch is sent when its packets have this many bytes.
        It has one packet at least, however large."""),
    ] = 2**20
    linger: Annotated[
        Duration,
        about("""How long a batch may wait to fill while something else is in flight to the analyzer.
        When the analyzer is idle a batch does not wait. Longer makes fuller batches under middling load."""),
    ] = 0.002
    connections: Annotated[
        Count,
        about("""Keep-alive connections to each analyzer, for each worker; opened when they are needed.
        The first is opened at once; each time packets have waited 5 ms for those there are, twice as many are allowed.
        More for analyzers that answer slowly but can do much at once. An analyzer has to bear `workers x connections`.
        """),
    ] = 32
    pipeline: Annotated[
        Count,
        about("""Requests in flight on each connection.
        More than 1 pays where the way is long and the analyzer reads ahead; one slow response then holds up those
        behind it, and an analyzer that does not understand pipelining must not get it."""),
    ] = 1
    spill_after: Annotated[
        DurationOrNever,
        about("""How long a packet waits for a slow analyzer before it goes to another that has room; or `"never"`.
        Slow is one that is slower than the others; for one as quick as they are it is four times as long. `"never"`:
        the weights hold whatever it costs. `sticky` never spills."""),
    ] = 1.0
    timeout: Annotated[
        Interval,
        about("""How long an analyzer may make no progress while a response is awaited.
        That is, take no bytes of the request and send none of the response. Then the packet goes to another analyzer,
        and may have been delivered twice. Well above what analyzers take at their slowest to answer; how large the
        packets are and how slow the way is does not matter. What the analyzer's system has acknowledged counts as
        taken, and a pause of the machine does not count.

        A response that has begun is awaited for twelve times as long (a minute), whatever progress it makes. If its
        head is not there by then, that was a failure; if it is, only the connection is closed."""),
    ] = 5.0
    connect_timeout: Annotated[
        Interval,
        about("""How long a connection to an analyzer may take to be there, for each address of a name.
        With TLS, the handshake may take as long again. Where a name has several addresses, the next is tried beside
        those before it after 250 ms, or at once when one refuses. A name's look-up may take as long, too."""),
    ] = 1.0
    max_age: Annotated[
        Interval,
        about("""How old a connection to an analyzer may become, so that a change behind its address is followed.
        This holds for health checks over https too. A connection is closed between two requests, and a new one opened
        when there is something to send; each has an age of its own between half of this and all of it, so that they do
        not all end at once. What is behind an address may change (a load balancer, a service of Kubernetes), and is
        followed within that time. A name whose addresses change is followed within seconds, whatever this is: see
        [operations](operations.md#analyzers-by-name)."""),
    ] = 60.0


class Retry(Struct, frozen=True, kw_only=True):
    """What happens to a packet that no analyzer at hand could take. With another one at hand it goes there at once."""

    base: Annotated[
        Interval,
        about("""The longest first wait once every analyzer at hand has failed.
        The wait is drawn from 0 to this, and doubles each round. Not over [`retry.cap`](#retrycap)."""),
    ] = 0.1
    cap: Annotated[Interval, about("The longest wait between rounds.")] = 30.0
    max_attempts: Annotated[
        int,
        Meta(ge=0, le=10**6),
        about("""Attempts before a packet becomes a dead letter; 0 is until it is delivered.
        The reason of that dead letter is `exhausted`; each attempt counts. Set it where a packet that crashes its
        analyzer must not go round forever."""),
    ] = 0


class Health(Struct, frozen=True, kw_only=True):
    """When an analyzer counts as online."""

    interval: Annotated[
        Interval,
        about("""Time between two checks of an analyzer.
        It is up to a tenth less, so that checks spread out."""),
    ] = 2.0
    timeout: Annotated[
        Interval,
        about("""How long a check may take; then it has failed.
        Where a name has several addresses, 250 ms longer for each after the first: that is when the next is tried.
        With https a connection is kept from check to check. If nothing comes on that one, a new one has as long again.
        """),
    ] = 1.0
    rise: Annotated[
        Count,
        about("""Checks in a row that have to succeed before an analyzer that is offline comes online.
        One that deliveries took offline is then [on probation](concepts.md#health) until it takes a packet. Higher for
        one that is up and down."""),
    ] = 2
    fall: Annotated[
        Count,
        about("""Failures in a row, of checks or of deliveries, that take an analyzer offline.
        Each of the two is counted by itself. Lower reacts faster, also to a hiccup. After as many packets refused in a
        row without one that was taken, an analyzer is [in doubt](concepts.md#retries-and-dead-letters)."""),
    ] = 3
    slow_start: Annotated[
        Duration,
        about("""Over which time a recovered analyzer goes from a tenth of its weight to all of it.
        0 is at once. For analyzers that have to warm up."""),
    ] = 0.0


class DeadLetters(Struct, frozen=True, kw_only=True):
    """Where packets that were given up are kept, how many of them and for how long: by default all, until a replay.

    What is over a bound is discarded for good: whole files, the oldest first, but for those that a replay or a purge is
    going through. It is counted (`fastdist_dead_letter_packets_discarded_total`) and logged.

    None of this has an effect with `queue.backend = "jetstream"`: the stream of dead letters is as large as
    `jetstream.max_bytes` says, and discards none.
    """

    max_bytes: Annotated[
        int,
        Meta(ge=0, le=2**46, extra=_SIZE),
        RELOAD,
        about("""How large the files of dead letters may be together; 0 is without a bound.
        It holds at every moment, over all workers, but for a packet that is larger than all of this: that one is kept
        alone. With a bound files are small (an eighth of a worker's part, 4 MiB at most unless the bound is over
        16 GiB), so that little goes at a time. Without one
        dead letters can fill the file system; then packets stay in the queue, and once that is full emitters get 503.
        """),
        Meta(examples=[2**30]),
    ] = 0
    max_age: Annotated[
        Duration,
        RELOAD,
        about("""How long dead letters are kept; 0 is without a bound.
        A file is discarded when the last dead letter in it is older than this. No file is written to for longer than an
        eighth of it, so that none is kept much longer."""),
        Meta(examples=[30 * 86_400]),
    ] = 0.0
    path: Annotated[
        str,
        Meta(extra={"type": "path", "range": "a folder"}),
        about("""The folder of dead letters; empty is `dead-letters` in [`queue.path`](#queuepath).
        Relative to where the service is started. On a file system of its own dead letters cannot take space that the
        queue or something else needs. It is made if it is not there; the systemd unit has to allow it
        (`ReadWritePaths=`). What is in the old folder stays there, and is neither counted nor discarded."""),
        Meta(examples=["/var/lib/fastdist-dead-letters"]),
    ] = ""


class Limits(Struct, frozen=True, kw_only=True):
    """How many requests with packets are taken a second, over all workers; beyond that 429 with `Retry-After`.

    Those are `POST /logs` and what [log agents](agents/index.md) send, who get the status that has their protocols try
    again: 503, or 429 of Elasticsearch. Other requests are not counted. The limits hold from the next request after a
    reload.
    """

    rate: Annotated[
        Rate,
        about("""Requests a second, of all emitters together; 0 is off.
        Rejects early what the analyzers cannot take."""),
    ] = 0.0
    burst: Annotated[Burst, about("Requests that may come at once, beyond the even pace; 0 is one second's worth.")] = 0
    client_rate: Annotated[
        Rate,
        about("""Requests a second, of each client address; 0 is off.
        Behind a proxy all clients have its address, unless it is in
        [`server.trusted_proxies`](#servertrusted_proxies)."""),
    ] = 0.0
    client_burst: Annotated[Burst, about("Requests of one address that may come at once; 0 is one second's worth.")] = 0


class Security(Struct, frozen=True, kw_only=True):
    """Which clients may do what.

    Tokens are compared in constant time and appear in no log and no message;
    [SECURITY.md](../SECURITY.md#running-it-safely) says what else to do.
    """

    tokens: Annotated[
        tuple[Token, ...],
        about("""Bearer tokens that `POST /logs` asks for; empty is open to all.
        They come as `Authorization: Bearer …`. To renew one without a gap: add the new one, reload, give it to
        emitters, take the old one out, reload. To take all away from a running service, write `tokens = []` and reload;
        just to leave them out [is refused](#how-they-are-given)."""),
        Meta(examples=[["a-token"]]),
    ] = ()
    tokens_file: Annotated[
        File,
        about("""A file with more of these, one a line; read at the start and by each reload.
        Empty lines and those that begin with `#` are left out. A file without a token is a fault: it may have been
        found half-written, and `POST /logs` must not be open then."""),
        Meta(examples=["/run/credentials/tokens"]),
    ] = ""
    admin_tokens: Annotated[
        tuple[Token, ...],
        about("""Bearer tokens that changes ask for; empty is clients on this machine only.
        Changes are `PATCH`, `DELETE` and `POST /admin/reload`. Set them where a proxy runs on this machine: to
        fastdist, its clients are all here."""),
        Meta(examples=[["another-token"]]),
    ] = ()
    admin_tokens_file: Annotated[
        File,
        about("""A file with more of these, one a line; as `tokens_file`."""),
        Meta(examples=["/run/credentials/admin-tokens"]),
    ] = ""
    cors_origins: Annotated[
        tuple[Origin, ...],
        about("""Origins whose pages may send packets and read responses, exactly; or `["*"]`.
        Without one no CORS header is sent."""),
        Meta(examples=[["https://app.example"]]),
    ] = ()
    tls_cert: Annotated[
        PemFile,
        about("""The certificate, with its chain, as PEM; with `tls_key` (both or neither): HTTPS instead of HTTP.
        A renewed file is used from a reload on, without dropping a connection. Turning TLS on or off needs a restart.

        The two files are read once, at a start and at a reload, and tried together; all workers, also those that are
        replaced later, use what was read then. Where they do not fit together (the one was renewed, the other not yet)
        or the certificate has expired or is not valid yet, the reload is refused (422, with file and date) and the old
        pair stays. At a start, by `fastdist check`, and where the pair in force has expired, that is a warning."""),
        Meta(examples=["/etc/fastdist/cert.pem"]),
    ] = ""
    tls_key: Annotated[
        PemFile,
        about("The key of the certificate, as PEM, not encrypted; both or neither."),
        Meta(examples=["/etc/fastdist/key.pem"]),
    ] = ""

    def __repr__(self) -> str:
        return f"Security({len(self.tokens)} tokens, {len(self.admin_tokens)} admin tokens, {self.cors_origins!r})"


class Admin(Struct, frozen=True, kw_only=True):
    """An address of their own for views, metrics, the dashboard and changes: what is not for emitters."""

    listen: Annotated[
        Listen,
        about("""The address and port for all but packets; empty is the server's own, for all.
        With it, [`server.host`](#serverhost) serves what emitters and load balancers ask for: packets, `/health` and
        `/ready`; all else there is 404. This address serves all but packets. It has 256 connections for each worker,
        which emitters cannot take, and is served until the end of a drain. Which clients may make changes is as ever
        ([`security.admin_tokens`](#securityadmin_tokens)); the views are open to all that reach the address, so let
        it be one that only those reach that may see them.

        `fastdist top`, `reload` and `analyzers` then need `--url`, and Prometheus this address as its target."""),
        Meta(examples=["127.0.0.1:3001"]),
    ] = ""
    tls: Annotated[
        Literal["on", "off"],
        about("""Whether that address speaks HTTPS where the server does (`on`), or plain HTTP (`off`).
        The certificate is [`security.tls_cert`](#securitytls_cert); without one both addresses speak HTTP."""),
    ] = "on"


_ANALYZERS = tuple(
    Analyzer(id=f"A{number}", endpoint=f"http://127.0.0.1:{3000 + number}/analyze", weight=weight)
    for number, weight in enumerate((0.1, 0.4, 0.2, 0.3), 1)
)


class Config(Struct, frozen=True, kw_only=True):
    """Everything that can be set; ``Config()`` is the default configuration."""

    server: Server = Server()
    analyzers: Annotated[tuple[Analyzer, ...], RELOAD] = _ANALYZERS
    distribution: Distribution = Distribution()
    queue: Queue = Queue()
    jetstream: Jetstream = Jetstream()
    delivery: Delivery = Delivery()
    retry: Retry = Retry()
    health: Health = Health()
    dead_letters: DeadLetters = DeadLetters()
    limits: Annotated[Limits, RELOAD] = Limits()
    security: Annotated[Security, RELOAD] = Security()
    admin: Admin = Admin()
