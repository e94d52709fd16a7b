"""What an analyzer does wrong, and when: the options of the command line and of ``POST /control``.

An ``Options`` is immutable and replaced whole, so that a request never sees half of a change. JSON names are
camelCase. The faults exclude each other for one request and are tried in this order: hang, reset, garbage, truncate,
wrong length; a request that escapes them all is answered, with the status that ``status`` or ``failureRate`` say.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from random import Random

Rate = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Count = Annotated[int, Meta(ge=0)]
Status = Annotated[int, Meta(ge=200, le=599)]


class OptionsError(ValueError):
    """Options that cannot be used; ``unknown`` names the keys that do not exist, if that is what is wrong."""

    def __init__(self, detail: str, unknown: list[str] | None = None) -> None:
        super().__init__(detail)
        self.unknown = unknown or []


class Options(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """All options at their harmless defaults; a rate is a probability per request."""

    latency: Seconds = 0.0
    """Every answer comes this long after its request was read; pipelined requests wait side by side."""
    jitter: Seconds = 0.0
    """Up to this much is added to the latency, evenly distributed."""
    failure_rate: Rate = 0.0
    """This part of the requests gets ``failureStatus`` instead of 200."""
    failure_status: Status = 500
    status: Status | None = None
    """Every request gets this status; wins over ``failureRate``."""
    rejects: str = ""
    """Requests whose body this regular expression is found in get 422, whatever ``status`` says; empty = none."""
    retry_after: Seconds | None = None
    """429 and 503 carry this ``Retry-After``, rounded up to whole seconds as HTTP wants it."""
    hang: bool = False
    """Requests are read and never answered, nor is anything after them on the same connection."""
    reset_rate: Rate = 0.0
    """The request is read, then the connection is reset (RST) without an answer."""
    truncate_rate: Rate = 0.0
    """Half of the answer is sent, then a reset. Every other time on average the cut is inside the head."""
    garbage_rate: Rate = 0.0
    """Bytes that are not HTTP are sent; the connection stays open and is never used again."""
    wrong_length_rate: Rate = 0.0
    """``Content-Length`` promises more than is sent, then the connection is closed."""
    close_every: Count = 0
    """Every n-th answer of a connection says ``Connection: close`` and ends it; 0 = never."""
    silent_close: Count = 0
    """The connection ends after its n-th answer without saying so; 0 = never."""
    chunked: bool = False
    """Answers use the chunked transfer coding and leave in two writes."""
    interim: bool = False
    """A ``100 Continue`` or ``103 Early Hints`` (at random) precedes the answer."""
    unhealthy: bool = False
    """``GET /health`` answers 503."""
    health_hang: bool = False
    """``GET /health`` is never answered."""
    refuse: bool = False
    """The listener and all connections are closed; only the control port can bring the analyzer back."""
    verify: bool = False
    """Bodies must be JSON, and a digest of each packet is kept."""
    keep: bool = False
    """The same, and the packets themselves are kept."""

    @property
    def plain(self) -> bool:
        """Whether every packet is answered 200 at once, so that a request can take the short way."""
        unfelt = Options(
            failure_status=self.failure_status,
            retry_after=self.retry_after,
            unhealthy=self.unhealthy,
            health_hang=self.health_hang,
            refuse=self.refuse,
            verify=self.verify,
            keep=self.keep,
        )
        return self == unfelt

    def reject(self, body: bytes) -> bool:
        """Return whether a request with this body gets 422."""
        return bool(self.rejects) and re.search(self.rejects.encode(), body) is not None

    def changed(self, patch: object) -> Options:
        """Return these options with those of a decoded JSON object applied; raises ``OptionsError``."""
        if not isinstance(patch, dict):
            raise OptionsError("a JSON object is wanted")
        unknown = sorted(set(patch) - set(NAMES))
        if unknown:
            raise OptionsError(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}", unknown)
        try:
            options = msgspec.convert(self.as_json() | patch, Options)
            re.compile(options.rejects.encode())
        except (msgspec.ValidationError, re.error) as error:
            raise OptionsError(str(error)) from None
        return options

    def as_json(self) -> dict[str, Any]:
        """Return the options by their JSON names."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


NAMES: tuple[str, ...] = tuple(field.encode_name for field in msgspec.structs.fields(Options))


class Fault(Enum):
    """What happens instead of a whole answer; the value is the name under ``faults`` in the totals."""

    HANG = "hang"
    RESET = "reset"
    GARBAGE = "garbage"
    TRUNCATE = "truncate"
    WRONG_LENGTH = "wrongLength"


def draw_fault(options: Options, random: Random) -> Fault | None:
    """Decide whether the next request meets a fault."""
    if options.hang:
        return Fault.HANG
    if options.reset_rate and random.random() < options.reset_rate:
        return Fault.RESET
    if options.garbage_rate and random.random() < options.garbage_rate:
        return Fault.GARBAGE
    if options.truncate_rate and random.random() < options.truncate_rate:
        return Fault.TRUNCATE
    if options.wrong_length_rate and random.random() < options.wrong_length_rate:
        return Fault.WRONG_LENGTH
    return None


def draw_status(options: Options, random: Random) -> int:
    """Decide the status of the next answer."""
    if options.status is not None:
        return options.status
    if options.failure_rate and random.random() < options.failure_rate:
        return options.failure_status
    return 200


def draw_delay(options: Options, random: Random) -> float:
    """Decide how many seconds the next answer takes."""
    if options.jitter:
        return options.latency + random.uniform(0, options.jitter)
    return options.latency
