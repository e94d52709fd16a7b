"""Dead letters in a stream of their own, where all replicas, and any machine with the configuration, see the same ones.

A packet's message is acknowledged only after its dead letter is stored. The id of that is made of the packet's place in
the stream, so one that was stored when its worker was killed is not stored twice within the window. A dead letter is
the same line of JSON as in the files (``dead_letter_format.as_line``); where that is larger than a message may be
(its packet need not have been: as a string it takes more), it is compressed.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
from typing import TYPE_CHECKING

import msgspec

from fastdist.storage.jetstream import api
from fastdist.storage.jetstream.api import ApiError, request
from fastdist.storage.jetstream.publisher import Outcome, Publisher

if TYPE_CHECKING:
    from datetime import datetime

    from fastdist.storage.jetstream.connection import Connection


COMPRESSED = b"\x1f\x8b"  # how gzip's data begin; a line begins with a brace
HEADERS = 256  # bytes of a message besides the line, at most


class StoredLetter(msgspec.Struct, frozen=True):
    """A dead letter, its sequence, by which it is removed, and when it was stored."""

    sequence: int
    line: bytes
    stored_at: datetime


class DeadStream:
    """The stream of dead letters; it makes a publisher (before the connection is started)."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        settings = connection.settings
        self.stream = settings.dead_stream
        self._publisher = Publisher(connection, self.stream, settings.dead_subject, settings.publish_timeout)

    async def put(self, line: bytes, sequence: int, index: int = 0, stored_ns: int = 0) -> Outcome:
        """Store the dead letter of packet ``index`` of message ``sequence``; only after a *yes* may that be settled.

        ``stored_ns``: when that message was stored. A stream that was made again has the same sequences.
        """
        if len(line) + HEADERS > (self.connection.max_payload or len(line) + HEADERS):
            line = await asyncio.to_thread(gzip.compress, line, 1, mtime=0)
        return await self._publisher.publish(line, f"dead/{sequence}.{index}/{stored_ns}")

    async def next(self, first: int) -> StoredLetter | None:
        """Return the first dead letter from a sequence on; None if it does not exist. Raises UnavailableError."""
        wanted = {"seq": first, "next_by_subj": ">"}
        try:
            response = await request(self.connection.client, f"STREAM.MSG.GET.{self.stream}", wanted)
        except ApiError as error:
            if error.code == api.MESSAGE_NOT_FOUND:
                return None
            raise
        message = response["message"]
        line = base64.b64decode(message.get("data", ""))
        if line.startswith(COMPRESSED):
            line = await asyncio.to_thread(gzip.decompress, line)
        return StoredLetter(message["seq"], line, api.parse_time(message.get("time", "")))

    async def last(self) -> int:
        """Return the sequence of the last dead letter there ever was. Raises UnavailableError."""
        response = await request(self.connection.client, f"STREAM.INFO.{self.stream}")
        return int(response["state"]["last_seq"])

    async def remove(self, sequence: int) -> bool:
        """Remove a dead letter that was replayed; return whether it was there. Raises UnavailableError."""
        try:
            await request(
                self.connection.client, f"STREAM.MSG.DELETE.{self.stream}", {"seq": sequence, "no_erase": True}
            )
        except ApiError as error:
            gone = error.code == api.DELETE_FAILED and "no message found" in str(error)  # the number is of all failures
            if gone or error.code in {api.SEQUENCE_NOT_FOUND, api.MESSAGE_NOT_FOUND}:
                return False
            raise
        return True
