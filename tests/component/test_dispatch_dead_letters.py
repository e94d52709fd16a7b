"""Packets no analyzer takes: refused, sent too often, left over; and dead letters that cannot be written."""

from __future__ import annotations

import errno
import os

import pytest
from upstream_harness import Bench, reply

from fastdist.storage.dead_letter_format import FOLDER


def send_all(bench):
    """Answer 200 until nothing is in flight."""
    while bench.answer_all():
        pass


@pytest.mark.parametrize("status", [400, 402, 406, 409, 411, 413, 415, 418, 422, 431, 499])
def test_refused_packet_is_a_dead_letter(tmp_path, status):
    with Bench(tmp_path, (1, 1)) as bench:
        bench.push(b'{"a":"\xc3\xa9"}', messages=7)
        slot = 0 if bench.busy(0) else 1
        bench.answer(bench.busy(slot)[0], reply(status))
        (dead_letter,) = bench.dead_letters()
        times = dead_letter.pop("acceptedAt"), dead_letter.pop("deadLetteredAt")
        assert times[0] <= times[1]
        assert dead_letter == {
            "id": "p1",
            "reason": "refused",
            "analyzer": f"A{slot + 1}",
            "status": status,
            "error": f"HTTP {status}",
            "attempts": 1,
            "messages": 7,
            "body": '{"a":"é"}',
        }
        assert bench.ring.undone == bench.ring.claimed == 0
        assert (bench.count("refused"), bench.count_of(slot, "failed"), bench.count("retried")) == (1, 1, 0)
        assert bench.settled == [(1, None)]
        assert bench.states.is_online(slot)
        assert bench.states.error(slot) == f"HTTP {status}"


def test_dead_letter_has_its_attempt_count(tmp_path):
    with Bench(tmp_path, (1, 1, 1)) as bench:
        bench.push(b"x")
        bench.answer_all(reply(500))
        bench.answer_all(reply(429))
        bench.answer_all(reply(400))
        (dead_letter,) = bench.dead_letters()
        assert (dead_letter["reason"], dead_letter["attempts"], dead_letter["status"]) == ("refused", 3, 400)
        assert bench.dispatcher.retrying == {}


def test_only_the_packet_at_fault_is_refused(tmp_path):
    with Bench(tmp_path, (1,), delivery={"mode": "batch", "connections": 1, "pipeline": 3, "linger": 0}) as bench:
        bench.push(*[b"%d" % number for number in range(1, 11)])
        (connection,) = bench.busy(0)
        bench.answer(connection, reply(422))
        assert bench.dead_letters() == []
        assert bench.count("retried") == 10
        alone = connection.transport.requests[1:]
        assert [request.ids for request in alone] == [["p1"], ["p2"], ["p3"]]  # in order
        bench.push(b"11")  # behind them
        for number in range(1, 11):
            bench.answer(connection, reply(422 if number in (4, 9) else 200))
        assert [request.ids for request in connection.transport.requests[1:]] == [[f"p{n}"] for n in range(1, 12)]
        assert [request.body for request in connection.transport.requests[1:11]] == [b"%d" % n for n in range(1, 11)]
        assert all("X-Packet-Id" in request.headers for request in connection.transport.requests[1:11])
        assert connection.transport.requests[1].headers["X-Attempt"] == "2"
        assert connection.transport.requests[11].body == b"[11]"
        assert [(dead_letter["id"], dead_letter["attempts"]) for dead_letter in bench.dead_letters()] == [
            ("p4", 2),
            ("p9", 2),
        ]
        send_all(bench)
        assert bench.delivered == 9


def test_refused_batch_of_1_retries_single(tmp_path):
    with Bench(tmp_path, (1,), delivery={"mode": "batch"}) as bench:
        bench.push(b"1")
        bench.answer_all(reply(400))
        assert bench.dead_letters() == []
        assert bench.sent(0)[1].body == b"1"
        bench.answer_all(reply(400))
        assert len(bench.dead_letters()) == 1


