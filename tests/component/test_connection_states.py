"""The tables of a connection's states (core/connection_life.pxi): an example here takes each move, and no other."""

from __future__ import annotations

import time

import pytest
from ingest_harness import BODY, Service, Transport, head, keyed, post, post_chunked
from upstream_harness import OK, SECOND, Desk, reply

from fastdist.worker.ingest import IngestProtocol

CHUNKED = b"HTTP/1.1 200 OK\r\n%b\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"2\r\nok\r\n0\r\n\r\n"
TO_CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"


class Moves:
    """The moves of both directions that were seen; every change of a state is one, so steps have to be small."""

    def __init__(self):
        self.seen = set(), set()

    def during(self, protocol, step, *args):
        before = protocol.state
        step(*args)
        for seen, old, new in zip(self.seen, before, protocol.state, strict=True):
            if old != new:
                seen.add((old, new))

    def bytewise(self, protocol, data):
        for at in range(len(data)):
            self.during(protocol, protocol.data_received, data[at : at + 1])

    def are_those_of(self, life):
        for seen, table in zip(self.seen, (life.reading, life.writing), strict=True):
            assert seen == {(state, following) for state in table for following in table[state]}


# ---- emitters

GOOD = (post(), post_chunked(BODY), head("GET /health"), b"\r\n")
BAD = {"body": post(b"{ "), "chunks": post_chunked(b"{"), "no body": head("GET /health")}
ENDS = (b"", post()[:9], post()[:-1], post_chunked(BODY)[:-1])


def busy(**settings):
    """Return a service that has no time left for answers that Python makes."""
    service = Service(**settings)
    service.budget(10**18, 1)
    for _ in range(2):
        service.connect().protocol.data_received(head("GET /health"))
    return service


def requests_that_wait_for_their_turn(moves):
    for data in BAD.values():
        for what in ("answered", "ended", "drained"):
            service = busy()
            connection = service.connect()
            moves.bytewise(connection.protocol, data)
            if what == "ended":
                moves.during(connection.protocol, connection.end)
            service.intake.draining = what == "drained"
            for _ in range(4):
                moves.during(connection.protocol, service.turn)


def requests_cut_short(moves):
    for data in ENDS:
        for how in ("end", "lose", "wait"):
            connection = Service().connect()
            moves.bytewise(connection.protocol, data)
            moves.during(connection.protocol, getattr(connection, how), *([40] if how == "wait" else []))
            if how == "wait":
                moves.during(connection.protocol, connection.end)
            if how != "lose":
                moves.during(connection.protocol, connection.lose)


def answers_that_wait(moves):
    for line in ("Connection: close", "X: y"):
        for synced in (True, False):
            service = Service(fsync=True)
            connection = service.connect()
            moves.bytewise(connection.protocol, post(BODY, line))
            if synced:
                moves.during(connection.protocol, service.sync)
            moves.during(connection.protocol, connection.lose)


def test_each_emitter_connection_move_exists():
    moves = Moves()
    for data in (*GOOD, head("GET /health", "Connection: close")):
        moves.bytewise(Service().connect().protocol, data)
    protocol = IngestProtocol((service := Service(max_connections=0)).intake, service.emitters)
    moves.during(protocol, protocol.connection_made, Transport())  # one too many
    requests_that_wait_for_their_turn(moves)
    requests_cut_short(moves)
    answers_that_wait(moves)
    moves.are_those_of(protocol.life)


# ---- analyzers


def at_work(unwritten=0, **delivery):
    """Return a desk and a connection on which two requests are in flight."""
    desk = Desk(connections=1, pipeline=4, **delivery)
    connection = desk.connect()
    desk.push(b"1", b"2")
    desk.pool.pump()
    connection.transport.unflushed = unwritten
    return desk, connection


def replies(moves):
    for close in ("X: y", "Connection: close"):
        for data in (reply(200, close, body=b"ok"), CHUNKED % close.encode() + CHUNKS, TO_CLOSE):
            moves.bytewise(at_work()[1], data)
    _, connection = at_work()
    for _ in range(2):  # a body that was read before
        moves.bytewise(connection, CHUNKED % b"X: y")
        moves.during(connection, connection.data_received, CHUNKS)


def replies_that_come_early(moves):
    chunked = CHUNKED % b"X: y"
    for beginning in (OK, reply(body=b"ok")[:-1], chunked, chunked + b"2", TO_CLOSE):
        for what in ("ended", "written", "retired", "lost"):
            desk, connection = at_work(unwritten=1000)
            moves.bytewise(connection, beginning)
            if what == "ended":
                moves.during(connection, connection.eof_received)
            elif what == "retired":
                moves.during(connection, connection.retire)
            if what != "lost":
                connection.transport.unflushed = 0
                moves.during(connection, desk.pool.check, time.monotonic_ns())
            moves.during(connection, connection.connection_lost, None)


def test_analyzer_connection_moves_exist():
    moves = Moves()
    replies(moves)
    replies_that_come_early(moves)
    _, connection = at_work()
    moves.during(connection, connection.retire)
    moves.bytewise(connection, OK + OK)
    desk, connection = at_work(timeout=1.0)
    moves.during(connection, desk.pool.check, time.monotonic_ns() + 2 * SECOND)
    moves.are_those_of(connection.life)


# ---- a move that is not allowed


class Broken(IngestProtocol):
    def went_wrong(self, error):
        self.emitters.errors = [*getattr(self.emitters, "errors", []), str(error)]


@pytest.mark.parametrize("begun", [b"", post()[:9], post()[:-1], post_chunked(BODY)[:-1]])
def test_invalid_move_closes_connection(begun):
    service = Service(protocol=Broken)
    connection, other = service.ask(keyed("a") + begun), service.connect()
    connection.protocol.let_go()
    try:
        connection.protocol.promise()
    except AssertionError:  # a checked build
        return
    assert service.emitters.errors == ["a connection may not go from LOST to WAITING"]
    assert connection.transport.aborted
    connection.protocol.data_received(keyed("b"))
    assert connection.statuses == [202]
    assert other.send(keyed("c")).statuses == [202]
    assert service.intake.bodies == 0
    connection.lose()
    assert [packet.id for packet in service.packets()] == ["a", "c"]
