"""An event-loop iteration is bounded over all connections, and packets come before answers that Python makes.

Times are no matter here: with budgets of nothing a turn reads on from one connection, and makes one costly answer.
"""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop
from ingest_harness import BODY, Service, corpus, head, keyed, normalised, post, post_chunked
from upstream_harness import until

from fastdist._core import Poller, Stream
from fastdist.worker.ingest import IngestProtocol

CORPUS = corpus()
COSTLY = {  # status -> what brings it
    "a body that is no packet": (400, post(b'{"emitterId":1}')),
    "malformed json": (400, post(b"{")),
    "an empty body": (400, post(b"")),
    "no packet, in chunks": (400, post_chunked(b'{"emitterId"', b":1}")),
    "a bad key": (400, keyed("a b")),
    "no http": (400, b"\x16\x03\x01\r\n\r\n"),
    "a bad head": (400, head("POST /logs", "Content-Length: x")),
    "empty lines": (400, b"\r\n" * 101),
    "bad chunks": (400, post_chunked(BODY, end=b"x\r\n")),
    "a method": (405, head("DELETE /logs")),
    "a path": (404, head("GET /nowhere")),
    "a path, with a body": (404, post(b"x", first="PUT /nowhere")),
    "a large body": (413, head("POST /logs", "Content-Length: 99999999")),
    "a large body of another request": (413, head("PUT /x", "Content-Length: 99999999")),
    "a large chunk": (413, post_chunked(end=b"fffffff\r\n")),
    "a media type": (415, post(BODY, "Content-Type: text/plain")),
    "an encoding": (415, post(BODY, "Content-Encoding: br")),
    "an expectation": (417, post(BODY, "Expect: much")),
    "a large head": (431, head("POST /logs", "X: " + "x" * 2000)),
    "large trailers": (431, post_chunked(BODY, end=b"0\r\n" + b"A: b\r\n" * 300)),
    "a view": (200, head("GET /health")),
    "an option": (204, head("OPTIONS /logs")),
}


def busy(packets=10**18, **settings):
    """Return a service whose budget for costly answers is used up: a connection waits for its turn."""
    service = Service(max_header=1024, max_body=4096, **settings)
    service.budget(packets, 1)
    for _ in range(2):
        service.connect().protocol.data_received(head("GET /health"))
    return service


def sent(service, data):
    """Return a connection on which this was read; the loop has had no further turn."""
    connection = service.connect()
    connection.protocol.data_received(data)
    return connection


@pytest.mark.parametrize("name", COSTLY)
def test_only_costly_responses_wait(name):
    status, request = COSTLY[name]
    service = busy()
    connection = sent(service, request)
    assert connection.written == b""
    assert not connection.transport.reading
    assert not connection.protocol.idle()
    assert sent(service, post()).statuses == [202]
    service.turn()
    assert connection.written == b""  # behind the one that waited before
    service.turn()
    assert connection.statuses == [status]


@pytest.mark.parametrize(
    ("status", "settings", "state"),
    [
        (401, {"security": {"tokens": ("secret",)}}, {}),
        (429, {"limits": {"rate": 1e-9, "burst": 1}}, {}),
        (503, {}, {"closed": True}),
        (503, {}, {"broken_storage": True}),
        (503, {"capacity": 65536}, {}),
    ],
    ids=["unauthorized", "rate limited", "draining", "storage", "full"],
)
def test_turning_packets_away_waits_its_turn(status, settings, state):
    service = busy(**settings)
    for name, value in state.items():
        setattr(service.intake, name, value)
    while sent(service, post()).written:  # as long as they are taken
        pass
    connection = sent(service, post())
    assert connection.written == b""
    for _ in range(3):
        service.turn()
    assert connection.statuses == [status]


def test_waiting_request_is_admitted_once():
    service = busy(security={"tokens": ("secret",)}, limits={"rate": 0.001, "burst": 3})
    connections = [sent(service, post()) for _ in range(3)]
    for _ in range(10):
        service.turn()
    assert [connection.statuses for connection in connections] == [[401]] * 3
    assert sent(service, post()).written == b""
    for _ in range(3):
        service.turn()
    assert service.rejected == {"unauthorized": 3, "rate_limited": 1}


