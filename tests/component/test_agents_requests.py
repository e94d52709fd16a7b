"""Agents' requests: answered as their protocols have it, stored whole or not at all, in the order of the connection."""

from __future__ import annotations

import base64
import gzip
import itertools
import random
import zlib

import orjson
import pytest
from agents_harness import JSON, REQUESTS, ask, connect, counted, counted_at_all, texts
from ingest_harness import BODY, Service, head, keyed, normalised, post, read_answers

NAMES = list(REQUESTS)
each = pytest.mark.parametrize("name", NAMES)
TOKENS = {"security": {"tokens": ("secret",)}}


def stored(service):
    return service.accepted, service.counters.get("messages_accepted")


@pytest.mark.parametrize("disk", [False, True])
@each
def test_records_are_stored(name, disk):
    service, sent = Service(disk=disk), REQUESTS[name]
    connection = ask(service, sent.request())
    answer = connection.answer()
    assert answer.status == sent.status
    assert connection.open
    assert connection.protocol.idle()
    assert stored(service) == (1, 2)
    assert service.accepts == 1
    assert service.rejected == {}
    assert counted_at_all(service) == {name: (2, {sent.status: 1})}
    assert service.intake.bodies == 0
    assert texts(service) == ["one", "two"]


@each
def test_wherever_it_is_cut(name):
    sent = REQUESTS[name]
    data = sent.request() + keyed("k")
    for place in range(1, len(data)):
        service = Service()
        connection = ask(service, data[:place], data[place:])
        assert connection.statuses == [sent.status, 202], place
        assert stored(service) == (2, 4)
        assert connection.protocol.idle()
        connection.lose()


@each
def test_single_bytes(name):
    service, sent = Service(), REQUESTS[name]
    data = sent.packed().request() + sent.chunked(1, 2, 30)
    connection = ask(service, *(data[at : at + 1] for at in range(len(data))))
    assert connection.statuses == [sent.status] * 2
    assert texts(service) == ["one", "two"] * 2


@each
@pytest.mark.parametrize("fsync", [False, True])
def test_order_of_a_pipeline(name, fsync):
    service, sent = Service(fsync=fsync), REQUESTS[name]
    wrong = sent.with_body(b"\x00{").request()
    requests = [keyed("a"), sent.request(), keyed("b"), wrong, head("GET /health"), sent.request(), keyed("c")]
    connection = ask(service, b"".join(requests))
    service.sync()
    assert connection.statuses == [202, sent.status, 202, 400, 200, sent.status, 202]
    assert [packet.id for packet in service.packets() if len(packet.id) == 1] == ["a", "b", "c"]
    assert stored(service) == (5, 10)
    assert counted(service, name) == (4, {sent.status: 2, 400: 1})


@each
def test_framing_is_that_of_packets(name):
    service, sent = Service(), REQUESTS[name]
    assert ask(service, sent.request("Expect: 100-continue")[: -len(sent.body)], sent.body).answer().interims == 1
    old = head(f"POST {sent.target} HTTP/1.0", *sent.lines, f"Content-Length: {len(sent.body)}", host=None)
    connection = ask(service, old + sent.body)
    assert (connection.answer().status, connection.transport.closed) == (sent.status, True)
    kept = head(
        f"POST {sent.target} HTTP/1.0", *sent.lines, f"Content-Length: {len(sent.body)}", "Connection: keep-alive"
    )
    connection = ask(service, (kept + sent.body) * 2)
    assert [answer.headers["connection"] for answer in connection.answers()] == ["keep-alive"] * 2
    connection = ask(service, sent.request("Connection: close"))
    assert connection.answer().closes
    assert ask(service, sent.request("Expect: much")).answer().status == 417
    assert ask(service, sent.chunked()[:-5] + b"x\r\n").answer().status == 400
    assert stored(service) == (5, 10)


@each
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_encoded_bodies(name, coding):
    service, sent = Service(max_body=4096), REQUESTS[name]
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    packed = sent.with_body(pack(sent.body), f"Content-Encoding: {coding}")
    bomb = sent.with_body(pack(bytes(10**6)), f"Content-Encoding: {coding}")
    unknown = sent.with_body(sent.body, "Content-Encoding: br")
    connection = ask(service, packed.request() + bomb.request() + unknown.request() + packed.request())
    assert connection.statuses == [sent.status, 413, 415, sent.status]
    assert connection.answers()[2].headers["accept-encoding"] == "gzip, deflate, zstd, snappy"
    assert service.rejected == {"too_large": 1, "unsupported_media_type": 1}
    assert stored(service) == (2, 4)
    assert service.intake.bodies == 0


