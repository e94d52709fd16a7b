"""Tells emitters that wait for a delivery (``Prefer: wait``) what became of it, whichever worker or replica delivers.

A packet's message names the subject to tell it to: this worker's inbox and the packet's sequence here. A notice
that is lost costs its emitter no more than that it is answered 202 when its time is over.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from nats.errors import Error as NatsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.storage.jetstream.client import Client
    from fastdist.storage.jetstream.connection import Connection


class DeliveryNotice(Struct, frozen=True, omit_defaults=True):
    """What became of a packet: the analyzer that has it; without one, it is a dead letter."""

    analyzer: str | None = None


INBOX = re.compile(r"_INBOX\.[0-9A-Za-z.]{1,100}")
_decode = msgspec.json.Decoder(DeliveryNotice).decode


class DeliveryNotices:
    """A part of a connection (before that is started). ``settled(sequence, analyzer)`` is called for each notice."""

    def __init__(self, connection: Connection, inbox: str, settled: Callable[[int, str | None], None]) -> None:
        self._inbox, self._settled = inbox, settled
        self._client: Client | None = None
        connection.add(self)

    def subject(self, sequence: int) -> str:
        """Return where to tell of a packet of this worker."""
        return f"{self._inbox}.{sequence}"

    def tell(self, subject: str, analyzer: str | None) -> None:
        """Tell the worker that awaits it what became of a packet."""
        if self._client is not None and INBOX.fullmatch(subject):  # anything may stand in a message
            with contextlib.suppress(NatsError):
                self._client.send(subject, msgspec.json.encode(DeliveryNotice(analyzer)))

    def connected(self, client: Client) -> None:
        """Listen on a new client."""
        client.take(f"{self._inbox}.*", self._received)
        self._client = client

    def lost(self) -> None:
        """Wait for the next client."""
        self._client = None

    def _received(self, subject: str, _reply: str, _headers: bytes, data: bytes) -> None:
        number = subject[len(self._inbox) + 1 :]
        try:
            notice = _decode(data)
        except msgspec.MsgspecError:
            return
        if number.isdecimal():
            self._settled(int(number), notice.analyzer)
