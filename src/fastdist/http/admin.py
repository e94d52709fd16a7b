"""Changes while the service runs: who may ask for them, and what they ask. The supervisor carries them out."""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastdist import packet
from fastdist.errors import PacketError
from fastdist.ipc import Action

if TYPE_CHECKING:
    from collections.abc import Iterable

LARGEST_WEIGHT = 1e100  # so that no sum of weights is ever infinite
STATES = {"draining": True, "online": False}


class BadChangeError(Exception):
    """A request that asks for nothing that can be done: ``status`` 400 or 422, and the fields at fault."""

    def __init__(self, status: int, detail: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, errors or []


def has_token(authorization: str | None, tokens: Iterable[str]) -> bool:
    """Whether an Authorization header holds one of the bearer tokens; takes as long whichever it is."""
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        return False
    secret = given.strip().encode("latin-1", "replace")
    return sum(hmac.compare_digest(secret, token.encode()) for token in tokens) > 0


def is_loopback(address: str) -> bool:
    """Whether a client's address is of this machine."""
    try:
        client = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = client.ipv4_mapped if isinstance(client, ipaddress.IPv6Address) else None
    return (mapped or client).is_loopback


def is_own_page(origin: str, host: str) -> bool:
    """Whether a browser sent this from a page of ours, opened under a name of this machine that nobody else can claim.

    Being on this machine is all that is asked for where there is no admin token, and any page in its browser is. One
    whose own name resolves to this machine (DNS rebinding) is even of the same origin, hence the look at the name.
    """
    try:
        page = urlsplit(origin)
        name = page.hostname or ""
    except ValueError:
        return False
    return page.netloc == host and (name == "localhost" or is_loopback(name))


def parse_override(analyzer: str, body: bytes) -> Action:
    """Return the change that the body of PATCH /analyzers/{id} asks for. Raises BadChangeError."""
    try:  # not by msgspec, for which a number without end (1e400) is no JSON
        document = packet.decode(body)
    except PacketError as error:
        raise BadChangeError(400, error.detail) from None
    if not isinstance(document, dict) or not document:
        raise BadChangeError(422, 'the body must be an object such as {"weight": 0.2} or {"state": "draining"}')
    errors = [
        {"pointer": f"/{_escape(key)}", "detail": "unknown; weight and state can be changed"}
        for key in document
        if key not in ("weight", "state")
    ]
    weight, state = document.get("weight"), document.get("state")
    if "weight" in document and not _is_weight(weight):
        errors.append({"pointer": "/weight", "detail": f"must be a number from 0 to {LARGEST_WEIGHT:g}"})
    if "state" in document and not (isinstance(state, str) and state in STATES):
        errors.append({"pointer": "/state", "detail": 'must be "draining" or "online"'})
    if errors:
        raise BadChangeError(422, "the analyzer cannot be changed like that", errors)
    return Action("override", analyzer, None if weight is None else float(weight), STATES.get(str(state)))


def _is_weight(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= LARGEST_WEIGHT


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
