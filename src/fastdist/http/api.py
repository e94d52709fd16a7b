"""The HTTP API but for POST /logs: from a request to a response, both plain values.

No sockets and no waiting here, so that tests need neither. What the module sees to:

- Every error is a problem document (RFC 9457), and so is an unexpected exception: 500. A method that a path does not
  take is answered 405 with Allow (RFC 9110), an unknown path 404. The query is no part of the path; a slash at its end
  is.
- HEAD is answered as GET, body included: the connection leaves the body out, and so has its length right.
- Headers of every response are not made here: Date, Content-Length and those for safety come with the writing, and
  ``cors_headers`` is for the connection to add to all its responses, preflights among them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

import msgspec

from fastdist import logs
from fastdist.errors import INTERNAL_ERROR
from fastdist.exchange import JSON, Request, Response
from fastdist.http import metrics, stats
from fastdist.http.admin import RefusedError, authorize, parse_override
from fastdist.http.responses import Ready, json_response, problem
from fastdist.http.static import FOLDER, pages
from fastdist.ipc import Action
from fastdist.retry_after import retry_after

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fastdist.shm.snapshot import Snapshot

PREFLIGHT_SECONDS = 600  # how long a browser may go by the response to its preflight
PUBLIC = ("/health", "/ready")  # paths that are served at each address
# That scripts of other origins may set.
REQUEST_HEADERS = b"Content-Type, Content-Encoding, Authorization, Idempotency-Key, Prefer, X-Emitter-Id"

LOG_INTERVAL = 60.0  # between tracebacks of one kind

log = logs.get()


Handler = Callable[[Request], Response | Action]


class Faults:
    """Answers requests that have met a fault of this program, whose traceback is logged once a minute."""

    def __init__(self) -> None:
        self._log_limit = logs.Throttle(LOG_INTERVAL)  # by kind and line

    def response(self, error: Exception) -> Response:
        """Return what to answer; ``error`` is logged unless one like it just was."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else ("", 0)
        if self._log_limit.allow((type(error), *where)):
            log.error("a request could not be answered", error=str(error), exc_info=error)
        return problem(500, INTERNAL_ERROR)


def cors_headers(origin: str, allowed: Sequence[str]) -> bytes:
    """Return the header lines that let scripts of ``origin`` read a response; empty if it is not ``allowed``.

    ``allowed`` are exact origins, or ``"*"``.
    """
    if "*" in allowed:
        shared = b"Access-Control-Allow-Origin: *\r\n"
    elif origin in allowed:
        shared = b"Access-Control-Allow-Origin: " + origin.encode("latin-1") + b"\r\nVary: Origin\r\n"
    else:
        return b""
    return shared + b"Access-Control-Expose-Headers: Retry-After\r\n"


