"""An HTTP exchange as plain values: a request, a response to it, and what statuses are called."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping

JSON = b"Content-Type: application/json\r\n"
# As RFC 9110 has them; Python called them otherwise before 3.13.
_REASONS = {413: "Content Too Large", 422: "Unprocessable Content"}


class Request(Struct, frozen=True):
    """A request: ``target`` as it came, ``headers`` by lower-case name (repeated ones joined), ``body`` as it was sent.

    ``client`` is its address, ``received_ns`` the time of receipt (wall clock).
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""
    client: str = ""
    received_ns: int = 0

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The target's query."""
        return self.target.partition("?")[2]

    @property
    def media_type(self) -> str:
        """The content type in lower case, without parameters; empty if not given, the last one of several."""
        return self.headers.get("content-type", "").rpartition(",")[2].partition(";")[0].strip().lower()


class Response(Struct, frozen=True):
    """A response: ``headers`` are lines that each end in CR LF, Content-Type among them if there is a body."""

    status: int
    body: bytes = b""
    headers: bytes = b""

    @property
    def parts(self) -> tuple[int, str, bytes, bytes]:
        """Status, reason phrase, header lines and body, as the core takes them."""
        return self.status, reason(self.status), self.headers, self.body


def reason(status: int) -> str:
    """Return the reason phrase of a status."""
    return _REASONS.get(status) or HTTPStatus(status).phrase