def test_costly_responses_are_fair_to_all():
    service = Service()
    service.budget(0, 1)
    connections = [sent(service, post(b"{") * 50) for _ in range(20)]
    for turn in range(1, 1000):
        made = [connection.written.count(b"HTTP/1.1 400") for connection in connections]
        assert sum(made) == turn
        assert max(made) - min(made) <= 1
        service.turn()


def test_packets_of_one_read_take_turns():
    service = Service()
    service.budget(0, 1)
    one, other = (sent(service, b"".join(keyed(f"{name}{number}") for number in range(5))) for name in "ab")
    assert not one.transport.reading
    assert sent(service, keyed("single")).statuses == [202]
    while service.turns:
        service.turn()
    ids = ["a0", "b0", "single", "a1", "b1", "a2", "b2", "a3", "b3", "a4", "b4"]
    assert [packet.id for packet in service.packets()] == ids
    assert one.transport.reading
    assert one.protocol.idle()
    assert one.statuses == other.statuses == [202] * 5


def test_packets_go_on_beside_costly_answers():
    service = busy(packets=0)
    connection = sent(service, b"".join(keyed(f"k{number}") for number in range(5)) + post(b"{"))
    for taken in range(1, 6):
        assert connection.statuses == [202] * taken
        service.turn()
    for _ in range(3):
        service.turn()
    assert connection.statuses == [202] * 5 + [400]


@pytest.mark.parametrize("fsync", [False, True])
@pytest.mark.parametrize("name", CORPUS)
def test_waiting_in_turn_changes_no_response(name, fsync):
    seen = []
    for short in (False, True):
        service = Service(max_header=1024, max_body=4096, fsync=fsync)
        if short:
            service.budget(0, 1)
        connection = service.connect().send(CORPUS[name])
        service.sync()
        connection.pump()
        service.sync()
        state = (connection.transport.reading, connection.transport.half_closed, connection.transport.closed)
        packets = [(packet.id, packet.body) for packet in service.packets() if packet.id.startswith("k")]
        seen.append((normalised(connection.written), packets, service.rejected, state, connection.protocol.idle()))
    assert seen[0] == seen[1]


def test_input_behind_held_input_waits():
    """Nothing should, but a transport may have had it already (TLS)."""
    service = busy()
    connection = sent(service, keyed("a") + post(b"{") + keyed("b")[:-10])
    connection.protocol.data_received(keyed("b")[-10:])
    connection.protocol.data_received(keyed("c"))
    assert connection.statuses == [202]
    while connection.protocol.responses or len(connection.statuses) < 4:
        service.turn()
    assert connection.statuses == [202, 400, 202, 202]
    assert [packet.id for packet in service.packets()] == ["a", "b", "c"]


def test_loops_connections_share_a_budget():
    """With TLS the loop calls for each that has something, however many there are."""
    service = Service()
    service.budget(0, 1, loop=0)
    connections = [sent(service, post()) for _ in range(5)]
    for taken in range(6):
        assert sum(len(connection.statuses) for connection in connections) == taken
        assert all(connection.transport.reading == bool(connection.written) for connection in connections)
        service.turn()


def test_held_input_takes_nothing_from_new():
    """Over TLS as well: who always has more does not stand before the silent."""
    service = Service()
    service.budget(0, 1, loop=1)
    flood = sent(service, post() * 5)
    for taken in range(1, 5):
        assert flood.statuses == [202] * taken
        service.turn()
        assert sent(service, post()).statuses == [202]
    assert flood.statuses == [202] * 5


def test_queued_packets_are_taken_at_the_end():
    """Behind the end of a TLS connection nothing can be written: what is held back would be lost with its answers."""
    service = Service()
    service.intake.slice_ns = 0
    connection = sent(service, b"".join(keyed(f"k{number}") for number in range(5)))
    assert connection.statuses == [202]
    connection.end()
    assert connection.statuses == [202] * 5


