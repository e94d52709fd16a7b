"""Requests of agents: decoding alone with a library, beside converting them into packets."""

from __future__ import annotations

import gzip

import pytest
from agent_requests import RECORDS, REQUESTS

from fastdist.exchange import Request
from fastdist.protocols.base import Limits, finish
from fastdist.protocols.table import NAMES, find

LIMITS = Limits(max_body=10 << 20, max_packet=10 << 20, max_batch=64 << 20)
pytestmark = pytest.mark.parametrize("name", REQUESTS)


def converted(name, body, coding=""):
    sent = REQUESTS[name]
    headers = {"content-type": sent.content_type, "content-encoding": coding}
    asked = Request("POST", sent.path, headers, body, "192.0.2.1", 1)
    return finish(find("POST", sent.path, headers, NAMES).take(asked, LIMITS)).packets


def test_decode_alone(benchmark, name):
    benchmark.group = f"{name}, {RECORDS} records"
    assert benchmark(REQUESTS[name].decode, REQUESTS[name].body)


def test_convert(benchmark, name):
    benchmark.group = f"{name}, {RECORDS} records"
    assert sum(packet.messages for packet in benchmark(converted, name, REQUESTS[name].body)) == RECORDS


def test_convert_gzip(benchmark, name):
    benchmark.group = f"{name}, {RECORDS} records"
    coding = "snappy, gzip" if name == "loki" else "gzip"
    assert benchmark(converted, name, gzip.compress(REQUESTS[name].body), coding)
