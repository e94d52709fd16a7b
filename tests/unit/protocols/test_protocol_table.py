"""The table: which request is for which protocol, with which token; and what the seam promises."""

from __future__ import annotations

import base64
import pickle

import pytest
from agents import convert, request
from hypothesis import given
from hypothesis import strategies as st

from fastdist.protocols.base import STATUSES, Reason, Refused
from fastdist.protocols.table import NAMES, PROTOCOLS, find


def test_names_are_those_of_the_setting():
    assert NAMES == ("json", "otlp", "loki", "splunk", "elasticsearch")


@pytest.mark.parametrize(
    ("method", "target", "name"),
    [
        ("POST", "/ingest", "json"),
        ("PUT", "/ingest/app?x=y", "json"),
        ("HEAD", "/ingest/", None),
        ("POST", "/ingest/a/b", None),
        ("POST", "/v1/logs", "otlp"),
        ("POST", "/v1/logs/", None),
        ("POST", "/loki/api/v1/push", "loki"),
        ("POST", "/services/collector/event/1.0", "splunk"),
        ("POST", "/_bulk?refresh=true", "elasticsearch"),
        ("POST", "/logs/_bulk", "elasticsearch"),
        ("POST", "/logs", None),
        ("GET", "/stats", None),
        ("POST", "/a/b/_bulk", None),
        ("POST", "//_bulk", None),
        ("POST", "/" + "x" * 5000 + "/_bulk", None),
        ("POST", "/logs/_docs", None),
        ("OPTIONS", "*", None),
    ],
)
def test_paths_are_found(method, target, name):
    found = find(method, target, {}, NAMES)
    assert (found and found.protocol.name) == name


@given(st.text(max_size=30))
def test_any_target_may_be_looked_for(target):
    find("POST", "/" + target, {}, NAMES)


def test_a_protocol_that_is_off_has_no_paths():
    assert find("POST", "/_bulk", {}, [name for name in NAMES if name != "elasticsearch"]) is None


@pytest.mark.parametrize(
    ("target", "allow"),
    [
        ("/ingest", ["POST", "PUT", "GET", "HEAD", "OPTIONS"]),
        ("/v1/logs", ["POST", "OPTIONS"]),
        ("/_license", ["GET", "HEAD", "OPTIONS"]),
    ],
)
def test_a_wrong_method_is_told_which(target, allow):
    found = find("DELETE", target, {}, NAMES)
    assert (found.take, found.reply, found.allow) == (None, None, allow)


def protocol(name):
    return PROTOCOLS[NAMES.index(name)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("authorization", "tokens"),
    [
        ("Bearer T", ["T"]),
        ("bEaReR  T ", ["T"]),
        ("Basic " + base64.b64encode(b"user:T:x").decode(), ["T:x"]),
        ("basic " + base64.b64encode(b"user").decode(), [""]),
        ("Basic !", [""]),
        ("Digest T", []),
        ("", []),
    ],
)
def test_tokens_come_in_forms_of_all(name, authorization, tokens):
    assert protocol(name).tokens({"authorization": authorization}) == tokens


def test_tokens_come_in_forms_of_protocols():
    key = base64.b64encode(b"id:T").decode()
    assert protocol("splunk").tokens({"authorization": "splunk T"}) == ["T"]
    assert protocol("elasticsearch").tokens({"authorization": "ApiKey T"}) == ["T"]
    assert protocol("elasticsearch").tokens({"authorization": f"apikey {key}"}) == [key, "T"]
    assert protocol("json").tokens({"authorization": "Splunk T"}) == []
    assert protocol("otlp").tokens({}) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_response(name, reason):
    each = protocol(name)
    reply = each.refuse(request(each.routes[0].path), Refused(reason, "é \ud800", record=3, headers=b"Allow: POST\r\n"))
    assert reply.status in {STATUSES[reason], 429}
    assert reply.body
    assert b"Content-Type: " in reply.headers
    assert b"Allow: POST\r\n" in reply.headers
    assert reply.headers.endswith(b"\r\n")


def test_values_may_go_to_another_process():
    asked = request("/ingest", b'{"message":"m"}')
    batch = convert("/ingest", b'{"message":"m"}')
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert pickle.loads(pickle.dumps(batch)) == batch
    refused = pickle.loads(pickle.dumps(Refused(Reason.DRAINING, "x", record=2, retry_after=4, headers=b"a")))
    assert (refused.reason, refused.detail, refused.record, refused.retry_after) == (Reason.DRAINING, "x", 2, 4)
