"""Real clients that log without a pause, what is done to the service meanwhile, and the comparison of the ledgers.

A client keeps account of what it was told: the numbers of the records that were accepted, and of those that it gave up.
What a client makes of a response is its own affair: it is asked, never the response.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections import Counter, defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from support import free_port, get_json, kill_worker, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from support import Distributor, Mocks

LEVELS = ("debug", "info", "warn", "error")
ROUNDING = 0.002  # seconds
FILLING = b'{"emitterId":"filling","messages":[{"message":"%s"}]}' % (b"x" * 20_000)


def part_of(wanted: dict[str, Any], found: Any) -> dict[str, Any]:
    """Return of what was found only what is wanted."""
    return {
        name: part_of(value, found[name]) if isinstance(value, dict) else found[name]
        for name, value in wanted.items()
        if name in found
    }


class Client:
    """One that logs: ``retries`` says whether it sends again what was refused."""

    retries = True
    each = 5  # records at a time
    pause = 0.05  # seconds between them

    def __init__(self, name: str, port: int) -> None:
        self.name, self.port = name, port
        self.sent = 0
        self.accepted: set[int] = set()
        self.refused: set[int] = set()
        self.when: dict[int, tuple[float, float]] = {}
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def log(self, numbers: range) -> None:
        """Log these records."""
        raise NotImplementedError

    def finish(self) -> None:
        """Return when the client has been told about everything."""

    def check(self, number: int, message: dict[str, Any], emitter: str) -> None:
        """Compare what has arrived with what was logged; ``expected`` is a part of it."""
        wanted = self.expected(number)
        assert emitter == wanted.pop("emitterId", self.name), (self.name, message, emitter)
        message["timestamp"] = message["timestamp"].replace("+00:00", "Z")
        assert part_of(wanted, message) == wanted, message
        if "timestamp" not in wanted:
            self.check_time(number, message)

    def check_time(self, number: int, message: dict[str, Any]) -> None:
        before, after = self.when[number]
        taken = datetime.fromisoformat(message["timestamp"]).timestamp()
        assert before - ROUNDING <= taken <= after + ROUNDING, (message, before, after)

    def expected(self, number: int) -> dict[str, Any]:
        """Return what a message must have: ``emitterId`` is the client's name unless it stands here."""
        raise NotImplementedError

    def gave_up(self) -> bool:
        """Return whether it has given up records so far."""
        return bool(self.refused)

    def text(self, number: int) -> str:
        return f'{self.name}/{number} Zoë said "naïve" \\ 100 % <€>'

    def tell(self, accepted: bool, numbers: Iterable[int]) -> None:  # noqa: FBT001
        """Note what the client was told."""
        if accepted:
            self.accepted.update(numbers)
        else:
            self.refused.update(numbers)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.stopped.set()

    def join(self) -> None:
        self._thread.join(90)
        assert not self._thread.is_alive(), f"{self.name} does not end"
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            while not self.stopped.is_set():
                numbers = range(self.sent, self.sent + self.each)
                self.sent += self.each
                before = time.time()
                self.log(numbers)
                self.when |= dict.fromkeys(numbers, (before, time.time()))
                self.stopped.wait(self.pause)
            self.finish()
        except BaseException as error:  # noqa: BLE001  (raised again where it is looked for)
            self.error = error


@contextlib.contextmanager
def at_work(clients: list[Client]) -> Iterator[None]:
    """Have them log meanwhile; at the end they have been told about everything."""
    for client in clients:
        client.start()
    try:
        yield
    finally:
        for client in clients:
            client.stop()
    for client in clients:
        client.join()


def some_more(clients: list[Client], records: int = 25) -> None:
    """Wait until each has logged so many more."""
    enough = {client: client.sent + records for client in clients}
    wait_until(
        lambda: all(client.error or client.sent >= enough[client] for client in clients),
        "each has logged",
        60,
        lambda: sum(client.sent for client in clients),
    )


def delivered(mocks: Mocks) -> list[tuple[str, dict[str, Any], int]]:
    """Return (emitter, message, times) of all that was acknowledged."""
    bodies: dict[str, Any] = {}
    for name in mocks.ids:
        bodies |= get_json(mocks.control_port, f"/control/{name}/bodies")
    return [
        (bodies[packet]["emitterId"], message, times)
        for packet, times in mocks.delivered().items()
        for message in bodies[packet]["messages"]
    ]


