"""Requests of JetStream's API: JSON in, JSON out, and what its errors mean.

Not those of nats-py's ``js``: their classes know the settings of streams of their day, and drop all others from what
they read and write back.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

if TYPE_CHECKING:
    from nats.aio.client import Client

TIMEOUT = 2.0  # seconds

# Error codes (nats-server, server/errors.json).
STREAM_NAME_EXIST = 10058  # with another configuration
STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
MESSAGE_NOT_FOUND = 10037
DELETE_FAILED = 10057  # among others: it does not exist
SEQUENCE_NOT_FOUND = 10043
STORE_FAILED = 10077  # the stream is full, and discards what is new
DUPLICATE_IN_PROCESS = 10158  # a message of this id was proposed and is not stored yet
MESSAGE_TOO_LARGE = 10054
WRONG_LAST_SEQUENCE = (10071, 10164)
NO_PEERS = 10005  # too few servers, or with too little room
MEMORY_EXCEEDED = 10028
STORAGE_EXCEEDED = 10047
NOT_CLUSTERED = 10074  # several copies are wanted of one server


class Fault(Struct, frozen=True):
    """An error as JetStream says it."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(Struct, frozen=True):
    """The response to a message that was published to a stream."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: Fault | None = None


class ApiError(Exception):
    """A request was refused."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.description)
        self.fault = fault

    @property
    def code(self) -> int:
        """JetStream's number of the error."""
        return self.fault.err_code


class UnavailableError(Exception):
    """There is no response now: no server, no leader, no majority. It may come back by itself."""


read_ack = msgspec.json.Decoder(PubAck).decode
_to_fault = msgspec.json.Decoder(Fault).decode


async def request(
    client: Client | None,
    subject: str,
    body: object = None,
    *,
    timeout: float = TIMEOUT,  # noqa: ASYNC109  (nats-py's)
) -> dict[str, Any]:
    """Ask JetStream (``subject`` without ``$JS.API.``); return its response. Raises ApiError or UnavailableError."""
    if client is None:
        raise UnavailableError("no server is connected")
    data = b"" if body is None else msgspec.json.encode(body)
    try:
        reply = await client.request(f"$JS.API.{subject}", data, timeout=timeout)
        response: dict[str, Any] = msgspec.json.decode(reply.data)
    except NoRespondersError as error:
        raise UnavailableError("JetStream does not answer: it is off, or has no leader") from error
    except (NatsError, OSError, TimeoutError, msgspec.DecodeError) as error:
        raise UnavailableError(str(error) or type(error).__name__) from error
    if "error" in response:
        fault = msgspec.convert(response["error"], Fault)
        if fault.code in {429, 503} and fault.err_code != STREAM_NOT_FOUND:
            raise UnavailableError(fault.description)
        raise ApiError(fault)
    return response


async def find(client: Client | None, subject: str, absent: int, body: object = None) -> dict[str, Any] | None:
    """Return what is there; None where the response is the error ``absent``. Raises UnavailableError for all others."""
    try:
        return await request(client, subject, body)
    except ApiError as error:
        if error.code == absent:
            return None
        raise UnavailableError(str(error)) from error


def parse_time(text: str) -> datetime:
    """Return a time as JetStream writes it, to the nanosecond; the beginning of 1970 for any other text."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
