"""The JSON of the HTTP API's views: the server encodes these structs, ``fastdist top`` decodes them.

- The schemas in openapi.json are made from them (``scripts/generate_openapi.py``): docstrings and ``doc`` describe the
  API.
- Attributes are snake_case, members camelCase, in the order written here.
- A response has every member but those that may be UNSET. Defaults are for ``top``: a server of another version may
  lack what is not shown, and may have members, or words besides those listed, that are not known here.
- What all other requests are answered is in ``http.responses``. What packets are stands in ``fastdist.packet``.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType, field

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Number = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]


def doc(text: str) -> Meta:
    """Return what describes a member."""
    return Meta(description=text)


def words(*words: str) -> Meta:
    """Return what lists the words that a member may be."""
    return Meta(extra_json_schema={"enum": list(words)})


class Model(Struct, rename="camel"):
    """A JSON object."""


class FieldError(Model, kw_only=True):
    """A field at fault."""

    pointer: Annotated[
        str,
        Meta(
            description="JSON pointer (RFC 6901) to the field; empty for the document as a whole. A missing member is "
            "pointed at as if it were there.",
            pattern="^(/.*)?$",
        ),
    ]
    detail: Annotated[str, Meta(description="What is wrong with it.", min_length=1)]
    file: Annotated[str | UnsetType, doc("The file that it stands in, of a configuration.")] = UNSET
    line: Annotated[Positive | UnsetType, doc("The line there, or that of the table it belongs into.")] = UNSET


# ---- GET /health


class RunningWorkers(Model, kw_only=True):
    """The worker processes."""

    running: Annotated[Count, doc("How many run.")]
    configured: Annotated[Positive, doc("How many there should be.")]


class OnlineAnalyzers(Model, kw_only=True):
    """The analyzers."""

    online: Annotated[Count, doc("How many are online, and not draining.")]
    total: Annotated[Positive, doc("How many are configured.")]


class ListedProblem(Model, kw_only=True):
    """Something that is wrong; it stays in the list for as long as it lasts."""

    code: Annotated[str, doc("What kind of problem it is; the operations page says what to do about each.")]
    level: Annotated[
        str,
        words("error", "warning", "notice"),
        doc(
            "`error`: packets are refused, or none are delivered. `warning`: an operator has to look. `notice`: it is "
            "meant to be so, or passes."
        ),
    ] = "warning"
    since: Annotated[Time, doc("Since when.")]
    subject: Annotated[str, doc("What it is about: an analyzer, a worker, a file, a part of the upkeep; may be empty.")]
    detail: Annotated[str, Meta(description="What is wrong, for a person to read.", min_length=1)]


class DeadLettersInShort(Model, kw_only=True):
    """The dead letters that are there, and their file system."""

    packets: Annotated[Count, doc("How many there are.")] = 0
    bytes: Annotated[Count, doc("How large their files are.")] = 0
    file_system_used: Annotated[Share | None, doc("Which part of their file system is used; null: not known yet.")] = (
        None
    )
    warning: Annotated[
        str | UnsetType, doc("What is wrong with that: it is over 80 % full while there are dead letters.")
    ] = UNSET


Durability = Annotated[str, words("memory", "disk", "fsync", "replicated"), doc("What the queue survives.")]
SyncInterval = Annotated[
    Number,
    doc(
        "With `disk`: how often the queue is synced; so long after its 202 a packet may be lost if the system crashes."
    ),
]


class Health(Model, kw_only=True):
    """Whether all is there that should be."""

    status: Annotated[
        str,
        words("ok", "degraded", "unavailable"),
        doc(
            "`degraded`: `problems` has an error or a warning, such as an analyzer or a worker that is missing. "
            "`unavailable`: no analyzer is online."
        ),
    ]
    version: Annotated[str, doc("The version of the service.")]
    uptime_seconds: Annotated[Number, doc("Since the service started.")]
    workers: RunningWorkers
    analyzers: OnlineAnalyzers
    storage: Annotated[str, words("ok", "failing"), doc("Whether packets can be stored.")] = "ok"
    storage_error: Annotated[str | UnsetType, doc("Why they cannot, while they cannot.")] = UNSET
    durability: Durability = "disk"
    sync_interval_seconds: SyncInterval = 0.0
    failing: Annotated[
        list[str],
        doc("Parts of the upkeep that fail at present and are tried again; the log says why. Usually empty."),
    ] = []
    problems: Annotated[
        list[ListedProblem],
        doc("All that is wrong, the worst first; the dashboard, `fastdist top`, systemd and the log show the same."),
    ] = []
    dead_letters: DeadLettersInShort = field(default_factory=DeadLettersInShort)


# ---- GET /stats


class Percentiles(Model, kw_only=True):
    """Milliseconds, since the service started; null while there are no values."""

    p50: Annotated[Number | None, doc("50 % took no longer.")] = None
    p90: Annotated[Number | None, doc("90 % took no longer.")] = None
    p99: Annotated[Number | None, doc("99 % took no longer.")] = None
    p999: Annotated[Number | None, doc("99.9 % took no longer.")] = None
    max: Annotated[Number | None, doc("The longest.")] = None


class Packets(Model, kw_only=True):
    """Packets."""

    received: Annotated[Count, doc("Accepted, rejected, or duplicates.")] = 0
    accepted: Annotated[Count, doc("Answered 202 or 200.")] = 0
    rejected: Annotated[Count, doc("Refused; `rejected` has the reasons.")] = 0
    delivered: Annotated[Count, doc("Taken by an analyzer.")] = 0
    queued: Annotated[
        Count,
        doc(
            "That wait. With `queue.backend` `jetstream`: in the whole stream, so the same at every replica, and an "
            "estimate where messages of the stream hold several packets."
        ),
    ] = 0
    in_flight: Annotated[
        Count, doc("Sent, and not answered yet. With `queue.backend` `jetstream`: claimed by this service.")
    ] = 0
    retried: Annotated[Count, doc("Attempts that were not a packet's first.")] = 0
    spilled: Annotated[Count, doc("Given to another analyzer because the one picked was busy for too long.")] = 0
    dead_lettered: Annotated[Count, doc("Given up, and written to the dead letters.")] = 0
    recovered: Annotated[
        Count,
        doc("Found in the queue when the service started, or delivered by a worker that was killed and sent again."),
    ] = 0
    corrupt: Annotated[Count, doc("Records of the queue that were damaged.")] = 0
    lost: Annotated[
        Count, doc("Packets that were accepted or recovered, and then damaged in the queue while they waited.")
    ] = 0
    duplicates: Annotated[
        Count | UnsetType,
        doc("Known by their Idempotency-Key, and so not stored again. Only with `queue.backend` `jetstream`."),
    ] = UNSET


class InAndOut(Model, kw_only=True):
    """What was in accepted and in delivered packets."""

    accepted: Annotated[Count, doc("Accepted.")] = 0
    delivered: Annotated[Count, doc("Delivered.")] = 0


class Rejected(Model, kw_only=True):
    """Requests that brought no packet, by reason."""

    malformed: Annotated[Count, doc("Broken HTTP, no JSON, an empty body.")] = 0
    invalid: Annotated[
        Count, doc("JSON that is no packet, a bad Idempotency-Key, an expectation that cannot be met.")
    ] = 0
    too_large: Annotated[
        Count, doc("A body over `server.max_body`, a packet over half of a worker's part of the queue.")
    ] = 0
    head_too_large: Annotated[Count, doc("A request head over `server.max_header`.")] = 0
    unsupported_media_type: Annotated[Count, doc("Not JSON, or in a coding that is not taken.")] = 0
    unauthorized: Annotated[Count, doc("No token, or a wrong one.")] = 0
    rate_limited: Annotated[Count, doc("Over one of the `limits`.")] = 0
    queue_full: Annotated[Count, doc("No room in the queue, or for more in-progress bodies.")] = 0
    draining: Annotated[Count, doc("While the service is shutting down.")] = 0
    storage: Annotated[Count, doc("The queue's storage failed.")] = 0
    timeout: Annotated[Count, doc("A request that did not arrive in time.")] = 0
    unconfirmed: Annotated[
        Count | UnsetType, doc("Sent to the stream, and not acknowledged in time: they may be delivered.")
    ] = UNSET


class ProtocolCounts(Model, kw_only=True):
    """What has come in one of the log agents' protocols."""

    requests: Annotated[Count, doc("Requests with records, accepted or refused.")] = 0
    records: Annotated[Count, doc("Records that were accepted: a message each.")] = 0
    refused: Annotated[Count, doc("Requests that were answered with an error.")] = 0


