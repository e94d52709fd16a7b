"""Sending dead letters again, and purging them.

The rules:

1. A letter goes from its file only once the distributor has accepted it (2xx) or a person has purged it.
2. It is posted under its own id, so that an analyzer can tell a repetition: at worst a letter is replayed twice.
3. What is accepted is noted at once in the file's journal; the file itself is rewritten once, when all of it has been
   gone through. (Rewriting it every so often instead would write a file of 64 MiB many times over.) So a replay that is
   killed repeats no more than the letters that were under way. It is not rewritten before the distributor has had the
   time to sync what it accepted (``disk``): until then the letters are safer in the file, noted as replayed.
4. A file is changed only under its lock; a worker that is writing to it is asked for it, and gives it up in a moment.
5. Letters that die while a replay runs are none of its business: a packet that is refused again is not sent in circles.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from fastdist.client.connection import LARGEST_ANSWER, Answer, Connection, Sender, Target, describe
from fastdist.storage.dead_letters import (
    JOURNAL_SUFFIX,
    SUFFIX,
    Found,
    Letter,
    Line,
    Selection,
    ask_for,
    digest_of,
    journal_of,
    read_file,
    read_journal,
    read_lines,
    sync_folder,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator
    from concurrent.futures import Future
    from datetime import datetime
    from pathlib import Path

LOCK_PATIENCE = 5.0  # seconds to wait for a file that a worker has open
UNKNOWN_INTERVAL = 0.5  # seconds between syncs of a distributor that does not say how often it does that
LONGEST_INTERVAL = 30.0  # seconds between syncs that are waited for
MOST_HELD = 100  # files that wait to be rewritten
PATIENCE = 60.0  # seconds without a letter accepted, after which a busy distributor is left alone
SHORTEST_PAUSE = 0.1  # seconds
TRIES = 3  # to reach the distributor
TRY_AGAIN = 0.5  # seconds before the last of them
BUSY = {408, 425, 429, 500, 502, 503, 504}  # not now
WRONG_DOOR = {401, 403, 404, 405}  # no letter would be accepted there
TEMPORARY_SUFFIX = ".tmp"


class Census(msgspec.Struct):
    """What there is of a selection: lines in all, those of them that are letters, bytes of packets, the oldest time."""

    lines: int = 0
    letters: int = 0
    size: int = 0
    oldest: datetime | None = None

    def add(self, line: Line) -> None:
        """Count a line."""
        self.lines += 1
        self.letters += line.letter is not None
        self.size += line.size
        self.oldest = min(self.oldest or line.time, line.time)


def count(files: list[Found], selection: Selection) -> Census:
    """Return what there is of a selection. Raises OSError."""
    census = Census()
    for found in files:
        for line in read_file(found):
            if line in selection:
                census.add(line)
    return census


class HeldFile:
    """A file of dead letters that is this process's alone until it is closed."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._replayed = read_journal(path)
        self._file = os.fdopen(fd, "rb")  # last: what fails before leaves fd to the caller
        self._journal = -1

    @classmethod
    def hold(cls, path: Path, patience: float) -> HeldFile | None:
        """Open and lock a file; None when there is none any more. Raises BlockingIOError after ``patience`` seconds."""
        end = time.monotonic() + patience
        while True:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                _lock(fd, end)
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return cls(path, fd)
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._journal >= 0:
            os.close(self._journal)
        self._file.close()

    @property
    def has_replayed(self) -> bool:
        """Whether there are letters in it that are safe elsewhere."""
        return bool(self._replayed)

    def lines(self, end: int = sys.maxsize) -> Iterator[Line]:
        """Yield the lines that start before ``end`` bytes and have not been replayed."""
        return read_lines(self._file, end, self._replayed)

    def note_replayed(self, line: Line) -> None:
        """Note that a letter is safe elsewhere: from now on it is no longer in this file. Raises OSError."""
        digest = self._replayed[line.offset] = digest_of(line.raw)
        if self._journal < 0:
            self._journal = self._create(journal_of(self.path), os.O_APPEND)
            os.write(self._journal, b"\n")  # the last entry may have been torn
        os.write(self._journal, f"{line.offset} {digest}\n".encode())

    def rewrite(self, gone: Container[int] = ()) -> None:
        """Have a file without the lines at these offsets, and without what was replayed; none if nothing is left.

        At every moment either the old file or the new one is there. Raises OSError, and then it is the old one.
        """
        if not gone and not self._replayed and os.fstat(self._file.fileno()).st_size:
            return
        if any(line.offset not in gone for line in self.lines()):
            self._replace(gone)
        else:  # without a new file: the disk may be full
            self.path.unlink(missing_ok=True)
            self._temporary.unlink(missing_ok=True)  # of one that was killed
        journal_of(self.path).unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + TEMPORARY_SUFFIX)

    def _replace(self, gone: Container[int]) -> None:
        temporary = self._temporary
        try:
            with os.fdopen(self._create(temporary, os.O_TRUNC), "wb") as out:
                for line in self.lines():
                    if line.offset not in gone:
                        out.write(line.raw if line.raw.endswith(b"\n") else line.raw + b"\n")
                out.flush()
                os.fsync(out.fileno())
            temporary.rename(self.path)
            sync_folder(self.path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _create(self, path: Path, flag: int) -> int:
        """Open a file next to this one, which has the same owner also where root does this."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
        owner = os.fstat(self._file.fileno())
        with contextlib.suppress(PermissionError):
            os.fchown(fd, owner.st_uid, owner.st_gid)
        return fd


def _lock(fd: int, end: float) -> None:
    """Lock an open file, asking its worker for it until ``end`` (time.monotonic()). Raises BlockingIOError."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            ask_for(fd)
            time.sleep(0.05)
        else:
            return


def tidy(files: list[Found]) -> None:
    """Remove what a killed replay or purge left behind of files that are gone."""
    for folder in {found.path.parent for found in files}:
        for file in folder.iterdir():
            for suffix in (JOURNAL_SUFFIX, TEMPORARY_SUFFIX):
                if file.name.endswith(SUFFIX + suffix) and not file.with_suffix("").exists():
                    file.unlink(missing_ok=True)


class Events(Protocol):
    """Who wants to know how it goes. Called by several threads, but by one at a time."""

    def begin(self, letters: int) -> None:
        """Hear how many letters are to be sent, before the first one is."""

    def replayed(self) -> None:
        """Hear that one more letter was accepted."""

    def refused(self, letter: Letter, answer: Answer) -> None:
        """Hear that a letter will not be accepted, whatever one does."""

    def note(self, text: str) -> None:
        """Hear of anything else a person should know."""


class Summary(msgspec.Struct):
    """How it went: letters accepted, letters refused, lines left (the refused included), and why it ended early."""

    replayed: int = 0
    refused: int = 0
    left: int = 0
    stopped: str | None = None


class Said(msgspec.Struct, rename="camel"):
    """What a distributor says of itself (GET /queue, GET /health), as far as it matters here."""

    durability: str = "disk"
    sync_interval_seconds: float = UNKNOWN_INTERVAL
    storage: str = "ok"


class Replay:
    """One run: what is selected of the dead letters in ``files``, to ``target``."""

    def __init__(self, files: list[Found], selection: Selection, target: Target, events: Events) -> None:
        self.files, self.selection, self.target, self.events = files, selection, target, events
        self.summary = Summary()
        self._room = 0  # letters that may still be sent
        self._lock = threading.Lock()  # for all that follows, the summary and the events
        self._halt = threading.Event()
        self._resume_at = self._last_success = 0.0  # time.monotonic()
        self._told_to_wait = self._told_to_keep = False
        self._noted: deque[tuple[float, HeldFile]] = deque()  # to be rewritten after that moment (time.monotonic())
        self._patience: float | None = None  # see ``_time_to_sync``

    def run(self, connections: int, limit: int | None = None) -> Summary:
        """Replay over this many connections, ``limit`` letters at most. Raises OSError for unreadable files."""
        tidy(self.files)
        census = count(self.files, self.selection)
        self.summary.left = census.lines
        self._room = census.letters if limit is None else min(limit, census.letters)
        self.events.begin(self._room)
        self._last_success = time.monotonic()
        senders = [Sender(self.target) for _ in range(connections)]
        try:
            with ThreadPoolExecutor(connections) as pool:
                for found in self.files:
                    if self._halt.is_set():
                        break
                    if self._room > 0 or journal_of(found.path).exists():  # that of one that could not finish
                        self._replay_file(found, pool, senders)
                        self._rewrite_files()
        except KeyboardInterrupt:
            self._stop("interrupted")
        finally:
            for sender in senders:
                sender.close()
            self._rewrite_files(all_of_them=True)
        return self.summary

    def _replay_file(self, found: Found, pool: ThreadPoolExecutor, senders: list[Sender]) -> None:
        try:
            held = HeldFile.hold(found.path, LOCK_PATIENCE)
        except BlockingIOError:
            self.events.note(f"{found.path.name}: skipped, a worker is writing to it; try again later")
            return
        if held is None:
            return
        lines = (line for line in held.lines(found.size) if line in self.selection)
        works: list[Future[None]] = []
        try:
            works += (pool.submit(self._work, sender, held, lines) for sender in senders)
            for work in works:
                work.result()
        except BaseException:  # Ctrl-C, or a fault in a thread: the others are to end as well
            self._halt.set()
            raise
        finally:
            wait(works)
            self._noted.append((time.monotonic() + (self._time_to_sync() if held.has_replayed else 0.0), held))

    # ---- files whose letters were accepted

    def _rewrite_files(self, *, all_of_them: bool = False) -> None:
        """Rewrite the files whose letters the distributor has synced by now; or all of them, when it has."""
        while self._noted and (all_of_them or len(self._noted) > MOST_HELD or self._noted[0][0] <= time.monotonic()):
            moment, held = self._noted.popleft()
            with held:
                if not held.has_replayed or self._are_synced(moment):
                    self._rewrite(held)

    def _rewrite(self, held: HeldFile) -> None:
        try:
            held.rewrite()
        except OSError as error:
            self._stop(f"cannot rewrite {held.path}: {error.strerror}; what was replayed is noted next to it")

    def _time_to_sync(self) -> float:
        """Return the seconds after which the distributor has synced what it has accepted.

        That is one interval until the sync begins, and one that it may take. 0: it syncs before it accepts, or never;
        infinite: that is too long to wait for.
        """
        if self._patience is None:
            said = self._ask("/queue")
            self._patience = 2 * said.sync_interval_seconds if said.durability == "disk" else 0.0
            if self._patience > 2 * LONGEST_INTERVAL:
                self._patience = math.inf
        return self._patience

    def _are_synced(self, moment: float) -> bool:
        """Wait until then; say whether the distributor has synced what it has accepted, as far as that can be told."""
        why = f"the distributor syncs its queue less often than every {LONGEST_INTERVAL:g} s"
        if moment < math.inf:
            if self._time_to_sync() == 0.0:
                return True
            time.sleep(max(0.0, moment - time.monotonic()))
            if self._ask("/health").storage == "ok":
                return True
            why = "the distributor does not say that it can write to its disk"
        if not self._told_to_keep:
            self._told_to_keep = True
            self.events.note(f"{why}: what it has accepted stays in the files, hidden, until the next replay")
        return False

    def _ask(self, path: str) -> Said:
        """Return what the distributor says of itself there; the defaults, where it does not."""
        connection = Connection(self.target)
        try:
            return msgspec.json.decode(connection.request("GET", path, None, {}, LARGEST_ANSWER).content, type=Said)
        except (OSError, HTTPException):
            return Said(storage="unknown")
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return Said()
        finally:
            connection.close()

    # ---- in a thread for each connection

    def _work(self, sender: Sender, held: HeldFile, lines: Iterator[Line]) -> None:
        """Take letters from a file, one after another, while there are any."""
        while (line := self._next(lines)) is not None:
            if line.letter is None:
                continue
            answer = self._post(sender, line.letter)
            if answer is None:
                return
            with self._lock:
                self._settle(held, line, line.letter, answer)

    def _next(self, lines: Iterator[Line]) -> Line | None:
        with self._lock:
            if self._halt.is_set() or self._room <= 0:
                return None
            line = next(lines, None)
            if line is not None and line.letter is not None:
                self._room -= 1
            return line

    def _post(self, sender: Sender, letter: Letter) -> Answer | None:
        """Post a letter until there is a final answer; None when the replay ends before that."""
        failures = 0
        while not self._halt.wait(max(0.0, self._resume_at - time.monotonic())):
            try:
                answer = sender.post(letter.id, letter.packet)
            except (OSError, HTTPException) as error:
                failures += 1
                if failures == TRIES:
                    self._stop(f"{self.target.url} cannot be reached: {describe(error)}")
                elif failures > 1:  # the first one may only mean that the connection was idle for too long
                    self._halt.wait(TRY_AGAIN)
                continue
            if answer.status not in BUSY:
                return answer
            self._pause(answer)
        return None

    def _pause(self, answer: Answer) -> None:
        """Leave a distributor that is busy alone for as long as it asks; stop when it has been for too long."""
        delay = max(SHORTEST_PAUSE, 1.0 if answer.retry_after is None else answer.retry_after)
        now = time.monotonic()
        if now + delay > self._last_success + PATIENCE:
            asks = f" and asks to wait {delay:.0f} s" if answer.retry_after is not None else ""
            self._stop(f"{self.target.url} answers {answer.text}{asks}; try again later")
            return
        with self._lock:
            self._resume_at = max(self._resume_at, now + delay)
            if not self._told_to_wait:
                self._told_to_wait = True
                self.events.note(f"the distributor answers {answer.text}; going on as it permits")

    def _settle(self, held: HeldFile, line: Line, letter: Letter, answer: Answer) -> None:
        """Do what a final answer asks for; the lock is held."""
        if answer.accepted:
            self._last_success = time.monotonic()
            self.summary.replayed += 1
            self.summary.left -= 1
            try:
                held.note_replayed(line)
            except OSError as error:
                self._stop_now(f"cannot note what was replayed of {held.path}: {error.strerror}")
            self.events.replayed()
        elif answer.status in WRONG_DOOR or answer.status < 400:  # noqa: PLR2004  (redirections are not followed)
            self._stop_now(f"{self.target.url} answers {answer.text}; {answer.advice}")
        else:
            self.summary.refused += 1
            self.events.refused(letter, answer)

    def _stop(self, why: str) -> None:
        with self._lock:
            self._stop_now(why)

    def _stop_now(self, why: str) -> None:
        """End the run, for the reason that came first."""
        self.summary.stopped = self.summary.stopped or why
        self._halt.set()


def purge(files: list[Found], selection: Selection, note: Callable[[str], None]) -> tuple[Census, int]:
    """Remove what is selected; return what is gone and how many files were skipped. Raises OSError."""
    tidy(files)
    removed, skipped = Census(), 0
    for found in files:
        try:
            held = HeldFile.hold(found.path, LOCK_PATIENCE)
        except BlockingIOError:
            note(f"{found.path.name}: skipped, a worker is writing to it; try again later")
            skipped += 1
            continue
        if held is None:
            continue
        with held:
            gone = set()
            for line in held.lines(found.size):
                if line in selection:
                    gone.add(line.offset)
                    removed.add(line)
            held.rewrite(gone)
    return removed, skipped
