"""Sending: every packet accepted once, in whatever way the distributor answers; and what is recorded of it."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from fakes import ACCEPTED, problem
from support import wait_until

from fastdist.client import retry, send
from fastdist.client.connection import Connection, Target
from fastdist.client.logfile import Trail
from fastdist.client.offsets import OffsetFile, Position
from fastdist.client.packing import MIN_PACKET_BYTES, Recipe, Style
from fastdist.client.send import Shipper

BUSY = problem(503, "the queue is full", Retry_After="0")


class Listener:
    """Remembers what it is told."""

    def __init__(self):
        self.sources, self.packets, self.waits, self.notes, self.stops = [], [], [], [], 0

    def begin(self, source):
        self.sources.append(source)

    def accepted(self, packet):
        self.packets.append(packet)

    def waiting(self, why, seconds):
        self.waits.append((why, seconds))

    def stopping(self):
        self.stops += 1

    def note(self, text):
        self.notes.append(text)


class Rig:
    """A log of so many lines, two to a packet, and how to send it."""

    def __init__(self, path, distributor):
        self.path, self.offset_path = path, path.with_suffix(".offset")
        self.distributor = distributor
        self.shipper = None

    def fill(self, lines):
        self.path.write_bytes(b"".join(b"line %d\n" % number for number in range(lines)))
        return self

    def make(self, *, connections=3, patience=60.0, url=None, token=None):
        self.events = Listener()
        self.shipper = Shipper(Target.parse(url or self.distributor.url, token), connections, patience, self.events)
        return self.shipper

    def send(self, *, offsets=False, follow=False, recipe=None, **options):
        shipper = self.make(**options)
        trail = Trail(self.path, recipe or Recipe(Style("e", "log"), 2, MIN_PACKET_BYTES), self.events.note)
        if not offsets:
            return shipper.run(trail.sources(None, shipper.is_stopping), None, follow=follow)
        with OffsetFile(self.offset_path) as held:
            return shipper.run(trail.sources(held, shipper.is_stopping), held, follow=follow)

    def in_background(self, **options):
        self.summary = None

        def run():
            self.summary = self.send(**options)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    @property
    def noted(self):
        text = self.offset_path.read_text()
        return json.loads(text) if text else {"offset": None}

    def arrived(self):
        """Return the lines that were accepted, in the order of the log."""
        bodies = {headers["Idempotency-Key"]: json.loads(body) for _, headers, body in self.distributor.requests}
        accepted = sorted((bodies[name] for name in self.distributor.accepted), key=lambda b: b["metadata"]["offset"])
        return [message["message"] for body in accepted for message in body["messages"]]

    def is_whole(self):
        return self.arrived() == self.path.read_text().splitlines()


@pytest.fixture
def rig(tmp_path, distributor):
    return Rig(tmp_path / "app.log", distributor)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(retry, "MIN_BACK_OFF", 0.01)
    monkeypatch.setattr(retry, "MAX_BACK_OFF", 0.05)
    monkeypatch.setattr(send, "LOOK_EVERY", 0.02)


def test_every_line_arrives_once(rig, distributor):
    summary = rig.fill(101).send()
    assert rig.is_whole()
    assert set(distributor.accepted.values()) == {1}
    assert (summary.packets, summary.messages, summary.bytes) == (51, 101, rig.path.stat().st_size)
    assert (summary.retries, summary.stopped, summary.unsent) == (0, None, 0)
    assert {packet.id for packet in rig.events.packets} == distributor.accepted.keys()
    assert distributor.connections <= 3, "they are kept"


def test_the_request_is_that_of_an_emitter(rig, distributor):
    rig.fill(1).send(token="secret", url=f"{distributor.url}/behind/a/proxy/")
    ((path, headers, body),) = distributor.requests
    assert path == "/behind/a/proxy/logs"
    assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", "Bearer secret")
    assert json.loads(body)["messages"] == [{"message": "line 0"}]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_transient_failure_retries_same_id(rig, distributor, status):
    distributor.script = {}
    distributor.otherwise = ACCEPTED
    first = threading.Event()

    def first_answer_is_another():
        distributor.otherwise = ACCEPTED if first.is_set() else problem(status, "not now")
        first.set()

    distributor.before_answer = first_answer_is_another
    summary = rig.fill(20).send(connections=1)
    assert rig.is_whole()
    assert set(distributor.accepted.values()) == {1}
    assert summary.retries == 1
    assert len(distributor.requests) == 11
    assert rig.events.waits[0][0] == f"answers {status} (not now)"


def test_broken_connection_is_opened_again(rig, distributor):
    """Every fifth answer fails to come: some packets may be there twice, under the same id."""
    numbers = iter(range(1000))
    answer = distributor.answer

    def sometimes(path, headers, body):
        given = answer(path, headers, body)
        return None if next(numbers) % 5 == 3 else given

    distributor.answer = sometimes
    summary = rig.fill(100).send()
    assert rig.is_whole()
    assert summary.retries > 5
    assert sum(distributor.accepted.values()) == 50 + summary.retries


def test_retry_after_holds_all_connections(rig, distributor):
    """The clock of the back-off is watched, not that on the wall: nothing is asked while it says so."""
    distributor.otherwise = problem(429, "too many", Retry_After="1")
    numbers, all_have_asked = iter(range(1000)), threading.Barrier(4, timeout=30)
    answer = distributor.answer

    def together(path, headers, body):
        if next(numbers) < 4:
            all_have_asked.wait()  # else one might be told to wait when the back-off of another is over
        return answer(path, headers, body)

    distributor.answer = together
    thread = rig.fill(40).in_background(connections=4)
    wait_until(lambda: rig.events.waits if rig.shipper else None, "a back-off")
    distributor.otherwise = ACCEPTED
    asked = len(distributor.requests)
    back_off = rig.shipper._back_off
    assert asked <= 4
    while back_off._until > time.monotonic():
        assert len(distributor.requests) <= 4, "some were under way when the back-off began"
        time.sleep(0.01)
    thread.join(30)
    assert rig.is_whole()
    assert any(0.9 < seconds <= 1 for _, seconds in rig.events.waits)


def test_absent_distributor_is_given_up(rig):
    rig.fill(10)
    summary = rig.send(url="http://127.0.0.1:1", patience=0.1)
    assert summary.stopped == "http://127.0.0.1:1 cannot be reached: Connection refused; given up, try again later"
    assert not summary.permanent
    assert summary.messages == 0


def test_retry_after_over_patience_gives_up(rig, distributor):
    distributor.otherwise = problem(503, "maintenance", Retry_After="3600")
    summary = rig.fill(10).send(patience=60)
    assert "answers 503 (maintenance) and asks to wait 3600 s; given up" in summary.stopped


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_refusal_ends_send_and_skips_nothing(rig, distributor, status):
    answer = distributor.answer

    def one(path, headers, body):
        return problem(status, "/messages/0: no") if b"line 4" in body else answer(path, headers, body)

    distributor.answer = one
    summary = rig.fill(40).send(offsets=True, connections=2)
    assert summary.permanent
    assert f"refuses the 2 messages of bytes 28 to 42: {status} (/messages/0: no)" in summary.stopped
    assert ("--batch-bytes" in summary.stopped) == (status == 413)
    assert (rig.noted["offset"], rig.noted["planned"][0]) == (28, 42)
    distributor.answer = answer
    rig.send(offsets=True)
    assert rig.is_whole()


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (problem(400, "a plain HTTP request was sent to a port that takes HTTPS only"), "it speaks TLS"),
        (problem(401, "no token"), "give one with --token, or in FASTDIST_TOKEN"),
        (problem(403, "no"), "is the token right?"),
        (problem(404, "no"), "is that the URL of a distributor?"),
        ((301, {"Location": "http://x/"}, b""), "is that the URL of a distributor?"),
    ],
)
def test_permanent_error_is_not_retried(rig, distributor, answer, advice):
    distributor.otherwise = answer
    summary = rig.fill(40).send(connections=1)
    assert summary.permanent
    assert advice in summary.stopped
    assert len(distributor.requests) == 1


def test_wrong_token_is_asked_about(rig, distributor):
    distributor.otherwise = problem(401, "this token is not known")
    assert rig.fill(40).send(connections=1, token="x").stopped.endswith("; is the token right?")


def test_https_to_a_plain_port_ends_at_once(rig, distributor):
    url = distributor.url.replace("http:", "https:")
    summary = rig.fill(40).send(connections=1, url=url)
    assert (summary.permanent, summary.retries) == (True, 0)
    assert summary.stopped == f"{url} does not speak TLS; use http:// in the URL"


@pytest.mark.parametrize("read", [1 << 16, 1])
def test_http_to_any_tls_port_ends_at_once(rig, read):
    """Of a server that answers with a TLS alert; what it has not read makes its close a reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(read)
                connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        summary = rig.fill(2).send(connections=1, url=url)
    assert (summary.permanent, summary.retries) == (True, 0)
    assert summary.stopped == f"{url} speaks TLS; use https:// in the URL"


