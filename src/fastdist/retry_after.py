"""Retry-After as HTTP has it (RFC 9110, 10.2.3): a number of seconds, or a date."""

from __future__ import annotations

import math
import time
from datetime import UTC

MAX_SECONDS = 1e9  # larger numbers are cut, not an error


def retry_after(seconds: float = 1, max_seconds: int = int(MAX_SECONDS)) -> bytes:
    """Return the header line that asks for another try in so many seconds: whole ones, at least one."""
    return b"Retry-After: %d\r\n" % min(max(1, math.ceil(seconds)), max_seconds)


def parse_retry_after(value: str) -> float | None:
    """Return how many seconds from now ``value`` asks to wait, at least 0; None for any other form."""
    value = value.strip()
    if value.isdecimal():
        seconds = float(value)
    else:
        from email.utils import parsedate_to_datetime  # noqa: PLC0415  (takes a while; most name a number)

        try:
            date = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        if date.tzinfo is None:  # the oldest of the three forms names no zone; it is GMT
            date = date.replace(tzinfo=UTC)
        seconds = date.timestamp() - time.time()
    return min(max(seconds, 0.0), MAX_SECONDS)
