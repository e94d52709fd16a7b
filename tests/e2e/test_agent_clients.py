"""Clients in Python that people log with, as they are: what they were told is accepted arrives as it was logged."""

from __future__ import annotations

import http.client
import logging
import logging.handlers
import time
from urllib.parse import parse_qs

import pytest
from clients_harness import LEVELS, SCENARIOS, Client
from elasticsearch import ApiError, Elasticsearch, helpers
from elasticsearch import ConnectionError as NotConnected
from logging_loki import LokiHandler
from opentelemetry._logs import SeverityNumber
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from splunk_handler import SplunkHandler
from support import wait_until

PYTHON_LEVELS = [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR]
SEVERITIES = [SeverityNumber.DEBUG, SeverityNumber.INFO2, SeverityNumber.WARN, SeverityNumber.ERROR4]


class OpenTelemetry(Client):
    """OpenTelemetry's SDK: a provider, its batches, its exporter, which retries as long as it is told."""

    def __init__(self, name, port):
        super().__init__(name, port)
        tell = self.tell

        class Exporter(OTLPLogExporter):
            def export(self, batch):
                result = super().export(batch)
                tell(result is LogRecordExportResult.SUCCESS, [each.log_record.attributes["number"] for each in batch])
                return result

        exporter = Exporter(endpoint=f"http://127.0.0.1:{port}/v1/logs", compression=Compression.Gzip, timeout=60)
        self.provider = LoggerProvider(resource=Resource.create({"service.name": name, "region": "eu"}))
        self.provider.add_log_record_processor(BatchLogRecordProcessor(exporter, 50, 100, max_queue_size=100_000))
        self.logger = self.provider.get_logger("shop.cart", "1.2", attributes={"part": "basket"})

    def log(self, numbers):
        for number in numbers:
            self.logger.emit(
                timestamp=time.time_ns(),
                severity_number=SEVERITIES[number % 4],
                severity_text=SEVERITIES[number % 4].name,
                body=self.text(number),
                attributes={"number": number, "user": "Zoë", "vip": True, "sizes": [1, 2]},
            )

    def finish(self):
        self.provider.shutdown()

    def expected(self, number):
        return {
            "message": self.text(number),
            "level": LEVELS[number % 4],
            "source": "shop.cart",
            "metadata": {
                "attributes": {"number": number, "user": "Zoë", "vip": True, "sizes": [1, 2]},
                "resource": {"region": "eu", "service.name": self.name, "telemetry.sdk.name": "opentelemetry"},
                "scope": {"version": "1.2", "attributes": {"part": "basket"}},
                "severityText": SEVERITIES[number % 4].name,
            },
        }


class Bulk(Client):
    """Elasticsearch's ``streaming_bulk``, which repeats what gets 429, in an application that repeats the rest."""

    def __init__(self, name, port):
        super().__init__(name, port)
        self.client = Elasticsearch(f"http://127.0.0.1:{port}", http_compress=True, request_timeout=60)

    def log(self, numbers):
        left = list(numbers)
        while left:
            try:
                for number, (done, _) in zip(tuple(left), self.send([self.action(each) for each in left]), strict=True):
                    if done:
                        left.remove(number)
                        self.tell(True, [number])
            except (ApiError, NotConnected):
                time.sleep(0.1)

    def send(self, actions):
        return helpers.streaming_bulk(self.client, actions, max_retries=5, initial_backoff=0.1, raise_on_error=False)

    def action(self, number):
        return {
            "_index": "shop",
            "_op_type": "create",
            "@timestamp": f"2026-01-02T03:04:05.{number:09}Z",
            "message": self.text(number),
            "log": {"level": LEVELS[number % 4].upper(), "file": {"path": "/var/log/shop"}},
            "service": {"name": self.name},
            "number": number,
            "user": {"name": "Zoë", "tags": ["a", None]},
        }

    def finish(self):
        self.client.close()

    def expected(self, number):
        metadata = {"number": number, "user": {"name": "Zoë", "tags": ["a", None]}, "_index": "shop"}
        return {
            "timestamp": f"2026-01-02T03:04:05.{number:09}Z",
            "message": self.text(number),
            "level": LEVELS[number % 4],
            "source": "/var/log/shop",
            "metadata": metadata,
        }


class ParallelBulk(Bulk):
    """``parallel_bulk``, which repeats nothing by itself."""

    each = 20
    pause = 0.1

    def send(self, actions):
        return helpers.parallel_bulk(self.client, actions, thread_count=2, chunk_size=5, raise_on_error=False)


