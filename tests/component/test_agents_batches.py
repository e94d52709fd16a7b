"""A batch is stored whole or not at all, in slices of work, and waits for room, for the disk, or for its delivery."""

from __future__ import annotations

import gzip
import time
from unittest import mock

import orjson
import pytest
from agents_harness import JSON, REQUESTS, Sent, ask, connect, counted, texts
from ingest_harness import BODY, Service, keyed, post
from support import files_end_at

from fastdist._core import HEADER_SIZE, record_bytes
from fastdist.protocols import base

NAMES = list(REQUESTS)
each = pytest.mark.parametrize("name", NAMES)
DURABILITIES = pytest.mark.parametrize("fsync", [False, True], ids=["disk", "fsync"])
TAKEN = "/ingest"


def lines(*records: tuple[str, str]) -> Sent:
    """Return a request with these records: (emitter, text)."""
    body = b"\n".join(orjson.dumps({"host": host, "message": text}) for host, text in records)
    return Sent(TAKEN, body, ("Content-Type: application/x-ndjson",), 200)


def many(count: int, size: int = 100) -> Sent:
    return lines(*((f"h{number}", "x" * size) for number in range(count)))


LONG = many(1, 2 << 20)  # its conversion takes several slices


def large(count: int = 20_000, *extra: str) -> Sent:
    """Return a request whose conversion takes several slices."""
    body = b'{"message":"%b","host":"h"}\n' % (b"x" * 100) * count
    return Sent(TAKEN, body, ("Content-Type: application/x-ndjson", *extra), 200)


def sent(service, data):
    """Return a connection on which this was read; the loop has had no further turn."""
    connection = connect(service)
    connection.protocol.data_received(data)
    return connection


# ---- whole or not at all


@pytest.mark.parametrize("disk", [False, True])
def test_packets_of_many_emitters(disk):
    service = Service(disk=disk)
    connection = ask(service, many(300).request())
    assert connection.statuses == [200]
    assert (service.accepted, service.counters.get("messages_accepted"), service.accepts) == (300, 300, 1)
    packets = service.packets()
    assert [orjson.loads(packet.body)["emitterId"] for packet in packets] == [f"h{number}" for number in range(300)]
    assert len({packet.id for packet in packets}) == 300
    assert service.counters.get("bytes_accepted") == sum(len(packet.body) for packet in packets)
    assert counted(service, "json") == (300, {200: 1})
    assert service.ingest.cumulative()[-1] == 1


@DURABILITIES
@pytest.mark.parametrize("fits", [0, 5_000, 70_000, 300_000])
@pytest.mark.parametrize("batch", [many(20), many(2000, 300), many(5, 60_000)], ids=["small", "many", "large"])
def test_write_fails(fsync, fits, batch):
    """Whatever the file has room for: all packets of a batch are there, or none."""
    service = Service(disk=not fsync, fsync=fsync, capacity=2**23)
    with files_end_at(HEADER_SIZE + fits):
        connection = ask(service, keyed("a"))
        connection.send(batch.request())
        other = ask(service, keyed("b"))
    service.sync()
    packets = batch.body.count(b"\n") + 1
    taken = 0 if connection.statuses[1] == 503 else packets
    assert connection.statuses[1] == (200 if taken else 503)
    first, last = connection.statuses[0] == 202, other.statuses == [202]
    assert service.accepted == service.ring.undone == taken + first + last
    assert (service.intake.held, service.ring.next_sequence_number) == (0, 1 + service.accepted)
    assert service.rejected.get("storage", 0) == 3 - first - last - bool(taken)
    assert counted(service, "json") == ((taken, {200: 1}) if taken else (0, {503: 1}))
    connection.send(lines(("h", "later")).request())
    service.sync()
    assert connection.statuses[2] == 200
    assert texts(service).count("later") == 1
    assert service.ring.undone == 0


def test_what_was_taken_back_stays_away():
    service = Service(disk=True, capacity=2**23)
    with files_end_at(HEADER_SIZE + 300_000):
        ask(service, keyed("a") + many(2000, 300).request() + keyed("b"))
    ask(service, keyed("c"))
    assert [packet.id for packet in service.ring.waiting()][-1] == "c"
    assert service.ring.undone == service.accepted


