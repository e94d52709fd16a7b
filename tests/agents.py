"""Requests of log agents, converted without sockets: every packet that comes out is checked by strict validation."""

from __future__ import annotations

import json

import msgspec
import pytest

from fastdist import packet
from fastdist._core import scan
from fastdist.exchange import Request
from fastdist.protocols.base import Limits, Refused, finish
from fastdist.protocols.table import NAMES, find

LIMITS = Limits(max_body=1 << 20, max_packet=1 << 20, max_batch=4 << 20)
RECEIVED_NS = 1_760_000_000_123_456_789
RECEIVED = "2025-10-09T08:53:20.123456789Z"
CLIENT = "192.0.2.7"


def request(target, body=b"", method="POST", **headers):
    """Return a request; headers by their names with underscores."""
    names = {name.replace("_", "-").lower(): value for name, value in headers.items()}
    return Request(method, target, names, body, CLIENT, RECEIVED_NS)


def route(asked):
    found = find(asked.method, asked.target, asked.headers, NAMES)
    assert found is not None, asked.target
    return found


def convert(target, body, limits=LIMITS, **rest):
    """Return the batch that a request becomes; raises Refused."""
    asked = request(target, body, **rest)
    found = route(asked)
    assert found.take is not None
    batch = finish(found.take(asked, limits))
    for each in batch.packets:
        assert scan(each.body, strict=True) == (each.messages, each.emitter_hash)
        assert packet.check(each.body, strict=True) == (each.messages, each.emitter_hash)
        assert len(each.body) <= limits.max_packet
    assert sum(each.messages for each in batch.packets) == batch.records
    return batch


def packets(batch):
    return [msgspec.json.decode(each.body) for each in batch.packets]


def messages(batch):
    """Return all messages of a batch."""
    return [message for each in packets(batch) for message in each["messages"]]


def message(target, body, **rest):
    """Return the message that a request with one record becomes, and its emitter."""
    batch = convert(target, body, **rest)
    (only,) = packets(batch)
    (one,) = only["messages"]
    return one | {"emitterId": only["emitterId"]}


def refusal(target, body, limits=LIMITS, **rest):
    """Return why a request is refused, and the response to that."""
    asked = request(target, body, **rest)
    found = route(asked)
    with pytest.raises(Refused) as caught:
        finish(found.take(asked, limits))
    return caught.value, found.protocol.refuse(asked, caught.value)


def answer(target, method="GET", obstacle="", **headers):
    """Return the response to a request without records."""
    asked = request(target, method=method, **headers)
    return route(asked).reply(asked, obstacle)


def header(reply, name):
    """Return a header of a response; None if it is not there."""
    lines = dict(line.split(": ", 1) for line in reply.headers.decode().split("\r\n") if line)
    return {key.lower(): value for key, value in lines.items()}.get(name.lower())


def document(reply):
    return json.loads(reply.body)