@pytest.mark.parametrize("pieces", [1, 2])
def test_large_packets_queue_small_ones_pass(pieces):
    """To scan one takes milliseconds, or a hundred; many may be whole at the same moment."""
    service = Service()
    service.budget(0, 1)
    request = post(BODY[:-1] + b',"metadata":{"x":"' + b"x" * 200_000 + b'"}}')
    connections = [sent(service, request[: len(request) // pieces]) for _ in range(4)]
    for connection in connections if pieces > 1 else ():
        connection.protocol.data_received(request[len(request) // 2 :])
    for taken in range(5):
        assert sum(connection.statuses == [202] for connection in connections) == taken
        assert sent(service, post()).statuses == [202]
        service.turn()
    assert all(connection.protocol.idle() for connection in connections)


def test_large_non_packet_waits_its_turn():
    service = Service()
    service.budget(0, 1)
    request = post(BODY[:-1] + b',"metadata":' + b" " * 200_000 + b"1}")
    connections = [sent(service, each) for each in (head("GET /health"), request, request, head("GET /health"))]
    assert sum(bool(connection.written) for connection in connections) == 1
    for _ in range(8):
        service.turn()
    assert [connection.statuses for connection in connections] == [[200], [400], [400], [200]]


def test_closed_connection_blocks_no_queue():
    service = busy()
    connections = [sent(service, post(b"{")) for _ in range(3)]
    connections[0].lose()
    connections[1].transport.close()
    for _ in range(4):
        service.turn()
    assert connections[2].statuses == [400]


def test_error_in_one_turn_spares_the_others():
    class Broken(IngestProtocol):
        def handle(self, method, target, head, body):
            if target == "/error":
                raise ZeroDivisionError
            return super().handle(method, target, head, body)

    service = busy(protocol=Broken)
    broken, whole = sent(service, head("GET /error")), sent(service, head("GET /health"))
    service.turn()
    with pytest.raises(ZeroDivisionError):
        service.turn()
    assert broken.transport.aborted
    service.turn()
    service.turn()
    assert whole.statuses == [200]


def test_unread_head_did_not_arrive_late():
    service = Service()
    connection = service.connect().send(post()[:10])
    unread = True
    connection.protocol.has_unread = lambda: unread
    connection.wait(1000)
    assert connection.open
    unread = False
    connection.wait(1000)
    assert connection.statuses == [408]


def test_busy_client_never_precedes_silent():
    """What comes while a connection waits is read in its turn there, not as that of one who had been silent."""

    async def scenario(poller):
        service = Service()
        service.budget(0, 1)
        flood, silent = (emitter(poller, service) for _ in range(2))
        flood.sendall(b"".join(keyed(f"f{number}") for number in range(3)))
        await until(lambda: service.turns, "the flood is held back")
        flood.sendall(b"".join(keyed(f"f{number}") for number in range(3, 6)))
        service.turn()
        service.turn()  # takes the last that was held, and reads what has come
        silent.sendall(keyed("s"))
        await until(lambda: service.ring.undone == 5, "the silent one is read")
        while service.turns:
            service.turn()
        flood.sendall(keyed("f6"))
        await until(lambda: service.ring.undone == 8, "the flood is read like the others")
        assert [packet.id for packet in service.packets()] == ["f0", "f1", "f2", "f3", "s", "f4", "f5", "f6"]
        for peer in (flood, silent):
            peer.close()
        await until(lambda: not service.intake.connections, "all closed")

    async def whole():
        poller = Poller(asyncio.get_running_loop())
        await scenario(poller)
        poller.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


def emitter(poller, service):
    """Return an emitter's end of a connection that a ``Stream`` reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = socket.create_connection(server.getsockname())
        ours, address = server.accept()
    Stream(poller, ours, address, service.protocol(service.intake, service.emitters))
    return peer