# -------------------------------------------------------------------------------------------------------------- offsets


def test_too_large_part_is_recut_next_run(rig, distributor):
    """A packet that was refused is no longer planned, nor is what was planned and never posted."""
    answer, largest = distributor.answer, 400

    def only_small_ones(path, headers, body):
        return problem(413, "too large") if len(body) > largest else answer(path, headers, body)

    distributor.answer = only_small_ones
    rig.fill(400)
    large, small = (Recipe(Style("e", "log"), most, MIN_PACKET_BYTES) for most in (50, 5))
    summary = rig.send(offsets=True, connections=3, recipe=large)
    assert "--batch-bytes" in summary.stopped
    assert len(rig.noted["planned"]) <= 3
    assert set(rig.noted["cuts"]) == {0}
    assert rig.send(offsets=True, connections=3, recipe=small).stopped is None
    assert rig.is_whole()
    assert set(distributor.accepted.values()) == {1}


def test_a_plan_outlives_runs_that_end_early(rig, distributor):
    """However few of the packets in doubt a run came to, and however the next one cuts what follows."""
    answer = distributor.answer

    def first_is_refused(path, headers, body):
        if b'"line 0"' in body:
            wait_until(lambda: len(distributor.accepted) >= 10, "others are accepted")
            return problem(413, "too large")
        return answer(path, headers, body)

    distributor.answer = first_is_refused
    assert rig.fill(100).send(offsets=True, connections=6).stopped
    planned = rig.noted["planned"]
    assert len(planned) > 10
    for _ in range(2):
        assert rig.send(offsets=True, connections=1).stopped
        assert rig.noted["planned"] == planned
    distributor.answer = answer
    other = Recipe(Style("e", "log"), 5, MIN_PACKET_BYTES)
    assert rig.send(offsets=True, recipe=other).stopped is None
    assert rig.is_whole()
    assert rig.noted["planned"] == []