class Rates(Model, kw_only=True):
    """Packets a second, over the last 10 s."""

    accepted_per_second: Annotated[Number, doc("Accepted.")]
    delivered_per_second: Annotated[Number, doc("Delivered.")]


class Latencies(Model, kw_only=True):
    """How long things took."""

    ingest: Annotated[
        Percentiles,
        doc(
            "From the end of a request's reading until its packet is safe (with `fsync`: synced) and its "
            "response written."
        ),
    ]
    queue_wait: Annotated[Percentiles, doc("From a packet's being put into the queue to its first attempt.")]
    delivery: Annotated[Percentiles, doc("From an attempt to the analyzer's response, for delivered packets.")]


class AnalyzerInShort(Model, kw_only=True):
    """An analyzer's shares and counts."""

    id: Annotated[str, Meta(description="Its name.", min_length=1)]
    state: Annotated[str, words("online", "offline", "draining"), doc("`draining` takes precedence over the others.")]
    target_share: Annotated[Share, doc("What its weight makes of the whole.")]
    actual_share: Annotated[Share, doc("What it has had of all that was delivered, by `distribution.by`.")]
    delivered: Annotated[Count, doc("Packets it has taken.")]
    failed: Annotated[Count, doc("Attempts that failed, by packets.")]
    retried: Annotated[Count, doc("Attempts that were not a packet's first.")]
    in_flight: Annotated[Count, doc("Packets it has been sent and not answered yet.")]


