"""Elasticsearch: bulk line by line, the exact bytes of its responses, documents, and what clients ask before."""

from __future__ import annotations

import json

import pytest
from agents import RECEIVED, answer, convert, document, header, message, messages, packets, refusal, request, route
from hypothesis import example, given
from hypothesis import strategies as st

from fastdist.protocols.base import STATUSES, Reason, Refused
from fastdist.protocols.table import NAMES, find

SHARDS = '"_shards":{"total":1,"successful":1,"failed":0},"_seq_no":0,"_primary_term":1'


def bulk(*lines, end=b"\n"):
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + end for line in lines)


def items(batch):
    return [item for each in document(batch.reply)["items"] for item in each.items()]


def test_response_is_what_agents_look_for():
    body = bulk(
        {"index": {"_index": "logs", "_id": "1"}}, {"message": "a"}, {"create": {"_index": "x"}}, {"message": "b"}
    )
    reply = convert("/_bulk", body).reply
    assert reply.status == 200
    assert reply.body.decode() == (
        '{"took":0,"errors":false,"items":['
        '{"index":{"_index":"logs","_id":"1","_version":1,"result":"created",' + SHARDS + ',"status":201}},'
        '{"create":{"_index":"x","_id":"186cc6acdc0bcd15-1","_version":1,"result":"created",'
        + SHARDS
        + ',"status":201}}'
        "]}"
    )
    assert header(reply, "X-Elastic-Product") == "Elasticsearch"
    assert header(reply, "Content-Type") == "application/json"


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/x-ndjson",
        "",
        "text/json",
        "application/vnd.elasticsearch+x-ndjson;compatible-with=8",
    ],
)
def test_documents_are_mapped(end, kind):
    source = {
        "@timestamp": "2024-01-02T03:04:05.678Z",
        "message": "hello",
        "log": {"level": "warn", "file": {"path": "/var/log/x"}},
        "host": {"name": "web-1"},
        "n": 2**63,
    }
    batch = convert(
        "/logs/_bulk?filter_path=x", bulk({"create": {"_id": "7"}}, source, end=end), content_type=kind, method="PUT"
    )
    assert packets(batch)[0]["emitterId"] == "web-1"
    assert messages(batch) == [
        {
            "timestamp": "2024-01-02T03:04:05.678Z",
            "level": "warn",
            "message": "hello",
            "source": "/var/log/x",
            "metadata": {"log": source["log"], "host": source["host"], "n": 2**63, "_index": "logs", "_id": "7"},
        }
    ]


def test_other_keys_of_an_action_are_ignored():
    body = bulk({"index": {"_index": "a", "op_type": "create", "pipeline": None}, "attempts": 0}, {"message": "m"})
    assert [name for name, _ in items(convert("/_bulk", body))] == ["index"]


def test_updates_have_doc_or_upsert():
    body = bulk(
        {"update": {"_id": "1", "_index": "i"}}, {"doc": {"message": "a"}, "doc_as_upsert": True},
        {"update": {"_id": "2", "_index": "i"}}, {"upsert": {"message": "b"}, "script": {}},
        {"update": {"_id": "3", "_index": "i"}}, {"script": {}},
    )  # fmt: skip
    batch = convert("/_bulk", body)
    assert [one["message"] for one in messages(batch)] == ["a", "b"]
    assert [item["status"] for _, item in items(batch)] == [200, 200, 400]


@pytest.mark.parametrize(
    "source", [b"[1]", b"5", b'"x"', b"null", b"{", b"", b"{}{}", b'{"a":\xff}', b'{"a":' * 200 + b"1" + b"}" * 200]
)
def test_a_bad_source_is_its_own_error(source):
    create = {"create": {"_index": "i"}}
    batch = convert("/_bulk", bulk(create, {"message": "a"}, create, source, create, {"message": "b"}))
    assert [one["message"] for one in messages(batch)] == ["a", "b"]
    assert [item["status"] for _, item in items(batch)] == [201, 400, 201]
    assert b'"errors":true' in batch.reply.body
    assert batch.refused == 1
    error = items(batch)[1][1]["error"]
    assert error["type"]
    assert error["reason"]