class Logged(Client):
    """A handler of the standard library's logging."""

    def __init__(self, name, port):
        super().__init__(name, port)
        self.handler = self.make()
        self.logger = logging.Logger(name)  # noqa: LOG001  (of this test alone)
        self.logger.addHandler(self.handler)

    def make(self):
        """Return the handler."""
        raise NotImplementedError

    def log(self, numbers):
        for number in numbers:
            self.logger.log(PYTHON_LEVELS[number % 4], "%s", self.text(number), extra=self.extra(number))

    def extra(self, _number):
        return {}

    def finish(self):
        self.handler.close()


class Loki(Logged):
    """python-logging-loki, which never retries and tells its application by ``handleError``."""

    retries = False
    each = 2

    failed = False

    def make(self):
        url = f"http://127.0.0.1:{self.port}/loki/api/v1/push"
        handler = LokiHandler(url, {"service_name": self.name}, version="1")
        handler.handleError = self.fail
        return handler

    def fail(self, _record):
        self.handler.emitter.close()
        self.failed = True

    def log(self, numbers):
        for number in numbers:
            self.failed = False
            super().log([number])
            self.tell(not self.failed, [number])

    def extra(self, number):
        return {"tags": {"number": str(number), "user": "Zoë"}}

    def expected(self, number):
        metadata = {"number": str(number), "user": "Zoë", "service_name": self.name}
        return {
            "message": self.text(number),
            "level": LEVELS[number % 4],
            "source": self.name,
            "metadata": metadata,
        }


class Splunk(Logged):
    """splunk_handler, which retries as often as it is told, by urllib3."""

    def make(self):
        handler = SplunkHandler(
            "127.0.0.1",
            self.port,
            "token",
            "main",
            protocol="http",
            hostname=self.name,
            flush_interval=0.05,
            retry_count=10,  # by default it gives up after six seconds: a slow machine is away for longer
            retry_backoff=0.2,
            source="cart.py",
        )
        post = handler.session.post

        def ledger(url, data, **rest):
            numbers = [int(each.split()[0]) for each in data.split(f"{self.name}/")[1:]]
            try:
                response = post(url, data=data, **rest)
            except OSError:
                self.tell(False, numbers)
                raise
            self.tell(response.ok, numbers)
            return response

        handler.session.post = ledger
        return handler

    def finish(self):
        self.handler.force_flush()  # does not wait for what its thread is sending, or trying again
        wait_until(lambda: len(self.accepted | self.refused) == self.sent, "all is sent")
        super().finish()

    def expected(self, number):
        return {"message": self.text(number), "level": "info", "source": "cart.py", "metadata": {"index": "main"}}


class Form(Logged):
    """The standard library's ``HTTPHandler``: a form that is a line of text here; it looks at no response."""

    retries = False
    each = 2

    def make(self):
        statuses = self.statuses = []

        class Connection(http.client.HTTPConnection):
            def getresponse(self):
                response = super().getresponse()
                statuses.append(response.status)
                return response

        class Handler(logging.handlers.HTTPHandler):
            def getConnection(self, host, _secure):  # noqa: N802
                return Connection(host)

            def mapLogRecord(self, record):  # noqa: N802
                fields = super().mapLogRecord(record)
                return {"text": record.getMessage(), "level": fields["levelname"], "name": fields["name"]}

            def handleError(self, _record):  # noqa: N802
                statuses.append(0)

        return Handler(f"127.0.0.1:{self.port}", "/ingest/shop", "POST")

    def log(self, numbers):
        for number in numbers:
            super().log([number])
            self.tell(self.statuses.pop() == 200, [number])

    def expected(self, _number):
        return {"level": "info", "source": "shop", "emitterId": "127.0.0.1"}

    def check(self, number, message, emitter):
        super().check(number, {"metadata": {}} | message, emitter)
        assert parse_qs(message["message"], strict_parsing=True) == {
            "text": [self.text(number)],
            "level": [logging.getLevelName(PYTHON_LEVELS[number % 4])],
            "name": [self.name],
        }


def make(port):
    kinds = {
        "opentelemetry": OpenTelemetry,
        "streaming_bulk": Bulk,
        "parallel_bulk": ParallelBulk,
        "loki": Loki,
        "splunk": Splunk,
        "form": Form,
    }
    return [kind(name, port) for name, kind in kinds.items()]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_is_accepted_arrives(mocks, serve, scenario):
    scenario(mocks, serve, make)
