"""Agents that cannot be had here: the bytes that they send, and what they make of the responses, as their sources say.

Each sends a batch until its own rules say that it is taken, and gives it up when they say so.
"""

from __future__ import annotations

import gzip
import http.client
import json
import time
import zlib
from typing import ClassVar

import cramjam
import pytest
from clients_harness import LEVELS, SCENARIOS, Client
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from support import request

SECOND = 1_767_323_045  # 2026-01-02T03:04:05Z
TAKEN, AGAIN, DROPPED = "taken", "again", "dropped"


def lines(values):
    return "".join(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n" for value in values).encode()


def retried(status, *statuses):
    """Return what most make of a status: 2xx is success, some others are tried again."""
    if 200 <= status < 300:
        return TAKEN
    return AGAIN if status in statuses else DROPPED


class Canned(Client):
    """An agent: its requests, and ``verdict``, what it makes of a response."""

    pause = 0.1
    path = "/ingest"
    headers: ClassVar[dict[str, str]] = {}
    probes: tuple[tuple[str, str, dict[str, str]], ...] = ()  # what it asks when it starts: method, path, headers
    level = True  # whether records say it where it is looked for
    source: str | None = None

    def __init__(self, name, port):
        super().__init__(name, port)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for method, path, headers in self.probes:
            self.probed(path, *request(port, method, path, headers=headers))

    def probed(self, path, status, _headers, _body):
        assert status == 200, (self.name, path, status)

    def log(self, numbers):
        left = list(numbers)
        while left:
            left = self.send(left)

    def send(self, numbers):
        """Send a batch; return what has to be sent again."""
        try:
            self.connection.request("POST", self.path, self.pack(self.body(numbers)), self.headers)
            response = self.connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            time.sleep(0.2)
            return numbers
        verdicts = self.verdict(response.status, response.headers, body, len(numbers))
        if isinstance(verdicts, str):
            verdicts = [verdicts] * len(numbers)
        assert len(verdicts) == len(numbers), body
        told = list(zip(numbers, verdicts, strict=True))
        self.tell(True, [number for number, verdict in told if verdict == TAKEN])
        self.tell(False, [number for number, verdict in told if verdict == DROPPED])
        again = [number for number, verdict in told if verdict == AGAIN]
        time.sleep(0.2 if again else 0)
        return again

    def finish(self):
        self.connection.close()

    def pack(self, body):
        coding = self.headers.get("Content-Encoding")
        packers = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": cramjam.zstd.compress}
        packers["snappy"] = cramjam.snappy.compress_raw
        return bytes(packers[coding](body)) if coding else body

    def body(self, numbers):
        return lines(self.record(number) for number in numbers)

    def record(self, number):
        raise NotImplementedError

    def verdict(self, status, headers, body, count):
        raise NotImplementedError

    def time(self, number, digits=9):
        """Return the time that a record has, of so many digits behind the point."""
        return f"2026-01-02T03:04:05.{f'{number:06}000'[:digits]}Z"

    def metadata(self, number):
        return {"number": number}

    def expected(self, number):
        level = {"level": LEVELS[number % 4] if self.level else "info"}
        source = {"source": self.source} if self.source else {}
        text = {"message": self.text(number), "timestamp": self.time(number)}
        return text | level | source | {"metadata": self.metadata(number)}

    def check(self, number, message, emitter):
        """As many digits of the time as were sent."""
        whole, _, fraction = message["timestamp"].removesuffix("Z").partition(".")
        message["timestamp"] = f"{whole}.{fraction:0<9}Z"
        super().check(number, message, emitter)


# ---------------------------------------------------------------------------------------------------------- Fluent Bit


class FluentBit(Canned):
    """``http``, ``format json``."""

    headers: ClassVar = {"Content-Type": "application/json", "User-Agent": "Fluent-Bit"}

    def record(self, number):
        record = {"date": float(f"{SECOND}.{number:06}"), "log": self.text(number), "level": LEVELS[number % 4]}
        return record | {"hostname": self.name, "number": number, "file": "/var/log/shop"}

    source = "/var/log/shop"

    def body(self, numbers):
        return json.dumps([self.record(number) for number in numbers], separators=(",", ":")).encode()

    def verdict(self, status, _headers, _body, _count):
        if 200 <= status <= 205:
            return TAKEN
        return AGAIN if status >= 500 or status in (408, 429) else DROPPED


class FluentBitStream(FluentBit):
    """``http``, ``format json_stream``, compressed."""

    headers: ClassVar = FluentBit.headers | {"Content-Encoding": "gzip"}

    def body(self, numbers):
        return b"".join(json.dumps(self.record(number), separators=(",", ":")).encode() for number in numbers)


class FluentBitElastic(FluentBit):
    """``es``: a chunk is done when the beginning of the response says that there are no errors."""

    path = "/_bulk"
    headers: ClassVar = {"Content-Type": "application/x-ndjson", "User-Agent": "Fluent-Bit"}

    def body(self, numbers):
        action = {"create": {"_index": "fluent-bit", "_type": "_doc"}}
        pairs = [(action, {"@timestamp": self.time(number, 3)} | self.record(number)) for number in numbers]
        return lines(line for pair in pairs for line in pair)

    def record(self, number):
        record = super().record(number)
        del record["date"]
        return record

    def verdict(self, status, _headers, body, _count):
        return TAKEN if status in (200, 201) and b'"errors":false,"items":[' in body[:512_000] else AGAIN

    def metadata(self, number):
        return {"number": number, "_index": "fluent-bit"}

    def time(self, number, digits=3):
        return super().time(number, 3).replace("Z", "000000Z" if digits == 9 else "Z")

    def expected(self, number):
        return super().expected(number) | {"timestamp": self.time(number, 9)}


class FluentBitLoki(FluentBit):
    """``loki``, ``line_format json``."""

    path = "/loki/api/v1/push"

    def body(self, numbers):
        streams = [
            {
                "stream": {"job": "fluent-bit", "host": self.name, "level": LEVELS[number % 4]},
                "values": [[f"{SECOND}{number:06}000", self.line(number)]],
            }
            for number in numbers
        ]
        return json.dumps({"streams": streams}, separators=(",", ":")).encode()

    def line(self, number):
        return json.dumps({"log": self.text(number), "number": number}, ensure_ascii=False, separators=(",", ":"))

    source = "fluent-bit"

    def expected(self, number):
        return super().expected(number) | {"message": self.line(number), "metadata": {"job": "fluent-bit"}}

    def verdict(self, status, _headers, _body, _count):
        if 200 <= status <= 205:
            return TAKEN
        return DROPPED if status == 400 else AGAIN


class FluentBitSplunk(FluentBit):
    """``splunk``: any success but 200 is sent again."""

    path = "/services/collector/event"
    headers: ClassVar = {"Authorization": "Splunk t", "Content-Type": "application/json", "User-Agent": "Fluent-Bit"}
    source = "shop"

    def body(self, numbers):
        return b"".join(json.dumps(self.record(number), separators=(",", ":")).encode() for number in numbers)

    def record(self, number):
        event = {"log": self.text(number), "level": LEVELS[number % 4], "number": number}
        return {"time": float(f"{SECOND}.{number:06}"), "host": self.name, "source": "shop", "event": event}

    def verdict(self, status, _headers, _body, _count):
        if status == 200:
            return TAKEN
        return DROPPED if 400 <= status < 500 and status not in (408, 429) else AGAIN

    def metadata(self, number):
        return {"event": {"number": number}}


# -------------------------------------------------------------------------------------------------------------- Vector


class Vector(Canned):
    """``http``, codec json, framing by newlines, zstd."""

    agent: ClassVar = {"User-Agent": "Vector/0.50.0 (x86_64-unknown-linux-gnu)", "Accept-Encoding": "identity"}
    headers = agent | {"Content-Type": "application/x-ndjson", "Content-Encoding": "zstd"}
    probes = (("HEAD", "/ingest", agent),)
    source = "/var/log/shop"

    def record(self, number):
        record = {"file": "/var/log/shop", "host": self.name, "message": self.text(number), "number": number}
        return record | {"severity": LEVELS[number % 4].upper(), "timestamp": self.time(number)}

    def verdict(self, status, _headers, _body, _count):
        return retried(status, 408, 429, 500, *range(502, 600))


class VectorElastic(Vector):
    """``elasticsearch``, without ``request_retry_partial``; it asks for a version without saying what it accepts."""

    path = "/_bulk?timeout=60s"
    headers: ClassVar = Vector.agent | {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
    probes = (("GET", "/", Vector.agent), ("GET", "/_cluster/health", Vector.agent))

    def probed(self, path, status, headers, body):
        super().probed(path, status, headers, body)
        assert path != "/" or int(json.loads(body)["version"]["number"].split(".")[0]) == 8

    def body(self, numbers):
        action = {"index": {"_index": "vector-2026.01.02"}}
        return lines(line for number in numbers for line in (action, self.record(number)))

    def verdict(self, status, headers, body, count):
        verdict = super().verdict(status, headers, body, count)
        return DROPPED if verdict == TAKEN and b'"errors":true' in body else verdict


class VectorLoki(Vector):
    """``loki``, in its default encoding: a block of snappy."""

    path = "/loki/api/v1/push"
    headers: ClassVar = Vector.agent | {"Content-Type": "application/x-protobuf", "Content-Encoding": "snappy"}
    probes = (("GET", "/ready", Vector.agent),)

    def body(self, numbers):
        return push_request(self, numbers)

    def metadata(self, number):
        return {"number": str(number), "host": self.name}


class VectorSplunk(Vector):
    """``splunk_hec_logs``."""

    path = "/services/collector/event"
    headers: ClassVar = Vector.agent | {
        "Authorization": "Splunk t",
        "Content-Type": "application/json",
        "X-Splunk-Request-Channel": "6a9d1ab6-d4a5-46d0-8b3a-1a61f2b2d4f1",
    }
    probes = (("GET", "/services/collector/health/1.0", Vector.agent),)

    def body(self, numbers):
        return b"".join(json.dumps(self.record(number), separators=(",", ":")).encode() for number in numbers)

    def record(self, number):
        fields = {"number": number, "level": LEVELS[number % 4]}
        rest = {"time": float(f"{SECOND}.{number:06}"), "host": self.name, "source": "/var/log/shop"}
        return {"event": self.text(number), "fields": fields} | rest

    def metadata(self, number):
        return {"fields": {"number": number}}


# -------------------------------------------------------------------------------------------- Elastic's own, and others


class Filebeat(Canned):
    """Its output ``elasticsearch``: looks at each item's status; whatever is not 200 is sent again."""

    path = "/_bulk"
    headers: ClassVar = {
        "Accept": "application/json",
        "Content-Type": "application/json; charset=UTF-8",
        "Content-Encoding": "gzip",
        "User-Agent": "Elastic-filebeat/8.19.0 (linux; amd64; x; 2025-07-01 00:00:00 +0000 UTC)",
        "X-Elastic-Product-Origin": "beats",
    }
    probes = (
        ("GET", "/", {"Accept": "application/json"}),
        ("GET", "/_license?human=false", {}),
        ("GET", "/_ilm/policy/filebeat", {}),
        ("GET", "/_index_template/filebeat-8.19.0", {}),
    )
    source = "/var/log/shop"

    def probed(self, path, status, headers, body):
        super().probed(path, status, headers, body)
        assert headers["x-elastic-product"] == "Elasticsearch"
        assert path != "/" or json.loads(body)["version"]["number"] >= "8.19.0"

    def body(self, numbers):
        action = {"create": {"_index": "filebeat-8.19.0"}}
        return lines(line for number in numbers for line in (action, self.record(number)))

    def record(self, number):
        return {
            "@timestamp": self.time(number, 3),
            "log": {"level": LEVELS[number % 4], "offset": number, "file": {"path": "/var/log/shop"}},
            "message": self.text(number),
            "input": {"type": "filestream"},
            "host": {"name": self.name},
            "agent": {"type": "filebeat", "version": "8.19.0"},
        }

    def time(self, number, digits=9):
        return super().time(number, 3) if digits == 3 else super().time(number, 3).replace("Z", "000000Z")

    def metadata(self, number):
        return {"log": {"offset": number}, "input": {"type": "filestream"}, "_index": "filebeat-8.19.0"}

    def verdict(self, status, _headers, body, _count):
        if status != 200:
            return AGAIN
        return [self.of_item(*item.values()) for item in json.loads(body)["items"]]

    def of_item(self, item):
        if item["status"] < 300 or item["status"] == 409:
            return TAKEN
        return DROPPED if item["status"] < 500 and item["status"] != 429 else AGAIN


class LogstashElastic(Filebeat):
    """Its output ``elasticsearch``; it asks for a version without saying what it accepts."""

    path = "/_bulk?filter_path=errors,items.*.error,items.*.status"
    agent: ClassVar = {"User-Agent": "logstash/8.11.0 (OS=Linux-6.1-amd64) logstash-output-elasticsearch/11.22.2"}
    headers: ClassVar = {"Content-Type": "application/json", "Content-Encoding": "gzip", "Connection": "Keep-Alive"}
    probes = (("HEAD", "/", agent), ("GET", "/", agent), ("GET", "/_license", agent))

    def probed(self, path, status, headers, body):
        if body:
            super().probed(path, status, headers, body)
        assert status == 200


class Logstash(Canned):
    """Its output ``http``, ``format json_batch``."""

    headers: ClassVar = {"Content-Type": "application/json"}

    def record(self, number):
        record = {"@timestamp": self.time(number), "@version": "1", "message": self.text(number), "number": number}
        return record | {"host": {"name": self.name}, "log": {"level": LEVELS[number % 4]}}

    def body(self, numbers):
        return json.dumps([self.record(number) for number in numbers], ensure_ascii=False).encode()

    def verdict(self, status, _headers, _body, _count):
        return retried(status, 429, 500, 502, 503, 504)


class Fluentd(Canned):
    """Its output ``http``: 503 is all that it tries again."""

    headers: ClassVar = {"Content-Type": "application/x-ndjson", "Accept": "*/*", "User-Agent": "Ruby"}
    path = "/ingest/shop"
    source = "shop"

    def record(self, number):
        record = {"message": self.text(number), "level": LEVELS[number % 4], "number": number, "host": self.name}
        return record | {"time": self.time(number)}

    def verdict(self, status, _headers, _body, _count):
        return retried(status, 503)


class Docker(Canned):
    """Docker's driver ``splunk``, which asks by OPTIONS whether there is one, and takes nothing but 200."""

    path = "/services/collector/event/1.0"
    headers: ClassVar = {"Authorization": "Splunk t", "Content-Encoding": "gzip", "User-Agent": "Go-http-client/1.1"}
    probes = (("OPTIONS", path, {}),)
    level = False
    source = "stdout"

    def body(self, numbers):
        return b"".join(json.dumps(self.record(number), separators=(",", ":")).encode() for number in numbers)

    def record(self, number):
        event = {"line": self.text(number), "source": "stdout", "tag": f"{number}"}
        return {"event": event, "time": f"{SECOND}.{number:06}", "host": self.name, "source": "stdout"}

    def expected(self, number):
        wanted = super().expected(number)
        return wanted | {"message": json.dumps(self.record(number)["event"], ensure_ascii=False, separators=(",", ":"))}

    def metadata(self, _number):
        return {}

    def verdict(self, status, _headers, _body, _count):
        return TAKEN if status == 200 else AGAIN


# ------------------------------------------------------------------------------------------------------------- protobuf


def varint(number):
    return (bytes([number & 0x7F | 0x80]) + varint(number >> 7)) if number > 0x7F else bytes([number])


def field(number, data):
    if isinstance(data, int):
        return bytes([number << 3]) + varint(data)
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def push_request(client, numbers):
    """Return a PushRequest of Loki's, with a stream for each record."""
    streams = b""
    for number in numbers:
        labels = f'{{filename="/var/log/shop", host="{client.name}", level="{LEVELS[number % 4]}"}}'
        time = field(1, SECOND) + field(2, number * 1000)
        metadata = field(1, b"number") + field(2, str(number).encode())
        entry = field(1, time) + field(2, client.text(number).encode()) + field(3, metadata)
        streams += field(1, field(1, labels.encode()) + field(2, entry))
    return streams


class Promtail(Canned):
    """promtail and Alloy."""

    path = "/loki/api/v1/push"
    headers: ClassVar = {
        "Content-Type": "application/x-protobuf",
        "User-Agent": "promtail/3.5.0",
        "X-Scope-OrgID": "shop",
    }
    source = "/var/log/shop"

    def body(self, numbers):
        return push_request(self, numbers)

    def pack(self, body):
        return bytes(cramjam.snappy.compress_raw(body))

    def metadata(self, number):
        return {"number": str(number), "host": self.name}

    def verdict(self, status, _headers, _body, _count):
        return retried(status, 429, *range(500, 600))


class Collector(Canned):
    """OpenTelemetry's Collector, ``otlphttp``, which does what the specification says."""

    path = "/v1/logs"
    headers: ClassVar = {
        "Content-Type": "application/x-protobuf",
        "Content-Encoding": "zstd",
        "User-Agent": "OpenTelemetry Collector Contrib/0.130.0 (linux/amd64)",
    }
    source = "filelog"

    def body(self, numbers):
        records = [
            {
                "timeUnixNano": f"{SECOND}{number:06}000",
                "severityNumber": (5, 9, 13, 17)[number % 4],
                "body": {"stringValue": self.text(number)},
                "attributes": [{"key": "number", "value": {"intValue": str(number)}}],
            }
            for number in numbers
        ]
        resource = {"attributes": [{"key": "host.name", "value": {"stringValue": self.name}}]}
        scope = [{"scope": {"name": "filelog"}, "logRecords": records}]
        whole = {"resourceLogs": [{"resource": resource, "scopeLogs": scope}]}
        return ParseDict(whole, ExportLogsServiceRequest()).SerializeToString()

    def metadata(self, number):
        return {"attributes": {"number": number}}

    def verdict(self, status, headers, _body, _count):
        assert status == 200 or int(headers["Retry-After"]) <= 5
        return retried(status, 429, 502, 503, 504)


KINDS = {
    "fluent-bit": FluentBit,
    "fluent-bit-stream": FluentBitStream,
    "fluent-bit-es": FluentBitElastic,
    "fluent-bit-loki": FluentBitLoki,
    "fluent-bit-splunk": FluentBitSplunk,
    "vector": Vector,
    "vector-es": VectorElastic,
    "vector-loki": VectorLoki,
    "vector-splunk": VectorSplunk,
    "filebeat": Filebeat,
    "logstash": Logstash,
    "logstash-es": LogstashElastic,
    "fluentd": Fluentd,
    "docker": Docker,
    "promtail": Promtail,
    "collector": Collector,
}


def make(port):
    return [kind(name, port) for name, kind in KINDS.items()]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_accepted_arrives(mocks, serve, scenario):
    scenario(mocks, serve, make)