def test_single_packet_stays_single(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"mode": "batch", "connections": 1}) as bench:
        bench.push(b"1")
        first = 0 if bench.busy(0) else 1
        bench.answer_all(reply(400))
        bench.answer_all(reply(500))
        (request,) = bench.sent(1 - first)
        assert request.body == b"1"
        send_all(bench)
        assert bench.delivered == 1


# ---- sent too often


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("how", ["500", "429", "pause", "reset", "garbage", "stale"])
def test_max_attempts_ends_in_a_dead_letter(tmp_path, most, how):
    fast = {"base": 0.001, "cap": 0.001, "max_attempts": most}
    with Bench(tmp_path, (1, 1, 1), retry=fast, health={"fall": 10_000}) as bench:
        if how == "stale":
            bench.push(*[b"warm"] * 60)
            send_all(bench)
        warm = bench.pushed
        bench.push(b"x")
        for attempt in range(1, most + 1):
            assert bench.dead_letters() == []
            while not any(bench.busy(slot) for slot in range(3)):
                bench.pass_time(1.5 if how == "pause" else 0.01)
            (connection,) = (each for slot in range(3) for each in bench.busy(slot))
            assert connection.transport.requests[-1].headers["X-Attempt"] == str(attempt)
            name = connection.pool.analyzer.id
            if how in ("reset", "stale"):
                bench.lose(connection, OSError("reset"))
            elif how == "pause":
                bench.answer(connection, reply(503, "Retry-After: 1"))
            else:
                bench.answer(connection, b"\0" if how == "garbage" else reply(int(how)))
        (dead_letter,) = bench.dead_letters()
        status = {"500": 500, "429": 429, "pause": 503}.get(how)
        assert (dead_letter["id"], dead_letter["reason"], dead_letter["attempts"]) == (
            f"p{warm + 1}",
            "exhausted",
            most,
        )
        assert (dead_letter["analyzer"], dead_letter["status"]) == (name, status)
        assert dead_letter["error"]
        assert bench.count("exhausted") == 1
        assert bench.settled[-1] == (warm + 1, None)
        assert bench.dispatcher.retrying == {}
        bench.pass_time(60)
        assert bench.ring.undone == 0


@pytest.mark.parametrize(("most", "reason"), [(1, "exhausted"), (2, "refused"), (3, "refused")])
def test_refused_batch_counts_as_an_attempt(tmp_path, most, reason):
    """A packet is sent on its own afterwards only if it may be sent once more."""
    with Bench(tmp_path, (1,), delivery={"mode": "batch"}, retry={"max_attempts": most}) as bench:
        bench.push(b"1", b"2", b"3")
        while bench.answer_all(reply(422)):
            pass
        assert max(int(request.headers["X-Attempt"]) for request in bench.sent(0)) == min(most, 2)
        dead_letters = [(row["id"], row["reason"], row["attempts"], row["status"]) for row in bench.dead_letters()]
        assert sorted(dead_letters) == [(f"p{number}", reason, min(most, 2), 422) for number in (1, 2, 3)]
        assert bench.count(reason) == 3
        assert bench.count("retried") == (0 if most == 1 else 3)
        assert bench.ring.undone == bench.ring.claimed == 0


def test_attempts_of_an_earlier_life_count(tmp_path):
    with Bench(tmp_path, (1, 1), retry={"max_attempts": 5}) as bench:
        bench.push(b"x", attempts=4)
        bench.answer_all(reply(500))
        assert bench.dead_letters()[0]["attempts"] == 5


def test_failed_connect_is_no_attempt(tmp_path):
    with Bench(tmp_path, (1,), retry={"base": 0.01, "cap": 0.01, "max_attempts": 1}, health={"fall": 1000}) as bench:
        bench.pool(0).reachable = False
        bench.push(b"x")
        for _ in range(10):
            bench.pass_time(0.02)
        assert bench.dead_letters() == []
        bench.pool(0).reachable = True
        bench.pass_time(0.02)
        bench.answer_all()
        assert bench.delivered == 1
        assert bench.sent(0)[0].headers["X-Attempt"] == "1"