def test_accepted_after_refusal_keeps_its_id(rig, distributor):
    """The packets behind the refused one are in doubt only for the log: analyzers have them under their ids."""
    answer = distributor.answer
    others = threading.Event()

    def first_is_refused(path, headers, body):
        if b'"line 0"' in body:
            others.wait(30)
            return problem(413, "too large")
        return answer(path, headers, body)

    distributor.answer = first_is_refused
    thread = rig.fill(12).in_background(offsets=True, connections=2)
    wait_until(lambda: sum(distributor.accepted.values()) == 5, "all others are accepted")
    others.set()
    thread.join(30)
    beyond = set(distributor.accepted)
    distributor.answer = answer
    rig.send(offsets=True, recipe=Recipe(Style("e", "log"), 1, MIN_PACKET_BYTES))
    assert {name for name, times in distributor.accepted.items() if times == 2} == beyond
    assert len(distributor.accepted) == 7, "the first in two, the others as they were"


def test_removed_offset_file_is_rewritten(rig, monkeypatch):
    """Also when there is nothing new to record."""
    monkeypatch.setattr(send, "RECORD_EVERY", 0.05)
    thread = rig.fill(5).in_background(offsets=True, follow=True)
    size = rig.path.stat().st_size
    wait_until(lambda: rig.offset_path.exists() and rig.noted["offset"] == size, "it is recorded")
    rig.offset_path.unlink()
    wait_until(lambda: rig.offset_path.exists() and rig.noted["offset"] == size, "it is there again")
    rig.shipper.stopping = True
    thread.join(30)


def test_offset_file_of_another_ends_send(rig, monkeypatch):
    monkeypatch.setattr(send, "RECORD_EVERY", 0.05)
    thread = rig.fill(5).in_background(offsets=True, follow=True)
    wait_until(lambda: rig.offset_path.exists() and rig.noted["offset"], "it is recorded")
    with OffsetFile(rig.path.with_suffix(".another")) as other:
        other.save(Position("another", 1, 2, "x"))
        other.path.rename(rig.offset_path)
        thread.join(30)
        assert "in use by another fastdist send" in rig.summary.stopped
        assert rig.noted["file"] == "another"


