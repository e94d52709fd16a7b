"""Packets that are stored elsewhere: each is answered when that is known, whatever becomes of others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingest_harness import Service, keyed, post


class Replicated(Service):
    """A service whose packets are stored elsewhere, in the order in which they are taken out of the ring."""

    def __init__(self, **settings) -> None:
        super().__init__(replicated=True, **settings)
        self.taken: list[tuple[int, int, int]] = []  # (handle, where it begins and ends)

    def take(self) -> list[str]:
        """Take all packets out that are there; return their ids."""
        ids = []
        while True:
            begin = self.ring.claim_position
            handle = self.ring.claim()
            if not handle:
                return ids
            ids.append(self.ring.packet(handle).id)
            self.taken.append((handle, begin, self.ring.claim_position))

    def stored(self, count: int = 1) -> None:
        """Let the next packets be stored elsewhere."""
        for handle, _, end in self.taken[:count]:
            self.ring.done(handle)
            self.ring.mark_synced(end)
        del self.taken[:count]
        self.intake.synced()

    def failed(self, number: int) -> int:
        """Let one of the packets that were taken be stored nowhere; return how many answers that became."""
        _handle, begin, end = self.taken[number]
        return self.intake.not_stored(begin, 503, "Service Unavailable", b"Retry-After: 1\r\n", b"unknown", end=end)


def test_answer_waits_until_stored():
    service = Replicated()
    first, second = service.ask(keyed("a")), service.ask(keyed("b"))
    assert service.syncs_wanted
    assert service.take() == ["a", "b"]
    assert (first.written, second.written, service.accepted) == (b"", b"", 0)
    service.stored()
    assert (first.statuses, second.written, service.accepted) == ([202], b"", 1)
    service.stored()
    assert (second.statuses, service.accepted, service.ring.used) == ([202], 2, 0)


@pytest.mark.parametrize("number", range(3))
def test_one_of_them_is_not_stored(number):
    """Its client is told at once, all others when theirs are stored."""
    service = Replicated()
    connections = [service.ask(keyed(name)) for name in "abc"]
    service.take()
    assert service.failed(number) == 1
    assert service.ring.undone == 3
    service.stored(3)
    statuses = [connection.written[9:12] for connection in connections]
    assert statuses == [b"503" if each == number else b"202" for each in range(3)]
    assert service.accepted == 2


def test_answers_keep_their_order():
    service = Replicated()
    connection = service.ask(keyed("a") + keyed("b") + keyed("c") + post(b"{"))
    service.take()
    service.failed(1)
    assert connection.written == b""
    service.stored()
    assert [each[:3] for each in connection.written.split(b"HTTP/1.1 ")[1:]] == [b"202", b"503"]
    service.stored(2)
    assert [each[:3] for each in connection.written.split(b"HTTP/1.1 ")[1:]] == [b"202", b"503", b"202", b"400"]


def test_duplicate_has_another_answer():
    service = Replicated(remembers_keys=True)
    connection = service.ask(keyed("a") + post() + keyed("b"))
    other = service.ask(keyed("a"))
    service.take()
    assert list(service.intake.keyed) == [1, 3, 4]
    service.stored(3)
    assert connection.statuses == [202, 202, 202]
    text = b"HTTP/1.1 202 Accepted\r\nContent-Length: 9\r\n\r\nduplicate"
    service.intake.keyed.pop(4).complete_after_sync(text)
    assert other.written == b""
    service.stored()
    assert other.written == text


def test_answer_is_no_duplicate_without_keys():
    service = Replicated()
    assert service.intake.keyed is None
    connection = service.ask(keyed("a"))
    service.take()
    service.stored()
    assert connection.statuses == [202]


@given(st.lists(st.sampled_from(["packet", "pipelined", "take", "store", "fail"]), max_size=40))
def test_every_packet_has_its_own_answer(steps):
    service = Replicated()
    sent, lost, count = [], set(), 0
    for step in steps:
        if step in ("packet", "pipelined"):
            names = [f"k{count + each}" for each in range(1 if step == "packet" else 3)]
            count += len(names)
            sent.append((service.connect(), names))
            sent[-1][0].protocol.data_received(b"".join(map(keyed, names)))
        elif step == "take":
            service.take()
        elif step == "store":
            service.stored(2)
        elif service.taken:
            handle, *_ = service.taken[-1]
            name = service.ring.packet(handle).id
            service.failed(-1)
            lost.add(name)
    service.take()
    service.stored(len(service.taken))
    for connection, names in sent:
        statuses = [each[:3] for each in connection.written.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"503" if name in lost else b"202" for name in names]
    assert (service.accepted, service.intake.held, service.ring.used) == (count - len(lost), 0, 0)