def test_batch_that_can_never_be_stored():
    service = Service(capacity=2**18)
    connection = ask(service, many(1500).request() + keyed("k"))
    assert connection.statuses == [413, 202]
    assert service.rejected == {"too_large": 1}


# ---- durability


@each
def test_nothing_is_said_before_the_sync(name):
    service = Service(fsync=True)
    connection = ask(service, keyed("a") + REQUESTS[name].request() + keyed("b"))
    assert (connection.written, service.accepted) == (b"", 0)
    assert service.syncs_wanted
    assert counted(service, name) == (0, {})
    service.sync(record_bytes(1, len(BODY)))
    assert connection.statuses == [202]
    service.sync()
    assert connection.statuses == [202, REQUESTS[name].status, 202]
    assert counted(service, name) == (2, {REQUESTS[name].status: 1})


@each
def test_sync_fails(name):
    service, request = Service(fsync=True), REQUESTS[name]
    connection = ask(service, keyed("a"))
    service.sync()
    connection.send(request.request("Origin: https://x"))
    service.ring.withdraw_unsynced()
    rejected = service.intake.not_stored(service.ring.synced_position, 503, "Service Unavailable", b"", b"")
    assert rejected == 1
    assert connection.statuses == [202, request.busy]
    assert connection.answers()[1].headers["retry-after"] == "1"
    assert counted(service, name) == (0, {request.busy: 1})
    service.sync()
    assert connection.statuses == [202, request.busy]


# ---- room


def full(**settings):
    """Return a service with a ring that is filled, and what to make room with."""
    service = Service(capacity=2**18, **settings)
    filler = service.ask()
    for size in (20_000, 10):
        body = BODY[:-1] + b',"metadata":{"x":"%b"}}' % (b"x" * size)
        while filler.send(keyed("f", body)).statuses[-1] == 202:
            pass
    service.counters.set("queue_full", 0)
    return service


@each
@pytest.mark.parametrize("disk", [False, True])
def test_full_queue_makes_room(name, disk):
    service, sent = full(disk=disk), REQUESTS[name]
    batch = Sent(TAKEN, many(100, 300).body, ("Content-Type: application/x-ndjson",), 200) if name == "json" else sent
    first = ask(service, many(100, 300).request() + keyed("later"))
    connection = ask(service, batch.request())
    for _ in range(3):
        service.intake.look_for_room()
    assert (first.written, connection.written) == (b"", b"")
    assert service.intake.bodies > 0
    before = service.accepted
    service.packets()
    service.intake.look_for_room()
    service.turn()
    assert first.statuses == [200, 202]
    assert connection.statuses == [batch.status]
    assert service.accepted == before + 100 + 1 + (100 if name == "json" else 1)
    assert (service.rejected, service.intake.bodies) == ({}, 0)


@each
def test_full_queue_stays_full(name):
    service, sent = full(), REQUESTS[name]
    service.intake.room_wait_ns = 50_000_000
    blocked = ask(service, many(100, 300).request())
    connection = ask(service, sent.request() * 2 + keyed("k"))
    assert connection.written == b""
    assert not connection.transport.reading
    time.sleep(0.06)
    service.intake.look_for_room()
    service.turn()
    assert blocked.statuses == [503]
    assert connection.statuses[0] == sent.busy
    assert int(connection.answers()[0].headers["retry-after"]) >= 1
    assert service.rejected == {"queue_full": 2}


def test_batches_wait_in_order():
    service = full()
    connections = [
        ask(service, lines(("h", f"{number}" * size)).request()) for number, size in enumerate((30_000, 5, 5))
    ]
    service.intake.look_for_room()
    assert [connection.written for connection in connections] == [b""] * 3
    service.packets()
    service.intake.look_for_room()
    assert [connection.statuses for connection in connections] == [[200]] * 3
    assert [text[0] for text in texts(service)] == ["0", "1", "2"]


