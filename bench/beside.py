"""Connections that pipeline one kind of request as fast as they can: how long others' packets take beside them.

Kinds: ``invalid`` (a tiny body that is no packet), ``path`` (an unknown one), ``view`` (GET /metrics), ``valid``, and
bodies of almost 10 MiB (Loki's: as they are decoded), of records of log agents, one after the other: ``otlp``,
``otlp-json``, ``ndjson``, ``loki``.
One worker; the others' packets are an open loop whose latencies (ms) are taken with no such connection, then beside
them. ``answered``: the flood's requests a second. ``lag``: the longest time (ms) for which the event loop let nothing
else have its turn, as /stats tells it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import selectors
import socket
import tempfile
import time
from functools import partial
from pathlib import Path

import cramjam
from agent_requests import RECORDS, REQUESTS, export, push
from contestants import Fastdist
from google.protobuf import json_format
from measure import EMITTERS, started
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from tools import WEIGHTS, Load, Sink, compile_tools, free_ports, get, packet

PIECE = 1 << 18  # bytes that a connection of the flood tries to send at once
LARGE = 9 << 20  # bytes
FIRST_SECOND = 1.0  # of the flood, before the others' packets are looked at


def post(body: bytes, path: str = "/logs", content_type: str = "application/json") -> bytes:
    """Return a request that brings a body."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def large(agent: str) -> bytes:
    """Return a request of a log agent, as large as the limit allows about."""
    path, content_type, body, _ = REQUESTS[agent.partition("-")[0]]
    count = LARGE // len(body)
    if agent == "otlp":
        body = export(count * RECORDS)
    elif agent == "otlp-json":
        content_type = "application/json"
        request = ExportLogsServiceRequest.FromString(export(count * RECORDS // 3))
        body = json_format.MessageToJson(request, indent=None).encode()
    elif agent == "loki":
        body = push(LARGE // (len(cramjam.snappy.decompress_raw(body)) // RECORDS))
    else:
        body = body * count
    return post(body, path, content_type)


KINDS = {
    "invalid": lambda: post(b'{"emitterId":1}'),
    "path": lambda: b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
    "view": lambda: b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "valid": lambda: post(packet(2)),
    **{agent: partial(large, agent) for agent in ("otlp", "otlp-json", "ndjson", "loki")},
}


class Flood:
    """Connections that send the same request again and again, and read what is answered."""

    def __init__(self, port: int, request: bytes, connections: int) -> None:
        self.data = request * (PIECE // len(request) + 2)
        self.length = len(request)
        self.answered = 0
        self.selector = selectors.DefaultSelector()
        for _ in range(connections):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setblocking(False)  # noqa: FBT003
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            self.selector.register(connection, both, [0])

    def run(self, seconds: float) -> None:
        """Go on for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, events in self.selector.select(0.1):
                with contextlib.suppress(BlockingIOError):
                    if events & selectors.EVENT_READ:
                        self.answered += key.fileobj.recv(1 << 20).count(b"HTTP/1.1 ")
                    if events & selectors.EVENT_WRITE:
                        sent = key.data[0]
                        sent += key.fileobj.send(self.data[sent : sent + PIECE])
                        key.data[0] = sent % self.length

    def close(self) -> None:
        """Close all connections."""
        for key in tuple(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()


def measure(folder: Path, kind: str, connections: int, rate: int, seconds: int) -> dict[str, object]:
    """Flood it with so many connections; return the figures."""
    ports = free_ports(len(WEIGHTS))
    settings = {"SERVER__WORKERS": "1", "SERVER__MAX_CONNECTIONS": "2000", "QUEUE__CAPACITY": "2GiB"}
    with Sink(folder, ports), started(Fastdist(folder, folder / "fastdist", ports, settings)) as fastdist:
        flood = Flood(fastdist.port, KINDS[kind](), connections)
        try:
            flood.run(FIRST_SECOND)
            before = flood.answered
            with Load(folder, "rate", fastdist.port, packet(2), min(rate, EMITTERS), rate, seconds) as load:
                flood.run(seconds)
                line = load.line()
        finally:
            flood.close()
        stats = json.loads(get(fastdist.port, "/stats"))
        states = [each["state"] for each in stats["analyzers"]]
    worker = stats["workers"][0]
    return {
        **{name: line[name] for name in ("sent", "p50", "p99", "max")},
        "answered": round((flood.answered - before) / seconds),
        "lag": worker.get("loopLagMs", {}).get("max"),
        "killed": worker["restarts"],
        "offline": states.count("offline"),
    }


def main() -> None:
    """Measure what the command line asks for, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--connections", type=int, nargs="*", default=[0, 100, 500])
    parser.add_argument("--rate", type=int, nargs="*", default=[100, 5000], help="others' packets a second")
    parser.add_argument("--seconds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastdist-beside-") as name:
        folder = Path(name)
        compile_tools(folder)
        for kind in options.kind:
            for rate in options.rate:
                for connections in options.connections:
                    figures = measure(folder, kind, connections, rate, options.seconds)
                    print(f"{kind} x {connections}, {rate}/s: {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
