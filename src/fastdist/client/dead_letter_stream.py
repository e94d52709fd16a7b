"""The dead letters of all replicas, in the stream that they share: listed, sent again, purged by any machine.

The rules:

1. A dead letter is replayed by publishing its packet to the stream of packets, and removed once that is stored.
2. The id of that message is made of the dead letter's place and bytes. So one that was published by a replay that was
   killed before it could remove it is not stored twice, by whichever machine, within ``jetstream.dedup_window``.
3. Dead letters that are added while a command runs are left for the next: what is refused again is not sent in circles.

The commands are synchronous, with a thread for each connection; what talks to the servers runs in an event loop of its
own, in one more thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Self, TypeVar

from fastdist._core import scan
from fastdist.client.connection import Response
from fastdist.client.purge import Census, census_of
from fastdist.client.replay import ReplayRun, Summary
from fastdist.errors import StartError
from fastdist.storage.dead_letter_format import as_read, digest_of
from fastdist.storage.jetstream import api
from fastdist.storage.jetstream.api import ApiError, UnavailableError
from fastdist.storage.jetstream.connection import Connection
from fastdist.storage.jetstream.dead_stream import DeadStream
from fastdist.storage.jetstream.message import DamagedError, StoredPacket, decode, encode
from fastdist.storage.jetstream.publisher import Publisher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from typing import Any

    from fastdist.client.connection import Target
    from fastdist.client.dead_letter_store import Stored
    from fastdist.client.progress import ReplayView
    from fastdist.settings import Jetstream
    from fastdist.storage.dead_letter_format import DeadLetter, Line, Selection

Result = TypeVar("Result")

PATIENCE = 10.0  # seconds without a connection
RESPONSE_PATIENCE = 30.0  # seconds without a response: an election takes up to ten, more if a vote is split
PAUSE = 0.25  # seconds between two attempts
PAGE = 100  # dead letters that are read at once
PAGE_BYTES = 4 << 20  # of those
ACCEPTED, TOO_LARGE, INVALID, BUSY = 202, 413, 422, 503  # what a distributor would answer in such a case


class StreamResponse(Response):
    """What became of a packet that was published, in the shape of a distributor's response; its content is the text."""

    @property
    def text(self) -> str:
        """What the stream said, for a person."""
        return self.content.decode()

    @property
    def verdict(self) -> str:
        """The text behind the name of the stream."""
        return f"has not stored a packet: {self.text}"


