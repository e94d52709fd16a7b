"""``/control``: read and change analyzers while they run.

On an analyzer's own port the paths are ``/control``, ``/control/reset``, ``/control/ids``, ``/control/digests``,
``/control/bodies``. On the control port the analyzer's id comes in between (``/control/A1/reset``), and ``/control``
and ``/control/reset`` mean all analyzers. This module only decides; the connection writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from mock_analyzers import responses
from mock_analyzers.options import NAMES, OptionsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mock_analyzers.analyzer import Analyzer
    from mock_analyzers.responses import Response

_TEXT = b"text/plain; charset=utf-8"

Stream = tuple[bytes, "Iterator[bytes]"]
"""The head and the pieces of a response that is too long for one go."""


def is_control(path: bytes) -> bool:
    """Return whether a request is for this module."""
    return path == b"/control" or path.startswith((b"/control/", b"/control?"))


class Control:
    """Answers for one analyzer (its own port) or for several (the control port)."""

    def __init__(self, *, own: Analyzer | None = None, every: Sequence[Analyzer] = ()) -> None:
        self._own = own
        self._every = every

    def respond(self, method: bytes, path: bytes, body: bytes) -> Response | Stream:
        """Return the response to a request whose path ``is_control``."""
        steps = path.partition(b"?")[0].decode("latin-1").strip("/").split("/")[1:]
        one = self._own
        if one is None and steps:
            one = next((analyzer for analyzer in self._every if analyzer.id == steps[0]), None)
            steps = steps[1:] if one else steps
        action = f"{method.decode('latin-1')} {'/'.join(steps)}".strip()
        match action:
            case "GET":
                return self._described(one)
            case "POST":
                return self._configured(one, body)
            case "POST reset":
                for analyzer in self._chosen(one):
                    analyzer.ledger.reset()
                return self._described(one)
            case "GET ids" if one:
                return responses.stream_head(_TEXT), one.ledger.id_lines()
            case "GET digests" | "GET bodies" if one:
                ledger = one.ledger
                return responses.stream_head(), ledger.digest_json() if "digests" in steps else ledger.body_json()
        return responses.json(404, {"error": f"no such control: {method.decode('latin-1')} {path.decode('latin-1')}"})

    def _chosen(self, one: Analyzer | None) -> Sequence[Analyzer]:
        return self._every if one is None else (one,)

    def _described(self, one: Analyzer | None) -> Response:
        if one is not None:
            return responses.json(200, one.describe())
        return responses.json(200, {"analyzers": [analyzer.describe() for analyzer in self._every]})

    def _configured(self, one: Analyzer | None, body: bytes) -> Response:
        try:
            patch = orjson.loads(body)
            for analyzer in self._chosen(one):
                analyzer.configure(patch)
        except orjson.JSONDecodeError as error:
            return responses.json(400, {"error": f"the body is not JSON: {error}"})
        except OptionsError as error:
            problem: dict[str, Any] = {"error": str(error)}
            if error.unknown:
                problem |= {"unknown": error.unknown, "known": NAMES}
            return responses.json(400, problem)
        except OSError as error:
            return responses.json(409, {"error": f"cannot listen again: {error}"})
        return self._described(one)