class Worker(Model, kw_only=True):
    """A worker process."""

    id: Annotated[Count, doc("Its number.")]
    pid: Annotated[Positive | None, doc("Its process; null while it does not run.")]
    state: Annotated[str, words("starting", "running", "draining", "stopped"), doc("What it does.")]
    restarts: Annotated[Count, doc("How often it was replaced.")]
    cpu_percent: Annotated[Number, doc("Of one core, over the last second.")]
    rss_bytes: Annotated[Count, doc("Resident memory.")]
    accepted: Annotated[Count, doc("Packets it has accepted.")]
    delivered: Annotated[Count, doc("Packets it has delivered.")]
    loop_lag_ms: Annotated[
        Percentiles, doc("How long its event loop was busy with one thing: the longest time in each 20 ms.")
    ] = field(default_factory=Percentiles)
    last_error: Annotated[str | None, doc("How the process before this one ended, unasked; null if none did.")] = None
    last_error_at: Annotated[Time | None, doc("When it did.")] = None


class Supervisor(Model, kw_only=True):
    """The process that keeps the workers running."""

    pid: Annotated[Count, doc("Its process.")] = 0


class Replicas(Model, kw_only=True):
    """Copies of the stream."""

    current: Annotated[Count, doc("Those that have all of it.")] = 0
    total: Annotated[Count, doc("As many as there should be.")] = 0


class Stream(Model, kw_only=True):
    """The stream that replicas of the service share as their queue: figures over all of them, a second old at most."""

    name: Annotated[str, doc("What it is called.")] = ""
    connected: Annotated[bool, doc("Whether this service is connected to a server.")] = False
    stored: Annotated[Count, doc("Messages that were ever stored: the last sequence.")] = 0
    queued: Annotated[Count, doc("Messages that wait, claimed by no replica.")] = 0
    in_flight: Annotated[Count, doc("Messages that are claimed, and not acknowledged yet.")] = 0
    bytes: Annotated[Count, doc("Used.")] = 0
    capacity_bytes: Annotated[Count, doc("What it may hold: `jetstream.max_bytes`.")] = 0
    dead_letters: Annotated[Count, doc("In the stream of dead letters.")] = 0
    server: Annotated[str | None, doc("The server that this service is, or was last, connected to.")] = None
    leader: Annotated[str | None, doc("The server that leads the stream; null: none does, or there is only one.")] = (
        None
    )
    replicas: Replicas = field(default_factory=Replicas)