def test_room_cannot_be_made_by_writing():
    """What was pushed for one that waited is gone when it cannot be written to make room for the next: it is told."""
    service = full(disk=True)
    first, second = ask(service, many(1, 5000).request()), ask(service, many(1, 100_000).request())
    filled = []
    while handle := service.ring.claim():
        filled.append(handle)
    for handle in filled:
        if handle != filled[9]:  # which is then the first, in the way of the second
            service.ring.done(handle)
    before = service.accepted
    with files_end_at(HEADER_SIZE):
        service.intake.look_for_room()
    assert service.unwritten
    while service.turns:
        service.turn()
    assert (first.statuses, second.statuses) == ([503], [503])
    assert ask(service, lines(("h", "later")).request()).statuses == [200]
    assert (service.accepted, service.ring.undone) == (before + 1, 2)


def test_wait_for_room_ends_with_connection():
    service = full()
    gone, left = (ask(service, many(100, 300).request()) for _ in range(2))
    gone.lose()
    service.packets()
    service.intake.look_for_room()
    assert left.statuses == [200]
    assert service.intake.bodies == 0


@pytest.mark.parametrize("state", ["closed", "broken_storage"])
def test_wait_for_room_ends_with_service(state):
    service = full()
    connection = ask(service, many(100, 300).request())
    setattr(service.intake, state, True)
    if state == "closed":
        assert service.intake.holds_back
        service.intake.go_on()
    else:
        service.intake.look_for_room()
    assert connection.statuses == [503]
    assert not service.intake.holds_back


# ---- slices


@pytest.mark.parametrize("disk", [False, True])
def test_others_go_on_during_a_conversion(disk):
    service = Service(capacity=2**26, disk=disk)
    busy = sent(service, large().request() + keyed("behind"))
    other, turns = service.connect(), 0
    while busy.written == b"":
        assert service.turns
        other.protocol.data_received(keyed(f"k{turns}"))
        service.turn()
        turns += 1
    assert turns > 5
    assert other.statuses == [202] * turns
    assert service.intake.bodies == 0
    busy.pump()
    assert busy.statuses == [200, 202]
    assert counted(service, "json")[0] == 20_000
    packets = service.packets()
    others = [packet.id for packet in packets if len(packet.id) < 36]
    assert others == [f"k{number}" for number in range(turns)] + ["behind"]
    assert packets[-1].id == "behind"


def test_conversions_take_turns():
    service = Service(capacity=2**26)
    connections = [sent(service, large().request()) for _ in range(3)]
    with mock.patch.object(base, "SLICE_NS", 3600 * 10**9):
        short = sent(service, lines(("h", "short")).request())
    assert short.statuses == [200]
    assert all(connection.written == b"" for connection in connections)
    assert service.intake.bodies >= 3 * len(large().body)
    done = []
    while service.turns:
        service.turn()
        done += [connection for connection in connections if connection.written and connection not in done]
    assert len(done) == 3
    assert service.intake.bodies == 0
    assert [connection.statuses for connection in connections] == [[200]] * 3


def test_one_slice_a_turn():
    service = Service(capacity=2**26)
    steps = []
    agents = service.emitters.agents
    taken = agents.find

    def find(method, target, headers):
        route, brings = taken(method, target, headers)
        take = route.take

        def counting(request, limits):
            work = take(request, limits)
            while True:
                try:
                    value = next(work)
                except StopIteration as end:
                    return end.value
                steps.append(request.headers["x-emitter-id"])
                yield value

        return route._replace(take=counting), brings

    service.emitters.agents.find = find
    for name in "abc":
        sent(service, large(20_000, f"X-Emitter-Id: {name}").request())
    assert steps == ["a", "b", "c"]
    for turn in range(1, 10):
        service.turn()
        assert len(steps) <= 3 + turn
    assert steps[:9] == ["a", "b", "c"] * 3


def test_conversions_count_as_bodies():
    """A body, and what has become of it so far."""
    service = Service(capacity=2**26)
    service.intake.max_bodies = 3 * len(large().body)
    connections = [sent(service, large().request()) for _ in range(5)]
    for connection in connections:
        connection.pump()
    statuses = sorted(connection.statuses[0] for connection in connections)
    assert (statuses[0], statuses[-2:]) == (200, [503, 503])
    assert service.rejected == {"queue_full": statuses.count(503)}
    assert service.intake.bodies == 0


