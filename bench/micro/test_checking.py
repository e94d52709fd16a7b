"""Whether a body is a log packet: our scanner, beside parsers that build objects."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson
import pytest
from tools import packet

from fastdist import packet as packets
from fastdist._core import scan

MESSAGES = [2, 100]


class Message(msgspec.Struct, gc=False):
    message: str
    timestamp: str = ""
    level: str = ""
    source: str = ""
    metadata: dict[str, Any] = {}


class Packet(msgspec.Struct, gc=False):
    emitterId: str  # noqa: N815  (as it is called in JSON)
    messages: list[Message]
    metadata: dict[str, Any] = {}


class RawMessage(msgspec.Struct, gc=False):
    message: str
    timestamp: str = ""
    level: str = ""
    source: str = ""
    metadata: msgspec.Raw = msgspec.Raw()


class RawPacket(msgspec.Struct, gc=False):
    emitterId: str  # noqa: N815
    messages: list[RawMessage]
    metadata: msgspec.Raw = msgspec.Raw()


@pytest.fixture(params=MESSAGES)
def body(request, benchmark):
    body = packet(request.param)
    benchmark.group = f"checking {len(body)} bytes, {request.param} messages"
    return body


def test_scan(benchmark, body):
    assert benchmark(scan, body)


def test_scan_strictly(benchmark, body):
    assert benchmark(scan, body, True)


def test_orjson_loads(benchmark, body):
    """Parsed, not checked."""
    assert benchmark(orjson.loads, body)


def test_msgspec(benchmark, body):
    assert benchmark(msgspec.json.Decoder(Packet).decode, body).messages


def test_msgspec_with_metadata_left_raw(benchmark, body):
    assert benchmark(msgspec.json.Decoder(RawPacket).decode, body).messages


def test_the_slow_check(benchmark, body):
    """What tells why a body is no packet."""
    assert benchmark(packets.check, body)
