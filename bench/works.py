"""The works of the race and the aims they have. What a figure means stands in ``measure.py``, and in README.md.

A work has fastdist run under some settings, and others beside it. Two works that let a contestant do the same thing
share the run: nginx does not know what fastdist's durability is.
"""

from __future__ import annotations

from typing import NamedTuple

from agent_requests import RECORDS, REQUESTS
from contestants import CONTESTANTS, PEERS, Contestant, Fastdist, Haproxy, Nginx
from tools import mix, packet


class Load(NamedTuple):
    """What is sent, by how many, to how many analyzers, and how many connections are open beside and idle.

    ``step``: every request has a traceparent, every reply a Date and an id; by how much they grow (None: no such).
    ``mixed``: packets of 0.2 to 60 KB in turn, whatever ``messages`` is. ``agent``: requests of a log agent instead, a
    key of ``agent_requests.REQUESTS``. ``keyed``: every request has an Idempotency-Key of its own.
    """

    messages: int = 2
    connections: int = 64
    analyzers: int = 4
    idle: int = 0
    step: int | None = None
    mixed: bool = False
    agent: str = ""
    keyed: bool = False

    @property
    def bodies(self) -> tuple[bytes, ...]:
        """What is sent, in turn."""
        return mix() if self.mixed else (packet(self.messages),)

    @property
    def size(self) -> str:
        """How large packets are, in short."""
        if self.agent:
            return f"{RECORDS} records"
        return "0.2-60 KB" if self.mixed else "452 B" if self.messages == 2 else "18 KB"


class Run(NamedTuple):
    """One thing that is measured once in every round: who does what."""

    measure: str
    load: Load
    contestant: type[Contestant]
    settings: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        settings = ", ".join(f"{name.partition('__')[2].lower()}={value}" for name, value in self.settings)
        load = f"{self.load.size} x {self.load.connections}"
        more = [f"{self.load.analyzers} analyzers"] * (self.load.analyzers != 4) + [f"{self.load.idle} idle"] * (
            self.load.idle > 0
        )
        more += [f"heads grow by {self.load.step}"] * (self.load.step is not None)
        more += ["keys"] * self.load.keyed
        return f"{self.measure}, {', '.join([load, *more])}: {self.contestant.name} {settings}".strip()


class Aim(NamedTuple):
    """What fastdist's figure, divided by another's of the same name, has to be.

    ``against``: a contestant ("before": where it runs); "best", the best of nginx, HAProxy and Envoy that ran; the name
    of another work, for fastdist's figure there; or "", for the figure as it is.
    """

    against: str
    at_least: float | None = None
    at_most: float | None = None
    figure: str = "per_cpu"

    @property
    def text(self) -> str:
        """What is wanted, in short."""
        sign, bound = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        return f"{sign} {bound:g}"

    def met(self, value: float) -> bool:
        """Return whether the value is as it should be."""
        above = self.at_least is None or value >= self.at_least
        return above and (self.at_most is None or value <= self.at_most)


class Work(NamedTuple):
    """A row of the table. ``figure`` is the one it shows; ``rounds``: at most so many, for what takes long."""

    name: str
    measure: str
    load: Load
    settings: dict[str, str]
    peers: tuple[type[Contestant], ...] = ()
    aims: tuple[Aim, ...] = ()
    figure: str = "per_cpu"
    rounds: int = 1000

    def run(self, contestant: type[Contestant]) -> Run:
        """Return what a contestant does in this work."""
        ours = tuple(sorted(self.settings.items())) if issubclass(contestant, Fastdist) else ()
        return Run(self.measure, self.load, contestant, ours)

    @property
    def runs(self) -> list[Run]:
        """All runs that it takes."""
        return [
            self.run(contestant)
            for contestant in CONTESTANTS
            if issubclass(contestant, Fastdist) or contestant in self.peers
        ]


def settings(mode: str, durability: str = "memory", **more: str) -> dict[str, str]:
    """Return settings of fastdist, as environment variables without their prefix."""
    return {"DELIVERY__MODE": mode, "QUEUE__DURABILITY": durability, **more}


SMALL, LARGE, MANY, MIXED = Load(), Load(messages=100), Load(connections=256), Load(mixed=True)
DEFAULT = "single, disk (the default)"
ENOUGH_FOR_A_MILLION = {"QUEUE__CAPACITY": "2GiB", "HEALTH__INTERVAL": "200ms", "DELIVERY__CONNECTIONS": "4"}
OVER_EXPRESS = Aim("Express", at_least=20)


