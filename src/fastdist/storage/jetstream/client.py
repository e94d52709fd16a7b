"""nats-py's client with a short way for messages, sent and received.

nats-py logs in, encrypts, keeps the connection alive and asks JetStream's API. Its way of a message (expressions, a
queue and a task for each subscription, another for what is written) takes several times as much time as all else that
a packet needs, so the messages of packets go past it:

- ``send`` appends to what nats-py writes; all that an event-loop iteration sends leaves in one write.
- ``take`` subscribes with a function that is called with each message as soon as it is read. What is not a message of
  such a subscription is left to nats-py, byte by byte.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nats.aio.client import Client as NatsClient
from nats.errors import ConnectionClosedError

from fastdist import logs
from fastdist.storage.jetstream.transport import DroppableTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    # (subject, reply subject, headers, data)
    Handler = Callable[[str, str, bytes, bytes], None]

LINE_END = b"\r\n"

log = logs.get()


class Client(NatsClient):
    """A client that can be left at any moment, and never reconnects; ``must_encrypt``: it says nothing before TLS."""

    def __init__(self, *, must_encrypt: bool) -> None:
        super().__init__()
        self._messages = Messages()
        self._transport = self.transport = DroppableTransport(self._messages, must_encrypt=must_encrypt)
        self._is_scheduled = False

    def send(self, subject: str, data: bytes, reply: str = "", message_id: str = "") -> None:
        """Publish at the end of this event-loop iteration. Raises ConnectionClosedError: it is never sent.

        ``message_id``: the stream's Nats-Msg-Id, printable ASCII.
        """
        if not self.is_connected:
            raise ConnectionClosedError
        if message_id:
            headers = f"NATS/1.0\r\nNats-Msg-Id: {message_id}\r\n\r\n"
            size = len(headers)
            command = f"HPUB {subject} {reply} {size} {size + len(data)}\r\n{headers}".encode()
        else:
            command = f"PUB {subject} {reply} {len(data)}\r\n".encode()
        self._append(b"%b%b\r\n" % (command, data))

    def take(self, subject: str, handler: Handler) -> None:
        """Subscribe. ``handler`` must not wait; what it raises is logged, and the next message comes."""
        self._sid += 1
        self._messages.handlers[b"%d" % self._sid] = handler
        self._append(f"SUB {subject}  {self._sid}\r\n".encode())

    @property
    def unsent(self) -> int:
        """Bytes that are ours still: the kernel does not take them."""
        self.write()
        return self.transport.unsent

    def _append(self, command: bytes) -> None:
        self._pending.append(command)
        self._pending_data_size += len(command)
        if not self._is_scheduled:
            asyncio.get_running_loop().call_soon(self.write)
            self._is_scheduled = True

    def write(self) -> None:
        """Write what is pending, of nats-py too, in its order."""
        self._is_scheduled = False
        if self._pending and self.is_connected:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            self.transport.writelines(pending)


class Messages:
    """Takes the messages of some subscriptions out of the bytes that a server sends."""

    def __init__(self) -> None:
        self.handlers: dict[bytes, Handler] = {}  # by the subscription's number
        self.rest = bytearray()  # the beginning of a message or a line
        self._needed = 0  # bytes of it until there is more to do

    def split(self, received: bytes) -> bytes:
        """Have all whole messages handled; return what is not ours: whole lines and messages, in their order."""
        if self.rest:
            self.rest += received
            if len(self.rest) < self._needed:
                return b""
            received = bytes(self.rest)
            self.rest.clear()
        others, at, size, self._needed = [], 0, len(received), 0
        while at < size:
            end = received.find(LINE_END, at)
            if end < 0:
                break
            begin, fields = end + 2, received[at:end].split()
            behind = begin + _size_behind(fields)
            if behind > size:
                self._needed = behind - at
                break
            handler = self.handlers.get(fields[2]) if behind > begin else None
            if handler is None:
                others.append(received[at:behind])
            else:
                _hand_over(handler, fields, received, begin, behind - 2)
            at = behind
        self.rest += received[at:]
        return b"".join(others)


def _size_behind(fields: list[bytes]) -> int:
    """Return how many bytes belong to a line, for a message: MSG or HMSG, subject, number, ..., size."""
    if len(fields) < 4 or fields[0] not in {b"MSG", b"HMSG"} or not fields[-1].isdigit():  # noqa: PLR2004
        return 0
    return int(fields[-1]) + 2


def _hand_over(handler: Handler, fields: list[bytes], received: bytes, begin: int, end: int) -> None:
    """Call it. ``fields``: MSG, subject, number, reply subject if there is one, size; HMSG has that of its headers."""
    has_headers = fields[0] == b"HMSG"
    try:
        reply = fields[3].decode() if len(fields) == 5 + has_headers else ""
        body = begin + int(fields[-2]) if has_headers else begin
        handler(fields[1].decode(), reply, received[begin:body], received[body:end])
    except Exception as error:  # one message is not to end the connection
        log.error("jetstream: a message could not be handled", exc_info=error)


def status_of(headers: bytes) -> str:
    """Return the status that a server says something with; empty in a message."""
    line = headers[: headers.find(LINE_END)].split(None, 2)
    return line[1].decode() if len(line) > 1 else ""


def fields_of(headers: bytes) -> dict[str, str]:
    """Return headers by their names; "Description" is that of the status."""
    first, *lines = headers.decode(errors="replace").split("\r\n")
    words = first.split(None, 2)
    fields = {"Description": words[2]} if len(words) == 3 else {}  # noqa: PLR2004
    for line in lines:
        name, _, value = line.partition(":")
        fields[name] = value.strip()
    return fields
