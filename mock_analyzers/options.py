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

    latency: Annotated[Seconds, Meta(description="Seconds before each response, pipelined or not.")] = 0.0
    jitter: Annotated[Seconds, Meta(description="Up to so many seconds more, at random.")] = 0.0
    failure_rate: Annotated[Rate, Meta(description="Part of the requests answered with --failure-status, 0..1.")] = 0.0
    failure_status: Annotated[Status, Meta(description="The status of those.")] = 500
    status: Annotated[Status | None, Meta(description="Answer all requests with this status.")] = None
    rejects: Annotated[str, Meta(description="Answer 422 where this regular expression is found in the body.")] = ""
    retry_after: Annotated[Seconds | None, Meta(description="Seconds in Retry-After of 429 and 503, rounded up.")] = (
        None
    )
    hang: Annotated[bool, Meta(description="Read, never answer, nor what comes next on the connection.")] = False
    reset_rate: Annotated[Rate, Meta(description="Part of the requests met with a connection reset, 0..1.")] = 0.0
    truncate_rate: Annotated[Rate, Meta(description="Part of the responses cut in half by a reset, 0..1.")] = 0.0
    garbage_rate: Annotated[Rate, Meta(description="Part of the responses that are not HTTP, 0..1.")] = 0.0
    wrong_length_rate: Annotated[Rate, Meta(description="Part of the responses that end too early, 0..1.")] = 0.0
    close_every: Annotated[Count, Meta(description="Close a connection after every n-th response, saying so.")] = 0
    silent_close: Annotated[Count, Meta(description="Close a connection after its n-th response, not saying so.")] = 0
    chunked: Annotated[bool, Meta(description="Answer with the chunked coding, in two writes.")] = False
    interim: Annotated[bool, Meta(description="Send 100 Continue or 103 Early Hints before each response.")] = False
    unhealthy: Annotated[bool, Meta(description="GET /health answers 503.")] = False
    health_hang: Annotated[bool, Meta(description="GET /health is not answered.")] = False
    refuse: Annotated[bool, Meta(description="Refuse connections until the control port allows them again.")] = False
    verify: Annotated[bool, Meta(description="Check that bodies are JSON and keep a digest of each packet.")] = False
    keep: Annotated[bool, Meta(description="The same, and keep the packets themselves.")] = False

    @property
    def plain(self) -> bool:
        """Whether every packet is answered 200 at once, so that a request can take the short way."""
        return self == msgspec.structs.replace(self, **_HARMFUL)

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
_HARMLESS = ("failure_status", "retry_after", "unhealthy", "health_hang", "refuse", "verify", "keep")
_HARMFUL = {f.name: f.default for f in msgspec.structs.fields(Options) if f.name not in _HARMLESS}


class Fault(Enum):
    """What happens instead of a whole response; the value is the name under ``faults`` in the totals."""

    HANG = "hang"
    RESET = "reset"
    GARBAGE = "garbage"
    TRUNCATE = "truncate"
    WRONG_LENGTH = "wrongLength"


def draw_fault(options: Options, random: Random) -> Fault | None:
    """Decide whether the next request meets a fault."""
    rates = (
        (Fault.HANG, float(options.hang)),
        (Fault.RESET, options.reset_rate),
        (Fault.GARBAGE, options.garbage_rate),
        (Fault.TRUNCATE, options.truncate_rate),
        (Fault.WRONG_LENGTH, options.wrong_length_rate),
    )
    return next((fault for fault, rate in rates if rate and random.random() < rate), None)


def draw_status(options: Options, random: Random) -> int:
    """Decide the status of the next response."""
    if options.status is not None:
        return options.status
    if options.failure_rate and random.random() < options.failure_rate:
        return options.failure_status
    return 200


def draw_delay(options: Options, random: Random) -> float:
    """Decide how many seconds the next response takes."""
    if options.jitter:
        return options.latency + random.uniform(0, options.jitter)
    return options.latency
