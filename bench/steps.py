"""The longest step of converting bodies that log agents send as JSON: for so long a worker serves no other connection.

Milliseconds of processor time: of the longest step (the least of the rounds, and in which part of the conversion it
is), and of all of it (the median). ``--tree`` measures another working tree, built there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 9 << 20  # bytes
MANY = 500_000
LOGS = "/v1/logs"
PUSH = "/loki/api/v1/push"


def logs(records: bytes, resource: bytes = b"", scope: bytes = b"") -> bytes:
    """Return OTLP's request with these records in one scope."""
    return b'{"resourceLogs":[{%b"scopeLogs":[{%b"logRecords":[%b]}]}]}' % (resource, scope, records)


def record(size: int) -> bytes:
    """Return a record of OTLP with about so many bytes."""
    attributes = [{"key": f"key{n}", "value": {"stringValue": f"value {n}"}} for n in range(2)]
    given = {"timeUnixNano": "1760000000123456789", "severityNumber": 9, "attributes": attributes}
    return json.dumps(given | {"body": {"stringValue": "x" * (size - 219)}}, separators=(",", ":")).encode()


def entry(size: int) -> bytes:
    """Return an entry of Loki with so many bytes."""
    return b'["1760000000123456789","%b"]' % (b"x" * (size - 26))


def filled(value: bytes) -> bytes:
    """Return so many of these values that they are SIZE bytes."""
    return b",".join([value] * (SIZE // (len(value) + 1)))


RESOURCE = b'"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"s"}}]},'
BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "OTLP, 9 MiB of 300-byte records in a scope": (LOGS, lambda: logs(filled(record(300)), RESOURCE)),
    "OTLP, 9 MiB of 50 KB records": (LOGS, lambda: logs(filled(record(50_000)))),
    "OTLP, 9 MiB in a record": (LOGS, lambda: logs(record(SIZE))),
    "OTLP, 199,999 values in a record": (LOGS, lambda: logs(b'{"flags":[%b]}' % b",".join([b"[]"] * 199_999))),
    "OTLP, 99,999 attributes of a resource": (
        LOGS,
        lambda: logs(b"{}", RESOURCE.replace(b"]", b',{"key":"abc","value":{}}' * 99_998 + b"]")),
    ),
    "OTLP, 500,000 scopes with a record": (
        LOGS,
        lambda: b'{"resourceLogs":[{"scopeLogs":[%b]}]}' % b",".join([b'{"logRecords":[{}]}'] * MANY),
    ),
    "OTLP, 500,000 empty resources": (LOGS, lambda: b'{"resourceLogs":[%b]}' % b",".join([b"{}"] * MANY)),
    "OTLP, 9 MiB in an unknown member": (LOGS, lambda: b'{"x":[%b]}' % b",".join([b"[10000000000000000]"] * 495_000)),
    "OTLP, a fault behind 9 MiB of records": (LOGS, lambda: logs(filled(record(300)))[:-2]),
    "OTLP, 9 MiB of spaces": (LOGS, lambda: b" " * SIZE + logs(record(300))),
    "Loki, 9 MiB of 300-byte entries in a stream": (
        PUSH,
        lambda: b'{"streams":[{"stream":{"app":"a"},"values":[%b]}]}' % filled(entry(300)),
    ),
    "Loki, 9 MiB in an entry": (PUSH, lambda: b'{"streams":[{"values":[%b]}]}' % entry(SIZE)),
    "Loki, 199,999 labels": (
        PUSH,
        lambda: (
            b'{"streams":[{"stream":{%b},"values":[["1","x"]]}]}' % b",".join(b'"%x":1' % n for n in range(199_999))
        ),
    ),
    "Loki, 500,000 empty streams": (PUSH, lambda: b'{"streams":[%b]}' % b",".join([b"{}"] * MANY)),
    "Loki, 200,000 streams with an entry": (
        PUSH,
        lambda: b'{"streams":[%b]}' % b",".join([b'{"stream":{"a":"b"},"values":[["1","x"]]}'] * 200_000),
    ),
}


class Converted:
    """What converting a body took: milliseconds of the longest step, its number, how many there were, of all."""

    def __init__(self, path: str, body: bytes) -> None:
        from fastdist.protocols.base import Limits, Refused, Request  # noqa: PLC0415  (of the tree that is measured)
        from fastdist.protocols.table import NAMES, find  # noqa: PLC0415

        headers = {"content-type": "application/json"}
        found = find("POST", path, headers, NAMES)
        limits = Limits(max_body=10 << 20, max_packet=10 << 20, max_batch=64 << 20)
        if found is None or found.take is None:
            raise ValueError(path)
        work = found.take(Request("POST", path, headers, body, "192.0.2.1", 1), limits)
        steps, self.outcome = [], ""
        while not self.outcome:
            began = time.thread_time_ns()
            try:
                next(work)
            except StopIteration as end:
                self.outcome = f"{end.value.records} records"
            except Refused as refused:
                self.outcome = f"refused: {refused.detail[:60]}"
            steps.append((time.thread_time_ns() - began) / 1e6)
        self.longest, self.total, self.count = max(steps), sum(steps), len(steps)
        self.number = steps.index(self.longest) + 1


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="bodies whose name contains this")
    parser.add_argument("--tree", type=Path, help="another working tree")
    options = parser.parse_args()
    if options.tree:
        sys.path.insert(0, str(options.tree / "src"))
    print("| body | longest step, ms | it is | of steps | all, ms | outcome |\n|---|---:|---:|---:|---:|---|")
    for name, (path, make) in BODIES.items():
        if options.only in name:
            body = make()
            rounds = [Converted(path, body) for _ in range(options.rounds)]
            least = min(rounds, key=lambda each: each.longest)
            total = statistics.median(each.total for each in rounds)
            row = (name, f"{least.longest:.2f}", str(least.number), str(least.count), f"{total:,.0f}", least.outcome)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