def test_packet_is_planned_before_it_is_sent(rig, distributor):
    seen = {}
    answer = distributor.answer

    def look(path, headers, body):
        noted = rig.noted  # read once: the next record may come between two looks
        seen[json.loads(body)["metadata"]["offset"]] = {noted["offset"], *noted["planned"]}
        return answer(path, headers, body)

    distributor.answer = look
    rig.fill(100).send(offsets=True)
    assert len(seen) == len(rig.events.packets) == 50
    for packet in rig.events.packets:
        assert {packet.offset, packet.end} <= seen[packet.offset]


def test_offset_at_end_is_that_of_the_log(rig):
    rig.fill(101).send(offsets=True)
    assert rig.noted["offset"] == rig.path.stat().st_size
    assert rig.noted["planned"] == []
    assert rig.send(offsets=True).messages == 0


def test_the_offset_has_no_gap(rig, distributor):
    """The first packet waits while others are accepted: nothing counts but what is before it."""
    go_on = threading.Event()
    answer = distributor.answer

    def first_waits(path, headers, body):
        if b"line 0" in body:
            go_on.wait(30)
        return answer(path, headers, body)

    distributor.answer = first_waits
    thread = rig.fill(100).in_background(offsets=True, connections=2)
    wait_until(lambda: len(distributor.accepted) >= 6, "others are accepted")
    wait_until(lambda: rig.shipper._window[0].packet.offset == 0, "the first is awaited")
    assert rig.noted["offset"] == 0
    assert len(rig.shipper._window) <= 2 * send.WINDOW, "memory is bounded"
    go_on.set()
    thread.join(30)
    assert rig.is_whole()
    assert set(distributor.accepted.values()) == {1}


def test_unwritable_offset_file_ends_send(rig, distributor):
    rig.fill(100)
    rig.offset_path.with_name("app.offset.tmp").mkdir()
    summary = rig.send(offsets=True)
    assert summary.stopped == f"cannot write {rig.offset_path}: Is a directory"
    assert distributor.requests == [], "nothing is sent that was not planned"


def test_following_records_offsets_regularly(rig, monkeypatch):
    monkeypatch.setattr(send, "RECORD_EVERY", 0.05)
    thread = rig.fill(5).in_background(offsets=True, follow=True)
    size = rig.path.stat().st_size
    wait_until(lambda: rig.offset_path.exists() and rig.noted["offset"] == size, "it is recorded")
    assert rig.noted["planned"] == []
    rig.shipper.stopping = True
    thread.join(30)
    assert rig.summary.messages == 5


# ------------------------------------------------------------------------------------------------------------- stopping


def test_stop_finishes_what_is_in_flight(rig, distributor):
    go_on = threading.Event()
    distributor.before_answer = lambda: go_on.wait(30)
    thread = rig.fill(1000).in_background(offsets=True, connections=2)
    wait_until(lambda: rig.shipper and sum(slot.posted for slot in rig.shipper._window) == 2, "two are under way")
    rig.shipper.stopping = True
    wait_until(lambda: rig.events.stops, "it says so")
    go_on.set()
    thread.join(30)
    assert (rig.summary.packets, rig.summary.stopped) == (2, None)
    assert rig.noted["offset"] > 0
    rig.send(offsets=True)
    assert rig.is_whole()
    assert set(distributor.accepted.values()) == {1}


def test_followed_log_is_sent_as_far_as_read(rig, distributor):
    go_on = threading.Event()
    distributor.before_answer = lambda: go_on.wait(30)
    thread = rig.fill(11).in_background(follow=True, connections=1)
    wait_until(lambda: rig.shipper and rig.shipper._in_flight, "one is under way")
    rig.shipper.stopping = True
    wait_until(lambda: rig.events.stops, "it says so")
    go_on.set()
    thread.join(30)
    assert rig.is_whole()


def test_a_fault_in_a_thread_is_not_hidden(rig, monkeypatch):
    def fault(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(Connection, "post", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        rig.fill(10).send()


def test_empty_lines_at_end_are_passed_over(rig, distributor):
    rig.path.write_bytes(b"one\ntwo\n\n\n\n")
    summary = rig.send(offsets=True)
    assert (summary.packets, summary.bytes, summary.tally) == (1, 11, {"empty": 3})
    assert rig.noted["offset"] == 11
    assert len(distributor.requests) == 1
