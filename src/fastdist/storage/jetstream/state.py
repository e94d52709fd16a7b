"""What replicas tell each other: values by key, in a key-value bucket (as ``nats kv`` shows it).

A value is read from the leader, so it is never an old one, and by asking once a second, so that nothing has to be set
up again after a connection was lost. ``put`` may be told which revision it replaces: of two changes at once one is
refused, and made again upon the other.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING

import msgspec
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from fastdist.storage.jetstream import api
from fastdist.storage.jetstream.api import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastdist.storage.jetstream.connection import Connection

EVERY = 1.0  # seconds between two looks of a watch


class Value(msgspec.Struct, frozen=True):
    """A value and its revision; revision 0: it does not exist yet."""

    data: bytes = b""
    revision: int = 0


class ConflictError(Exception):
    """Another has put a value since."""


class StateBucket:
    """The bucket of a connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._bucket = connection.settings.bucket

    async def get(self, key: str) -> Value:
        """Return the value of a key. Raises UnavailableError."""
        subject, wanted = f"STREAM.MSG.GET.KV_{self._bucket}", {"last_by_subj": self._subject(key)}
        response = await api.find(self.connection.client, subject, api.MESSAGE_NOT_FOUND, wanted)
        if response is None:
            return Value()
        message = response["message"]
        return Value(base64.b64decode(message.get("data", "")), message["seq"])

    async def put(self, key: str, data: bytes, replaces: int | None = None) -> int:
        """Store a value; return its revision. Raises ConflictError if the present one is not ``replaces``.

        Raises UnavailableError if that is not known to have happened; ``get`` says whether it has.
        """
        client = self.connection.client
        if client is None:
            raise UnavailableError("no server is connected")
        headers = {} if replaces is None else {"Nats-Expected-Last-Subject-Sequence": str(replaces)}
        try:
            reply = await client.request(self._subject(key), data, timeout=api.TIMEOUT, headers=headers or None)
            ack = api.read_ack(reply.data)
        except NoRespondersError as error:
            raise UnavailableError("the bucket does not answer: it is gone, or has no leader") from error
        except (NatsError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise UnavailableError(str(error) or type(error).__name__) from error
        if ack.error is None:
            return ack.seq
        if ack.error.err_code in api.WRONG_LAST_SEQUENCE:
            raise ConflictError(ack.error.description)
        raise UnavailableError(ack.error.description)

    async def watch(self, key: str) -> AsyncIterator[Value]:
        """Yield the value of a key, and each one after it that is there when a second is over; never ends."""
        seen = -1
        while True:
            try:
                value = await self.get(key)
            except UnavailableError:
                pass  # and none can change it meanwhile
            else:
                if value.revision != seen:
                    seen = value.revision
                    yield value
            await asyncio.sleep(EVERY)

    def _subject(self, key: str) -> str:
        return f"$KV.{self._bucket}.{key}"
