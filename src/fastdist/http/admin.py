"""Changes while the service runs: which clients may request them, and their bodies. The supervisor applies them."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastdist import packet
from fastdist.errors import PacketError
from fastdist.http.responses import MAX_WEIGHT
from fastdist.ipc import Action

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fastdist.settings import Security

STATES = {"draining": True, "online": False}


class RefusedError(Exception):
    """A request that is refused: the status of the response, why, the fields at fault, and its header lines."""

    def __init__(
        self, status: int, detail: str, errors: list[dict[str, str]] | None = None, headers: bytes = b""
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors, self.headers = status, detail, errors or [], headers


def authorize(headers: Mapping[str, str], client: str, security: Security) -> str:
    """Let administrators pass: by token where there are any, else from this machine. Return how the log names them.

    Raises RefusedError.
    """
    if security.admin_tokens:
        if not has_token(headers.get("authorization"), security.admin_tokens):
            challenge = b'WWW-Authenticate: Bearer realm="fastdist admin"\r\n'
            raise RefusedError(401, "an admin token is needed", headers=challenge)
        return f"{client}, token {token_hash(headers['authorization'])}"
    if not is_loopback(client):
        raise RefusedError(403, "without security.admin_tokens changes are taken from this machine only")
    origin = headers.get("origin")
    if origin is None or origin in security.cors_origins or is_own_page(origin, headers.get("host", "")):
        return client
    raise RefusedError(
        403,
        f"without security.admin_tokens changes are not taken from pages of {origin}; "
        "open the dashboard as localhost, or list that origin in security.cors_origins",
    )


def has_token(authorization: str | None, tokens: Iterable[str]) -> bool:
    """Whether an Authorization header holds one of the bearer tokens; takes as long whichever it is."""
    scheme, _, given = (authorization or "").partition(" ")
    return scheme.lower() == "bearer" and is_token(given.strip(), tokens)


def token_hash(authorization: str) -> str:
    """Return what tells a token from others, and does not tell the token: the first 8 digits of its SHA-256."""
    token = authorization.partition(" ")[2].strip()
    return hashlib.sha256(token.encode("latin-1", "replace")).hexdigest()[:8]


def is_token(given: str, tokens: Iterable[str]) -> bool:
    """Whether it is one of the tokens; takes as long whichever it is."""
    secret = given.encode("latin-1", "replace")
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
    """Whether a browser sent this from a page of ours, opened under a name that only this machine can have.

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
    """Return the change that the body of PATCH /analyzers/{id} asks for. Raises RefusedError."""
    try:  # not by msgspec, for which a number without end (1e400) is no JSON
        document = packet.decode(body)
    except PacketError as error:
        raise RefusedError(400, error.detail) from None
    if not isinstance(document, dict) or not document:
        raise RefusedError(422, 'the body must be an object such as {"weight": 0.2} or {"state": "draining"}')
    errors = [
        {"pointer": f"/{_escape(key)}", "detail": "unknown; weight and state can be changed"}
        for key in document
        if key not in ("weight", "state")
    ]
    weight, state = document.get("weight"), document.get("state")
    if "weight" in document and not _is_weight(weight):
        errors.append({"pointer": "/weight", "detail": f"must be a number from 0 to {MAX_WEIGHT:g}"})
    if "state" in document and not (isinstance(state, str) and state in STATES):
        errors.append({"pointer": "/state", "detail": 'must be "draining" or "online"'})
    if errors:
        raise RefusedError(422, "the analyzer cannot be changed like that", errors)
    return Action("override", analyzer, None if weight is None else float(weight), STATES.get(str(state)))


def _is_weight(value: object) -> bool:
    return isinstance(value, float) and 0 <= value <= MAX_WEIGHT


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
