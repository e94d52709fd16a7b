"""Messages between the supervisor and its workers: JSON lines over a socket pair, and settings in a memfd.

- To a worker: ``drain`` (until ``deadline``), ``reload`` (new settings were written), ``reply`` (to request ``id``).
- From a worker: ``ready`` (with the generation of its settings), ``reloaded`` (``id`` is the generation it has read,
  ``body`` the error if it cannot use that), ``migrated`` (an old ring, which is deleted), ``request`` (an ``action`` of
  an administrator).

End of file on the socket means that the other side is gone; for a worker's the supervisor gets a message, ``gone``.

Settings grow with the configuration: they go into the memfd, never into a line or a command line. It is written in
place while workers may be reading it; a wrong checksum makes them read again. Of many problems a line has the first.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from fastdist.errors import Fault, StartError
from fastdist.settings import Config  # noqa: TC001  (decoding needs it)

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

MAX_LINE = 2**26  # bytes; far more than any message has, see ``shorten``: a reload names all that it has changed
MAX_PROBLEMS, MAX_PROBLEM = 100, 500  # lines, characters
HEADER = struct.Struct("=Q16s")  # of the settings: their length and checksum
PATIENCE = 1.0  # seconds until settings that are being written must be complete


class Pair(msgspec.Struct, frozen=True):
    """A certificate, with its chain, and its key: PEM, as in the files."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Pair(...)"


class Settings(msgspec.Struct, frozen=True):
    """A worker's settings: the configuration, the slots of its analyzers by id, and certificate and key."""

    generation: int  # grows with every reload
    slots: dict[str, int]
    config: Config
    pair: Pair | None = None


class Assignment(msgspec.Struct, frozen=True):
    """What a worker gets at its start: its slot's index, and the descriptors it inherits."""

    index: int
    shared: int
    listener: int
    ring: int
    control: int
    settings: int  # a memfd, see ``ipc.Settings``
    old_rings: dict[str, int]  # to migrate: path -> descriptor
    renewed: bool = False  # the ring is in the place of one that could not be read
    irreplaceable: bool = False  # the ring cannot be read in part, and no other could be made
    handed_on: bool = False  # the listener is the service manager's, and the next process of the service gets it too
    views: int = -1  # the listener of admin.listen; -1: none


def write_settings(fd: int, settings: Settings) -> None:
    """Overwrite the settings in the memfd ``fd``."""
    body = msgspec.msgpack.encode(settings)  # JSON has no infinity, which a setting may be
    os.pwrite(fd, HEADER.pack(len(body), _checksum(body)) + body, 0)


def read_settings(fd: int, patience: float = PATIENCE) -> Settings:
    """Return the settings written last. Raises StartError when they stay incomplete for ``patience`` seconds."""
    end = time.monotonic() + patience
    while True:
        data = os.pread(fd, os.fstat(fd).st_size, 0)  # pread: all processes share the descriptor's position
        if len(data) >= HEADER.size:
            length, checksum = HEADER.unpack_from(data)
            body = data[HEADER.size : HEADER.size + length]
            if len(body) == length and _checksum(body) == checksum:
                return msgspec.msgpack.decode(body, type=Settings)
        if time.monotonic() > end:
            raise StartError("the settings passed to this worker are incomplete")
        time.sleep(0.001)


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=16).digest()


class Action(msgspec.Struct, frozen=True):
    """A change an administrator asks for: ``reload``, or ``override`` or ``clear`` of an analyzer's settings.

    ``by``: the client's address, and a short hash of its token if it gave one.
    """

    name: str
    analyzer: str = ""
    weight: float | None = None
    draining: bool | None = None
    by: str = ""


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line."""

    verb: str
    id: int = 0
    deadline: float = 0.0  # time.monotonic()
    action: Action | None = None
    status: int = 0  # of a reply, as in HTTP
    body: Any = None


def shorten(problems: list[str]) -> list[str]:
    """Return as many problems as fit a message, a response or a log line; ``check`` prints them all."""
    few = [each if len(each) <= MAX_PROBLEM else f"{each[:MAX_PROBLEM]}…" for each in problems[:MAX_PROBLEMS]]
    if len(problems) > MAX_PROBLEMS:
        few.append(f"and {len(problems) - MAX_PROBLEMS} more problems; `fastdist check FILE` prints them all")
    return few


def shorten_faults(faults: list[Fault]) -> list[Fault]:
    """Return the same of faults of a configuration."""
    details = shorten([fault.detail for fault in faults])
    few = zip(details, faults[:MAX_PROBLEMS], strict=False)
    short = [Fault(text, each.pointer[:MAX_PROBLEM], each.file[:MAX_PROBLEM], each.line) for text, each in few]
    return short + [Fault(text) for text in details[MAX_PROBLEMS:]]


async def connect(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return reader and writer of one end of the socket pair."""
    return await asyncio.open_connection(sock=sock, limit=MAX_LINE)


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send a message; it is lost if the other side is gone."""
    if not writer.is_closing():
        writer.write(msgspec.json.encode(message) + b"\n")


async def receive(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """Yield messages until the other side is gone."""
    try:
        while line := await reader.readline():
            yield msgspec.json.decode(line, type=Message)
    except ConnectionError:
        return
