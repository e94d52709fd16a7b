"""Requests of log agents for the ingest of one worker: one of each protocol, and what they become."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING, NamedTuple

import orjson
from ingest_harness import Connection, Service, head, post

from fastdist.protocols.table import NAMES

if TYPE_CHECKING:
    from fastdist.shm.snapshot import Snapshot

JSON = "Content-Type: application/json"


class Sent(NamedTuple):
    """A request's parts, the status of its success, and of where another try makes sense."""

    target: str
    body: bytes
    lines: tuple[str, ...]
    status: int
    busy: int = 503

    def request(self, *lines: str, method: str = "POST") -> bytes:
        return post(self.body, *self.lines, *lines, first=f"{method} {self.target}")

    def chunked(self, *sizes: int) -> bytes:
        """Return it with a body that comes in chunks of these sizes, and a last one."""
        data, chunks = self.body, []
        for size in (*sizes, len(data)):
            chunks.append(data[:size])
            data = data[size:]
        body = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks if each) + b"0\r\n\r\n"
        return head(f"POST {self.target}", *self.lines, "Transfer-Encoding: chunked") + body

    def with_body(self, body: bytes, *lines: str) -> Sent:
        return self._replace(body=body, lines=(*self.lines, *lines))

    def packed(self) -> Sent:
        return self.with_body(gzip.compress(self.body), "Content-Encoding: gzip")


# Two records each, "one" and "two", of one emitter.
REQUESTS = {
    "json": Sent(
        "/ingest/app",
        b'{"message":"one","host":"h"}\n{"message":"two","host":"h"}\n',
        ("Content-Type: application/x-ndjson",),
        200,
    ),
    "otlp": Sent(
        "/v1/logs",
        orjson.dumps(
            {
                "resourceLogs": [
                    {
                        "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "h"}}]},
                        "scopeLogs": [
                            {"logRecords": [{"body": {"stringValue": "one"}}, {"body": {"stringValue": "two"}}]}
                        ],
                    }
                ]
            }
        ),
        (JSON,),
        200,
    ),
    "loki": Sent(
        "/loki/api/v1/push",
        orjson.dumps(
            {
                "streams": [
                    {
                        "stream": {"host": "h"},
                        "values": [["1760000000000000000", "one"], ["1760000000000000001", "two"]],
                    }
                ]
            }
        ),
        (JSON,),
        204,
    ),
    "splunk": Sent("/services/collector/event", b'{"event":"one","host":"h"}{"event":"two","host":"h"}', (), 200),
    "elasticsearch": Sent(
        "/logs-app/_bulk",
        b'{"create":{}}\n{"message":"one","host":{"name":"h"}}\n{"index":{}}\n{"message":"two","host":{"name":"h"}}\n',
        ("Content-Type: application/x-ndjson",),
        200,
        busy=429,
    ),
}


def texts(service: Service) -> list[str]:
    """Take what can be claimed out of the ring; return the texts of all messages."""
    return [message["message"] for body in service.bodies() for message in orjson.loads(body)["messages"]]


def connect(service: Service) -> Connection:
    """Return a connection whose errors may be in the shape of an agents' protocol."""
    connection = service.connect()
    connection.agents = True
    return connection


def ask(service: Service, *reads: bytes) -> Connection:
    return connect(service).send(*reads)


def counted(service: Service, name: str) -> tuple[int, dict[int, int]]:
    """Return how many records of a protocol were accepted, and its responses by status."""
    snapshot: Snapshot = service.emitters.api.snapshot()
    figures = snapshot.protocols[name]
    return figures.records, figures.statuses


def counted_at_all(service: Service) -> dict[str, tuple[int, dict[int, int]]]:
    return {name: counted(service, name) for name in NAMES if counted(service, name) != (0, {})}
