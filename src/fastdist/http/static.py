"""The dashboard's files: what ``GET /`` and the paths below /dashboard/ answer.

- Static: read once from the package, the same for all clients. The page fetches live figures from the API itself.
- Nothing is loaded from elsewhere and nothing runs inline; the policy below holds browsers to that.
- Kept by browsers, but asked for again each time (``no-cache`` and an ETag), so that a page is never older than the
  service it shows.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = "/dashboard/"
FIRST = "index.html"  # is at /
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Page(Struct, frozen=True):
    """A file: its bytes, and the header lines of a response with them or (304) without."""

    body: bytes
    headers: bytes
    etag: str

    def is_held(self, if_none_match: str) -> bool:
        """Whether a client that sends this If-None-Match has the file as it is (RFC 9110, weak comparison)."""
        tags = [tag.strip(" \t").removeprefix("W/") for tag in if_none_match.split(",")]
        return if_none_match == "*" or self.etag in tags


@cache
def pages() -> Mapping[str, Page]:
    """Return all files by their path."""
    found = {}
    for file in Path(__file__).with_name("dashboard").iterdir():
        kind = TYPES.get(file.suffix)
        if kind is not None:
            found["/" if file.name == FIRST else FOLDER + file.name] = _page(file.read_bytes(), kind)
    return found


def _page(body: bytes, kind: str) -> Page:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    lines = (
        f"Content-Type: {kind}",
        "Cache-Control: no-cache",
        f"ETag: {etag}",
        f"Content-Security-Policy: {POLICY}",
        "Referrer-Policy: no-referrer",
        "Cross-Origin-Resource-Policy: same-origin",
    )
    return Page(body, "".join(f"{line}\r\n" for line in lines).encode(), etag)