def judge(mocks: Mocks, clients: list[Client], *, killed: bool = False) -> None:
    """Compare the ledgers: each accepted record once, as it was logged; at least once if something was killed."""
    names = {client.name: client for client in clients}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for emitter, message, times in delivered(mocks):
        if emitter == "filling":
            continue
        found = re.search(r"([\w.-]+)(?:/|%2F)(\d+)[ +]", message["message"])
        assert found, message
        client, number = names[found[1]], int(found[2])
        client.check(number, message, emitter)
        counts[client.name][number] += times
    for client in clients:
        told, here = f"{client.name}: {len(client.accepted)} of {client.sent} accepted", counts[client.name]
        lost = client.accepted - here.keys()
        assert not lost, f"{told}, lost {sorted(lost)[:5]}"
        assert client.accepted, told
        assert here.keys() <= set(range(client.sent)), told
        if client.retries:
            assert client.accepted == set(range(client.sent)), (told, sorted(client.refused)[:5])
        print(f"{told}, {client.sent - len(client.accepted)} given up, {sum(here.values()) - len(here)} arrived again")  # noqa: T201
        if not killed:
            assert here == Counter(client.accepted), f"{told}, others or twice: {here - Counter(client.accepted)}"


# ----------------------------------------------------------------------------------------------------------- scenarios


def begin(mocks: Mocks, serve: Any, make: Any, **settings: dict[str, object]) -> tuple[Distributor, list[Client]]:
    mocks.set_all(keep=True)
    fastdist = serve(mocks, settings, port=free_port())
    return fastdist, make(fastdist.port)


def analyzers_down(mocks: Mocks, serve: Any, make: Any) -> None:
    """One is gone for a while, another answers 503 meanwhile: no client notices."""
    fastdist, clients = begin(mocks, serve, make, queue={"durability": "fsync"}, retry={"cap": "200ms"})
    with at_work(clients):
        some_more(clients)
        mocks.set("A2", refuse=True)
        mocks.set("A3", status=503)
        fastdist.wait_for_state("A2", "offline")
        some_more(clients)
        mocks.set("A2", refuse=False)
        mocks.set("A3", status=200)
        some_more(clients)
    stats = fastdist.wait_at_rest()
    judge(mocks, clients)
    assert not any(client.gave_up() for client in clients)
    assert stats["messages"]["accepted"] == sum(client.sent for client in clients)
    assert stats["packets"]["rejected"] == 0


def full(mocks: Mocks, fastdist: Distributor) -> None:
    """Fill the queue."""
    mocks.set_all(hang=True)
    wait_until(lambda: fastdist.post(FILLING)[0] == 503, "the queue is full")


def empty(mocks: Mocks) -> None:
    """Let analyzers take what is queued; what they did not answer is sent to them again."""
    mocks.set_all(refuse=True)
    mocks.set_all(hang=False, refuse=False)


def queue_full(mocks: Mocks, serve: Any, make: Any) -> None:
    """There is room again while requests wait for it: no client notices. Later it is full for longer than they wait.

    Those that retry lose nothing then either.
    """
    queue, server, health = {"capacity": "1MiB"}, {"workers": 1}, {"rise": 1, "interval": "100ms"}
    fastdist, clients = begin(mocks, serve, make, queue=queue, server=server, retry={"cap": "200ms"}, health=health)
    full(mocks, fastdist)
    with at_work(clients):
        time.sleep(0.1)
        empty(mocks)
        some_more(clients)
        assert not any(client.gave_up() for client in clients)
        full(mocks, fastdist)
        rejected = fastdist.stats()["packets"]["rejected"]
        wait_until(lambda: fastdist.stats()["packets"]["rejected"] >= rejected + len(clients), "requests are refused")
        wait_until(
            lambda: all(client.retries or client.gave_up() for client in clients), "those that do not retry know"
        )
        empty(mocks)
        some_more(clients)
    fastdist.wait_at_rest()
    judge(mocks, clients)


def worker_killed(mocks: Mocks, serve: Any, make: Any) -> None:
    fastdist, clients = begin(mocks, serve, make, queue={"durability": "disk"})
    mocks.set_all(latency=0.05)  # so that something is in flight
    with at_work(clients):
        some_more(clients)
        kill_worker(random.choice(fastdist.worker_pids()))
        wait_until(lambda: sum(row["restarts"] for row in fastdist.stats()["workers"]) == 1, "a new worker")
        some_more(clients)
    fastdist.wait_at_rest()
    judge(mocks, clients, killed=True)


def service_killed(mocks: Mocks, serve: Any, make: Any) -> None:
    """Everything is killed, with packets in the queue and in flight, and started again on the same queue."""
    fastdist, clients = begin(mocks, serve, make, queue={"durability": "disk"})
    mocks.set_all(latency=0.2)
    with at_work(clients):
        some_more(clients)
        fastdist.kill_all()
        fastdist = serve(mocks, {"queue": {"durability": "disk"}}, port=fastdist.port)
        some_more(clients)
    fastdist.wait_at_rest()
    judge(mocks, clients, killed=True)


SCENARIOS: list[Callable[[Mocks, Any, Any], None]] = [analyzers_down, queue_full, worker_killed, service_killed]
