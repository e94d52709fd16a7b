"""Takes a batch apart into the packets it was made of, byte for byte.

A JSON library would do for the values, but not for the bytes: white space around a packet belongs to it, because the
packet was accepted with it. So the array is cut exactly at its own brackets and commas.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


def split_array(body: bytes) -> list[bytes]:
    """Return what stands between the outermost brackets and commas; raises ``ValueError`` if there is no array."""
    if not body.startswith(b"["):
        raise ValueError("the body does not start with [")
    items: list[bytes] = []
    depth, start = 0, 1
    for match in _TOKEN.finditer(body):
        token = match[0]
        if token == b",":
            if depth == 1:
                items.append(body[start : match.start()])
                start = match.end()
        elif token in b"[{":
            depth += 1
        elif token in b"]}":
            depth -= 1
            if depth == 0:
                return _finish(body, items, start, match.start())
    raise ValueError("the array does not end")


def _finish(body: bytes, items: list[bytes], start: int, end: int) -> list[bytes]:
    if body[end + 1 :].strip():
        raise ValueError("something follows the array")
    last = body[start:end]
    if items or last.strip():
        items.append(last)
    return items
