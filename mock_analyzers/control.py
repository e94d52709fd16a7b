"""``/control``: read and change analyzers while they run.

On an analyzer's own port the paths are ``/control``, ``/control/reset``, ``/control/ids``, ``/control/digests``. On
the control port the analyzer's id comes in between (``/control/A1/reset``), and the paths without an id mean all
analyzers where that makes sense. This module only decides; the connection writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from mock_analyzers import answers
from mock_analyzers.options import NAMES, OptionsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mock_analyzers.analyzer import Analyzer
    from mock_analyzers.answers import Answer

_TEXT = b"text/plain; charset=utf-8"

Stream = tuple[bytes, "Iterator[bytes]"]
"""The head and the pieces of an answer that is too long for one go."""


def is_control(path: bytes) -> bool:
    """Return whether a request is for this module."""
    return path == b"/control" or path.startswith((b"/control/", b"/control?"))


class Control:
    """Answers for ``analyzers``; ``named``: paths carry an analyzer's id."""

    def __init__(self, analyzers: Sequence[Analyzer], *, named: bool) -> None:
        self._analyzers = analyzers
        self._named = named

    def answer(self, method: bytes, path: bytes, body: bytes) -> Answer | Stream:
        """Return the answer to a request whose path ``is_control``."""
        steps = path.partition(b"?")[0].decode("latin-1").strip("/").split("/")[1:]
        chosen: Sequence[Analyzer] = self._analyzers
        if self._named and steps:
            one = [analyzer for analyzer in self._analyzers if analyzer.id == steps[0]]
            chosen, steps = (one, steps[1:]) if one else (chosen, steps)
        action = f"{method.decode('latin-1')} {'/'.join(steps)}".strip()
        match action:
            case "GET":
                return self._described(chosen)
            case "POST":
                return self._configured(chosen, body)
            case "POST reset":
                for analyzer in chosen:
                    analyzer.ledger.reset()
                return self._described(chosen)
            case "GET ids" if len(chosen) == 1:
                return answers.stream_head(_TEXT), chosen[0].ledger.id_lines()
            case "GET digests" if len(chosen) == 1:
                return answers.stream_head(), chosen[0].ledger.digest_json()
        return answers.json(404, {"error": f"no such control: {method.decode('latin-1')} {path.decode('latin-1')}"})

    def _described(self, chosen: Sequence[Analyzer]) -> Answer:
        value: dict[str, Any]
        if len(chosen) == 1:
            value = chosen[0].describe()
        else:
            value = {"analyzers": [analyzer.describe() for analyzer in chosen]}
        return answers.json(200, value)

    def _configured(self, chosen: Sequence[Analyzer], body: bytes) -> Answer:
        try:
            patch = orjson.loads(body)
            for analyzer in chosen:
                analyzer.configure(patch)
        except orjson.JSONDecodeError as error:
            return answers.json(400, {"error": f"the body is not JSON: {error}"})
        except OptionsError as error:
            problem: dict[str, Any] = {"error": str(error)}
            if error.unknown:
                problem |= {"unknown": error.unknown, "known": NAMES}
            return answers.json(400, problem)
        except OSError as error:
            return answers.json(409, {"error": f"cannot listen again: {error}"})
        return self._described(chosen)
