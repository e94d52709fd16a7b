"""Tells emitters that wait for a delivery (``Prefer: wait``) what became of it, whichever worker or replica delivers.

A packet's message names the subject to tell it to: this worker's inbox and the packet's sequence here. A word that is
lost costs its emitter no more than that it is answered 202 when its time is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError

from fastdist.storage.jetstream.connection import background

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from fastdist.storage.jetstream.connection import Connection


class Word(Struct, frozen=True, omit_defaults=True):
    """What became of a packet: the analyzer that has it; without one, it is a dead letter."""

    analyzer: str | None = None


_decode = msgspec.json.Decoder(Word).decode


class Words:
    """A part of a connection (before that is started). ``settled(sequence, analyzer)`` is called for each word."""

    def __init__(self, connection: Connection, inbox: str, settled: Callable[[int, str | None], None]) -> None:
        self._inbox, self._settled = inbox, settled
        self._client: Client | None = None
        connection.add(self)

    def subject(self, sequence: int) -> str:
        """Return where to tell of a packet of this worker."""
        return f"{self._inbox}.{sequence}"

    def tell(self, subject: str, analyzer: str | None) -> None:
        """Tell the worker that awaits it what became of a packet."""
        if self._client is not None:
            background(self._tell(self._client, subject, msgspec.json.encode(Word(analyzer))))

    async def _tell(self, client: Client, subject: str, word: bytes) -> None:
        try:
            await client.publish(subject, word)
        except (NatsError, OSError):
            return

    async def connected(self, client: Client) -> None:
        """Listen on a new client."""
        await client.subscribe(f"{self._inbox}.*", cb=self._received)
        self._client = client

    def lost(self) -> None:
        """Wait for the next client."""
        self._client = None

    async def _received(self, message: Msg) -> None:
        number = message.subject[len(self._inbox) + 1 :]
        try:
            word = _decode(message.data)
        except msgspec.MsgspecError:
            return
        if number.isdecimal():
            self._settled(int(number), word.analyzer)