@each
def test_request_without_records(name):
    service, sent = Service(disk=True), REQUESTS[name]
    bodies = {"json": b"[]", "otlp": b"{}", "loki": b'{"streams":[]}'}
    connection = ask(service, sent.with_body(bodies.get(name, b"")).request())
    expected = sent.status if name in bodies else 400
    assert connection.answer().status == expected
    assert stored(service) == (0, 0)
    assert counted(service, name) == (0, {expected: 1})


# ---- refusals


@each
def test_large_bodies(name):
    service, sent = Service(max_body=1000), REQUESTS[name]
    large = sent.with_body(bytes(1001))
    connection = ask(service, large.request()[:-1001])
    assert connection.answer().status == 413
    assert connection.transport.half_closed
    assert ask(service, large.chunked()).answer().status == 413
    assert service.rejected == {"too_large": 2}
    assert counted(service, name) == (0, {413: 2})


@each
def test_tokens(name):
    service, sent = Service(**TOKENS), REQUESTS[name]
    basic = base64.b64encode(b"any:secret").decode()
    good = ["Bearer secret", "bearer  secret", f"Basic {basic}"]
    good += {"splunk": ["Splunk secret"], "elasticsearch": ["ApiKey secret", f"ApiKey {basic}"]}.get(name, [])
    connection = connect(service)
    for credentials in good:
        connection.send(sent.request(f"Authorization: {credentials}"))
    assert connection.statuses == [sent.status] * len(good)
    bad = [(), ("Authorization: Bearer wrong",), ("Authorization: Digest secret",)]
    answers = [answer for lines in bad for answer in ask(service, sent.request(*lines)).answers()]
    assert {answer.status for answer in answers} <= {401, 403}
    assert all("www-authenticate" in answer.headers for answer in answers if answer.status == 401)
    assert service.rejected == {"unauthorized": 3}
    assert stored(service) == (len(good), 2 * len(good))


def test_token_is_looked_at_before_the_body():
    service, sent = Service(**TOKENS), REQUESTS["splunk"]
    connection = ask(service, sent.request("Expect: 100-continue")[: -len(sent.body)])
    assert connection.answer().json["code"] == 2
    assert connection.transport.half_closed


@each
def test_limits(name):
    service, sent = Service(limits={"rate": 1e-9, "burst": 1}), REQUESTS[name]
    connection = ask(service, sent.request() * 2)
    assert connection.statuses == [sent.status, sent.busy]
    assert int(connection.answers()[1].headers["retry-after"]) >= 1
    assert service.rejected == {"rate_limited": 1}


@each
@pytest.mark.parametrize(
    ("state", "counter"), [("closed", "draining"), ("broken_storage", "storage")], ids=["draining", "storage"]
)
def test_nothing_can_be_stored(name, state, counter):
    service, sent = Service(), REQUESTS[name]
    setattr(service.intake, state, True)
    connection = ask(service, sent.request() * 2)
    assert connection.statuses == [sent.busy] * 2
    assert connection.answers()[0].headers["retry-after"] == "1"
    assert service.rejected == {counter: 2}
    assert counted(service, name) == (0, {sent.busy: 2})


@each
def test_draining_answers_one_more(name):
    service, sent = Service(), REQUESTS[name]
    connection = connect(service)
    service.intake.draining = True
    connection.send(sent.request() * 2)
    assert connection.answer().closes
    assert stored(service) == (1, 2)


@each
def test_protocols_are_switched_off(name):
    service = Service(protocols=tuple(other for other in NAMES if other != name))
    for other, sent in REQUESTS.items():
        assert ask(service, sent.request()).answer().status == (404 if other == name else sent.status)


def test_methods():
    service = Service(security={"cors_origins": ("https://ops.example",)})
    assert ask(service, head("GET /ingest")).answer().status == 200
    (answer,) = ask(service, head("HEAD /ingest")).answers("HEAD")
    assert answer.status == 200
    answer = ask(service, head("DELETE /v1/logs")).answer()
    assert (answer.status, answer.headers["allow"]) == (405, "POST, OPTIONS")
    assert ask(service, head("OPTIONS /v1/logs")).answer().headers["allow"] == "POST, OPTIONS"
    preflight = ["Origin: https://ops.example", "Access-Control-Request-Method: POST"]
    answer = ask(service, head("OPTIONS /services/collector", *preflight)).answer()
    assert answer.headers["access-control-allow-origin"] == "https://ops.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    sent = REQUESTS["json"]
    assert "access-control-allow-origin" in ask(service, sent.request(preflight[0])).answer().headers
    assert service.rejected == {}


def test_probes():
    service = Service(**TOKENS)
    assert ask(service, head("GET /services/collector/health")).answer().json["code"] == 17
    answer = ask(service, head("GET /", "Accept: application/json")).answer()
    assert answer.headers["x-elastic-product"] == "Elasticsearch"
    assert answer.json["tagline"] == "You Know, for Search"
    assert ask(service, head("GET /")).answer().headers["content-type"].startswith("text/html")


