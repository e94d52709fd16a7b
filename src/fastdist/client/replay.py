"""Dead letters sent again: what all replays have in common, and those of files, which are posted to a distributor.

The rules of files:

1. A dead letter goes from its file only once the distributor has accepted it. At worst it is replayed twice, under its
   own id, so that an analyzer can recognise it.
2. What is accepted is noted at once (see ``held_file``), so a replay that is killed repeats no more than
   the dead letters in flight. The file is not rewritten before the distributor has had the time to sync what it
   accepted (``disk``): until then the dead letters are safer in the file, noted as replayed.
3. What an earlier replay has noted is sent again if the distributor was restarted since then, or is another one: it may
   have lost what it had not synced.
4. Packets that become dead letters while a replay runs are left alone: what is refused again is not sent in circles.
"""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import repeat
from typing import TYPE_CHECKING, Protocol

import msgspec

from fastdist.client import retry
from fastdist.client.connection import Connection
from fastdist.client.held_file import HeldFile, tidy
from fastdist.client.purge import count
from fastdist.errors import UNDECODABLE
from fastdist.storage.dead_letter_format import digest_of, journal_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdist.client.connection import Response, Target
    from fastdist.client.progress import ReplayView
    from fastdist.client.purge import Census
    from fastdist.storage.dead_letter_format import DeadLetter, Found, Line, Selection

UNKNOWN_INTERVAL = 0.5  # seconds between syncs of a distributor that does not say how often it does that
MAX_INTERVAL = 30.0  # seconds between syncs that are waited for
MAX_HEALTH = 1 << 24  # bytes of GET /health: it names all problems
MAX_HELD = 100  # files that wait to be rewritten
PATIENCE = 60.0  # seconds without a dead letter accepted
MAX_FAILURES = 3  # attempts at a dead letter without a response


class Summary(retry.Summary):
    """How it went: dead letters accepted, dead letters refused, lines left (the refused included)."""

    replayed: int = 0
    refused: int = 0
    left: int = 0


class _State(msgspec.Struct, rename="camel"):
    """What a distributor says of itself (GET /health, which is served at each address), as far as it matters here."""

    durability: str = "disk"
    sync_interval_seconds: float = UNKNOWN_INTERVAL
    storage: str = "ok"
    uptime_seconds: float = math.inf

    @property
    def started(self) -> float:
        """Since when it has lost nothing that it accepted (``time.time()``), if this is asked at once."""
        return time.time() - self.uptime_seconds if self.durability == "disk" else -math.inf


UNKNOWN = _State(storage="unknown")  # it does not answer


class Source(Protocol):
    """Dead letters to be sent, for several threads; and the way of each."""

    def lines(self) -> Iterator[Line]:
        """Yield them; the run's lock is held."""

    def send(self, line: Line, dead_letter: DeadLetter) -> Response | None:
        """Send one until the response is final; None when the run ends before that."""

    def remove(self, line: Line) -> bool:
        """Remove one that was accepted; return whether it is gone. If not, or not in good order, end the run."""


class ReplayRun(retry.Run):
    """One run: what is selected of some dead letters, at most so many of them, as often as is said."""

    def __init__(self, name: str, selection: Selection, view: ReplayView) -> None:
        super().__init__(name, PATIENCE, view.waiting, MAX_FAILURES)
        self.selection, self.view = selection, view
        self.summary: Summary = Summary()
        self._room = 0  # dead letters that may still be sent

    def _begin(self, census: Census, limit: int | None) -> None:
        """Set how many there are, and how many of them may be sent."""
        self.summary.left = census.lines
        self._room = census.dead_letters if limit is None else min(limit, census.dead_letters)
        self.view.begin(self._room)

    def _replay(self, source: Source, connections: int) -> None:
        """Send what is selected of a source, as many at a time as there are connections."""
        lines = ((line, line.dead_letter) for line in source.lines() if line.dead_letter and line in self.selection)
        with ThreadPoolExecutor(connections) as pool:
            try:
                list(pool.map(self._work, repeat(source, connections), repeat(lines)))
            except BaseException:  # Ctrl-C, or a fault in a thread: the others must end as well
                self.halt.set()
                raise

    # ---- in a thread for each connection

    def _work(self, source: Source, lines: Iterator[tuple[Line, DeadLetter]]) -> None:
        """Send the dead letters of a source, one after another, while there are any."""
        while (found := self._take(lines)) is not None:
            line, dead_letter = found
            response = source.send(line, dead_letter)
            if response is None:
                return
            gone = response.accepted and source.remove(line)
            with self.lock:
                self._settle(dead_letter, response, gone=gone)

    def _take(self, lines: Iterator[tuple[Line, DeadLetter]]) -> tuple[Line, DeadLetter] | None:
        with self.lock:
            if self.halt.is_set() or self._room <= 0:
                return None
            found = next(lines, None)
            self._room -= found is not None
            return found

    def _settle(self, dead_letter: DeadLetter, response: Response, *, gone: bool) -> None:
        """Count what became of one, and show it; the lock is held."""
        self.summary.left -= gone
        if response.accepted:
            self.summary.replayed += 1
            self.view.replayed()
        else:
            self.summary.refused += 1
            self.view.refused(dead_letter, response)


