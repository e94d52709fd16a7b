"""The queue as a stream, on the supervisor's side: it is made, its figures are kept, overrides are shared by it.

- A start fails where no server can be used and one has refused the login, or where a stream does not fit. Where nothing
  can be said (no server, no leader) the service runs, and tries until it is there.
- What is known of the stream goes into the shared block; workers decide by it whether to accept packets.
- Overrides are a value in the key-value bucket: a change that replaces another's is made again upon that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING

import msgspec

from fastdist import logs
from fastdist.errors import UNDECODABLE, StartError
from fastdist.storage.jetstream.api import ApiError, UnavailableError
from fastdist.storage.jetstream.connection import WARNING_EVERY, Connection, forever
from fastdist.storage.jetstream.figures import Watcher
from fastdist.storage.jetstream.state import ConflictError, StateBucket
from fastdist.storage.jetstream.streams import prepare
from fastdist.supervisor.overrides import Override

if TYPE_CHECKING:
    from fastdist.ipc import Action
    from fastdist.settings import Config
    from fastdist.shm.block import SharedBlock
    from fastdist.storage.jetstream.state import Value
    from fastdist.stream_figures import StreamFigures
    from fastdist.supervisor.reload import Changes

KEY = "overrides"
PREPARE_TIMEOUT = 8.0  # seconds, at the start
RETRY = 1.0  # seconds between tries to have the streams
RETRY_REFUSED = 10.0  # seconds, if what is there cannot be used
TRIES = 5  # at a change that others make at the same time
SILENT = 2.5  # seconds that the stream may be missing without a word in the log

log = logs.get()


class SharedStream:
    """The stream of the configuration, and what is shared by it: between ``start`` and ``close``."""

    def __init__(self, config: Config, block: SharedBlock, changes: Changes) -> None:
        self.connection = Connection(config.jetstream, f"fastdist-supervisor-{os.getpid()}")
        self._watcher, self._bucket = Watcher(self.connection), StateBucket(self.connection)
        self._block, self._changes = block, changes
        self._fault = ""  # why the streams cannot be used, or are not there yet
        self._lost_at = 0.0  # time.monotonic(), 0: the stream can store
        self._said = False  # that it cannot
        self._throttle = logs.Throttle(WARNING_EVERY)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Have connection and streams, or go on trying. Raises StartError where that makes no sense."""
        if await self.connection.start():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PREPARE_TIMEOUT):
                    await self._prepare()
            if not self._fault:
                await self._take_overrides()
            self._publish(await self._watcher.refresh())
        else:
            self._fault = self.connection.last_error or "no server can be used"
            self._publish(self._watcher.latest)
        self._tasks = [forever(self._run), forever(lambda: self._watcher.run(self._publish))]

    def _compare_max_payload(self) -> None:
        largest, wanted = self.connection.max_payload, self._changes.config.server.max_body
        if 0 < largest < wanted:
            log.warning(
                "the NATS server takes smaller messages than server.max_body; larger packets are answered 413",
                max_payload=largest,
                max_body=wanted,
                server=self.connection.server,
            )

    async def close(self) -> None:
        """Leave."""
        for task in self._tasks:
            task.cancel()
        await self.connection.close()

    async def _prepare(self) -> None:
        """Have the streams, or note why not. Raises StartError."""
        self._fault = "the streams are not there yet"
        try:
            await prepare(self.connection)
        except (UnavailableError, ApiError) as error:
            self._fault = f"the streams cannot be used yet: {error}"
            if self._throttle.allow():
                what = "jetstream: the streams cannot be used yet; packets are answered 503"
                log.warning(what, server=self.connection.server, error=str(error))
        else:
            self._fault = ""
            self._compare_max_payload()

    async def _run(self) -> None:
        """Have the streams, then follow the overrides."""
        while self._fault:
            await self.connection.wait()
            try:
                await self._prepare()
            except StartError as error:
                self._fault = str(error)
                log.error(str(error))
                await asyncio.sleep(RETRY_REFUSED)
            else:
                await asyncio.sleep(RETRY if self._fault else 0)
        async for value in self._bucket.watch(KEY):
            self._use(value)

    def _publish(self, figures: StreamFigures) -> None:
        if self._fault:
            figures = msgspec.structs.replace(figures, has_leader=False, error=self._fault)
        self._block.stream = figures
        now = time.monotonic()
        if figures.has_leader:
            if self._said:
                log.info("the stream can store packets again", leader=figures.leader or None)
            self._lost_at, self._said = 0.0, False
            return
        self._lost_at = self._lost_at or now
        if now - self._lost_at > SILENT and not self._said and figures.connected:  # else the connection has told
            self._said = True
            log.error("the stream cannot store packets; they are answered 503", error=figures.error or None)

    # ---- overrides

    async def _take_overrides(self) -> None:
        try:
            self._use(await self._bucket.get(KEY))
        except UnavailableError as error:
            log.warning("the overrides cannot be read yet; the configuration holds", error=str(error))

    def _use(self, value: Value) -> None:
        try:
            self._changes.use_overrides(_read(value))
        except UNDECODABLE as error:
            log.error("the shared overrides cannot be read; those in force stay", error=str(error))

    async def apply(self, action: Action) -> tuple[int, object]:
        """Change an analyzer on all replicas; return a status as in HTTP, and the error if it is not 200."""
        for _ in range(TRIES):
            try:
                value = await self._bucket.get(KEY)
                shared = _read(value)
                self._changes.use_overrides(shared)  # what others have changed since the last look
                wanted, before = self._changes.wanted(action, shared), self._changes.overrides.get(action.analyzer)
                if not isinstance(wanted, dict):
                    return wanted
                await self._bucket.put(KEY, msgspec.json.encode(wanted), value.revision)
            except ConflictError:
                continue
            except (UnavailableError, *UNDECODABLE) as error:
                return 503, f"the change cannot be shared with the other replicas: {error}"
            self._changes.overrides.by_id = wanted
            return self._changes.put_override_in_force(action, before)
        return 503, "others change analyzers at the same time; try again"


def _read(value: Value) -> dict[str, Override]:
    return msgspec.json.decode(value.data, type=dict[str, Override]) if value.data else {}
