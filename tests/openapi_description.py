"""The API's description as tests use it: resolved, and as a judge of what the service really answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from fastdist.http.api import description

if TYPE_CHECKING:
    from collections.abc import Mapping

DOCUMENT: dict[str, Any] = orjson.loads(description())
# Without those of log agents, which have shapes of their own: AGENTS.
PATHS = {
    path: item
    for path, item in DOCUMENT["paths"].items()
    if all("agents" not in each["tags"] for each in item.values())
}
AGENTS = {path: item for path, item in DOCUMENT["paths"].items() if path not in PATHS}
METHODS = ("get", "head", "options", "post", "put", "patch", "delete", "trace")
EVERYWHERE = {"400", "408", "413", "417", "431", "501", "503", "505"}  # whatever the path
# 404 and 405 also where no operation is described; 500 is a fault of the program; 504 is what the supervisor's silence
# is called between processes.
ANSWERED_OUTSIDE = {405, 500, 504}
UNNAMED_HEADERS = {"content-type", "content-length"}  # OpenAPI has other words for them

_URI = "urn:description"
_REGISTRY = Registry().with_resource(_URI, Resource.from_contents(DOCUMENT, DRAFT202012))


def resolved(node: Any) -> Any:
    """Return what a reference stands for."""
    while "$ref" in node:
        target: Any = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part.replace("~1", "/").replace("~0", "~")]
        node = target
    return node


def _absolute(node: Any) -> Any:
    if isinstance(node, list):
        return [_absolute(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        name: f"{_URI}{value}" if name == "$ref" and isinstance(value, str) else _absolute(value)
        for name, value in node.items()
    }


def errors_of(schema: Any, value: Any) -> list[str]:
    """Return what is wrong with a value according to a schema of the description."""
    validator = Draft202012Validator(
        _absolute(schema), registry=_REGISTRY, format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def undescribed(schema: Any, value: Any, where: str = "$") -> list[str]:
    """Return the members of a value that its schema does not name."""
    schema = resolved(schema)
    for each in schema.get("anyOf", ()):
        if value is not None and resolved(each).get("type") != "null":
            return undescribed(each, value, where)
    if isinstance(value, list):
        return [
            line for n, each in enumerate(value) for line in undescribed(schema.get("items", {}), each, f"{where}[{n}]")
        ]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    missing = [f"{where}.{name}" for name in value if name not in known]
    return missing + [
        line for name in value if name in known for line in undescribed(known[name], value[name], f"{where}.{name}")
    ]


def concrete(path: str) -> str:
    """Return a path that belongs to a described one, and exists."""
    return re.sub(r"\{\w+\}", "x", path.replace("{id}", "A1").replace("{file}", "app.js"))


def operation_of(method: str, path: str) -> tuple[str, dict[str, Any]]:
    """Return the described path that a path belongs to, and its operation."""
    path = path.partition("?")[0]
    for name, item in DOCUMENT["paths"].items():
        if re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(name)), path):
            return name, item[method.lower()]
    raise AssertionError(f"{path} is not described")


def check_answer(method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> str:
    """Fail unless an answer is what the description says of this request; ``headers`` by lower-case name.

    Returns "METHOD /path status", as the description has it.
    """
    name, operation = operation_of(method, path)
    told = f"{method} {name} {status}"
    assert str(status) in operation["responses"], f"{told} is not described"
    answer = resolved(operation["responses"][str(status)])
    described = {each.lower(): resolved(header) for each, header in answer.get("headers", {}).items()}
    assert set(headers) - UNNAMED_HEADERS <= described.keys(), told
    for each, header in described.items():
        if header.get("required"):
            assert each in headers, f"{told} lacks {each}"
        if each in headers:
            number = header["schema"].get("type") == "integer"
            value: Any = int(headers[each]) if number else headers[each]
            assert errors_of(header["schema"], value) == [], f"{told}: {each}"
    content = answer.get("content")
    if not body:
        empty = content and content.get(headers.get("content-type")) == {}  # a message of protobuf may be
        assert content is None or method == "HEAD" or empty, f"{told} has no body"
        return told
    media_type = headers["content-type"].partition(";")[0]
    assert content is not None, f"{told} has a body"
    assert media_type in content, f"{told} is {media_type}"
    schema = content[media_type].get("schema", {})  # none of protobuf
    if media_type.endswith("json"):
        value = orjson.loads(body)
        assert errors_of(schema, value) == [], told
        assert undescribed(schema, value) == [], told
    return told
