"""What one analyzer was given, and what it made of it: the ledger tests compare fastdist's claims with.

Each time a packet arrives in a complete request, exactly one of three counts of its id goes up, once the outcome is
certain (a request that still waits for its response is in none of them):

``acknowledged``
    A complete response with a 2xx status, head and body, was handed to the operating system for sending.
``ambiguous``
    The whole 2xx head was handed over but not the whole body (truncated, or shorter than its Content-Length). The
    sender may take it for delivered (fastdist does) or send it again; a test has to allow both.
``received``
    Anything else: another status, a reset, garbage, no response, a connection that was gone before the response. The
    sender must not take it for delivered.

Rules: ids are the bytes of the header; a million of them must fit (about 150 MB), so the three counts of an id share
one integer, and equal integers are shared.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mock_analyzers.options import Options

# One integer per id. Acknowledged comes lowest because it is the usual one and small integers cost no memory. The
# fields are wide enough for a load generator that sends one and the same id for days.
_ACKNOWLEDGED = 1
_AMBIGUOUS = 1 << 32
_RECEIVED = 1 << 64
_FIELD = (1 << 32) - 1
_DELIVERED = _RECEIVED - 1  # the bits of acknowledged and ambiguous

_LINES_AT_ONCE = 5000  # some milliseconds of work: the other analyzers must go on answering meanwhile

_array = msgspec.json.Decoder(list[msgspec.Raw])


class Totals(msgspec.Struct, rename="camel"):
    """All that is counted beyond the single id."""

    requests: int = 0
    packets: int = 0
    bytes: int = 0
    batches: int = 0
    broken: int = 0
    anonymous: int = 0
    acknowledged: int = 0
    ambiguous: int = 0
    received: int = 0
    duplicates: int = 0
    changed: int = 0
    max_attempt: int = 0


class Ledger(Totals, dict=True):
    """Counts per packet id and in total. ``arrive`` notes a request, one of three methods its outcome."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from nothing."""
        for field in msgspec.structs.fields(Totals):
            setattr(self, field.name, 0)
        self._counts: dict[bytes, int] = {}
        self._digests: dict[bytes, bytes] = {}
        self._bodies: dict[bytes, bytes] = {}
        self.faults: Counter[str] = Counter()

    def arrive(self, headers: Mapping[bytes, bytes], body: bytes, options: Options) -> Sequence[bytes]:
        """Note a complete request and return the ids in it. Headers have lower-case names."""
        self.requests += 1
        self.bytes += len(body)
        attempt = headers.get(b"x-attempt", b"")
        if attempt.isdigit():
            self.max_attempt = max(self.max_attempt, int(attempt[:9]))
        packet_id = headers.get(b"x-packet-id")
        if packet_id is None:
            return self._arrive_many(headers, body, options)
        self.packets += 1
        if options.verify or options.keep:
            self._verify((packet_id,), (body,), intact=_is_json(body), keep=options.keep)
        return (packet_id,)

    def _arrive_many(self, headers: Mapping[bytes, bytes], body: bytes, options: Options) -> Sequence[bytes]:
        joined = headers.get(b"x-packet-ids")
        if joined is None:
            self.packets += 1
            self.anonymous += 1
            return ()
        ids = [packet_id.strip() for packet_id in joined.split(b",")]
        self.batches += 1
        self.packets += len(ids)
        intact = headers.get(b"x-packet-count") == b"%d" % len(ids)
        if options.verify or options.keep:
            bodies = _split(body)
            self._verify(ids, bodies, intact=intact and len(bodies) == len(ids), keep=options.keep)
        elif not intact or len(_elements(body)) != len(ids):
            self.broken += 1
        return ids

    def _verify(self, ids: Sequence[bytes], bodies: Sequence[bytes], *, intact: bool, keep: bool) -> None:
        if not intact:
            self.broken += 1  # and no telling which body belongs to which id
            return
        for packet_id, body in zip(ids, bodies, strict=True):
            digest = blake2b(body, digest_size=8).digest()
            if self._digests.setdefault(packet_id, digest) != digest:
                self.changed += 1
            if keep:
                self._bodies[packet_id] = body

    def acknowledge(self, ids: Sequence[bytes]) -> None:
        """Note that a complete 2xx response for these ids was sent."""
        self.acknowledged += len(ids)
        self._add(ids, _ACKNOWLEDGED)

    def doubt(self, ids: Sequence[bytes]) -> None:
        """Note that a 2xx head for these ids was sent, but not all of the response."""
        self.ambiguous += len(ids)
        self._add(ids, _AMBIGUOUS)

    def miss(self, ids: Sequence[bytes]) -> None:
        """Note that these ids came and they must not be taken for delivered."""
        self.received += len(ids)
        self._add(ids, _RECEIVED)

    def _add(self, ids: Sequence[bytes], unit: int) -> None:
        counts = self._counts
        for packet_id in ids:
            old = counts.get(packet_id)
            if old is None:
                counts[packet_id] = unit  # the same object for all of them, not a copy
                continue
            if old & _DELIVERED and unit != _RECEIVED:
                self.duplicates += 1
            counts[packet_id] = old + unit

    def totals(self) -> dict[str, Any]:
        """Return all that is counted beyond the single id, by JSON names."""
        totals: dict[str, Any] = msgspec.to_builtins(self)
        return totals | {"ids": len(self._counts), "faults": dict(self.faults)}

    def id_lines(self) -> Iterator[bytes]:
        """Yield ``id acknowledged received ambiguous`` lines, many at a time; packets may arrive in between."""
        counts = self._counts
        ids = list(counts)
        for first in range(0, len(ids), _LINES_AT_ONCE):
            yield b"".join(_id_line(packet_id, counts[packet_id]) for packet_id in ids[first : first + _LINES_AT_ONCE])

    def body_json(self) -> Iterator[bytes]:
        """Yield ``{id: packet}`` in pieces, the packets as they came; only JSON may have been kept."""
        bodies = self._bodies
        for number, packet_id in enumerate(list(bodies)):
            yield (b"," if number else b"{") + orjson.dumps(_text(packet_id)) + b":" + bodies[packet_id]
        yield b"}" if bodies else b"{}"

    def digest_json(self) -> Iterator[bytes]:
        """Yield ``{id: hex}`` in pieces; packets may arrive in between."""
        digests = self._digests
        ids = list(digests)
        yield b"{"
        for first in range(0, len(ids), _LINES_AT_ONCE):
            some = ids[first : first + _LINES_AT_ONCE]
            piece = orjson.dumps({_text(packet_id): digests[packet_id].hex() for packet_id in some})
            yield (b"," if first else b"") + piece[1:-1]
        yield b"}"


def _id_line(packet_id: bytes, count: int) -> bytes:
    return b"%s %d %d %d\n" % (packet_id, count & _FIELD, count >> 64, count >> 32 & _FIELD)


def _text(packet_id: bytes) -> str:
    return packet_id.decode("latin-1")


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True


def _elements(body: bytes) -> list[msgspec.Raw]:
    """Return the elements of an array, none if it is not one."""
    try:
        return _array.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return []


def _split(body: bytes) -> list[bytes]:
    """Return the packets of a batch, none if it is not what a batch should be.

    White space around a packet belongs to it, because the packet was accepted with it.
    """
    packets: list[bytes] = []
    if body.startswith(b"[") and _is_json(body):
        start = 1
        for element in _elements(body):
            end = body.find(b",", body.index(bytes(element), start) + len(element))
            packets.append(body[start : end if end >= 0 else body.rindex(b"]")])
            start = end + 1
    return packets
