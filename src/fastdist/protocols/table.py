"""The table of all protocols, and which of them a request is for."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from fastdist import settings
from fastdist.protocols import elasticsearch, ingest, loki, otlp, splunk

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fastdist.protocols.base import Protocol, Respond, Route, Take

PROTOCOLS: Final[tuple[Protocol, ...]] = (
    ingest.Json(),
    otlp.Otlp(),
    loki.Loki(),
    splunk.PROTOCOL,
    elasticsearch.Elasticsearch(),
)
NAMES: Final = tuple(protocol.name for protocol in PROTOCOLS)
CLIENTS: Final = re.compile(r"logstash/|vector/|(go-)?elastic")  # of Elasticsearch, by their User-Agent
MAX_PATH: Final = 1024  # of those that are looked for among patterns


class Found(NamedTuple):
    """What serves a path: ``take`` a request with records, ``reply`` one without; with neither the method is wrong.

    ``number``: that of the protocol, for counters. ``allow``: the methods of the path.
    """

    protocol: Protocol
    number: int
    take: Take | None
    reply: Respond | None
    allow: list[str]


def find(method: str, target: str, headers: Mapping[str, str], enabled: Collection[str]) -> Found | None:
    """Return what serves a request of the ``enabled`` protocols; None if it is for no agent.

    OPTIONS is served only where it has a response of its own.
    """
    found = _route(target.partition("?")[0])
    if found is None or found[0].name not in enabled:
        return None
    protocol, route = found
    if route.for_json and not (method in ("GET", "HEAD") and _wants_json(headers)):
        return None
    reply = route.reply.get("GET" if method == "HEAD" else method)
    number = settings.PROTOCOLS.index(protocol.name)
    return Found(protocol, number, route.take.get(method), reply, route.methods)


def _wants_json(headers: Mapping[str, str]) -> bool:
    """Whether a client of Elasticsearch asks, not a browser: many do not say what they accept, or that all will do."""
    accept, agent = headers.get("accept", "*/*").lower(), headers.get("user-agent", "").lower()
    return "json" in accept or (accept == "*/*" and CLIENTS.match(agent) is not None)


def _pattern(path: str) -> str:
    return "".join(
        part if n % 2 == 0 else "[^/]+"
        for n, part in enumerate(re.split(r"(\{\w+\})", re.escape(path).replace(r"\{", "{").replace(r"\}", "}")))
    )


_ROUTES: Final = [(protocol, route) for protocol in PROTOCOLS for route in protocol.routes]
_EXACT: Final = {route.path: (protocol, route) for protocol, route in _ROUTES if "{" not in route.path}
_OTHERS: Final = [(protocol, route) for protocol, route in _ROUTES if "{" in route.path]
_PATTERN: Final = re.compile("|".join(f"({_pattern(route.path)})" for _, route in _OTHERS))


@lru_cache(maxsize=256)
def _route(path: str) -> tuple[Protocol, Route] | None:
    exact = _EXACT.get(path)
    if exact is not None or len(path) > MAX_PATH:
        return exact
    match = _PATTERN.fullmatch(path)
    return _OTHERS[match.lastindex - 1] if match is not None and match.lastindex else None
