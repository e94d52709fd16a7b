"""How the messages of a request become packets.

Messages of one emitter stay in their order, and share a packet as long as it is not too large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from fastdist._core import hash_text
from fastdist.packet import MAX_EMITTER_ID
from fastdist.protocols.base import Batch, Packet, Reason, Refused, Slices

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from fastdist.exchange import Response
    from fastdist.protocols.base import Limits

FLUSH: Final = 128  # messages that are encoded together
FLUSH_BYTES: Final = 128 << 10  # about, of those
FULL: Final = 1 << 20  # bytes of a packet that gets no more messages: a larger one takes long to join, and to split up
APART: Final = 512  # bytes that a packet takes besides its own, about

encode = msgspec.json.Encoder().encode


class Packets:
    """Gathers the messages of a request, by emitter, and makes packets of them. ``metadata`` is that of all packets.

    ``decoded``: bytes of the body, for ``kept``.
    """

    def __init__(self, limits: Limits, metadata: Mapping[str, Any], decoded: int = 0) -> None:
        self.limits, self.slices, self.records = limits, Slices(), 0
        self._metadata = metadata
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._size = 0  # of those that wait, about
        self._emitters: dict[str, list[tuple[bytes, int]]] = {}  # chunks: messages with commas between, and how many
        self._room = limits.max_packet - len(self._body("x" * MAX_EMITTER_ID, [b""])) - 6 * MAX_EMITTER_ID
        self._left = limits.max_batch
        self._apart = len(self._body("", [b""])) + APART
        self.decoded = decoded

    @property
    def kept(self) -> int:
        """How many bytes are kept of the request, for conversions to yield."""
        return self.decoded + self._size + self.limits.max_batch - self._left

    @property
    def number(self) -> int:
        """The number of the next record."""
        return self.records + len(self._waiting)

    def add(self, emitter: str, message: dict[str, Any], size: int) -> None:
        """Add a message of about so many bytes: of large ones not as many are encoded together, in another step."""
        if len(self._waiting) >= FLUSH or self._size + size > FLUSH_BYTES:
            self.flush()
        self._waiting.append((emitter, message))
        self._size += size

    def add_chunk(self, emitter: str, chunk: bytes, count: int) -> None:
        """Add messages that are encoded already, with commas between them, and follow each other in the request."""
        if self._waiting:
            self.flush()
        self._add(emitter, chunk, count, self.records)

    def _add(self, emitter: str, chunk: bytes, count: int, first: int | None) -> None:
        """Add a chunk; ``first``: the number of its first record, if the others follow it."""
        chunks = self._emitters.get(emitter)
        if chunks is None:
            self.reserve(self._apart + len(emitter))
            chunks = self._emitters[emitter] = []
        self.reserve(len(chunk))
        if len(chunk) > self._room:
            chunks.extend(self._split(chunk, first))
        elif count:
            chunks.append((chunk, count))
        self.records += count

    def reserve(self, size: int) -> None:
        """Count bytes that are kept until the end. Raises Refused if they are too many."""
        self._left -= size
        if self._left < 0:
            raise Refused(Reason.TOO_LARGE, "the records, as packets, are more than can be stored of one request")

    def record_too_large(self, number: int | None = None) -> Refused:
        """Return the refusal of a record that no packet has room for, or of very many values."""
        detail = f"a record is larger than a packet may be ({self.limits.max_packet} bytes)"
        return Refused(Reason.TOO_LARGE, detail, record=number)

    def flush(self) -> None:
        """Encode what was added."""
        waiting, self._waiting, self._size = self._waiting, [], 0
        groups: dict[str, list[dict[str, Any]]] = {}
        for emitter, message in waiting:
            groups.setdefault(emitter, []).append(message)
        for emitter, messages in groups.items():
            first = self.records if len(groups) == 1 else None
            chunk = encode(messages)[1:-1] if len(messages) > 1 else encode(messages[0])  # one may be large
            self._add(emitter, chunk, len(messages), first)

    def _split(self, chunk: bytes, first: int | None) -> Iterator[tuple[bytes, int]]:
        """Cut messages into chunks that fit into a packet."""
        texts: list[bytes] = []
        size = 0
        for number, raw in enumerate(msgspec.json.decode(b"[%b]" % chunk, type=list[msgspec.Raw])):
            text = bytes(raw)
            if len(text) > self._room:
                raise self.record_too_large(None if first is None else first + number)
            if texts and size + len(text) + 1 > self._room:
                yield b",".join(texts), len(texts)
                texts, size = [], 0
            texts.append(text)
            size += len(text) + 1
        yield b",".join(texts), len(texts)

    def finish(self, reply: Response, refused: int = 0) -> Generator[Any, None, Batch]:
        """Make the packets."""
        self.flush()
        if self.slices.over():
            yield
        packets: list[Packet] = []
        for emitter in list(self._emitters):
            chunks = self._emitters.pop(emitter)[::-1]
            texts: list[bytes] = []
            size = count = 0
            while chunks:
                text, records = chunks.pop()  # so that none is kept beside the packet it is in
                if texts and size + len(text) + 1 > min(self._room, FULL):
                    packets.append(self._packet(emitter, texts, count))
                    texts, size, count = [], 0, 0
                    if self.slices.over():
                        yield
                texts.append(text)
                size += len(text) + 1
                count += records
            if texts:
                packets.append(self._packet(emitter, texts, count))
            if self.slices.over():
                yield
        return Batch(packets, self.records, reply, refused)

    def _packet(self, emitter: str, chunks: list[bytes], count: int) -> Packet:
        name = emitter[:MAX_EMITTER_ID]
        return Packet(self._body(name, chunks), count, hash_text(name.encode()))

    def _body(self, emitter: str, chunks: list[bytes]) -> bytes:
        return b'{"emitterId":%b,"metadata":%b,"messages":[%b]}' % (
            encode(emitter),
            encode(self._metadata),
            b",".join(chunks),
        )