class DeadLetterStream:
    """The dead letters of a stream, from entering to leaving.

    Raises StartError where the servers or the stream cannot be used.
    """

    peer = "the stream"

    def __init__(self, settings: Jetstream) -> None:
        self.settings = settings
        self.name = settings.dead_stream
        self._connection = Connection(settings, "fastdist dead-letters")
        self._dead = DeadStream(self._connection)
        self._packets = Publisher(self._connection, settings.stream, settings.subject, settings.publish_timeout)
        self._runner = asyncio.Runner()
        self._loop, self._ended = self._runner.get_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._last = 0  # sequence of the last dead letter that this is about

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._last = self._run(self._open())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _serve(self) -> None:
        with self._runner:
            self._runner.run(self._ended.wait())

    def _end(self) -> None:
        self._run(self._connection.close())
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine to its end, from any thread but the loop's."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- for the commands

    def selected(self, selection: Selection) -> Iterator[Stored]:
        """Yield what is selected, each with its place in the stream."""
        return (({"stream": self.name, "sequence": line.offset}, line) for line in self.lines() if line in selection)

    def purge(self, selection: Selection, note: Callable[[str], None]) -> Census:  # noqa: ARG002  (nothing is skipped)
        """Remove what is selected; return what is gone by this."""
        return census_of(line for _, line in self.selected(selection) if self.remove(line))

    def replay(
        self,
        selection: Selection,
        target: Target,  # noqa: ARG002  (nothing is posted)
        view: ReplayView,
        connections: int,
        limit: int | None,
    ) -> Summary:
        """Publish what is selected, as many at a time as there are connections."""
        return _StreamReplay(self, selection, view).run(connections, limit)

    # ---- single ones

    def lines(self) -> Iterator[Line]:
        """Yield all dead letters."""
        first = 1
        while page := self._run(self._page(first)):
            yield from page
            first = page[-1].offset + 1

    def remove(self, line: Line) -> bool:
        """Remove a dead letter; return whether it was there."""
        return self._run(self._patiently(lambda: self._dead.remove(line.offset)))

    def publish(self, line: Line, dead_letter: DeadLetter) -> StreamResponse:
        """Store a packet in the stream of packets, under the id it had; return what became of it."""
        body = dead_letter.packet
        messages, emitter = scan(body) or (dead_letter.messages, 0)
        packet = StoredPacket(dead_letter.id, body, emitter, messages, time.time_ns())
        message = encode([packet])
        try:
            decode(message)
        except DamagedError as error:  # a foreign dead letter: no replica could read its packet
            return StreamResponse(INVALID, str(error).encode())
        outcome = self._run(self._packets.publish(message, f"replay/{line.offset}/{digest_of(line.raw)}"))
        if outcome.stored == "yes":
            return StreamResponse(ACCEPTED)
        return StreamResponse(TOO_LARGE if outcome.reason == "tooLarge" else BUSY, outcome.detail.encode())

    # ---- in the loop

    async def _open(self) -> int:
        """Connect, and return the sequence of the last dead letter."""
        if not await self._connection.start():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await self._connection.wait()
        if not self._connection.is_connected:
            raise StartError(self._connection.last_error or "jetstream: no server can be used")
        return await self._patiently(self._dead.last)

    async def _page(self, first: int) -> list[Line]:
        """Return some dead letters from a sequence on; none at the end."""
        page: list[Line] = []
        size = 0
        while first <= self._last and len(page) < PAGE and size < PAGE_BYTES:
            sequence = first
            found = await self._patiently(lambda: self._dead.next(sequence))  # noqa: B023  (awaited at once)
            if found is None or found.sequence > self._last:
                break
            page.append(as_read(found.sequence, found.line, found.stored_at))
            size += len(found.line)
            first = found.sequence + 1
        return page

    async def _patiently(self, ask: Callable[[], Awaitable[Result]]) -> Result:
        """Ask until there is a response. Raises StartError when that takes too long, or cannot help."""
        where = f"jetstream: {self._connection.server}"
        end = time.monotonic() + RESPONSE_PATIENCE
        while True:
            try:
                return await ask()
            except ApiError as error:
                hint = ": no fastdist has been started with it" if error.code == api.STREAM_NOT_FOUND else ""
                raise StartError(f"{where}: stream {self.name}: {error}{hint}") from error
            except UnavailableError as error:
                if self._connection.denied:
                    raise StartError(self._connection.denied) from error
                if time.monotonic() > end:
                    raise StartError(f"{where}: stream {self.name}: {error}") from error
            await asyncio.sleep(PAUSE)


class _StreamReplay(ReplayRun):
    """One run over the dead letters of a stream, which are a source of it."""

    def __init__(self, store: DeadLetterStream, selection: Selection, view: ReplayView) -> None:
        super().__init__(f"stream {store.settings.stream}", selection, view)
        self._store = store
        self.lines = store.lines

    def run(self, connections: int, limit: int | None) -> Summary:
        """Replay with this many at a time, ``limit`` dead letters at most."""
        self._begin(self._census(), limit)
        try:
            self._replay(self, connections)
            if self._room and not self.halt.is_set():  # some were gone: another machine has replayed or purged them
                self.summary.left = self._census().lines
        except KeyboardInterrupt:
            self.end("interrupted")
        return self.summary

    def _census(self) -> Census:
        return census_of(line for _, line in self._store.selected(self.selection))

    def send(self, line: Line, dead_letter: DeadLetter) -> Response | None:
        """Publish a packet until the stream has stored or refused it."""
        return self.repeat(lambda: self._store.publish(line, dead_letter), lambda: False)

    def remove(self, line: Line) -> bool:
        """Remove a dead letter whose packet is stored."""
        try:
            self._store.remove(line)
        except StartError as error:
            self.end(f"{error}; call it again soon: what is stored already is known for jetstream.dedup_window")
            return False
        return True
