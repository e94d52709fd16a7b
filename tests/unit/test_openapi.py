"""The API's description: valid, complete against the code, and every example what its schema says."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import openapi_spec_validator
import orjson
import pytest
from openapi_description import (
    AGENTS,
    ANSWERED_OUTSIDE,
    DOCUMENT,
    EVERYWHERE,
    METHODS,
    PATHS,
    concrete,
    errors_of,
    resolved,
)

import fastdist
from fastdist.exchange import Request
from fastdist.http.api import Api, description
from fastdist.http.models import Rejected
from fastdist.packet import check
from fastdist.protocols.base import Limits, finish
from fastdist.protocols.table import NAMES as NAMES_OF_PROTOCOLS
from fastdist.protocols.table import PROTOCOLS, find
from fastdist.shm.snapshot import REJECTIONS

SOURCES = Path(fastdist.__file__).parent
OPERATIONS = [
    (path, method, operation) for path, item in PATHS.items() for method, operation in item.items() if method in METHODS
]
NAMES = [f"{method} {path}" for path, method, _ in OPERATIONS]


def test_it_is_valid_openapi_3_1():
    assert DOCUMENT["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(DOCUMENT)


def test_it_is_what_is_served():
    response = Api(lambda: pytest.fail("no figure is needed")).respond("GET", "/openapi.json", {}, b"")
    assert response.status == 200
    assert response.headers == b"Content-Type: application/json\r\n"
    assert response.body == description()
    assert orjson.loads(response.body) == DOCUMENT == orjson.loads((SOURCES / "http" / "openapi.json").read_bytes())


def test_it_is_what_its_sources_say():
    script = SOURCES.parent.parent / "scripts" / "generate_openapi.py"
    subprocess.run([sys.executable, script, "--check"], check=True)


# ---- complete


def test_each_route_describes_its_methods():
    api = Api(lambda: pytest.fail("no figure is needed"))
    taken = {path: set(api._methods(concrete(path))) for path in (*api.routes, *api.ELSEWHERE)}
    described = {path: {method.upper() for method in item if method in METHODS} for path, item in PATHS.items()}
    assert described == taken


def test_agents_routes_describe_methods():
    taken = {
        route.path: {*route.take, *route.reply}
        for protocol in PROTOCOLS
        for route in protocol.routes
        if not route.for_json
    }
    described = {path: {method.upper() for method in item} for path, item in DOCUMENT["paths"].items()}
    assert {path: methods for path, methods in described.items() if path not in PATHS} == {
        path: methods for path, methods in taken.items() if path not in ("/v1/traces", "/v1/metrics")
    }
    names = [each["operationId"] for item in DOCUMENT["paths"].values() for each in item.values()]
    assert len(set(names)) == len(names)


AGENTS_OPERATIONS = [(path, method, each) for path, item in AGENTS.items() for method, each in item.items()]


@pytest.mark.parametrize(
    ("path", "operation"), [each[::2] for each in AGENTS_OPERATIONS], ids=[f"{m} {p}" for p, m, _ in AGENTS_OPERATIONS]
)
def test_agents_operations_are_complete(path, operation):
    assert operation["summary"]
    assert operation["description"]
    assert operation["responses"].keys() >= EVERYWHERE - {"503"} | {"404"}
    declared = {resolved(each)["name"] for each in operation.get("parameters", []) if resolved(each)["in"] == "path"}
    assert declared == set(re.findall(r"\{(\w+)\}", path))
    if "requestBody" not in operation:
        return
    assert operation["responses"].keys() >= {"401", "415", "502", "503"}
    contents = [*resolved(operation["requestBody"])["content"].items()]
    for status, answer in ((status, resolved(each)) for status, each in operation["responses"].items()):
        assert answer["description"]
        assert {"Date", "X-Content-Type-Options", "Cache-Control"} <= answer["headers"].keys()
        assert status == "204" or any("examples" in media for media in answer["content"].values())
        contents += answer.get("content", {}).items()
    for kind, media in contents:
        assert "schema" in media or kind == "application/x-protobuf"


def converted(path, kind, example):
    """Return what an example of a request becomes."""
    body = example.encode() if isinstance(example, str) else orjson.dumps(example)
    asked = Request("POST", concrete(path), {"content-type": kind}, body, "192.0.2.7", 1)
    found = find(asked.method, asked.target, asked.headers, NAMES_OF_PROTOCOLS)
    return finish(found.take(asked, Limits(1 << 20, 1 << 20, 1 << 22)))


def test_agents_request_examples_are_taken():
    count = 0
    for path, method, operation in AGENTS_OPERATIONS:
        if method != "post" or "requestBody" not in operation:
            continue
        for kind, media in resolved(operation["requestBody"])["content"].items():
            for each in media.get("examples", {}).values():
                batch = converted(path, kind, each["value"])
                assert batch.records > 0
                assert str(batch.reply.status) in operation["responses"]
                count += 1
    assert count > 15


def statuses_in_python(source: str):
    """Yield what a module answers: arguments, ``status=``, and what a function returns first."""
    for node in ast.walk(ast.parse(source)):
        numbers = []
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("problem", "Response", "RefusedError", "refuse", "fault"):
                numbers = [*node.args[:1], *(each.value for each in node.keywords if each.arg == "status")]
            elif name == "json_response":
                numbers = node.args[1:]
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            numbers = node.value.elts[:1]
        for number in numbers:
            if isinstance(number, ast.Constant) and isinstance(number.value, int) and 200 <= number.value <= 599:
                yield number.value


def statuses_in_the_code():
    found = {}
    for module in (
        "http/api",
        "http/admin",
        "worker/ingest",
        "worker/waits",
        "worker/main",
        "worker/admin",
        "supervisor/main",
        "supervisor/reload",
    ):
        for status in statuses_in_python((SOURCES / f"{module}.py").read_text()):
            found.setdefault(status, module)
    for part in ("ingest", "http"):
        text = (SOURCES / "core" / f"{part}.pxi").read_text()
        for number in re.findall(r"(?:\.(?:refuse|fault|malformed)|^    [A-Z_]+: )\((\d{3})\b", text, re.MULTILINE):
            found.setdefault(int(number), part)
    return found


def test_every_status_in_code_is_described():
    found = statuses_in_the_code()
    assert {202, 400, 408, 413, 429, 431, 501, 505} <= found.keys(), "the search does not find what is there"
    described = {int(status) for _, _, operation in OPERATIONS for status in operation["responses"]}
    missing = {status: where for status, where in found.items() if status not in described | ANSWERED_OUTSIDE}
    assert missing == {}
    assert described - found.keys() == set(), "described, but nowhere answered"


@pytest.mark.parametrize(("method", "operation"), [each[1:] for each in OPERATIONS], ids=NAMES)
def test_common_responses_are_on_every_route(method, operation):
    assert operation["responses"].keys() >= EVERYWHERE
    for status, answer in ((status, resolved(each)) for status, each in operation["responses"].items()):
        assert answer["description"]
        assert {"Date", "X-Content-Type-Options", "Cache-Control"} <= answer["headers"].keys()
        content = answer.get("content", {})
        if method == "head" or status in ("204", "304"):
            continue
        assert content, f"{status} has no body"
        if int(status) >= 400:
            assert content.keys() == {"application/problem+json"}


@pytest.mark.parametrize(("path", "operation"), [each[::2] for each in OPERATIONS], ids=NAMES)
def test_operations_have_distinct_ids(path, operation):
    assert operation["summary"]
    assert operation["description"]
    assert operation["tags"]
    same = [other for _, _, other in OPERATIONS if other["operationId"] == operation["operationId"]]
    assert len(same) == 1
    declared = {resolved(each)["name"] for each in operation.get("parameters", []) if resolved(each)["in"] == "path"}
    assert declared == set(re.findall(r"\{(\w+)\}", path))


def test_nothing_unused_is_described():
    text = json.dumps(DOCUMENT)
    for kind, names in DOCUMENT["components"].items():
        for name in names:
            if kind != "securitySchemes":
                assert f'"#/components/{kind}/{name}"' in text, (kind, name)


# ---- examples


def examples():
    """Yield name, schema and value of every example there is."""

    def walk(node, where):
        if isinstance(node, list):
            for number, each in enumerate(node):
                yield from walk(each, f"{where}/{number}")
        if not isinstance(node, dict):
            return
        schema = node.get("schema")
        if isinstance(schema, dict):
            yield from ((f"{where}/{name}", schema, each["value"]) for name, each in node.get("examples", {}).items())
            if "example" in node:
                yield where, schema, node["example"]
        elif isinstance(node.get("examples"), list):
            yield from ((where, node, value) for value in node["examples"])
        for name, each in node.items():
            if name not in ("example", "examples"):
                yield from walk(each, f"{where}/{name}")

    return list(walk(DOCUMENT, ""))


EXAMPLES = examples()


@pytest.mark.parametrize(("schema", "value"), [each[1:] for each in EXAMPLES], ids=[each[0] for each in EXAMPLES])
def test_examples_are_what_their_schemas_say(schema, value):
    assert errors_of(schema, value) == []


def test_inputs_and_headers_have_examples():
    contents = [
        (name, status, media)
        for name, (_, _, operation) in zip(NAMES, OPERATIONS, strict=True)
        for status, answer in operation["responses"].items()
        for media in resolved(answer).get("content", {}).values()
    ]
    assert [(name, status) for name, status, media in contents if not media.get("examples")] == []
    for kind in ("parameters", "headers"):
        for name, each in DOCUMENT["components"][kind].items():
            assert each.get("examples") or "example" in each, name
    for name, (_, _, operation) in zip(NAMES, OPERATIONS, strict=True):
        for media in operation.get("requestBody", {}).get("content", {}).values():
            assert media["examples"], name


# ---- the packet


def test_examples_of_packets_are_taken():
    media = DOCUMENT["paths"]["/logs"]["post"]["requestBody"]["content"]["application/json"]
    for each in media["examples"].values():
        check(orjson.dumps(each["value"]))


def test_all_rejection_reasons_are_listed():
    assert Rejected.__struct_fields__ == (*REJECTIONS, "unconfirmed")