def _against_peers() -> list[Work]:
    large = settings("batch")
    best_18 = (Aim("HAProxy", at_least=1.0), Aim("Envoy", at_least=1.0), Aim("nginx", at_least=0.75), OVER_EXPRESS)
    return [
        Work("batch, memory", "throughput", SMALL, large, PEERS, (Aim("best", at_least=2.0), OVER_EXPRESS)),
        Work(
            "batch, disk",
            "throughput",
            SMALL,
            settings("batch", "disk"),
            PEERS,
            (Aim("best", at_least=1.8), OVER_EXPRESS, *_cost("batch, memory", 0.95, 0.9), *_slowest("batch, memory")),
        ),
        Work("batch, fsync", "throughput", SMALL, settings("batch", "fsync"), PEERS, (OVER_EXPRESS,)),
        Work("single", "throughput", SMALL, settings("single"), PEERS, (Aim("best", at_least=1.0), OVER_EXPRESS)),
        Work(
            DEFAULT,
            "throughput",
            SMALL,
            settings("single", "disk"),
            PEERS,
            (Aim("best", at_least=1.1), OVER_EXPRESS, Aim("single", at_least=0.95), *_slowest("single")),
        ),
        Work(
            "single, pipeline 8",
            "throughput",
            SMALL,
            settings("single", DELIVERY__PIPELINE="8"),
            PEERS,
            (Aim("best", at_least=1.4), OVER_EXPRESS),
        ),
        *(
            Work(
                f"{name}, long heads that {how}",
                "throughput",
                Load(step=step),
                chosen,
                aims=(Aim(f"{name}, long heads that stay", at_least=0.95),) if step else (),
            )
            for name, chosen in {"batch, memory": large, "single": settings("single")}.items()
            for how, step in {"stay": 0, "vary": 1}.items()
        ),
        Work("18 KB, batch", "throughput", LARGE, large, PEERS, best_18),
        Work(
            "18 KB, batch, validation none",
            "throughput",
            LARGE,
            settings("batch", SERVER__VALIDATION="none"),
            PEERS,
            (Aim("best", at_least=1.0), OVER_EXPRESS),
        ),
        Work("18 KB, batch, disk", "throughput", LARGE, settings("batch", "disk"), PEERS, best_18),
        Work(
            "18 KB, batch, disk, validation none",
            "throughput",
            LARGE,
            settings("batch", "disk", SERVER__VALIDATION="none"),
            PEERS,
            (Aim("nginx", at_least=1.0), OVER_EXPRESS),
        ),
        Work("0.2-60 KB, batch, memory", "throughput", MIXED, large, PEERS, (OVER_EXPRESS,)),
        Work(
            "0.2-60 KB, batch, disk",
            "throughput",
            MIXED,
            settings("batch", "disk"),
            PEERS,
            (Aim("best", at_least=1.3), OVER_EXPRESS),
        ),
    ]


def _modes() -> dict[str, dict[str, str]]:
    """Return the settings of each mode with each durability, by name."""
    pairs = [(mode, durability) for mode in ("batch", "single") for durability in ("memory", "disk", "fsync")]
    names = {pair: ", ".join(pair) for pair in pairs} | {("single", "disk"): DEFAULT}
    return {names[pair]: settings(*pair) for pair in pairs}


def _latency() -> list[Work]:
    p99, p999 = (Aim("nginx", at_most=1.0, figure=figure) for figure in ("p99", "p999"))
    aims = {"memory": (p99,), "disk": (p99, p999), "fsync": ()}
    return [
        Work(
            f"latency, {name}",
            "latency",
            SMALL,
            chosen,
            (Nginx, Haproxy),
            aims[chosen["QUEUE__DURABILITY"]],
            figure="p99",
        )
        for name, chosen in _modes().items()
    ]