def test_a_delete_is_its_own_error():
    batch = convert(
        "/_bulk", bulk({"delete": {"_index": "i", "_id": "1"}}, {"index": {"_index": "i"}}, {"message": "a"})
    )
    assert [(name, item["status"]) for name, item in items(batch)] == [("delete", 400), ("index", 201)]


@pytest.mark.parametrize(
    ("lines", "record"),
    [
        ([], None),
        ([b"", b"\r"], None),
        ([{"index": {}}], 0),
        ([{"index": {}}, {"a": 1}, {"index": {}}], 1),
        ([{"foo": {}}, {}], 0),
        ([b"{", b"{}"], 0),
        ([b"[]", b"{}"], 0),
        ([{"index": 5}, {}], 0),
        ([{"index": {}}, {"a": 1}, b"x"], 1),
        ([{}], 0),
    ],
)
def test_a_broken_bulk_is_400(lines, record):
    error, reply = refusal("/_bulk", bulk(*lines))
    assert (error.reason, error.record, reply.status) == (Reason.MALFORMED, record, 400)
    problem = document(reply)
    assert problem["status"] == 400
    assert problem["error"]["root_cause"] == [{"type": problem["error"]["type"], "reason": problem["error"]["reason"]}]


sources = st.dictionaries(
    st.sampled_from(["message", "host", "level", "_id", "x"]), st.integers() | st.text(max_size=9), max_size=4
)
actions = st.sampled_from(["index", "create"])


@given(
    st.lists(
        st.tuples(actions, st.sampled_from(["i", "j"]), st.none() | st.text(min_size=1, max_size=4), sources),
        min_size=1,
    )
)
@example([("index", "i", None, {"message": str(n)}) for n in range(1000)])
def test_every_document_comes_out_in_order(documents):
    lines = []
    for number, (action, index, identity, source) in enumerate(documents):
        given_id = {} if identity is None else {"_id": identity}
        lines += [{action: {"_index": index, **given_id}}, source | {"number": number}]
    batch = convert("/_bulk", bulk(*lines))
    assert batch.records == len(documents)
    assert sorted(one["metadata"]["number"] for one in messages(batch)) == list(range(len(documents)))
    for each in packets(batch):
        numbers = [one["metadata"]["number"] for one in each["messages"]]
        assert numbers == sorted(numbers)
    for (name, item), (action, index, identity, _) in zip(items(batch), documents, strict=True):
        assert (name, item["_index"], item["status"]) == (action, index, 201)
        assert item["_id"] == identity or identity is None
    assert len(
        {item["_id"] for (_, item), each in zip(items(batch), documents, strict=True) if each[2] is None}
    ) == sum(each[2] is None for each in documents)


@given(st.binary(max_size=200))
def test_noise_is_a_batch_or_400(body):
    try:
        convert("/_bulk", body)
    except Refused as error:
        assert error.reason is Reason.MALFORMED  # noqa: PT017 - the other outcome is no exception


@pytest.mark.parametrize(
    ("method", "path", "identity"),
    [("POST", "/my-index/_doc", None), ("PUT", "/my-index/_create/a%2Fb", "a/b"), ("PUT", "/my-index/_doc/7", "7")],
)
def test_one_document(method, path, identity):
    batch = convert(path, b'{"message":"m"}', method=method)
    assert document(batch.reply)["_index"] == "my-index"
    assert (batch.reply.status, document(batch.reply)["result"]) == (201, "created")
    assert identity is None or document(batch.reply)["_id"] == identity
    one = message(path, b'{"message":"m"}', method=method)
    assert one == {"emitterId": "my-index", "timestamp": RECEIVED, "level": "info", "message": "m"} | {
        "metadata": {"_index": "my-index"} | ({} if identity is None else {"_id": identity})
    }


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"{", b'{"a":1}{"b":2}'])
def test_what_is_no_document_is_400(body):
    assert refusal("/i/_doc", body)[1].status == 400