class Api:
    """Answers requests from what ``snapshot()`` returns, called for each.

    ``routes`` maps paths (with ``{id}`` for an analyzer's, ``{file}`` for the dashboard's) to methods to handlers. GET
    brings HEAD with it, every path has OPTIONS, and a path whose handlers are elsewhere says in ``ELSEWHERE`` what it
    takes. A handler that asks for a change returns the ``Action``, which the worker has carried out.

    ``at``: with ``admin.listen``, the address that is served. What load balancers ask for is at both of them.
    """

    ELSEWHERE: Mapping[str, Sequence[str]] = {"/logs": ("POST",)}

    def __init__(self, snapshot: Callable[[], Snapshot], *, at: Literal["all", "packets", "views"] = "all") -> None:
        self.snapshot = snapshot
        self.faults = Faults()
        self.routes: dict[str, dict[str, Handler]] = {
            "/": {"GET": self._page},
            "/dashboard/{file}": {"GET": self._page},
            "/health": {"GET": lambda _: json_response(stats.health(self.snapshot()))},
            "/ready": {"GET": self._ready},
            "/stats": {"GET": lambda _: json_response(stats.stats(self.snapshot()))},
            "/queue": {"GET": lambda _: json_response(stats.queue(self.snapshot()))},
            "/analyzers": {"GET": lambda _: json_response(stats.analyzers(self.snapshot()))},
            "/dead-letters": {"GET": lambda _: json_response(stats.dead_letters(self.snapshot()))},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": lambda _: Response(200, description(), JSON)},
            "/admin/reload": {"POST": self._guarded(lambda _: Action("reload"))},
            "/analyzers/{id}": {"PATCH": self._guarded(self._override)},
            "/analyzers/{id}/override": {"DELETE": self._guarded(self._clear)},
        }
        self._hint = "there is nothing at this path; packets go to POST /logs"
        if at == "packets":
            self.routes = {path: self.routes[path] for path in PUBLIC}
            self._hint = "there is nothing at this path here; figures and changes are at the address of admin.listen"
        elif at == "views":
            self.ELSEWHERE = {}
            self._hint = "there is nothing at this path here; packets go to POST /logs of the other address"

    def respond(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes, client: str = ""
    ) -> Response | Action:
        """Answer a request that is not POST /logs; ``target`` is a path, ``*`` (OPTIONS) or what CONNECT names."""
        try:
            return self._respond(Request(method, target, headers, body, client))
        except RefusedError as error:
            return problem(error.status, error.detail, errors=error.errors, headers=error.headers)
        except Exception as error:  # noqa: BLE001  (every request gets a response)
            return self.faults.response(error)

    def _respond(self, request: Request) -> Response | Action:
        method, route = request.method, template(request.path)
        methods = self._methods(request.path)
        if not methods:
            return problem(404, self._hint)
        if method == "OPTIONS":
            if "{id}" in route:
                self._analyzer(request)
            return self.options(request.headers, methods)
        handler = self.routes.get(route, {}).get("GET" if method == "HEAD" else method)
        if handler is None:
            return problem(405, f"{', '.join(methods)} are what this path takes", headers=_allow(methods))
        return handler(request)

    def _methods(self, path: str) -> list[str]:
        """Return what a path takes: nothing if it is unknown. A target that is no path stands for the whole server."""
        paths = [template(path)] if path.startswith("/") else [*self.routes, *self.ELSEWHERE]
        methods = [method for path in paths for method in (*self.routes.get(path, ()), *self.ELSEWHERE.get(path, ()))]
        if not methods:
            return []
        with_head = [name for method in methods for name in (("GET", "HEAD") if method == "GET" else (method,))]
        return list(dict.fromkeys([*with_head, "OPTIONS"]))

    def options(self, headers: Mapping[str, str], methods: Iterable[str]) -> Response:
        """Answer OPTIONS of a path that takes these methods, and with it preflights."""
        lines = _allow(methods)
        if is_preflight(headers):
            allowed = self.snapshot().config.security.cors_origins
            if cors_headers(headers["origin"], allowed):
                lines += _preflight(methods)
        return Response(204, b"", lines)

    def _page(self, request: Request) -> Response:
        page = pages()[request.path]
        if page.is_held(request.headers.get("if-none-match", "")):
            return Response(304, b"", page.headers)
        return Response(200, page.body, page.headers)

    def _ready(self, _: Request) -> Response:
        snapshot = self.snapshot()
        obstacle = snapshot.obstacle
        return problem(503, obstacle, headers=retry_after(snapshot.retry_after)) if obstacle else json_response(Ready())

    def _metrics(self, request: Request) -> Response:
        if accepts(request.headers.get("accept", ""), "application/openmetrics-text"):
            render, content_type = metrics.openmetrics, metrics.OPENMETRICS_CONTENT_TYPE
        else:
            render, content_type = metrics.text, metrics.CONTENT_TYPE
        return Response(200, render(self.snapshot()), f"Content-Type: {content_type}\r\n".encode())

    def _guarded(self, handler: Handler) -> Handler:
        """Let only administrators ask for a change."""

        def guarded(request: Request) -> Response | Action:
            by = authorize(request.headers, request.client, self.snapshot().config.security)
            change = handler(request)
            return msgspec.structs.replace(change, by=by) if isinstance(change, Action) else change

        return guarded

    def _override(self, request: Request) -> Action:
        if request.headers.get("content-encoding", "").lower() not in ("", "identity"):
            raise RefusedError(415, "compressed bodies are not understood", headers=b"Accept-Encoding: identity\r\n")
        return parse_override(self._analyzer(request), request.body)

    def _clear(self, request: Request) -> Action:
        return Action("clear", self._analyzer(request))

    def _analyzer(self, request: Request) -> str:
        """Return the id in a path below /analyzers/. Raises RefusedError for one that is not configured."""
        name = unquote(request.path.split("/")[2])
        names = [analyzer.id for analyzer in self.snapshot().config.analyzers]
        if name not in names:
            raise RefusedError(404, f"there is no analyzer {name!r}; there are {', '.join(names)}")
        return name


def is_preflight(headers: Mapping[str, str]) -> bool:
    """Whether an OPTIONS request is what browsers send before a request to another origin."""
    return "origin" in headers and "access-control-request-method" in headers


@cache
def description() -> bytes:
    """Return what describes this API: OpenAPI 3.1, without the whitespace of the file."""
    return msgspec.json.format(Path(__file__).with_name("openapi.json").read_bytes(), indent=-1)


def template(path: str) -> str:
    """Return the route that a path belongs to; for an unknown path, one that does not exist."""
    if path.startswith(FOLDER):
        return "/dashboard/{file}" if path in pages() else ""
    parts = path.split("/")
    if path.startswith("/analyzers/") and len(parts) in (3, 4) and parts[2]:
        parts[2] = "{id}"
        return "/".join(parts)
    return path


def accepts(accept: str, media_type: str) -> bool:
    """Whether an Accept header names ``media_type`` itself (no wildcard), and not to refuse it (``q=0``)."""
    for item in accept.lower().split(","):
        name, *parameters = (part.strip(" \t") for part in item.split(";"))
        if name == media_type:
            return not any(parameter.startswith("q=") and not parameter[2:].strip("0.") for parameter in parameters)
    return False


def _allow(methods: Iterable[str]) -> bytes:
    return f"Allow: {', '.join(methods)}\r\n".encode()


def _preflight(methods: Iterable[str]) -> bytes:
    return (
        f"Access-Control-Allow-Methods: {', '.join(methods)}\r\n".encode()
        + b"Access-Control-Allow-Headers: "
        + REQUEST_HEADERS
        + f"\r\nAccess-Control-Max-Age: {PREFLIGHT_SECONDS}\r\n".encode()
    )