def test_decoded_bytes_count_as_bodies():
    service = Service(capacity=2**26)
    service.intake.max_bodies = len(large().body) * 5 // 2
    packed = large(20_000, "Content-Encoding: gzip")
    packed = packed.with_body(gzip.compress(packed.body))
    connections = [sent(service, packed.request()) for _ in range(3)]
    while service.turns:
        service.turn()
    assert sorted(connection.statuses[0] for connection in connections) == [200, 503, 503]
    assert service.intake.bodies == 0


def test_whole_body_is_not_ended_for_others():
    """It does not come slowly: it waits for its turn."""
    service = Service(capacity=2**26)
    service.intake.max_bodies = len(large().body) * 7 // 2
    working = sent(service, large().request())
    working.age(100)
    coming = sent(service, large().chunked()[:-10])
    working.pump()
    assert working.statuses == [200]
    assert coming.statuses in ([503], [])


def test_connection_lost_during_a_conversion():
    service = Service(capacity=2**26)
    gone = sent(service, large().request())
    gone.lose()
    while service.turns:
        service.turn()
    assert (service.accepted, service.intake.bodies, service.ring.undone) == (0, 0, 0)


def test_draining_while_a_body_is_converted():
    service = Service(capacity=2**26)
    connection = sent(service, large().request())
    service.intake.draining = True
    connection.pump()
    assert connection.answer().status == 200
    assert connection.answer().closes


def test_encoded_packet_is_decoded_in_slices():
    service = Service(capacity=2**26)
    body = BODY[:-1] + b',"metadata":{"x":"' + b"x" * 9_000_000 + b'"}}'
    connection = sent(service, post(gzip.compress(body), "Content-Encoding: gzip", JSON) + keyed("k"))
    turns = 0
    while service.turns:
        service.turn()
        turns += 1
    assert connection.statuses == [202, 202]
    assert turns > 1
    assert service.bodies() == [body, BODY]


# ---- Prefer: wait


@each
def test_waits_for_delivery(name):
    service, request = Service(), REQUESTS[name]
    with service.timers():
        connection = ask(service, request.request("Prefer: wait=5"))
        assert connection.written == b""
        service.deliver()
    assert connection.statuses == [request.status]
    assert counted(service, name) == (2, {request.status: 1})


def test_waits_for_the_delivery_of_all():
    service = Service()
    with service.timers():
        connection = ask(service, many(3).request("Prefer: wait=5") + keyed("k"))
        packets = service.packets()
        for packet in packets[:2]:
            service.emitters.settled(packet.sequence, "A1")
        assert connection.written == b""
        service.emitters.settled(packets[2].sequence, "A1")
    assert connection.statuses == [200, 202]
    assert not service.emitters.waiting


@each
def test_wait_ends(name):
    service, request = Service(), REQUESTS[name]
    with service.timers() as loop:
        connection = ask(service, request.request("Prefer: wait=5"))
        loop.advance(5.1)
        assert connection.statuses == [request.status]
        service.deliver(None)
    assert connection.statuses == [request.status]
    assert counted(service, name) == (2, {request.status: 1})


@each
def test_dead_letter_while_waiting(name):
    service = Service()
    with service.timers():
        connection = ask(service, REQUESTS[name].request("Prefer: wait=5"))
        service.deliver(None)
    assert connection.statuses == [502]


def test_waiting_connection_is_lost():
    service = Service()
    with service.timers() as loop:
        connection = ask(service, many(3).request("Prefer: wait=5"))
        connection.lose()
        service.deliver()
        loop.advance(6)
    assert not service.emitters.waiting


def test_wait_for_what_is_withdrawn():
    service = Service(fsync=True)
    with service.timers() as loop:
        connection = ask(service, REQUESTS["loki"].request("Prefer: wait=5"))
        service.ring.withdraw_unsynced()
        service.intake.not_stored(service.ring.synced_position, 503, "Service Unavailable", b"", b"")
        loop.advance(6)
    assert connection.statuses == [503]
