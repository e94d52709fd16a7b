"""Splunk HEC: events and raw lines, codes, probes."""

from __future__ import annotations

import gzip
import json

import pytest
from agents import RECEIVED, answer, convert, document, header, message, messages, packets, refusal, request, route
from hypothesis import given
from hypothesis import strategies as st

from fastdist.protocols.base import Reason, Refused

EVENT = "/services/collector/event"
RAW = "/services/collector/raw"


@pytest.mark.parametrize("path", ["", "/", "/event", "/event/1.0"])
def test_events_are_taken_at_all_paths(path):
    batch = convert("/services/collector" + path, b'{"event":"a"}{"event":"b"}\n{"event":"c"}')
    assert [one["message"] for one in messages(batch)] == ["a", "b", "c"]
    assert (batch.reply.status, batch.reply.body) == (200, b'{"text":"Success","code":0}')


def test_an_event_is_mapped():
    body = {
        "time": "1433188255.253",
        "host": "web",
        "source": "/log",
        "sourcetype": "st",
        "index": "main",
        "event": {"message": "hello", "severity": "WARN", "n": 1},
        "fields": {"a": "b"},
    }
    assert message(EVENT, gzip.compress(json.dumps(body).encode()), content_encoding="gzip") == {
        "emitterId": "web",
        "timestamp": "2015-06-01T19:50:55.253Z",
        "level": "warn",
        "message": "hello",
        "source": "/log",
        "metadata": {
            "time": "1433188255.253",
            "sourcetype": "st",
            "index": "main",
            "event": {"severity": "WARN", "n": 1},
            "fields": {"a": "b"},
        },
    }


@pytest.mark.parametrize(
    ("event", "text", "rest"),
    [
        ("line", "line", None),
        (" ", " ", None),
        ({"msg": "m"}, "m", None),
        ({"log": "l", "x": 1}, "l", {"x": 1}),
        ({"x": 1}, '{"x":1}', {"x": 1}),
        (5, "5", 5),
        ([1], "[1]", [1]),
        (False, "false", False),
        ({}, "{}", None),
    ],
)
def test_text_of_an_event(event, text, rest):
    one = message(EVENT, json.dumps({"event": event}).encode())
    assert one.pop("emitterId") == "splunk"
    assert one == {"timestamp": RECEIVED, "level": "info", "message": text} | (
        {} if rest is None else {"metadata": {"event": rest}}
    )


values = st.recursive(
    st.booleans() | st.integers() | st.text(min_size=1, max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(values, min_size=1, max_size=9))
def test_every_event_comes_out(events):
    batch = convert(
        EVENT, b"".join(json.dumps({"event": event, "fields": {"n": n}}).encode() for n, event in enumerate(events))
    )
    assert [one["metadata"]["fields"]["n"] for one in messages(batch)] == list(range(len(events)))


@pytest.mark.parametrize(
    ("body", "code", "number"),
    [
        (b"", 5, None),
        (b" \n", 5, None),
        (b"{}", 12, 0),
        (b'{"event":null}', 12, 0),
        (b'{"event":""}', 13, 0),
        (b"event", 6, 0),
        (b"5", 6, 0),
        (b'{"event":"a"', 6, 0),
    ],
)
def test_codes_of_faults(body, code, number):
    _, reply = refusal(EVENT, body)
    assert reply.status == 400
    assert document(reply)["code"] == code
    assert document(reply).get("invalid-event-number") == number
    assert document(reply)["text"]


@pytest.mark.parametrize(("bad", "code"), [(b'{"event":""}', 13), (b"{}", 12), (b"{", 6), (b"7", 6)])
def test_events_before_a_bad_one_are_stored(bad, code):
    batch = convert(EVENT, b'{"event":"a"}{"event":"b"}' + bad + b'{"event":"c"}')
    assert [one["message"] for one in messages(batch)] == ["a", "b"]
    assert (batch.reply.status, batch.refused) == (400, 1)
    assert document(batch.reply)["code"] == code
    assert document(batch.reply)["invalid-event-number"] == 2


@pytest.mark.parametrize("path", ["/raw", "/raw/1.0"])
def test_raw_lines_are_records(path):
    batch = convert(
        f"/services/collector{path}?host=h%201&source=s&sourcetype=t&index=i&x=y",
        b" one\r\n\n\ntwo",
        x_splunk_request_channel="c",
    )
    assert [one["message"] for one in messages(batch)] == [" one", "two"]
    assert messages(batch)[0] | {"metadata": {"sourcetype": "t", "index": "i"}, "source": "s"} == messages(batch)[0]
    assert packets(batch)[0]["emitterId"] == "h 1"
    assert packets(batch)[0]["metadata"]["channel"] == "c"
    assert batch.reply.status == 200


def test_raw_without_lines_has_no_data():
    assert document(refusal(RAW, b"\n\n")[1])["code"] == 5


def test_health_says_when_it_is_full():
    for path in ("/services/collector/health", "/services/collector/health/1.0"):
        assert (answer(path).status, document(answer(path))["code"]) == (200, 17)
        assert (answer(path, obstacle="full").status, document(answer(path, obstacle="full"))["code"]) == (503, 18)


def test_probes_of_docker_and_acks():
    assert answer(EVENT, method="OPTIONS").status == 200
    reply = answer("/services/collector/ack", method="POST")
    assert (reply.status, document(reply)["code"]) == (400, 14)


@pytest.mark.parametrize(
    ("authorization", "status", "code"),
    [(None, 401, 2), ("Digest x", 401, 3), ("Splunk", 401, 3), ("Splunk wrong", 403, 4), ("bearer wrong", 403, 4)],
)
def test_refused_tokens_have_codes(authorization, status, code):
    asked = request(EVENT, **({} if authorization is None else {"authorization": authorization}))
    reply = route(asked).protocol.refuse(asked, Refused(Reason.UNAUTHORIZED, "a token is needed"))
    assert (reply.status, document(reply)["code"]) == (status, code)
    assert (header(reply, "WWW-Authenticate") is not None) == (status == 401)


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (Reason.QUEUE_FULL, 503, 9),
        (Reason.RATE_LIMITED, 503, 9),
        (Reason.DRAINING, 503, 9),
        (Reason.TOO_LARGE, 413, 27),
        (Reason.UNSUPPORTED, 415, 6),
        (Reason.METHOD, 405, 6),
    ],
)
def test_errors_have_codes(reason, status, code):
    asked = request(EVENT)
    reply = route(asked).protocol.refuse(asked, Refused(reason, "what is wrong", retry_after=7))
    assert (reply.status, document(reply)["code"]) == (status, code)
    assert header(reply, "Retry-After") == ("7" if status == 503 else None)