def test_no_limit_retries_until_delivered(tmp_path):
    with Bench(tmp_path, (1,), retry={"base": 0.001, "cap": 0.001}, health={"fall": 10_000}) as bench:
        bench.push(b"x")
        for _ in range(300):
            bench.answer_all(reply(500))
            bench.pass_time(0.01)
        bench.answer_all()
        assert bench.sent(0)[-1].headers["X-Attempt"] == "301"
        assert bench.dead_letters() == []


# ---- what cannot be written


class Obstacle:
    """Something that keeps dead letters from being written, until it is taken away."""

    def __init__(self, kind, bench, monkeypatch):
        self.kind, self.path, self.monkeypatch = kind, bench.folder / FOLDER, monkeypatch
        if kind == "a file in its place":
            self.path.write_bytes(b"")
        else:
            self.error = OSError({"full": errno.ENOSPC, "broken": errno.EIO}[kind], kind)
            self.monkeypatch.setattr("fastdist.storage.dead_letter_files.os.write", self.fail)

    def fail(self, *_):
        raise self.error

    def remove(self):
        self.path.unlink() if self.kind == "a file in its place" else self.monkeypatch.undo()


@pytest.mark.parametrize("kind", ["a file in its place", "full", "broken"])
@pytest.mark.parametrize("reason", ["refused", "exhausted"])
def test_unwritten_dead_letter_stays_queued(tmp_path, monkeypatch, kind, reason):
    with Bench(tmp_path, (1, 1), retry={"max_attempts": 1 if reason == "exhausted" else 0}) as bench:
        obstacle = Obstacle(kind, bench, monkeypatch)
        bench.push(b"1", b"2", b"3")
        bench.answer_all(reply(422 if reason == "refused" else 500))
        assert bench.dispatcher.dead_letter_writer.failed
        assert bench.ring.undone == 3
        assert bench.dead_lettered == 0
        assert bench.settled == []
        for _ in range(5):
            bench.pass_time(1.1)
        assert bench.dispatcher.dead_letter_writer.failed
        assert len(bench.sent(0)) + len(bench.sent(1)) == 3  # it is not sent again meanwhile
        bench.push(b"4")
        bench.answer_all()  # others are delivered all the same
        assert bench.delivered == 1
        obstacle.remove()
        assert bench.dispatcher.dead_letter_writer.failed
        bench.pass_time(1.1)
        assert not bench.dispatcher.dead_letter_writer.failed
        while bench.dispatcher.dead_letter_writer.unwritten:  # on a slow disk they do not fit into one part
            bench.tick()
        dead_letters = bench.dead_letters()
        assert {dead_letter["id"] for dead_letter in dead_letters} == {"p1", "p2", "p3"}
        assert len(dead_letters) == 3
        assert {(dead_letter["reason"], dead_letter["attempts"]) for dead_letter in dead_letters} == {(reason, 1)}
        assert bench.ring.undone == bench.ring.claimed == 0
        assert bench.count(reason) == 3
        assert sorted(bench.settled) == [(1, None), (2, None), (3, None)]


def test_half_a_dead_letter_is_taken_back(tmp_path, monkeypatch):
    """The disk fills up in the middle of a line."""
    write, sizes = os.write, [100, 7, 0, 0]

    def fill_up(fd, data):
        if not sizes:
            return write(fd, data)
        if size := sizes.pop(0):
            return write(fd, data[:size])
        raise OSError(errno.ENOSPC, "full")

    with Bench(tmp_path, (1,)) as bench:
        bench.push(b"1")
        bench.answer_all(reply(422))
        assert len(bench.dead_letters()) == 1
        bench.push(b"2" * 500)
        monkeypatch.setattr("fastdist.storage.dead_letter_files.os.write", fill_up)
        bench.answer_all(reply(422))
        assert [dead_letter["id"] for dead_letter in bench.dead_letters()] == ["p1"]
        bench.pass_time(1.1)
        assert [dead_letter["id"] for dead_letter in bench.dead_letters()] == ["p1"]
        bench.pass_time(1.1)
        assert [dead_letter["id"] for dead_letter in bench.dead_letters()] == ["p1", "p2"]


