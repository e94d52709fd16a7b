"""Periodic upkeep of a process: each step runs whatever happens to the others.

A step that fails is logged once, and once more when it has worked again for ``QUIET`` seconds. Meanwhile its bit is set
in a word of the shared block, where /health reads it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.shm.block import Step

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

QUIET = 2.0  # seconds: a step may have nothing to do in some runs
ADVICE = {
    Step.OLD_RINGS: "let fastdist write to the queue's folder and to the old rings in it (adopt-*.fdq)",
    Step.DEAD_LETTERS: "let fastdist read and write the folder of dead letters, and the files in it",
    Step.QUEUE_FILES: "let fastdist read and write the queue's folder",
    Step.CONNECTIONS: "raise the limit on open files (ulimit -n, LimitNOFILE) or lower delivery.connections",
    Step.ACCEPTING: "raise the limit on open files (ulimit -n, LimitNOFILE) or lower server.max_connections",
    Step.OVERRIDES: "let fastdist write to the queue's folder",
}

log = logs.get()


class Upkeep:
    """Runs steps, and publishes those that fail in ``words[word]``."""

    def __init__(self, words: memoryview, word: int) -> None:
        self._words, self._word = words, word
        self._failed: dict[Step, float] = {}  # when it last failed, monotonic
        words[word] = 0

    def run(self, step: Step, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Do a part of a step; return what it returns, or None if it raises an Exception."""
        try:
            result = work(*args, **kwargs)
        except Exception as error:
            if step not in self._failed:
                expected = isinstance(error, OSError)
                more = {"advice": ADVICE[step]} if expected and step in ADVICE else {}
                log.error(
                    "a part of the upkeep fails; it is tried again and again",
                    step=step.word,
                    error=str(error),
                    exc_info=None if expected else error,
                    **more,
                )
            self._failed[step] = time.monotonic()
            self._publish()
            return None
        if step in self._failed and time.monotonic() - self._failed[step] >= QUIET:
            del self._failed[step]
            self._publish()
            log.info("a part of the upkeep works again", step=step.word)
        return result

    def _publish(self) -> None:
        self._words[self._word] = sum(self._failed)