class Replay(ReplayRun):
    """One run: what is selected of the dead letters in ``files``, to ``target``."""

    def __init__(self, files: list[Found], selection: Selection, target: Target, view: ReplayView) -> None:
        super().__init__(target.url, selection, view)
        self.files, self.target = files, target
        self.has_token = bool(target.token)
        self.peer = digest_of(target.url.rstrip("/").encode())
        self._noted_unsynced, self._state = False, UNKNOWN
        self._done: deque[tuple[float, HeldFile]] = deque()  # to be rewritten after that moment (time.monotonic())

    def run(self, connections: int, limit: int | None = None) -> Summary:
        """Replay over this many connections, ``limit`` dead letters at most. Raises OSError for unreadable files."""
        tidy(self.files)
        self._forget_lost()
        self._begin(count(self.files, self.selection), limit)
        opened = [Connection(self.target) for _ in range(connections)]
        try:
            for found in self.files:
                if self.halt.is_set():
                    break
                if self._room > 0 or journal_of(found.path).exists():  # that of one that could not finish
                    self._replay_file(found, opened)
                    self._rewrite_files()
        except KeyboardInterrupt:
            self.end("interrupted")
        finally:
            for connection in opened:
                connection.close()
            self._rewrite_files(all_of_them=True)
        return self.summary

    def _forget_lost(self) -> None:
        """Have what earlier replays have noted be sent again, where the distributor may have lost it."""
        started = None
        for found in self.files:
            try:
                held = HeldFile.hold(found.path, 0.0) if journal_of(found.path).exists() else None
            except BlockingIOError:  # another replay has it
                continue
            if held is not None:
                with held:
                    if held.sent_to:
                        started = self._ask().started if started is None else started
                        if not self._still_has(held, started):
                            held.forget_replayed()

    def _still_has(self, held: HeldFile, started: float) -> bool:
        """Return whether a distributor that started then has all that was noted, in memory at least."""
        return all(peer == self.peer and started <= since <= time.time() for peer, since in held.sent_to.items())

    def _replay_file(self, found: Found, connections: list[Connection]) -> None:
        held = HeldFile.hold_or_skip(found.path, self.view.note)
        if held is None:
            return
        try:
            self._replay(_File(self, held, found.size, connections), len(connections))
        finally:
            seconds = self._time_to_sync() if held.has_replayed else 0.0
            self._done.append((time.monotonic() + min(seconds, held.noted + seconds - time.time()), held))

    # ---- files whose dead letters were accepted

    def _rewrite_files(self, *, all_of_them: bool = False) -> None:
        """Rewrite the files whose dead letters the distributor has synced by now; or all of them, when it has."""
        while self._done and (all_of_them or len(self._done) > MAX_HELD or self._done[0][0] <= time.monotonic()):
            moment, held = self._done.popleft()
            with held:
                if not held.has_replayed or self._is_synced(moment, held):
                    try:
                        held.rewrite()
                    except OSError as error:
                        what = f"cannot rewrite {held.path}: {error.strerror}"
                        self.end(f"{what}; what was replayed is noted next to it")

    def _time_to_sync(self) -> float:
        """Return the seconds after which the distributor has synced what it has accepted.

        That is one interval until the sync begins, and one that it may take. 0: it syncs before it accepts, or never.
        """
        if self._state.storage == "unknown":
            self._state = self._ask()
        return 2 * self._state.sync_interval_seconds if self._state.durability == "disk" else 0.0

    def _is_synced(self, moment: float, held: HeldFile) -> bool:
        """Wait until then; say whether the distributor has synced what it has accepted, as far as that is known."""
        why = f"the distributor syncs its queue less often than every {MAX_INTERVAL:g} s"
        if moment - time.monotonic() <= 2 * MAX_INTERVAL:
            state = _State(durability="fsync")
            if self._time_to_sync():
                time.sleep(max(0.0, moment - time.monotonic()))
                state = self._ask()
            if state.storage != "ok":
                why = "the distributor does not say that it can write to its disk"
            elif self._still_has(held, state.started):
                return True
            else:
                why = "the distributor was restarted meanwhile, or is another one than before"
        if not self._noted_unsynced:
            self._noted_unsynced = True
            self.view.note(f"{why}: what it has accepted stays in the files, hidden, until the next replay")
        return False

    def _ask(self) -> _State:
        """Return what the distributor says of itself; the defaults, where it does not."""
        connection = Connection(self.target)
        try:
            return msgspec.json.decode(connection.request("GET", "/health", None, {}, MAX_HEALTH).content, type=_State)
        except (OSError, HTTPException):
            return UNKNOWN
        except UNDECODABLE:
            return _State()
        finally:
            connection.close()


class _File:
    """A file as the source of a run, with a connection for each thread."""

    def __init__(self, run: Replay, held: HeldFile, end: int, connections: list[Connection]) -> None:
        self._run, self._held, self._end = run, held, end
        self._free = list(connections)

    def lines(self) -> Iterator[Line]:
        return self._held.lines(self._end)

    def send(self, line: Line, dead_letter: DeadLetter) -> Response | None:  # noqa: ARG002  (its place is no matter)
        connection = self._free.pop()
        try:
            return self._run.post(connection, dead_letter.id, dead_letter.packet)
        finally:
            self._free.append(connection)

    def remove(self, line: Line) -> bool:
        """Note that it was replayed; if that fails it is gone nevertheless, once the file is rewritten."""
        with self._run.lock:
            try:
                self._held.note_replayed(line, self._run.peer)
            except OSError as error:
                self._run.end(f"cannot note what was replayed of {self._held.path}: {error.strerror}")
        return True