class ConfigurationState(Model, kw_only=True):
    """The state of the configuration."""

    file: Annotated[str | None, doc("The file it was read from; null without one.")] = None
    last_reload_at: Annotated[Time | None, doc("When a reload was last tried; null if none was.")] = None
    last_reload_successful: Annotated[bool, doc("Whether that one, or the start, has succeeded.")] = True
    last_success_at: Annotated[Time | None, doc("When what is in force was read.")] = None
    errors: Annotated[list[FieldError], doc("What was wrong with the last reload; of very many, the first.")] = []
    needs_restart: Annotated[
        list[str], doc("Settings in the file that differ from those in force, and change with a restart only.")
    ] = []
    masked: Annotated[
        list[str], doc("Analyzers whose weight in the file has no effect, since another was set while the service ran.")
    ] = []


class DeadLetterCount(Model, kw_only=True):
    """Dead letters with one reason, last sent to one analyzer."""

    reason: Annotated[
        str,
        doc(
            "`refused`, `exhausted`, `oversized` or `shutdown`; `unreadable`: a line of a file that is no dead letter; "
            "`other`: the rarest of very many that other programs have written."
        ),
    ]
    analyzer: Annotated[str | None, doc("The analyzer that had it last; null if none had.")] = None
    packets: Annotated[Count, doc("How many.")] = 0


class Discarded(Model, kw_only=True):
    """Dead letters that were discarded because they were over a bound, since the service started."""

    max_bytes: Annotated[Count, doc("Over `dead_letters.max_bytes`.")] = 0
    max_age: Annotated[Count, doc("Older than `dead_letters.max_age`.")] = 0


class DeadLetters(Model, kw_only=True):
    """The dead letters that are there now, also those of earlier runs; figures may be some seconds old."""

    packets: Annotated[Count, doc("How many, unreadable lines included.")] = 0
    bytes: Annotated[Count, doc("How large their files are.")] = 0
    files: Annotated[Count, doc("How many files.")] = 0
    counts: Annotated[list[DeadLetterCount], doc("By reason and analyzer; what is replayed or purged goes to 0.")] = []
    discarded: Discarded = field(default_factory=Discarded)


class DescribedDeadLetter(Model, kw_only=True):
    """A dead letter without its packet, and without the analyzer's response: `fastdist dead-letters list` has that."""

    id: Annotated[str, doc("The packet's id.")]
    reason: Annotated[str, doc("Why it was given up.")]
    analyzer: Annotated[str | None, doc("The analyzer that had it last; null if none had.")] = None
    status: Annotated[int | None, doc("Its response.")] = None
    error: Annotated[str | None, doc("What was wrong, in words.")] = None
    attempts: Annotated[Count, doc("How often it was sent.")] = 0
    messages: Annotated[Count, doc("How many messages it holds.")] = 0
    accepted_at: Annotated[Time, doc("When it was accepted.")]
    dead_lettered_at: Annotated[Time, doc("When it was given up.")]
    bytes: Annotated[Count, doc("The size of the packet.")] = 0


class LastDeadLetters(DeadLetters, kw_only=True):
    """The dead letters that are there now: how many, and the last of them."""

    last: Annotated[list[DescribedDeadLetter], doc("The last 20, the latest first.")] = []


class Stats(Model, kw_only=True):
    """What came in, what became of it, how fast, and by which workers and analyzers.

    At rest accepted + recovered = delivered + queued + inFlight + deadLettered + lost, exactly.
    """

    uptime_seconds: Annotated[Number, doc("Since the service started.")] = 0.0
    packets: Packets
    messages: Annotated[InAndOut, doc("Messages in accepted and in delivered packets.")] = field(
        default_factory=InAndOut
    )
    bytes: Annotated[InAndOut, doc("Bytes in accepted and in delivered packets.")] = field(default_factory=InAndOut)
    stream: Annotated[Stream | UnsetType, doc("Only with `queue.backend` `jetstream`.")] = UNSET
    rejected: Rejected
    protocols: Annotated[
        dict[str, ProtocolCounts], doc("By protocol of log agents (`server.protocols`); POST /logs is not among them.")
    ] = {}
    dead_letters: DeadLetters = field(default_factory=DeadLetters)
    rates: Rates
    latency_ms: Latencies
    analyzers: Annotated[list[AnalyzerInShort], doc("In the order of the configuration.")] = []
    workers: Annotated[list[Worker], doc("By their numbers.")]
    supervisor: Supervisor = field(default_factory=Supervisor)
    configuration: ConfigurationState = field(default_factory=ConfigurationState)


# ---- GET /queue


