"""What requests are answered that are no views: problem details (RFC 9457), what became of packets, and changes.

The rules of ``http.models`` apply. ``Change`` only describes what is taken; ``http.admin`` checks it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from fastdist.errors import printable
from fastdist.exchange import JSON, Response, reason
from fastdist.http.models import FieldError, Model, Number, Positive, doc, words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROBLEM = b"Content-Type: application/problem+json\r\n"
MAX_WEIGHT = 1e100  # that can be set, so that no sum of weights is ever infinite

PacketId = Annotated[
    str,
    Meta(
        description="The packet's id: a UUIDv7, or the request's Idempotency-Key.",
        pattern=r"^[!#-+\--:<-\[\]-~]{1,64}$",
        examples=["019b7a5c-3f2e-7c4d-8a1b-5e6f708192a3"],
    ),
]
Messages = Annotated[
    Positive | UnsetType,
    Meta(description='How many messages it holds; absent with `server.validation = "none"`.'),
]


def json_response(document: Model, status: int = 200) -> Response:
    """Return a document as JSON."""
    return Response(status, msgspec.json.encode(document), JSON)


def problem(
    status: int,
    detail: str,
    *,
    errors: Sequence[Mapping[str, Any]] | None = None,
    headers: bytes = b"",
    stored: str = "",
) -> Response:
    """Return an RFC 9457 document; ``errors`` are members of ``FieldError``, of the fields at fault, if any.

    ``stored``: whether the packet is, where that has to be said.

    Any text is allowed, also what is not Unicode: see ``printable``.
    """
    faults = [FieldError(**{name: _printable(member) for name, member in error.items()}) for error in errors or ()]
    document = Problem(
        title=reason(status), status=status, detail=printable(detail), errors=faults or UNSET, stored=stored or UNSET
    )
    return Response(status, msgspec.json.encode(document), PROBLEM + headers)


def _printable(member: Any) -> Any:
    return printable(member) if isinstance(member, str) else member


class Problem(Model, kw_only=True):
    """What went wrong (RFC 9457)."""

    type: Annotated[Literal["about:blank"], doc("Always `about:blank`: `status` says what kind of problem it is.")] = (
        "about:blank"
    )
    title: Annotated[str, doc("The status in words.")]
    status: Annotated[int, Meta(description="The status of the response.", ge=400, le=599)]
    detail: Annotated[str, Meta(description="What was wrong with this request, for a person to read.", min_length=1)]
    errors: Annotated[
        Annotated[list[FieldError], Meta(min_length=1, max_length=1000)] | UnsetType,
        doc("The fields at fault, where it is fields."),
    ] = UNSET
    stored: Annotated[
        Annotated[str, words("no", "unknown")] | UnsetType,
        doc(
            "Of a 503 to POST /logs with `queue.backend` `jetstream`. `no`: the packet will not be delivered. "
            "`unknown`: it may be; to send it again under the same Idempotency-Key is right."
        ),
    ] = UNSET


# ---- packets


class Accepted(Model, kw_only=True):
    """The packet is safe, and will be delivered."""

    status: Annotated[Literal["accepted"], doc("Always `accepted`.")] = "accepted"
    packet_id: PacketId
    messages: Messages = UNSET
    duplicate: Annotated[
        bool | UnsetType,
        doc("True: a packet of this Idempotency-Key was stored before. Only with `queue.backend` `jetstream`."),
    ] = UNSET


class Delivered(Model, kw_only=True):
    """The packet was delivered."""

    status: Annotated[Literal["delivered"], doc("Always `delivered`.")] = "delivered"
    packet_id: PacketId
    messages: Messages = UNSET
    analyzer: Annotated[str, doc("The id of the analyzer that has it.")]


class Ready(Model, kw_only=True):
    """The service takes packets."""

    status: Annotated[Literal["ready"], doc("Always `ready`.")] = "ready"


# ---- changes


class Change(Model, kw_only=True, forbid_unknown_fields=True):
    """The changes."""

    weight: Annotated[
        Annotated[Number, Meta(le=MAX_WEIGHT)] | UnsetType, doc("Its new weight, relative to the others'.")
    ] = UNSET
    state: Annotated[
        Literal["draining", "online"] | UnsetType,
        doc("`draining`: it gets no new packets. `online` ends draining; it does not overrule health."),
    ] = UNSET


class ChangedSetting(Model, kw_only=True):
    """A setting with its values as text, secrets masked."""

    setting: Annotated[str, doc("Its path; of an analyzer with its id: `analyzers[A2].weight`.")]
    before: Annotated[str | None, doc("What was in force; null if it was not there.")]
    after: Annotated[str | None, doc("What is in force now; null if it is gone.")]


class Reloaded(Model, kw_only=True):
    """The configuration was read again, and is in force."""

    status: Annotated[Literal["reloaded"], doc("Always `reloaded`.")] = "reloaded"
    changed: Annotated[list[ChangedSetting], doc("What has changed by it.")] = field(default_factory=list)
    masked: Annotated[
        list[str], doc("Analyzers whose weight in the file has no effect, since another was set while the service ran.")
    ] = field(default_factory=list)
    needs_restart: Annotated[list[str], doc("Settings that differ from those in force and change with a restart only.")]
