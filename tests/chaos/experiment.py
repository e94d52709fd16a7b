"""What experiments are made of: emitters and analyzers that keep ledgers outside fastdist, and the verdict on them.

An experiment starts analyzers, a distributor (as often as it likes, always on one port) and emitters, does harm, has
everything come to rest, and compares what emitters were answered with what analyzers answered:

- lost: answered 202 (or 200), but acknowledged by no analyzer and not among the dead letters;
- corrupted: an analyzer got another body than the emitter sent;
- phantom: acknowledged by an analyzer, but never sent, or answered with an error;
- duplicates: acknowledged more than once; no more than what may come twice when harm was done.

Where an emitter's connection broke before the answer, a packet may or may not have been accepted: that cannot be
known, and it counts as neither lost nor phantom.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from support import ROOT, Distributor, Emitter, Fleet, Mocks, Process, check_identity, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Started = TypeVar("Started", bound="Process")
LONG = os.environ.get("FASTDIST_CHAOS") == "long"
ANALYZERS = ("A1", "A2", "A3", "A4")
DELIVERY = {"connections": 8, "timeout": "10s"}  # a machine that is busy with other tests is not a fault
BATCHES = DELIVERY | {"mode": "batch", "batch_packets": 8, "pipeline": 2}
QUICK_RETRIES = {"base": "20ms", "cap": "500ms"}
TROUBLE = ("Traceback", "never retrieved", "Exception in callback", "exception was never", "ResourceWarning")
PADDING = "".join(random.Random(7).choices("abcdefghijklmnopqrstuvwxyz 0123456789", k=6000))


def form(short, long):
    """Return what the present form of the suite is to use."""
    return long if LONG else short


SOME = '[13579]",\t"messages'  # every other packet, for analyzers that reject those


def body_of(name: str) -> bytes:
    """Return a packet unlike any other, of 100 to 3,000 bytes, mostly short."""
    noise = zlib.crc32(name.encode())
    size = noise % 300 if noise % 8 else noise % 2900
    return b'{"emitterId":"%s",\t"messages":[{"message":"caf\xc3\xa9 %s","level":"info"}],"metadata":{"of":"%s"} }' % (
        name.encode(),
        PADDING[noise % 3000 :][:size].encode(),
        name.encode(),
    )


def digest_of(body: bytes) -> str:
    """Return what the mock analyzers keep of a body."""
    return blake2b(body, digest_size=8).hexdigest()


def on_free_ports(start: Callable[[], Started]) -> Started:
    """Return what ``start`` does, and have it done again where another process has taken a port."""
    while True:
        try:
            return start()
        except AssertionError as error:
            if "ddress already in use" not in str(error):
                raise


def in_flight(delivery: dict[str, object], workers: int = 2) -> int:
    """Return how many packets can be in flight at one moment."""
    requests = int(delivery.get("connections", 32)) * int(delivery.get("pipeline", 1))
    packets = int(delivery.get("batch_packets", 64)) if delivery.get("mode") == "batch" else 1
    return requests * packets * len(ANALYZERS) * workers


def twice_after_a_kill(delivery: dict[str, object], workers: int = 2) -> int:
    """Return how many packets a kill may have delivered twice, with ``disk`` or ``fsync``.

    What was in flight, and what was answered in that event-loop iteration: its marks are not written yet.
    """
    return 2 * in_flight(delivery, workers)


class Recorder(Emitter):
    """An emitter whose packets are all different, and that looks closely at the answers.

    ``pause`` (seconds) between an answer and the next packet on a connection leaves the machine some time for others.
    """

    def __init__(
        self, port: int, connections: int = 24, prefix: str = "p", *, pause: float = 0.005, **options: object
    ) -> None:
        super().__init__(port, connections, prefix, **({"body": body_of} | options))
        self.pause = pause
        self.cut_off: set[str] = set()  # whose answer began and did not end
        self.garbled: list[str] = []  # whose answer was none
        self.late: list[str] = []  # without an answer for as long as the emitter is prepared to wait

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(self.pause)
        name = f"{self.prefix}-{self._count + 1}"
        try:
            return await super()._exchange(reader, writer)
        except TimeoutError:
            self.late.append(name)
            raise
        except (OSError, EOFError) as error:
            if getattr(error, "partial", b"") or reader._buffer or self.answers[name] is not None:
                self.cut_off.add(name)
            raise
        except (ValueError, IndexError):
            self.garbled.append(name)
            return False


class Separate(Fleet):
    """Analyzers in a process each, on ports that stay theirs while they are down."""

    def _start(self, name: str, port: int) -> Mocks:
        return super()._start(name, port or free_port())


class Verdict(NamedTuple):
    """A row of the table."""

    fault: str
    accepted: int
    delivered: int
    lost: int
    corrupted: int
    phantom: int
    duplicates: int
    bound: int
    seconds: float


class Experiment:
    """Processes on one folder, with the ledgers of all that happened."""

    def __init__(self, folder: Path, verdicts: list[Verdict]) -> None:
        self.folder, self.verdicts = folder, verdicts
        self.port = 0  # of the distributor, once it has one
        self.started = time.monotonic()
        self.processes: list[Process | Fleet] = []
        self.emitters: list[Recorder] = []
        self.delivered_before: dict[str, int] = {}  # by analyzers whose ledgers are not at hand any more
        self.fastdist: Distributor
        self.mocks: Mocks | Fleet

    # ---- what takes part

    def analyzers(self, *options: str) -> Mocks:
        """Start four analyzers that verify bodies."""
        self.mocks = on_free_ports(
            lambda: Mocks(ANALYZERS, "--verify", *options, ports=[free_port() for _ in ANALYZERS])
        )
        self.processes.append(self.mocks)
        return self.mocks

    def fleet(self, *options: str) -> Separate:
        """Start four analyzers in a process each, which cannot tell of bodies once they have ended."""
        self.mocks = Separate(self.folder, *options)
        self.processes.append(self.mocks)
        return self.mocks

    def serve(self, settings: dict[str, dict[str, object]] | None = None, **options: object) -> Distributor:
        """Start the distributor (again), durable unless the settings say otherwise."""
        merged: dict[str, dict[str, object]] = {
            "queue": {"durability": "disk"},
            "delivery": DELIVERY,
            "retry": QUICK_RETRIES,
            "health": {"rise": 1, "timeout": "500ms"},
        }
        for section, keys in (settings or {}).items():
            merged[section] = merged.get(section, {}) | keys
        if self.port == 0:
            self.fastdist = on_free_ports(
                lambda: Distributor(self.folder, self.mocks, merged, port=free_port(), **options)
            )
            self.port = self.fastdist.port
        else:
            self.fastdist = Distributor(self.folder, self.mocks, merged, port=self.port, **options)
        self.processes.append(self.fastdist)
        return self.fastdist

    def begin_to_serve(self, workers: int) -> Process:
        """Start the distributor with its last configuration, and do not wait until it is ready."""
        command = [sys.executable, "-m", "fastdist", "serve", "--config", str(self.fastdist.config)]
        self.processes.append(Process([*command, "--workers", str(workers)]))
        return self.processes[-1]

    def refused_start(self, **environment: str) -> tuple[int, str]:
        """Start the distributor with its last configuration, which is to fail; return exit status and output."""
        command = [sys.executable, "-m", "fastdist", "serve", "--config", str(self.fastdist.config)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ | environment, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def emitter(self, **options: object) -> Recorder:
        """Return a further emitter, not started yet."""
        assert self.port, "there is no distributor yet"
        prefix = f"{'abcdefghij'[len(self.emitters)]}{random.SystemRandom().randrange(16**6):06x}"
        self.emitters.append(Recorder(self.port, prefix=prefix, **options))
        return self.emitters[-1]

    @property
    def data(self) -> Path:
        """The queue's folder."""
        return self.folder / "data"

    def close(self) -> None:
        """End everything."""
        for emitter in self.emitters:
            emitter.enough.set()
        for process in self.processes:
            process.kill_all()

    # ---- the verdict

    def judge(  # noqa: PLR0913  (what an experiment allows)
        self,
        fault: str,
        *,
        bound: int = 0,
        at_rest: bool = True,
        seconds: float = 60.0,
        may_lose: set[str] | frozenset[str] = frozenset(),
        corrupt: bool = False,
    ) -> Verdict:
        """Stop the emitters, have all come to rest, compare the ledgers, and add the row to the table.

        ``at_rest=False``: the distributor has ended. ``may_lose``: ids of packets that were destroyed on purpose.
        ``corrupt``: whether records may be counted as corrupt.
        """
        for emitter in self.emitters:
            if emitter._thread is not None:
                emitter.stop()
        stats = self.fastdist.wait_at_rest(seconds) if at_rest else None
        verdict, examples = self._compare(fault, bound, may_lose)
        self.verdicts.append(verdict)
        assert (verdict.lost, verdict.corrupted, verdict.phantom) == (0, 0, 0), (verdict, examples)
        assert verdict.duplicates <= bound, verdict
        assert verdict.accepted > 0, "nothing was accepted: the experiment shows nothing"
        for emitter in self.emitters:
            assert not emitter.garbled, emitter.garbled[:5]
            assert not emitter.late, emitter.late[:5]
            assert emitter.without_retry_after == 0
        if stats is not None:
            check_identity(stats)
            assert corrupt or stats["packets"]["corrupt"] == 0, stats["packets"]
        for process in self.processes:
            assert not any(word in process.output for word in TROUBLE), process.output[-6000:]
        return verdict

    def _compare(self, fault: str, bound: int, may_lose: set[str] | frozenset[str]) -> tuple[Verdict, list[str]]:
        accepted = set[str]().union(*(emitter.accepted for emitter in self.emitters))
        unknown = set[str]().union(*(emitter.unknown for emitter in self.emitters))
        delivered = self.delivered()
        dead_letters = {row["id"]: row.get("body", "").encode() for row in self.fastdist.dead_letters()}
        lost = accepted - delivered.keys() - dead_letters.keys() - may_lose
        phantoms = (delivered.keys() | dead_letters.keys()) - accepted - unknown
        digests, spoiled = self._bodies()
        digests |= {name: digest_of(body) for name, body in dead_letters.items()}
        corrupted = [name for name, digest in digests.items() if digest != digest_of(body_of(name))]
        verdict = Verdict(
            fault=fault,
            accepted=len(accepted),
            delivered=len(delivered),
            lost=len(lost),
            corrupted=len(corrupted) + spoiled,
            phantom=len(phantoms),
            duplicates=sum(delivered.values()) - len(delivered) + len(dead_letters.keys() & delivered.keys()),
            bound=bound,
            seconds=time.monotonic() - self.started,
        )
        return verdict, [*sorted(lost)[:5], *corrupted[:5], *sorted(phantoms)[:5]]

    def delivered(self) -> Counter[str]:
        """Return {packet id: times acknowledged}."""
        return Counter(self.delivered_before) + Counter(self.mocks.delivered())

    def _bodies(self) -> tuple[dict[str, str], int]:
        """Return {packet id: digest of its body}, and how many bodies came twice and not the same, or were no JSON."""
        if isinstance(self.mocks, Fleet):
            return {}, 0
        totals = [self.mocks.totals(name) for name in ANALYZERS]
        return self.mocks.digests(), sum(total["changed"] + total["broken"] for total in totals)


def table(verdicts: list[Verdict]) -> str:
    """Return the verdicts as a table in Markdown."""
    names = ("fault", "accepted", "delivered", "lost", "corrupted", "phantom", "duplicates", "allowed", "seconds")
    rows = [
        (*(f"{value:,}" if isinstance(value, int) else value for value in row[:-1]), f"{row.seconds:.0f}")
        for row in verdicts
    ]
    lines = [names, ("---", *["---:"] * (len(names) - 1)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def wait_for_restarts(fastdist: Distributor, restarts: int, seconds: float = 30.0) -> None:
    """Wait until so many workers have been replaced, and all run."""

    def replaced() -> bool:
        workers = fastdist.stats()["workers"]
        running = all(row["state"] == "running" for row in workers)
        return running and sum(row["restarts"] for row in workers) >= restarts

    def look() -> bool:
        try:
            return replaced()
        except OSError:  # asked a worker that was killed
            return False

    wait_until(look, f"{restarts} workers replaced", seconds)
