"""Log agents' formats in openapi.json: what is sent, what the success looks like, and what the members are.

Successes in the examples are those that the service's own converters give to the requests among the examples.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from openapi_parts import Json

TEXT = {"type": "string"}
ANYTHING: Json = {}  # where a value of another kind than the usual one is kept as it is
OBJECT = {"type": "object"}
LINES = {"type": "string", "minLength": 1}


def _object(description: str, required: tuple[str, ...] = (), /, **members: Json) -> Json:
    """Return the schema of an object, in which there may be other members as well."""
    needed = {"required": list(required)} if required else {}
    return {"description": description, "type": "object", "properties": members} | needed


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _schema(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _nullable(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


_NANOSECONDS = {"type": ["string", "integer"], "description": "Since 1970.", "examples": ["1767323045678901234"]}
_ATTRIBUTES = _nullable(_list(_schema("OtlpAttribute")))
SCHEMAS: Json = {
    "RecordsStored": _object(
        "All records are stored.", ("status", "records"), status={"const": "accepted"}, records={"type": "integer"}
    ),
    "OtlpLogs": _object(
        "An ExportLogsServiceRequest, as JSON. Members that are not known are passed over.",
        resourceLogs=_nullable(
            _list(
                _object(
                    "Of one resource.",
                    resource=_nullable(_object("Names the emitter.", attributes=_ATTRIBUTES)),
                    scopeLogs=_nullable(
                        _list(
                            _object(
                                "Of one logger.",
                                scope=_nullable(
                                    _object("The logger.", name=TEXT, version=TEXT, attributes=_ATTRIBUTES)
                                ),
                                logRecords=_nullable(_list(_schema("OtlpRecord"))),
                            )
                        )
                    ),
                )
            )
        ),
    ),
    "OtlpRecord": _object(
        "A log record.",
        timeUnixNano=_NANOSECONDS,
        observedTimeUnixNano=_NANOSECONDS,
        severityNumber={"type": "integer", "description": "1 to 24."},
        severityText=TEXT,
        body=_schema("OtlpValue"),
        attributes=_ATTRIBUTES,
        traceId=TEXT,
        spanId=TEXT,
        flags={"type": "integer"},
        eventName=TEXT,
        droppedAttributesCount={"type": "integer"},
    ),
    "OtlpAttribute": _object("A name and its value.", key=TEXT, value=_schema("OtlpValue")),
    "OtlpValue": _object(
        "An AnyValue: one of these.",
        stringValue=TEXT,
        boolValue={"type": "boolean"},
        intValue={"type": ["integer", "string"], "pattern": "^-?[0-9]{1,19}$"},
        doubleValue={"type": "number"},
        arrayValue=_object("Values.", values=_list(_schema("OtlpValue"))),
        kvlistValue=_object("A map.", values=_list(_schema("OtlpAttribute"))),
        bytesValue={"type": "string", "description": "Base64."},
    ),
    "OtlpStored": {"description": "An ExportLogsServiceResponse, without partial success.", "const": {}},
    "OtlpStatus": _object("A google.rpc.Status, as JSON.", ("code", "message"), code={"type": "integer"}, message=TEXT),
    "LokiPush": _object(
        "What is pushed to Loki.",
        streams=_list(
            _object(
                "Lines that have labels in common.",
                stream=OBJECT | {"description": "The labels."},
                values=_list(
                    {
                        "description": "Nanoseconds since 1970 as text, the line, structured metadata.",
                        "type": "array",
                        "prefixItems": [ANYTHING, ANYTHING, OBJECT],
                        "minItems": 2,
                    }
                ),
            )
        ),
    ),
    "SplunkEvent": _object(
        "An event; more follow each other, with or without white space in between.",
        ("event",),
        time={"description": "Seconds since 1970: a number, or the same as text."},
        host={"description": "The emitter."},
        source=ANYTHING,
        sourcetype=ANYTHING,
        index=ANYTHING,
        event={"description": "The record: text, or anything else but null.", "not": {"enum": [None, ""]}},
        fields={"description": "An object. `level` or `severity` in it is the record's level."},
    ),
    "SplunkReply": _object(
        "What Splunk's HTTP Event Collector replies.",
        ("text", "code"),
        text=TEXT,
        code={"type": "integer"},
        **{"invalid-event-number": {"type": "integer", "description": "The first event at fault, from 0."}},
        detail={"type": "string", "description": "What exactly is wrong."},
    ),
    "ElasticsearchBulk": _object(
        "An item for each action, in their order.",
        ("took", "errors", "items"),
        took={"type": "integer"},
        errors={"type": "boolean", "description": "Whether an item was refused."},
        items=_list({"type": "object", "additionalProperties": _schema("ElasticsearchItem")}),
    ),
    "ElasticsearchItem": _object(
        "What became of a document.",
        ("_index", "_id"),
        _index=TEXT,
        _id=TEXT,
        _version={"type": "integer"},
        result={"enum": ["created", "updated"]},
        _shards=OBJECT,
        _seq_no={"type": "integer"},
        _primary_term={"type": "integer"},
        status={"type": "integer", "description": "201 or 200; 400 of one that is refused."},
        error=_object("Why it is refused.", ("type", "reason"), type=TEXT, reason=TEXT),
    ),
    "ElasticsearchError": _object(
        "An error.",
        ("error", "status"),
        error=_object("It.", ("type", "reason"), root_cause=_list(OBJECT), type=TEXT, reason=TEXT),
        status={"type": "integer"},
    ),
}


class Format(NamedTuple):
    """A format of requests: ``path`` is one that takes it; ``bodies``: schema and examples by media type.

    ``schema`` is that of the success, None if it has no body; ``wrong`` are bodies that are refused.
    """

    path: str
    description: str
    bodies: dict[str, tuple[Json | None, dict[str, object]]]
    schema: Json | None
    wrong: dict[str, str]


_RECORDS = [
    {"date": 1767323045.678901, "log": "GET /cart 200", "level": "notice", "host": "web-42"},
    {"date": 1767323045.7, "log": "payment provider answered slowly", "level": "warn", "host": "web-42"},
]
_OTLP = {
    "resourceLogs": [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]},
            "scopeLogs": [
                {
                    "scope": {"name": "checkout"},
                    "logRecords": [
                        {
                            "timeUnixNano": "1767323045678901234",
                            "severityNumber": 13,
                            "severityText": "WARN",
                            "body": {"stringValue": "payment provider answered slowly"},
                            "attributes": [{"key": "attempt", "value": {"intValue": "2"}}],
                            "traceId": "5b8efff798038103d269b633813fc60c",
                        }
                    ],
                }
            ],
        }
    ]
}
_LOKI = {
    "streams": [
        {
            "stream": {"host": "web-42", "job": "shop", "level": "warn"},
            "values": [["1767323045678901234", "payment provider answered slowly", {"trace_id": "0242ac120002"}]],
        }
    ]
}
_EVENT = {"time": 1767323045.679, "host": "web-42", "source": "shop", "event": "GET /cart 200"}
_DOCUMENT = {"@timestamp": "2026-01-02T03:04:05.678Z", "message": "GET /cart 200", "host": {"name": "web-42"}}
_BULK = f'{{"create":{{"_index":"logs-app"}}}}\n{json.dumps(_DOCUMENT)}\n'
_BROKEN = {"notJson": "{"}
FORMATS = {
    "Records": Format(
        "/ingest",
        "Records: JSON values one after the other, with or without white space in between, or arrays of them; or lines "
        "of text. A value that is no object is a line. application/x-www-form-urlencoded, which is what libcurl says "
        "of anything, counts as text; no type at all as JSON.",
        {
            "application/json": ({}, {"array": _RECORDS, "object": _RECORDS[0]}),
            "application/x-ndjson": (LINES, {"lines": "\n".join(map(json.dumps, _RECORDS)) + "\n"}),
            "text/plain": (LINES, {"lines": "GET /cart 200\nGET /checkout 500\n"}),
        },
        _schema("RecordsStored"),
        _BROKEN | {"secondRecord": '{"log":"one"}{"log":'},
    ),
    "OtlpLogs": Format(
        "/v1/logs",
        "An ExportLogsServiceRequest (OTLP/HTTP), as protobuf or JSON.",
        {"application/json": (_schema("OtlpLogs"), {"usual": _OTLP}), "application/x-protobuf": (None, {})},
        _schema("OtlpStored"),
        _BROKEN,
    ),
    "LokiPush": Format(
        "/loki/api/v1/push",
        "Streams of Loki's push API: JSON, or a PushRequest of protobuf as a block of snappy.",
        {"application/json": (_schema("LokiPush"), {"usual": _LOKI}), "application/x-protobuf": (None, {})},
        None,
        _BROKEN,
    ),
    "SplunkEvents": Format(
        "/services/collector",
        "Events, one after the other. The media type is not looked at.",
        {"application/json": (_schema("SplunkEvent"), {"event": _EVENT, "object": _EVENT | {"event": {"id": 7}}})},
        _schema("SplunkReply"),
        {"noData": "", "notJson": "{", "noEvent": '{"host":"web-42"}', "blankEvent": '{"event":""}'},
    ),
    "SplunkLines": Format(
        "/services/collector/raw",
        "Lines of text. The media type is not looked at.",
        {"text/plain": (LINES, {"lines": "GET /cart 200\nGET /checkout 500\n"})},
        _schema("SplunkReply"),
        {"noData": ""},
    ),
    "ElasticsearchBulk": Format(
        "/_bulk",
        "Lines: an action (`create`, `index`, `update` with `doc` or `upsert`, `delete`), and behind it its document. "
        "A document that is no object and a delete are refused, each by itself. Any media type with json in it does.",
        {"application/x-ndjson": (LINES, {"create": _BULK, "delete": _BULK + '{"delete":{"_id":"7"}}\n'})},
        _schema("ElasticsearchBulk"),
        {"noAction": "", "brokenAction": "{}\n{}\n", "noDocument": '{"index":{}}\n'},
    ),
    "ElasticsearchDocument": Format(
        "/logs-app/_doc",
        "A document. Any media type with json in it will do.",
        {"application/json": (OBJECT, {"usual": _DOCUMENT})},
        _schema("ElasticsearchItem"),
        {"noObject": "[]"},
    ),
}
