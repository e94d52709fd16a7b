"""What must hold whatever the bytes: a function for each of the places where bytes of others are read.

A target raises if it does not hold. The sockets, loops and analyzers around the code are those of the component tests.
Whatever a target needs to choose (where to cut, how a connection ends) follows from a checksum of the input, so that
inputs are plain requests, packets and replies, fit to be read and to be copied into the tests.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import agent_targets
from ingest_harness import Service, corpus
from test_ingest_hostile import TRAILERS, Recorder, SecondOpinion, requests_read
from test_schema_scanner import ACCEPTED, REFUSED, bodies_with, is_json
from test_upstream_replies import CASES, FIN, OPEN, RST, Trials

from fastdist._core import malformed
from fastdist.errors import PacketError
from fastdist.packet import check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ingest_harness import Connection

    from fastdist._core import Input  # type: ignore[attr-defined]


def _choice(data: bytes, of: int) -> int:
    return zlib.crc32(data) % of


def _verdict(body: bytes, *, strict: bool) -> tuple[int, int] | None:
    try:
        return check(body, strict=strict)
    except PacketError as error:
        if error.reason not in ("malformed", "invalid") or not str(error):
            raise AssertionError(body) from error
        return None


def packet(given: Input) -> None:
    """Check that the scanner says of every body what ``packet.check`` says, and Python's decoder of its being JSON."""
    body = given.data
    if (malformed(body) is None) != is_json(body):
        raise AssertionError(("Python's decoder says otherwise of this JSON", malformed(body), body))
    for strict in (False, True):
        facts, verdict = given.scan(strict), _verdict(body, strict=strict)
        if facts != verdict:
            raise AssertionError(("the scanner is wrong", strict, facts, verdict, body))


class _Ingest:
    """Connections to two services: one checks packets, the other takes whatever comes."""

    def __init__(self) -> None:
        limits = {"max_header": 1024, "max_body": 4096, "protocol": Recorder}
        self.checking = Service(**limits, security={"cors_origins": ("*",)})
        self.trusting = Service(**limits, validation="none")
        self.timers = self.checking.timers()
        self.loop = self.timers.__enter__()  # for good: in place of a running event loop's, and they never go off

    def read(self, service: Service, pieces: Iterable[bytes]) -> tuple[Connection, list[object], list[int]]:
        """Return a connection that is gone again, the requests that were read from it, and its answers' statuses."""
        connection = service.connect().send(*pieces)
        service.emitters.end_waiting()
        self.loop.advance(0)
        requests = requests_read(service, connection)
        statuses = [int(answer[9:12]) for answer, _ in connection.protocol.composed]
        connection.wait(1000)
        if connection.open and not connection.transport.aborted:
            raise AssertionError("a connection without an end")
        connection.lose()
        if service.ring.undone:
            raise AssertionError("a packet without its 202")
        return connection, requests, statuses


_INGEST: list[_Ingest] = []


def request(given: Input) -> None:
    """Check that requests mean the same however they arrive, and to llhttp too, and that no packet lacks its 202."""
    data = given.data
    cut = _choice(data, len(data) + 1)
    given.check_request(cut)
    if not _INGEST:
        _INGEST.append(_Ingest())
    ingest = _INGEST[0]
    _, whole, statuses = ingest.read(ingest.checking, [data])
    _, in_two, again = ingest.read(ingest.checking, [data[:cut], data[cut:]])
    if whole != in_two or statuses != again:
        raise AssertionError(("other requests in two reads than in one", cut, whole, in_two, statuses, again))
    _, requests, _ = ingest.read(ingest.trusting, [data])
    if not SecondOpinion(data).agrees(requests):
        second = SecondOpinion(TRAILERS.sub(rb"\1", data))  # which llhttp takes for headers, and we drop
        if not second.agrees(requests):
            raise AssertionError(("llhttp reads it otherwise", requests, second.requests, second.objection))


_TRIALS: list[Trials] = []


def reply(given: Input) -> None:
    """Check that replies mean the same however they arrive, and lose no packet, nor settle one twice."""
    data = given.data
    cut = _choice(data, len(data) + 1)
    given.check_reply(cut)
    if not _TRIALS:
        _TRIALS.append(Trials())
    end = (OPEN, FIN, RST)[_choice(data, 3)]
    whole = _TRIALS[0].run([data] if data else [], end)
    in_two = _TRIALS[0].run([piece for piece in (data[:cut], data[cut:]) if piece], end)
    if whole != in_two:
        raise AssertionError(("other outcomes in two reads than in one", cut, end, whole, in_two))


TARGETS: dict[str, Callable[[Input], None]] = {
    "packet": packet,
    "request": request,
    "reply": reply,
    **agent_targets.TARGETS,
}


def seeds(target: str) -> Iterable[bytes]:
    """Yield inputs to start from: those that the tests were written with."""
    if target == "packet":
        for value in (*ACCEPTED, *REFUSED):
            yield bodies_with(value.encode())[_choice(value.encode(), 5)]
    elif target == "request":
        yield from corpus().values()
    elif target in agent_targets.TARGETS:
        yield from agent_targets.seeds(target)
    else:
        yield from (data for data, _, _ in CASES.values())