def test_client_checks():
    root = answer("/", accept="application/vnd.elasticsearch+json; compatible-with=8")
    version = document(root)["version"]
    assert version["number"].startswith("8.")
    assert version["build_flavor"] == "default"
    assert document(root)["tagline"] == "You Know, for Search"
    assert document(answer("/_license"))["license"]["status"] == "active"
    assert document(answer("/_license"))["license"]["type"] == "basic"
    assert document(answer("/_cluster/health?local=true"))["status"] == "green"
    assert document(answer("/_xpack"))["features"]["ilm"] == {"available": False, "enabled": False}
    assert answer("/logs/_refresh", method="POST").status == 200


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ({"host": "logs.example:3000"}, "logs.example:3000"),
        ({"host": "[::1]"}, "[::1]:80"),
        ({"host": "logs.example", "x-forwarded-proto": "https"}, "logs.example:443"),
    ],
)
def test_the_node_is_where_it_was_asked(headers, address):
    nodes = document(answer("/_nodes/http", **{name.replace("-", "_"): value for name, value in headers.items()}))
    assert [node["http"]["publish_address"] for node in nodes["nodes"].values()] == [address]


@pytest.mark.parametrize(
    "path",
    [
        "/_ilm/policy/filebeat",
        "/_index_template/x",
        "/_template/x",
        "/_component_template/x",
        "/_ingest/pipeline/x",
        "/_data_stream/x",
    ],
)
def test_what_agents_would_set_up_exists(path):
    assert document(answer(path)) == {}
    assert answer(path, method="HEAD").status == 200
    assert document(answer(path, method="PUT")) == {"acknowledged": True}


def test_the_root_is_not_for_browsers():
    assert find("GET", "/", {"accept": "text/html,*/*"}, NAMES) is None
    assert find("GET", "/", {"accept": "*/*"}, NAMES) is None
    assert find("POST", "/", {}, NAMES) is None
    assert find("GET", "/", {}, NAMES) is None
    assert find("GET", "/", {"user-agent": "Mozilla/5.0"}, NAMES) is None
    for agent in ("logstash/8.11.0 (OS=Linux) logstash-output-elasticsearch/11.22.2", "Vector/0.42.0 (x86_64 linux)"):
        assert find("HEAD", "/", {"user-agent": agent}, NAMES) is not None
    for agent in ("go-elasticsearch/7.17.10 (linux amd64)", "elasticsearch-java/7.17.9", "elasticsearch-ruby/8.1"):
        assert find("GET", "/", {"user-agent": agent}, NAMES) is not None
        assert find("GET", "/", {"user-agent": agent, "accept": "*/*"}, NAMES) is not None
        assert find("GET", "/", {"user-agent": agent, "accept": "text/html"}, NAMES) is None


def test_every_response_names_the_product():
    protocol = next(route(request(path)).protocol for path in ["/_bulk"])
    for each in protocol.routes:
        for reply in each.reply.values():
            assert header(reply(request("/"), ""), "X-Elastic-Product") == "Elasticsearch"
    for reason in Reason:
        assert header(protocol.refuse(request("/_bulk"), Refused(reason, "x")), "X-Elastic-Product") == "Elasticsearch"


@pytest.mark.parametrize("reason", Reason)
def test_errors_have_a_type(reason):
    asked = request("/_bulk")
    reply = route(asked).protocol.refuse(asked, Refused(reason, "what is wrong", retry_after=3))
    busy = STATUSES[reason] == 503
    assert reply.status == (429 if busy else STATUSES[reason])
    kind = document(reply)["error"]["type"]
    assert (kind == "es_rejected_execution_exception") == busy
    assert (kind == "security_exception") == (reply.status == 401)
    assert header(reply, "Retry-After") == ("3" if busy else None)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-protobuf", "application/octet-stream"])
def test_other_types_are_415(kind):
    assert refusal("/_bulk", b"", content_type=kind)[1].status == 415
