"""A message of the stream: one packet, or several that share it, as bytes.

    3 bytes   "FDM"
    1 byte    the format's number
    4 bytes   CRC-32C of the four bytes above and of all that follows, least significant byte first
    the rest  format 1: MessagePack, a list of packets, each a list of the members of ``StoredPacket`` in their order

Rules: these eight bytes stay as they are in every format, so that what is damaged and what is newer are told apart. A
member that is new is added at the end, with a default: replicas of the version before ignore it, and no new number
is needed. With one that they must not ignore, the number grows, and they give such messages back.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from fastdist._core import checksum

MAGIC = b"FDM"
FORMAT = 1
HEAD_BYTES = 8

Count = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class StoredPacket(Struct, frozen=True, array_like=True, gc=False):
    """A packet as the stream has it.

    ``emitter`` is the hash of the emitterId (64 bits), ``accepted_ns`` wall-clock time, ``attempts`` what was spent on
    it before it was stored (as a dead letter), ``inbox`` the subject where its emitter waits for the outcome, if it
    does.
    """

    id: Annotated[str, Meta(min_length=1)]
    body: Annotated[bytes, Meta(min_length=1)]
    emitter: Annotated[int, Meta(ge=0)] = 0
    messages: Count = 1
    accepted_ns: Annotated[int, Meta(ge=0)] = 0
    attempts: Count = 0
    inbox: str = ""


class UnreadableError(Exception):
    """A message that this version cannot read."""


class NewerFormatError(UnreadableError):
    """A message in a format of a later version, which other replicas may read."""

    def __init__(self, number: int) -> None:
        super().__init__(f"format {number}, and this version knows no later one than {FORMAT}")
        self.format = number


class DamagedError(UnreadableError):
    """A message that is not one of ours, or is not as it was written."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Annotated[list[StoredPacket], Meta(min_length=1)])
_START = MAGIC + bytes([FORMAT])
_START_SUM = checksum(_START)


def encode(packets: list[StoredPacket]) -> bytes:
    """Return the message of some packets, of one at least."""
    return whole(_encoder.encode(packets))


def whole(body: bytes) -> bytes:
    """Return the message whose packets are in ``body``, as MessagePack."""
    return _START + checksum(body, _START_SUM).to_bytes(4, "little") + body


def decode(message: bytes) -> list[StoredPacket]:
    """Return the packets of a message. Raises NewerFormatError or DamagedError."""
    if len(message) < HEAD_BYTES or not message.startswith(MAGIC):
        raise DamagedError("not a message of fastdist")
    body = message[HEAD_BYTES:]
    if checksum(body, checksum(message[:4])) != int.from_bytes(message[4:HEAD_BYTES], "little"):
        raise DamagedError("the checksum is not that of the message")
    if message[3] > FORMAT:
        raise NewerFormatError(message[3])
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise DamagedError(str(error)) from error
