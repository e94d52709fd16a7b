"""Group commit: a ring's file is synced in a thread, one sync at a time, and one sync serves all that came before it.

With durability ``fsync`` a sync follows whenever a response waits for one; with ``disk`` one follows every
``sync_interval`` in which something changed. A sync that fails is reported at once and retried until one succeeds; all
is written again before that, because after a failure the kernel may take pages for written that are not. The ring
remembers the failure, for the process that opens it next.
"""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.storage.files import has_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastdist._core import PacketRing

RETRY_SECONDS = 1.0  # after a sync that failed

log = logs.get()


def make_safe(ring: PacketRing, fd: int, *, write_again: bool = True) -> bool:
    """Put all of a ring, mapped from ``fd``, on stable storage; return whether that worked.

    What a process that was killed has left in the pages is not: not yet, or never, for it may have been killed after a
    sync that failed, which the kernel reports once. So for a ring of an earlier process, what no sync is known to have
    covered is written again.
    """
    if write_again:
        ring.write_again()
    position = ring.tail_position
    try:
        os.fdatasync(fd)
    except OSError as error:
        log.error("the queue cannot be synced", error=str(error))
        ring.forget_synced()
        return False
    ring.mark_synced(position)
    return True


class Syncer:
    """Syncs ``ring``, mapped from ``fd``; ``on_synced(position)`` or ``on_failed(error)`` is called in the event loop.

    With a ``path`` a sync counts only if the file is found there after it: FileNotFoundError then. ``failing``: whether
    the last one, which was not the syncer's, did.
    """

    def __init__(  # noqa: PLR0913  (what is synced, and the callbacks)
        self,
        ring: PacketRing,
        fd: int,
        on_synced: Callable[[int], None],
        on_failed: Callable[[OSError], None],
        *,
        path: Path | None = None,
        failing: bool = False,
    ) -> None:
        self.ring, self.fd, self.path, self.failing = ring, fd, path, failing
        self._on_synced, self._on_failed = on_synced, on_failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._wanted = self._running = self._scheduled = self._closed = False
        self._seen = (-1, -1, -1)
        self._retry: asyncio.TimerHandle | None = None

    def want(self) -> None:
        """Request a sync of what is in the ring at the end of this event-loop iteration."""
        self._wanted = True
        if not self._running and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._start)

    def want_if_changed(self) -> None:
        """Do the same if anything has changed since the last sync began."""
        if self._state() != self._seen:
            self.want()

    def _state(self) -> tuple[int, int, int]:
        return self.ring.tail_position, self.ring.used, self.ring.undone

    def _start(self) -> None:
        self._scheduled = False
        if self._running or self._closed or not self._wanted:
            return
        self._running, self._wanted = True, False
        if self._retry is not None:
            self._retry.cancel()
        if self.failing:
            self.ring.write_again()
        self._seen = self._state()
        position = self.ring.tail_position
        future = asyncio.get_running_loop().run_in_executor(self._thread, os.fdatasync, self.fd)
        future.add_done_callback(lambda done: self._finish(position, done))

    def _finish(self, position: int, done: asyncio.Future[None]) -> None:
        self._running = False
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            if self.failing:
                self.failing = False
                log.info("the queue can be written to disk again")
            found = self._is_found()
            if not found:  # it is on the disk, and yet the next start will know nothing of it
                self._on_failed(FileNotFoundError(errno.ENOENT, "the queue's file was deleted or renamed"))
            self.ring.mark_synced(position)
            if found:
                self._on_synced(position)
            if self._wanted:
                self._start()
            return
        if not isinstance(error, OSError):
            raise error
        if not self.failing:
            log.error(
                "cannot write the queue to disk; nothing can be accepted until that is possible", error=str(error)
            )
        self.failing = True
        self.ring.forget_synced()
        self._on_failed(error)
        self._retry = asyncio.get_running_loop().call_later(RETRY_SECONDS, self.want)

    def _is_found(self) -> bool:
        """Whether the file is what is found under ``path``, as far as can be seen.

        Not in the thread: each system call there has to get hold of the interpreter again, which a busy loop has.
        """
        try:
            return self.path is None or has_name(self.fd, self.path)
        except OSError:
            return True

    def run(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        """Do other work with the disk in the thread, before the next sync; ``done`` gets the outcome in the loop."""

        def finish(future: asyncio.Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, OSError):
                raise error
            done(error)

        if not self._closed:
            asyncio.get_running_loop().run_in_executor(self._thread, work).add_done_callback(finish)

    def close(self) -> None:
        """Sync once more, here and now, and end the thread."""
        self._closed = True
        self._thread.shutdown(wait=True)
        make_safe(self.ring, self.fd, write_again=self.failing)