def test_dead_letters_keep_order_over_faults(tmp_path, monkeypatch):
    with Bench(tmp_path, (1,), delivery={"connections": 1, "pipeline": 10}) as bench:
        obstacle = Obstacle("full", bench, monkeypatch)
        bench.push(*[b"x"] * 5)
        for _ in range(4):
            bench.answer(bench.busy(0)[0], reply(400))
        obstacle.remove()
        bench.answer(bench.busy(0)[0], reply(400))  # the fifth finds it mended
        assert [dead_letter["id"] for dead_letter in bench.dead_letters()] == [f"p{n}" for n in range(1, 6)]
        assert not bench.dispatcher.dead_letter_writer.failed


# ---- what is left at the end


def test_remaining_become_dead_letters(tmp_path, monkeypatch):
    weights = (1, 1, 1)
    with Bench(tmp_path, weights, delivery={"connections": 2, "pipeline": 2}, health={"fall": 100}) as bench:
        obstacle = Obstacle("full", bench, monkeypatch)
        bench.push(*[b"x"] * 40)
        bench.answer(bench.busy(0)[0], reply(400))  # cannot be written yet
        bench.answer(bench.busy(0)[0])
        retired = bench.pool(2)
        del bench.analyzers[2]
        bench.dispatcher.set_analyzers(bench.analyzers)  # removed, with requests under way
        bench.loop.run()
        for slot in (0, 1):
            bench.answer(bench.busy(slot)[0], reply(500))
        obstacle.remove()
        in_flight = bench.pool(0).packets_in_flight + bench.pool(1).packets_in_flight + retired.packets_in_flight
        assert in_flight == 12
        assert bench.dispatcher.dead_letter_all() == bench.pushed - bench.delivered
        bench.loop.run()
        bench.check()
        dead_letters = bench.dead_letters()
        assert bench.ring.undone == 0
        assert {dead_letter["id"] for dead_letter in dead_letters} | {"p" + str(n) for n in range(1, 41)} == {
            f"p{n}" for n in range(1, 41)
        }
        assert len({dead_letter["id"] for dead_letter in dead_letters}) == len(dead_letters) == 40 - bench.delivered
        assert sorted({dead_letter["reason"] for dead_letter in dead_letters}) == ["refused", "shutdown"]
        left = next(dead_letter for dead_letter in dead_letters if dead_letter["reason"] == "shutdown")
        assert (left["analyzer"], left["status"], left["error"]) == (None, None, None)
        assert bench.count("shutdown") == len(dead_letters) - 1


def test_unwritable_dead_letter_is_an_error(tmp_path, monkeypatch):
    with Bench(tmp_path, (1,)) as bench:
        Obstacle("full", bench, monkeypatch)
        bench.push(b"x")
        with pytest.raises(OSError, match="full"):
            bench.dispatcher.dead_letter_all()
        assert bench.ring.undone == 1


def test_nothing_is_sent_after_the_end(tmp_path):
    with Bench(tmp_path, (1, 1), delivery={"connections": 1, "pipeline": 2}) as bench:
        bench.push(*[b"x"] * 10)

        def sent():
            return sum(len(each.transport.requests) for pool in bench.pools for each in pool.history)

        before = sent()
        bench.dispatcher.stop()
        bench.loop.run()
        assert sent() == before
        assert all(pool.opening == pool.open_connections == 0 for pool in bench.pools)
        assert bench.ring.undone == 10
