"""The supervisor's part in dead letters: a census for the views, the bounds, and an eye on their file system.

It looks once a second, in a thread, for a folder may be large: at the start the files are read whole. After a look that
took long it rests longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING

from fastdist.errors import StartError
from fastdist.shm.block import HeadWord, Step
from fastdist.storage.dead_letter_bounds import Bounds
from fastdist.storage.dead_letter_census import Census, HaltedError
from fastdist.storage.dead_letter_format import folder_of
from fastdist.storage.files import make_folder

if TYPE_CHECKING:
    from fastdist.dead_letter_report import Report
    from fastdist.settings import Config
    from fastdist.settings import DeadLetters as Settings
    from fastdist.shm.block import SharedBlock
    from fastdist.shm.upkeep import Upkeep

LOOK = 1.0  # seconds
REST = 20  # times as long as a look, but no longer than MAX_REST seconds
MAX_REST = 30.0


def check_folder(config: Config) -> None:
    """See that a folder of dead letters of its own can be used. Raises StartError."""
    path = config.dead_letters.path
    if not path:
        return
    try:
        make_folder(folder_of(config.queue.path, path))
        probe = folder_of(config.queue.path, path) / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StartError(f"dead_letters.path: cannot write to the folder {path}: {error.strerror}") from error


class DeadLetterWatch:
    """Looks at the folder of dead letters again and again: ``run`` does."""

    def __init__(self, config: Config, block: SharedBlock, upkeep: Upkeep) -> None:
        self._block, self._upkeep = block, upkeep
        folder = folder_of(config.queue.path, config.dead_letters.path)
        self.bounds = Bounds(folder, config.dead_letters, block.workers, self._discarded_for_size)
        self._census = Census(self.bounds.folder)
        self._halted = threading.Event()
        self._changed = asyncio.Event()  # the bounds

    def use(self, settings: Settings) -> None:
        """Put other bounds in force, now."""
        self.bounds.use(settings)
        self._changed.set()

    async def run(self) -> None:
        """Look, until cancelled."""
        try:
            while True:
                began = time.monotonic()
                look = await asyncio.gather(asyncio.to_thread(self._look), return_exceptions=True)
                self._upkeep.run(Step.DEAD_LETTERS, self._publish, look[0])
                rest = max(LOOK, min(MAX_REST, REST * (time.monotonic() - began)))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), rest)
                self._changed.clear()
        finally:
            self._halted.set()

    def _look(self) -> Report:
        """In a thread: keep to the bounds, and count what is there."""
        self.bounds.enforce(self._discarded_for_age, self._halted.is_set)
        return self._census.look(self._halted.is_set)

    def _discarded_for_size(self, dead_letters: int) -> None:
        self._block.head[HeadWord.DISCARDED_FOR_SIZE] += dead_letters

    def _discarded_for_age(self, dead_letters: int) -> None:
        self._block.head[HeadWord.DISCARDED_FOR_AGE] += dead_letters

    def _publish(self, look: Report | BaseException) -> None:
        if isinstance(look, HaltedError):
            return
        if isinstance(look, BaseException):
            raise look
        self._block.dead_letters = look