def _stalls() -> list[Work]:
    modes = _modes()
    worst = (Aim("nginx", at_most=3.0, figure="worst"), Aim("", at_most=0, figure="errors"))
    paused = (Aim("", at_most=5.0, figure="pause"),)
    charged = (Aim("before", at_most=1.1, figure="charged_mib"),)
    stalls = [
        Work(f"an analyzer killed, {name}", "outage", SMALL, modes[name], (Nginx, Haproxy), worst, figure="worst")
        for name in ("batch, disk", DEFAULT)
    ]
    for name in ("single, memory", "batch, disk", DEFAULT):
        aims = paused if "disk" in name else ()
        stalls.append(Work(f"pause, {name}", "pause", SMALL, modes[name], aims=aims, figure="pause"))
        stalls.append(Work(f"memory, {name}", "pause", SMALL, modes[name], aims=charged, figure="charged_mib"))
    return stalls


def _cost(against: str, least: float, accepted: float) -> tuple[Aim, ...]:
    """Return the aims of durability: of processor time, and of what is accepted in a second."""
    return (
        Aim(against, at_least=least),
        Aim(against, at_least=accepted, figure="accepted_per_second"),
    )


def _slowest(memory: str) -> tuple[Aim, ...]:
    """Return the aims of the answers' p99 at saturation, on disk."""
    return Aim(memory, at_most=1.3, figure="p99"), Aim("nginx", at_most=1.0, figure="p99")


def _durability() -> list[Work]:
    memory = "256 connections, memory"
    return [
        Work(memory, "throughput", MANY, settings("batch")),
        Work("256 connections, disk", "throughput", MANY, settings("batch", "disk"), aims=_cost(memory, 0.9, 0.9)),
        Work("256 connections, fsync", "throughput", MANY, settings("batch", "fsync"), aims=_cost(memory, 0.6, 0.6)),
    ]


def _size() -> list[Work]:
    many = [
        Work(
            f"{count} analyzers, {mode}",
            "throughput",
            Load(analyzers=count),
            settings(mode),
            aims=(Aim("batch, memory" if mode == "batch" else "single", at_least=0.95),),
        )
        for mode in ("batch", "single")
        for count in (64, 1000)
    ]
    queue = settings("batch", **ENOUGH_FOR_A_MILLION)
    return [
        *many,
        Work("queue empty", "empty", SMALL, queue, rounds=3),
        Work("1,000,000 queued", "backlog", SMALL, queue, aims=(Aim("queue empty", at_least=0.95),), rounds=3),
        Work(
            "memory per idle connection",
            "memory",
            Load(idle=10_000),
            settings("batch"),
            (Nginx, Haproxy),
            (Aim("", at_most=8192, figure="bytes_each"),),
            figure="bytes_each",
            rounds=3,
        ),
        Work(
            "10,000 connections, 64 active",
            "throughput",
            Load(idle=9936),
            settings("batch"),
            aims=(Aim("batch, memory", at_least=0.9),),
        ),
    ]


def _agents() -> list[Work]:
    """Return the works in which log agents send; what they are compared with is decoding alone."""
    most = dict.fromkeys(("otlp", "ndjson", "loki", "bulk"), (Aim("", at_most=4.0, figure="of_decoding"),))
    return [
        Work(
            name,
            "records",
            Load(agent=name, connections=16),
            settings("batch"),
            aims=most.get(name, ()),
            figure="records_per_cpu",
        )
        for name in REQUESTS
    ]


def _cluster() -> list[Work]:
    """Return the works of a stream that two replicas share, and of a ring beside it under the same load."""
    works = []
    for keys, least in {"": 0.7, ", keys": 0.2}.items():
        load, ring = Load(connections=512, keyed=bool(keys)), f"ring, disk{keys}"
        works.append(Work(ring, "cluster", load, settings("batch", "disk", SERVER__WORKERS="2")))
        for name, copies in {"three copies": "3", "one copy": "1"}.items():
            aims = [Aim(ring, at_least=least), Aim("", at_most=3.0, figure="of_bare")]
            aims += [] if keys else [Aim(ring, at_least=0.5, figure="per_cpu_of_all")]
            chosen = {
                "DELIVERY__MODE": "batch",
                "SERVER__WORKERS": "1",
                "QUEUE__BACKEND": "jetstream",
                "JETSTREAM__REPLICAS": copies,
                "JETSTREAM__MAX_BYTES": "4GiB",
            }
            works.append(Work(f"stream, {name}{keys}", "cluster", load, chosen, aims=tuple(aims)))
    return works


WORKS = [*_against_peers(), *_latency(), *_stalls(), *_durability(), *_size(), *_agents(), *_cluster()]
