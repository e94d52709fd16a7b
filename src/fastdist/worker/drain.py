"""Draining: a worker takes no new connections, finishes what is under way and delivers what is queued, for a time.

Connections that the system has completed already are served. A request that arrives meanwhile is accepted and is the
last on its connection: the emitter could not know yet.

A listener that is handed on (the service manager has it open, and the next process gets it) need not be closed before
that process is there: while something is left in queues that last, all workers accept new connections and store their
packets. What comes once they do not waits for the next process.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from typing import TYPE_CHECKING

from fastdist import logs
from fastdist.storage.files import is_nameless
from fastdist.worker.upkeep import TICK

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.worker.dispatch import Dispatcher
    from fastdist.worker.ingest import Emitters, IngestProtocol
    from fastdist.worker.listener import Acceptor
    from fastdist.worker.queue import Queue
    from fastdist.worker.stream.queue import StreamQueue

LAST_LOOKS = 50  # TICK apart: the time a last request has to arrive; ticks in which we could not read do not count
LAST_RESPONSES = 1.0  # seconds at most for rejecting requests that arrive too late
SETTLED = 3  # looks after which the other workers' figures are newer than the beginning of the drain
LAST_CONNECTIONS = 2.0  # seconds before the end from which on a listener that is handed on is the next process's
LAST_LINGER_NS = 1_000_000_000  # that an emitter has to read its last response once all else is done

log = logs.get()


class Drain:
    """A worker's shutdown, done by ``run``. ``left()``: how many packets all workers have yet to deliver."""

    def __init__(
        self,
        server: Acceptor,
        emitters: Emitters,
        dispatcher: Dispatcher,
        queue: Queue | StreamQueue,
        left: Callable[[], int],
    ) -> None:
        self._server, self._emitters, self._dispatcher, self._queue = server, emitters, dispatcher, queue
        self._left = left
        self._intake, self._poller = emitters.intake, dispatcher.poller

    async def run(self, deadline: float, progress: Callable[[], object]) -> None:
        """Drain until ``deadline`` (time.monotonic()) at most; afterwards nothing is under way and all is stored.

        ``progress()`` is called while dead letters are written and the event loop does nothing else.
        """
        await self._finish(deadline - self._queue.end_seconds)
        self._intake.closed = True
        self._reject()
        self._dispatcher.stop()
        await self._queue.end(deadline)
        dead_letter_writer = self._dispatcher.dead_letter_writer
        while dead_letter_writer.syncing:  # noqa: ASYNC110  (an event would be set for this alone)
            await asyncio.sleep(TICK)
        if self._queue.ends_here:
            self._dead_letter_rest(progress)
        else:
            dead_letter_writer.finish()
        self._emitters.end_waiting()
        self._queue.close()
        self._intake.synced()
        self._emitters.close_all()
        dead_letter_writer.close()

    async def _finish(self, deadline: float) -> None:
        """Serve and deliver while there is something to finish."""
        self._intake.draining = True
        accepts = self._server.handed_on and not is_nameless(self._queue.fd)
        finished = 0  # the look at which new connections were stopped
        if not accepts:
            self._server.finish()
        idle: Counter[IngestProtocol] = Counter()  # looks at a connection that has nothing under way
        for look in itertools.count():
            self._queue.begin_to_end()
            if accepts and not self._accepts_on(look, deadline):
                accepts, finished = False, look
                self._server.finish()
            self._close_finished(idle)
            done = not (self._queue.unfinished or self._intake.connections or self._server.busy)
            if done or time.monotonic() >= deadline:
                break
            if not accepts and look - finished == LAST_LOOKS:
                self._server.close()  # the time for handshakes is over as well
            await asyncio.sleep(TICK)
        self._server.close()

    def _accepts_on(self, look: int, deadline: float) -> bool:
        """Whether a listener that is handed on has to be served yet: what is left keeps the next process away."""
        return time.monotonic() < deadline - LAST_CONNECTIONS and (look < SETTLED or self._left() > 0)

    def _close_finished(self, idle: Counter[IngestProtocol]) -> None:
        """Close connections whose last response was read, or had the time to be, and those ``idle`` at enough looks."""
        whole = self._poller.run_once()  # else a request may have arrived that was not read yet
        for connection in tuple(self._intake.connections):
            if connection.transport is None:
                continue
            if connection.idle():
                idle[connection] += whole
                if idle[connection] > LAST_LOOKS:
                    connection.transport.close()
            elif self._queue.undone == 0 and connection.lingered(time.monotonic_ns()) > LAST_LINGER_NS:
                connection.transport.abort()

    def _reject(self) -> None:
        """Reject the requests that have arrived by now."""
        end = time.monotonic() + LAST_RESPONSES
        while (not self._poller.run_once() or self._intake.holds_back) and time.monotonic() < end:
            self._intake.go_on()
        self._intake.give_up_storing()  # the disk was too slow for the rest of it

    def _dead_letter_rest(self, progress: Callable[[], object]) -> None:
        """Make dead letters of what would be lost with this process; the supervisor retries what cannot be written."""
        try:
            self._dispatcher.dead_letter_all(progress)  # the supervisor logs how many
        except OSError as error:
            log.error(
                "cannot write dead letters; what is left is lost unless the supervisor can",
                error=str(error),
                packets=self._queue.ring.undone,
            )
