"""Where TCP cuts the stream into reads changes nothing: not what is answered, not what is stored."""

from __future__ import annotations

import itertools
import random

import pytest
from ingest_harness import ADDRESS, BODY, CONTINUE, Service, corpus, head, keyed, normalised, post_chunked, read_answers

CORPUS = corpus()
OF_AGENTS = {"agents": 2, "agents, chunked": 1, "agents, encoded": 1}  # packets that were answered otherwise than 202
SERVER = {"max_header": 1024, "max_body": 4096}


@pytest.fixture(scope="module")
def service():
    return Service(**SERVER, security={"cors_origins": ("https://ops.example",)})


def outcome(service, *reads):
    """Return all that an emitter and the queue get to see, but for 100s: they depend on when the body comes."""
    before = {field: service.counters.get(field) for field in ("accepted", "messages_accepted", "bytes_accepted")}
    refused = service.rejected
    connection = service.connect().send(*reads)
    protocol, transport = connection.protocol, connection.transport
    after = service.rejected
    seen = (
        normalised(connection.written.replace(CONTINUE, b"")),
        [(packet.body, packet.messages, packet.emitter) for packet in service.packets()],
        {field: service.counters.get(field) - value for field, value in before.items()},
        {reason: count - refused.get(reason, 0) for reason, count in after.items() if count != refused.get(reason)},
        (transport.reading, transport.half_closed, transport.closed, transport.aborted),
        protocol.idle(),
        protocol.responses,
    )
    connection.lose()
    return seen


def pieces(data, *places):
    cuts = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


@pytest.mark.parametrize("name", CORPUS)
def test_two_reads_are_as_good_as_one(service, name):
    data = CORPUS[name]
    whole = outcome(service, data)
    for place in range(1, len(data)):
        assert outcome(service, *pieces(data, place)) == whole, (place, data[:place][-20:], data[place:][:20])


@pytest.mark.parametrize("name", CORPUS)
def test_single_bytes_equal_one_read(service, name):
    data = CORPUS[name]
    assert outcome(service, *pieces(data, *range(1, len(data)))) == outcome(service, data)


@pytest.mark.parametrize("name", CORPUS)
def test_any_reads_are_as_good_as_one(service, name):
    data, chance = CORPUS[name], random.Random(name)
    whole = outcome(service, data)
    for _ in range(30):
        places = chance.sample(range(1, len(data)), min(chance.randint(2, 12), len(data) - 1))
        assert outcome(service, *pieces(data, *places)) == whole, sorted(places)


def test_the_corpus_holds_what_it_says(service):
    """So that the tests above compare something: what becomes of each, spelled out."""
    statuses = {}
    for name, data in CORPUS.items():
        connection = service.connect().send(data)
        methods = {
            "health": ("GET", "HEAD"),
            "head of logs": ("HEAD",),
            "broken head of HEAD": ("POST", "HEAD"),
        }.get(name, ())
        statuses[name] = [answer.status for answer in read_answers(connection.written, *methods)]
        stored = len(service.packets())
        assert stored == statuses[name].count(202) + OF_AGENTS.get(name, 0), name
        connection.lose()
    assert statuses == {
        "plain": [202],
        "keyed": [202],
        "every header": [202],
        "odd spacing": [202],
        "empty lines before": [202, 202],
        "absolute form": [202],
        "pair": [202, 202],
        "triple": [202, 400, 202],
        "bad, then good": [400, 400, 202],
        "chunked": [202],
        "chunked, pipelined": [202, 202],
        "chunk extensions, trailers": [202, 202],
        "chunked and empty": [400, 202],
        "empty": [400, 202],
        "no length": [400, 202],
        "expect": [202, 202],
        "expect, chunked": [202, 202],
        "expect and refused": [415],
        "expect something else": [417, 202],
        "health": [200, 200, 200],
        "head of logs": [405, 202],
        "options": [204, 204, 202],
        "not found, with a body": [404, 202],
        "not allowed": [405, 405, 202],
        "unknown method": [405, 202],
        "http/1.0": [202],
        "http/1.0, kept alive": [202, 202],
        "close": [202],
        "h2c": [202],
        "media type": [415, 202],
        "encoded": [415, 202],
        "bad key": [400, 202],
        "too large": [413],
        "too large, chunked": [413],
        "refused and too large, chunked": [415],
        "head too large": [202, 431],
        "head too large, and bad beyond": [202, 431],
        "head too large, and bad before": [202, 400],
        "trailers too large": [431],
        "two lengths": [202, 400],
        "length and coding": [202, 400],
        "unknown coding": [202, 501],
        "future version": [202, 505],
        "control character": [202, 400],
        "control character later": [202, 400],
        "broken head of HEAD": [202, 400],
        "bare line feed": [202, 400],
        "bare line feed later": [202, 400],
        "bare carriage return": [202, 400],
        "folded line": [202, 400],
        "bad chunk": [202, 400],
        "bad chunk of what is refused": [415],
        "not http": [400],
        "cut short": [202],
        "agents": [202, 200, 202, 204],
        "agents, chunked": [200, 202],
        "agents, encoded": [200, 202],
        "packet, encoded": [202, 202],
        "agents, other methods": [200, 204, 202],
    }


# ---- 100 (Continue): the one thing that does depend on the reads


@pytest.mark.parametrize(
    "data",
    [keyed("k", BODY, "Expect: 100-continue"), post_chunked(BODY, lines=("Expect: 100-continue",))],
    ids=["length", "chunked"],
)
def test_100_is_sent_only_before_the_body(service, data):
    body_at = data.index(b"\r\n\r\n") + 4
    for place in range(1, len(data)):
        connection = service.connect().send(*pieces(data, place))
        (answer,) = connection.answers()
        assert answer.status == 202
        assert answer.interims == (place == body_at), place
        connection.lose()
    service.packets()


def test_100_comes_after_head_before_body(service):
    data = keyed("k", BODY, "Expect: 100-continue")
    body_at = data.index(b"\r\n\r\n") + 4
    connection = service.connect(ADDRESS).send(data[:body_at])
    assert connection.written == CONTINUE
    connection.send(data[body_at:])
    assert connection.answer().status == 202
    assert service.bodies() == [BODY]


def test_100_keeps_the_order_of_requests(service):
    waiting = head("POST /logs", "Expect: 100-continue", f"Content-Length: {len(BODY)}")
    connection = service.connect().send(keyed("first") + waiting, BODY + keyed("third"))
    first, second, third = connection.answers()
    assert (first.id, third.id) == ("first", "third")
    assert (first.interims, second.interims, third.interims) == (0, 1, 0)
    service.packets()
