"""What protocols are made of: requests, batches of packets, replies, and reasons why there are no packets.

The rules:

1. A batch is stored whole or not at all. Its reply is sent when all of its packets are as safe as the queue has to
   have them; until then nothing is said.
2. Every packet is one that strict validation accepts, and no larger than ``Limits.max_packet``.
3. Nothing here waits, and no step of a conversion is long: see ``SLICE_NS``.
"""

from __future__ import annotations

import binascii
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar

from msgspec import Struct
from msgspec.structs import replace

from fastdist.exchange import Request, Response
from fastdist.retry_after import MAX_SECONDS, retry_after

SLICE_NS = 1_000_000  # of work, after which a conversion yields
PROTOBUF_TYPES = ("application/x-protobuf", "application/protobuf")
TEXT = b"Content-Type: text/plain; charset=utf-8\r\n"


class Limits(Struct, frozen=True):
    """Bytes: of a body, as it is sent and decoded; of a packet; of all packets of a request."""

    max_body: int
    max_packet: int
    max_batch: int


class Packet(Struct, frozen=True):
    """A packet as the ring takes it: its JSON, its number of messages, ``hash_text`` of its emitterId."""

    body: bytes
    messages: int
    emitter_hash: int


class Batch(Struct, frozen=True):
    """What a request has become: packets (none is a success too), their records, the reply once they are stored.

    ``refused`` counts records that were left out, as the reply says.
    """

    packets: Sequence[Packet]
    records: int
    reply: Response
    refused: int = 0

    def without_packets(self) -> Batch:
        """Return what is left to be told once they are stored."""
        return replace(self, packets=())


class Reason(StrEnum):
    """Why a request is not accepted; most are named as the counter they belong to."""

    MALFORMED = "malformed"
    INVALID = "invalid"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    METHOD = "method"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    UNSUPPORTED = "unsupported_media_type"
    EXPECTATION = "expectation"
    RATE_LIMITED = "rate_limited"
    QUEUE_FULL = "queue_full"
    DRAINING = "draining"
    STORAGE = "storage"
    DEAD_LETTER = "dead_letter"
    FAULT = "fault"


STATUSES: Mapping[Reason, int] = {
    Reason.MALFORMED: 400,
    Reason.INVALID: 400,
    Reason.UNAUTHORIZED: 401,
    Reason.NOT_FOUND: 404,
    Reason.METHOD: 405,
    Reason.TIMEOUT: 408,
    Reason.TOO_LARGE: 413,
    Reason.UNSUPPORTED: 415,
    Reason.EXPECTATION: 417,
    # Not 429, which many clients take for final. All that retry at all retry 503.
    Reason.RATE_LIMITED: 503,
    Reason.QUEUE_FULL: 503,
    Reason.DRAINING: 503,
    Reason.STORAGE: 503,
    Reason.DEAD_LETTER: 502,
    Reason.FAULT: 500,
}
BUSY = frozenset((Reason.RATE_LIMITED, Reason.QUEUE_FULL, Reason.DRAINING, Reason.STORAGE))  # try again


class Refused(Exception):  # noqa: N818  (a fact of the protocol, not a fault of the program)
    """A request that is not accepted, and that leaves nothing behind.

    ``detail`` is for a person. ``record`` is the number of the record at fault, from 0. ``retry_after``: seconds after
    which another try makes sense (of BUSY). ``headers`` are lines for the response (Allow, Accept-Encoding).
    """

    def __init__(
        self,
        reason: Reason,
        detail: str,
        *,
        record: int | None = None,
        retry_after: float = 1,
        headers: bytes = b"",
    ) -> None:
        super().__init__(reason, detail)  # what it is made of again, in another process
        self.reason, self.detail, self.record = reason, detail, record
        self.retry_after, self.headers = retry_after, headers

    def __str__(self) -> str:
        return self.detail


# Yields how many bytes of a body it keeps, decoded; None: as many as before. (Any: a bare yield is allowed for that.)
Work = Generator[Any, None, Batch]
Take = Callable[[Request, Limits], Work]
Respond = Callable[[Request, str], Response]  # the text: why nothing can be stored now; empty if it can


class Route(Struct, frozen=True):
    """A path, with ``{name}`` for one segment: what takes records there by method, and what else replies.

    ``for_json``: only GET and HEAD, and where Accept names JSON, or is missing and User-Agent an agent's.
    """

    path: str
    take: Mapping[str, Take] = {}
    reply: Mapping[str, Respond] = {}
    for_json: bool = False

    @property
    def methods(self) -> list[str]:
        """The methods it takes: GET brings HEAD, and every path has OPTIONS."""
        methods = [name for method in (*self.take, *self.reply) for name in _WITH.get(method, (method,))]
        return list(dict.fromkeys([*methods, "OPTIONS"]))


_WITH = {"GET": ("GET", "HEAD")}


class Protocol(ABC):
    """One protocol: see the package."""

    name: ClassVar[str]
    routes: Sequence[Route]
    schemes: ClassVar[Sequence[str]] = ()  # of Authorization, lower case, besides Bearer and Basic

    def tokens(self, headers: Mapping[str, str]) -> list[str]:
        """Return what may be the token in a request's Authorization; empty if it has none that is understood.

        It is compared by the caller. ``Basic`` has it as the password, of any user.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        scheme, given = scheme.lower(), given.strip()
        if scheme == "basic":
            return [_decoded(given).partition(":")[2]]
        return [given] if scheme in ("bearer", *self.schemes) else []

    @abstractmethod
    def refuse(self, request: Request, refused: Refused) -> Response:
        """Return the response to a request that is not accepted. Its body need not have been read."""


def header_text(value: str) -> str:
    """Return a header's value, which was read as Latin-1, as UTF-8 where it is that."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def finish(work: Work) -> Batch:
    """Run a conversion to its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            batch: Batch = end.value
            return batch


class Slices:
    """Tells a conversion when to yield."""

    def __init__(self) -> None:
        self._until = time.monotonic_ns() + SLICE_NS

    def over(self) -> bool:
        """Whether this slice is over; the next one begins with the next call, as others may have their turn before."""
        now = time.monotonic_ns()
        if self._until == 0:
            self._until = now + SLICE_NS
        if now < self._until:
            return False
        self._until = 0
        return True


def refusal_headers(refused: Refused, scheme: bytes = b"Bearer", max_seconds: int = int(MAX_SECONDS)) -> bytes:
    """Return the header lines of a refusal: its own, when to try again if BUSY, and the challenge of a 401.

    ``scheme``: of the challenge; empty for none.
    """
    headers = refused.headers
    if refused.reason in BUSY:
        headers += retry_after(refused.retry_after, max_seconds)
    if refused.reason is Reason.UNAUTHORIZED and scheme:
        headers += b'WWW-Authenticate: %b realm="fastdist"\r\n' % scheme
    return headers


def _decoded(base64: str) -> str:
    try:
        return binascii.a2b_base64(base64).decode()
    except ValueError:
        return ""
