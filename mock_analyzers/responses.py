"""The bytes of responses, built once and kept: an analyzer says the same few things over and over.

An ``Response`` keeps head and body apart because the faults cut between and inside them.
"""

from __future__ import annotations

import math
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

import orjson

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </analyze>; rel=preload\r\n\r\n"
GARBAGE = b"\x16\x03\x01\x00\xa5 220 this is not HTTP\r\n\x00\xff\r\n\r\n"

_JSON = b"application/json"
_BODILESS = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
_PAUSING = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_MISSING = 10  # bytes that a wrong Content-Length promises beyond the body


class Response(NamedTuple):
    """A whole response as it goes over the wire."""

    head: bytes
    body: bytes


def is_success(status: int) -> bool:
    """Return whether a status is one of the 2xx."""
    return status // 100 == 2  # noqa: PLR2004 - the class of the status


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Mocked"


def _head(status: int, *fields: bytes, close: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} {_reason(status)}".encode(), *fields]
    if close:
        lines.append(b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def content(status: int, body: bytes, kind: bytes = _JSON, *, close: bool = False) -> Response:
    """Return a response with any body."""
    fields = (b"Content-Type: " + kind, b"Content-Length: %d" % len(body))
    return Response(_head(status, *fields, close=close), body)


def json(status: int, value: object, *, close: bool = False) -> Response:
    """Return a response with a JSON body."""
    return content(status, orjson.dumps(value), close=close)


def stream_head(kind: bytes = _JSON) -> bytes:
    """Return the head of a long response that comes in chunks and ends its connection."""
    return _head(200, b"Content-Type: " + kind, b"Transfer-Encoding: chunked", close=True)


def chunk(data: bytes) -> bytes:
    """Return one chunk of the chunked transfer coding; no data makes the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@lru_cache(maxsize=256)
def verdict(
    status: int,
    retry_after: float | None = None,
    *,
    close: bool = False,
    chunked: bool = False,
    short: bool = False,
) -> Response:
    """Return an analyzer's response to a packet; ``short`` promises more bytes than there are."""
    fields: list[bytes] = []
    if retry_after is not None and status in _PAUSING:
        fields.append(b"Retry-After: %d" % math.ceil(retry_after))
    if 300 <= status < 400:  # noqa: PLR2004 - redirects lead somewhere
        fields.append(b"Location: /elsewhere")
    if status in _BODILESS:
        return Response(_head(status, *fields, close=close), b"")
    body = b'{"status":"ok"}' if is_success(status) else b'{"status":"error","code":%d}' % status
    fields.append(b"Content-Type: " + _JSON)
    if short:
        fields.append(b"Content-Length: %d" % (len(body) + _MISSING))
    elif chunked:
        fields.append(b"Transfer-Encoding: chunked")
        half = len(body) // 2
        body = chunk(body[:half]) + chunk(body[half:]) + chunk(b"")
    else:
        fields.append(b"Content-Length: %d" % len(body))
    return Response(_head(status, *fields, close=close), body)
