"""Group commit: a thread syncs a ring's file, one sync at a time, and one sync serves all that came before it.

With durability ``fsync`` a sync follows whenever a response waits for one; with ``disk`` one follows every
``sync_interval`` in which something changed. A sync that fails is reported at once and retried until one succeeds; all
is written again before that, in another thread, because after a failure the kernel may take pages for written that are
not. The ring remembers the failure, for the process that opens it next.
"""

from __future__ import annotations

import asyncio
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist._core import SyncThread
from fastdist.storage.files import has_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastdist._core import PacketRing

RETRY_SECONDS = 1.0  # after a sync that failed

log = logs.get()


def make_safe(ring: PacketRing, fd: int, *, write_again: bool = True) -> OSError | None:
    """Put all of a ring, mapped from ``fd``, on stable storage; return why that did not work, None when it has.

    What a process that was killed has left in the pages is not: not yet, or never, for it may have been killed after a
    sync that failed, which the kernel reports once. So for a ring of an earlier process, what no sync is known to have
    covered is written again.
    """
    try:
        ring.write_out()
        if write_again:
            ring.write_again()
        position = ring.sync_position
        os.fdatasync(fd)
    except OSError as error:
        log.error("the queue cannot be synced", error=str(error))
        ring.forget_synced()
        return error
    ring.mark_synced(position)
    return None


class Syncer:
    """Syncs ``ring``, mapped from ``fd``; ``on_synced(position)`` or ``on_failed(error)`` is called in the event loop.

    With a ``path`` a sync counts only if the file is found there after it: FileNotFoundError then. ``error``: why the
    last sync has failed, None when it has not; at first that of one which was not the syncer's.
    """

    def __init__(  # noqa: PLR0913  (what is synced, and the callbacks)
        self,
        ring: PacketRing,
        fd: int,
        on_synced: Callable[[int], None],
        on_failed: Callable[[OSError], None],
        *,
        path: Path | None = None,
        error: OSError | None = None,
    ) -> None:
        self.ring, self.fd, self.path, self.error = ring, fd, path, error
        self._on_synced, self._on_failed = on_synced, on_failed
        self._loop = asyncio.get_running_loop()
        self._thread = SyncThread(fd)
        self._loop.add_reader(self._thread.fileno(), self._take)
        self._executor = ThreadPoolExecutor(1)  # for ``run``; has no thread before that
        self._scheduled = self._closed = False
        self._write_again = self.failing  # before the next sync
        self._writing_again = False  # at present
        self._seen = (-1, -1, -1)
        self._retry: asyncio.TimerHandle | None = None

    @property
    def failing(self) -> bool:
        """Whether the last sync has failed."""
        return self.error is not None

    def want(self) -> None:
        """Request a sync of what is in the ring at the end of this iteration; after a failure, with the next try."""
        if not self._scheduled and not self._writing_again and self._retry is None:
            self._scheduled = True
            self._loop.call_soon(self._request)

    def want_if_changed(self) -> None:
        """Do the same if anything has changed since the last sync was requested."""
        if self._state() != self._seen:
            self.want()

    def _state(self) -> tuple[int, int, int]:
        return self.ring.tail_position, self.ring.used, self.ring.undone

    def _request(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        if self._write_again:
            try:
                span = self.ring.begin_writing_again()
            except OSError as error:
                self._fail(error)
                return
            self._writing_again = True
            self.run(partial(self.ring.go_on_writing_again, span), self._written_again)
            return
        self._seen = self._state()
        self._thread.request(self.ring.sync_position)

    def _written_again(self, failed: OSError | None) -> None:
        self._writing_again = False
        try:
            self.ring.end_writing_again()
        except OSError as error:
            failed = failed or error
        if failed is not None:
            self._fail(failed)
            return
        self._write_again = False
        self._request()

    def _take(self) -> None:
        position, error = self._thread.take()
        if position >= 0:
            self._succeed(position)
        if error:
            self._fail(OSError(error, os.strerror(error)))

    def _succeed(self, position: int) -> None:
        if self.failing:
            self.error = None
            if logs.may_log():
                log.info("the queue can be written to disk again")
        found = self._is_found()
        if not found:  # it is on the disk, and yet the next start will know nothing of it
            self._on_failed(FileNotFoundError(errno.ENOENT, "the queue's file was deleted or renamed"))
        self.ring.mark_synced(position)
        if found:
            self._on_synced(position)

    def _fail(self, error: OSError) -> None:
        if not self.failing and logs.may_log():
            log.error(
                "cannot write the queue to disk; nothing can be accepted until that is possible", error=str(error)
            )
        self.error, self._write_again = error, True
        self.ring.forget_synced()
        self._on_failed(error)
        if self._retry is None:
            self._retry = self._loop.call_later(RETRY_SECONDS, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self.want()

    def _is_found(self) -> bool:
        """Whether the file is what is found under ``path``, as far as can be seen."""
        try:
            return self.path is None or has_name(self.fd, self.path)
        except OSError:
            return True

    def run(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        """Do other work with the disk in a thread, beside syncs; ``done`` gets the outcome in the event loop."""

        def finish(future: asyncio.Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is None or isinstance(error, OSError):
                done(error)
            else:  # an error of the program is reported, and is a failure as well
                done(OSError(errno.EIO, str(error)))
                raise error

        if not self._closed:
            self._loop.run_in_executor(self._executor, work).add_done_callback(finish)

    def close(self) -> None:
        """End the threads, and sync once more, here and now."""
        self._closed = True
        self._executor.shutdown()
        self._loop.remove_reader(self._thread.fileno())
        self._thread.close()
        self._take()
        make_safe(self.ring, self.fd, write_again=self.failing)
