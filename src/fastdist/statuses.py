"""What statuses are called."""

from __future__ import annotations

from http import HTTPStatus

# As RFC 9110 has them; Python called them otherwise before 3.13.
_REASONS = {413: "Content Too Large", 422: "Unprocessable Content"}


def reason(status: int) -> str:
    """Return the reason phrase of a status."""
    return _REASONS.get(status) or HTTPStatus(status).phrase