class WorkerQueue(Model, kw_only=True):
    """A worker's part."""

    id: Annotated[Count, doc("Its number.")]
    packets: Annotated[Count, doc("That wait.")]
    bytes: Annotated[Count, doc("Used, by old rings that it migrates as well.")]
    capacity_bytes: Annotated[Count, doc("Of its part.")]
    full: Annotated[
        bool, doc("Whether there is no room in it for one more packet like its last: that would be answered 503.")
    ] = False
    oldest_age_seconds: Annotated[Number, doc("Of its oldest packet.")]


class Queue(Model, kw_only=True):
    """What waits, and when it will have gone if nothing more comes.

    With `backend` `jetstream`: in the stream that all replicas share, and so the same at each of them.
    """

    backend: Annotated[str, words("ring", "jetstream"), doc("Where the queue is: `queue.backend`.")] = "ring"
    packets: Annotated[Count, doc("That wait, without those in flight.")]
    bytes: Annotated[
        Count, doc("Used, by records of any kind, and by old rings: then it may be more than `capacityBytes`.")
    ]
    capacity_bytes: Annotated[Count, doc("Of all workers together.")]
    full: Annotated[bool, doc("Whether a worker's part is full. `/ready` is 503 then.")] = False
    in_flight: Annotated[Count, doc("Packets sent, and not answered yet.")]
    oldest_age_seconds: Annotated[Number, doc("Of the oldest packet; 0 when the queue is empty.")]
    durability: Durability
    sync_interval_seconds: SyncInterval = 0.0
    drain_rate_per_second: Annotated[Number, doc("Packets delivered a second, over the last 10 s.")] = 0.0
    estimated_drain_seconds: Annotated[Number | None, doc("At that rate; null when nothing is delivered.")]
    workers: Annotated[list[WorkerQueue], doc("By their numbers.")] = []


# ---- analyzers


class Override(Model, kw_only=True):
    """What was set while the service ran, over what the configuration says."""

    weight: Annotated[Number | UnsetType, doc("Its weight.")] = UNSET
    state: Annotated[Annotated[str, words("draining")] | UnsetType, doc("It gets no new packets.")] = UNSET


class Probation(Model, kw_only=True):
    """Of an analyzer whose deliveries have failed and whose checks are good again."""

    next_packet_in_seconds: Annotated[Number, doc("How long the next one has to wait; 0: it gets the next that comes.")]


class Checks(Model, kw_only=True):
    """What an analyzer's health checks say."""

    last_check: Annotated[Time | None, doc("When it was last checked.")] = None
    last_status: Annotated[int | None, doc("What it answered; null for nothing.")] = None
    consecutive_failures: Annotated[Count, doc("Checks, or deliveries, that failed in a row.")] = 0
    consecutive_successes: Annotated[Count, doc("Checks that succeeded in a row.")] = 0


class Analyzer(AnalyzerInShort, kw_only=True):
    """All that is known of an analyzer."""

    endpoint: Annotated[
        str,
        Meta(
            description="Where packets are posted to; of a query, which may hold a key, `?...` is shown.",
            extra_json_schema={"format": "uri"},
        ),
    ] = ""
    weight: Annotated[Number, doc("The weight in force, as it was configured or set.")] = 0.0
    override: Annotated[Override | None, doc("What was set while the service ran; null if nothing was.")] = None
    effective_share: Annotated[Share, doc("What it gets of new packets now.")]
    since: Annotated[Time | None, doc("Since when it is in its state, online or offline.")] = None
    paused_for_seconds: Annotated[
        Number | None, doc("For how long it has asked to be left alone (Retry-After); null if it has not.")
    ] = None
    probation: Annotated[
        Probation | None,
        doc(
            "Its deliveries have failed and its checks are good again: it gets one packet at a time, "
            "and its share when it has taken one. It is `online` until it fails to take one. "
            "Null if it is not on probation."
        ),
    ] = None
    health: Checks = field(default_factory=Checks)
    connections: Annotated[Count, doc("Open to it, from all workers.")] = 0
    last_error: Annotated[str | None, doc("What last went wrong.")]
    last_error_at: Annotated[Time | None, doc("When that was.")] = None
    latency_ms: Annotated[Percentiles, doc("From an attempt to its response, for delivered packets.")]


class Analyzers(Model, kw_only=True):
    """All analyzers, in the order of the configuration."""

    analyzers: Annotated[list[Analyzer], Meta(min_length=1)]