def test_elasticsearch_answers_name_product():
    service = Service(**TOKENS, max_body=100)
    sent = REQUESTS["elasticsearch"]
    requests = [sent.request(), sent.with_body(bytes(200)).request("Authorization: Bearer secret")[:-200]]
    for request in (*requests, head("GET /_bulk"), head("GET /_license")):
        assert ask(service, request).answer().headers["x-elastic-product"] == "Elasticsearch"


def test_shapes_of_refusals():
    service = Service(max_body=100)

    def refuse(name, *lines):
        return ask(service, REQUESTS[name].with_body(bytes(101), *lines).request()[:-101]).answer()

    assert refuse("json").json["status"] == 413
    assert refuse("otlp").json["code"] == 3
    protobuf = head("POST /v1/logs", "Content-Type: application/x-protobuf", "Content-Length: 101")
    answer = ask(service, protobuf).answer()
    assert (answer.headers["content-type"], answer.body[:1]) == ("application/x-protobuf", b"\x08")
    assert refuse("loki").headers["content-type"].startswith("text/plain")
    assert refuse("splunk").json["code"] == 27
    assert refuse("elasticsearch").json["status"] == 413


def test_fault_of_the_program():
    service, sent = Service(), REQUESTS["splunk"]
    agents = service.emitters.agents
    agents.limits = None
    connection = ask(service, sent.request() + keyed("k"))
    assert connection.statuses == [500, 202]
    assert connection.answers()[0].json["code"] == 8


# ---- heads that are templates


def test_fields_of_every_request_count():
    service = Service()
    connection = connect(service)
    for emitter in ("a", "b", "c"):
        connection.send(post(b'{"message":"x"}', JSON, f"X-Emitter-Id: {emitter}", first="POST /ingest"))
    connection.send(post(b"x", "Content-Type: text/plain", first="POST /ingest"))
    connection.send(keyed("k") * 2)
    emitters = [orjson.loads(body)["emitterId"] for body in service.bodies()]
    assert emitters == ["a", "b", "c", "192.0.2.1", "web-1", "web-1"]


def test_lengths_of_a_template():
    service = Service()
    connection = connect(service)
    bodies = [b'{"message":"%s"}' % (b"x" * count) for count in range(200)]
    connection.send(b"".join(post(body, JSON, first="POST /ingest") for body in bodies))
    assert connection.statuses == [200] * 200
    assert [len(text) for text in texts(service)] == list(range(200))


# ---- packets that are encoded


def packed(body=BODY, *lines):
    return post(gzip.compress(body), "Content-Encoding: gzip", *lines)


@pytest.mark.parametrize("fsync", [False, True])
def test_encoded_packets(fsync):
    service = Service(fsync=fsync)
    connection = service.ask(keyed("a") + packed(BODY, "Idempotency-Key: b") + keyed("c"))
    service.sync()
    assert connection.statuses == [202] * 3
    assert [answer.id for answer in connection.answers()] == ["a", "b", "c"]
    assert service.bodies() == [BODY] * 3
    assert counted_at_all(service) == {}


def test_encoded_packets_that_are_none():
    service = Service(max_body=4096)
    requests = [
        post(b"\x00", "Content-Encoding: gzip"),
        packed(b"{}"),
        packed(b""),
        packed(bytes(5000)),
        post(BODY, "Content-Encoding: br"),
        packed(BODY, "Content-Type: text/plain"),
        packed(),
    ]
    connection = service.ask(b"".join(requests))
    assert connection.statuses == [400, 400, 400, 413, 415, 415, 202]
    assert service.rejected == {"malformed": 2, "invalid": 1, "too_large": 1, "unsupported_media_type": 2}
    assert service.bodies() == [BODY]


def test_encoded_packets_at_every_split():
    data, chance = packed() + keyed("k") + packed(b"{"), random.Random(1)
    whole = Service().ask(data)
    assert read_answers(whole.written)
    for _ in range(100):
        cuts = sorted(chance.sample(range(1, len(data)), 4))
        reads = [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]
        assert normalised(Service().ask(*reads).written) == normalised(whole.written)


def test_events_before_a_fault_are_stored():
    service = Service()
    events = b'{"event":"one"}{"event":"two"}{"event":""}'
    answer = ask(service, post(events, first="POST /services/collector")).answer()
    assert (answer.status, answer.json["code"], answer.json["invalid-event-number"]) == (400, 13, 2)
    assert counted(service, "splunk") == (2, {400: 1})
    assert service.rejected == {"invalid": 1}
    assert len(service.bodies()) == 1
