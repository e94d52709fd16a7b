"""How schemathesis writes bodies of lines, which it does not know by itself: loaded for test_schemathesis.py."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def lines(_context: Any, value: Any) -> dict[str, bytes]:
    """Return a body: text and bytes as they are, all else as JSON."""
    if isinstance(value, str):
        return {"data": getattr(value, "data", None) or value.encode("utf-8", "surrogatepass")}
    return {"data": value if isinstance(value, bytes) else json.dumps(value).encode()}
