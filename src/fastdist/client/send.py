"""Sending packets to a distributor: several at a time, each until it is accepted, with their place in the log kept.

The rules:

1. A packet counts as sent once the distributor has accepted it (2xx). What counts for the log is the offset up to
   which all packets are sent, without a gap.
2. Where offsets are recorded, a packet's end is recorded before the packet is sent (see ``offsets``).
3. What may get better is tried again, with the same id: no answer, 408, 425, 429, 5xx. All connections pause, as long
   as Retry-After says, else exponentially with jitter, until ``patience`` has passed without a packet accepted.
4. What will not get better (other statuses) ends the run: somebody has to look at it, and nothing is passed over.
5. Told to stop, it lets the requests under way finish and begins no other. But what has been read of a stream, or of
   a log that is followed, is sent nevertheless: nobody may read it again.
6. Memory is bounded: packets under way or waiting are at most ``WINDOW`` for each connection.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from http.client import HTTPException
from ssl import SSLCertVerificationError
from typing import TYPE_CHECKING, Protocol

import msgspec

from fastdist.client.connection import Answer, Sender, Target, describe
from fastdist.client.logfile import Log
from fastdist.client.offsets import InUseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.client.logfile import Stream
    from fastdist.client.offsets import OffsetFile, Position
    from fastdist.client.packing import Packet

WINDOW = 4  # packets a connection
BASE, CAP = 0.1, 10.0  # seconds of the first and the longest pause that nobody asked for
RECORD_EVERY = 1.0  # seconds between offsets that are recorded for their own sake
LOOK_EVERY = 0.2  # seconds
BUSY = {408, 425, 429}  # and every 5xx
WRONG_DOOR = {401, 403, 404, 405}  # no packet would be accepted there
TOO_LARGE = 413
SERVER_ERROR = 500


class Events(Protocol):
    """Who wants to know how it goes. Called by several threads, but by one at a time."""

    def begin(self, source: Log | Stream) -> None:
        """Hear which log or stream is sent from now on."""

    def accepted(self, packet: Packet) -> None:
        """Hear that a packet was accepted (or, without messages, passed over)."""

    def waiting(self, why: str, seconds: float) -> None:
        """Hear that nothing is sent for a while."""

    def stopping(self) -> None:
        """Hear that it is about to end because somebody wants it to."""

    def note(self, text: str) -> None:
        """Hear of anything else a person should know."""


class Sources(Protocol):
    """What is to be sent."""

    def begin(self, offsets: OffsetFile | None) -> Log | Stream:
        """Return what is to be sent first, open."""

    def following(self, log: Log, stopping: Callable[[], bool]) -> Log | None:
        """Return what comes after a log that has ended; None if nothing does."""


class Summary(msgspec.Struct):
    """How it went. ``stopped``: why it ended early; ``refused``: because of an answer that will not get better."""

    packets: int = 0
    messages: int = 0
    bytes: int = 0  # of the log
    retries: int = 0
    tally: Counter[str] = msgspec.field(default_factory=Counter)
    offset: int = 0  # up to which the last log is sent
    unsent: int = 0  # messages that were read from a stream
    stopped: str | None = None
    refused: bool = False


class _Slot:
    """A packet on its way."""

    __slots__ = ("packet", "posted", "refused", "sent")

    def __init__(self, packet: Packet, *, posted: bool) -> None:
        """Take a packet, which may have been ``posted`` by whoever sent this log before."""
        self.packet = packet
        self.posted = posted
        self.refused = False  # for good
        self.sent = not packet.messages  # empty lines only: there is nothing to send

    @property
    def plan(self) -> tuple[int, int]:
        """Its end and how it was cut, as an offset file has it: a refused one is to be cut anew."""
        return self.packet.end, 0 if self.refused else self.packet.cut


class Shipper:
    """Sends logs to one distributor. Whoever wants it to end in good order sets ``stopping``.

    That is a plain attribute because a signal handler sets it, which may take no lock.
    """

    def __init__(self, target: Target, connections: int, patience: float, events: Events) -> None:
        self.target, self.connections, self.patience, self.events = target, connections, patience, events
        self.stopping = False
        self._told = False  # that it is
        self.summary = Summary()
        self._halt = threading.Event()  # nothing more is to be sent
        self._changed = threading.Condition()  # its lock is for all that follows, the summary and the events
        self._window: deque[_Slot] = deque()  # from the first packet that is not sent on, in the log's order
        self._todo: deque[_Slot] = deque()  # what no connection has taken yet
        self._under_way = 0
        self._last: Packet | None = None  # up to which everything is sent
        self._rest_matters = False  # also when it is to end: what was read is sent
        self._pauses = Pauses(patience)
        self._fault: BaseException | None = None

    def run(self, sources: Sources, offsets: OffsetFile | None, *, follow: bool) -> Summary:
        """Send all there is; return how it went. Raises OSError and ValueError for logs that cannot be read."""
        log: Log | Stream | None = sources.begin(offsets)
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.connections)]
        for thread in threads:
            thread.start()
        try:
            while log is not None and not self._halt.is_set():
                self._ship(log, Recorder(log, offsets), follow=follow)
                following = None
                if isinstance(log, Log) and not self._halt.is_set():
                    following = sources.following(log, self._is_stopping)
                log.close()
                log = following
        except KeyboardInterrupt:
            threads = []  # at once: what is under way is left to itself
            raise
        finally:
            self._end()
            while threads:
                threads[0].join(LOOK_EVERY)
                threads = [thread for thread in threads if thread.is_alive()]
            if log is not None:
                log.close()
        if self._fault is not None:
            raise self._fault
        return self.summary

    def _is_stopping(self) -> bool:
        return self.stopping

    def _ship(self, source: Log | Stream, recorder: Recorder, *, follow: bool) -> None:
        """Send a log until it ends or the run does."""
        self._last = None
        self._rest_matters = follow or not source.resumable
        with self._changed:
            self.events.begin(source)
        most = max(1, self.connections * WINDOW // 2) if recorder.active else 1
        in_doubt = source.in_doubt if isinstance(source, Log) else set()
        group: list[_Slot] = []
        for packet in source.packets(self._is_stopping, follow=follow):
            if packet is not None:
                group.append(_Slot(packet, posted=packet.end in in_doubt))
            if group and (packet is None or len(group) >= most):
                self._hand_out(group, recorder)
                group = []
            self._keep_up(recorder)
            if self._halt.is_set():
                break
        if group:
            self._hand_out(group, recorder)
        self._wait_for(lambda: not self._window, recorder)
        with self._changed:
            # By and by: a signal that comes just before a wait without end would be seen after it.
            while not self._changed.wait_for(lambda: self._under_way <= 0, LOOK_EVERY):
                pass
            unsent = sum(slot.packet.messages for slot in self._window if not slot.sent)
            self.summary.unsent += 0 if source.resumable else unsent
            while self._window and not self._window[-1].posted:
                self._window.pop()  # nobody has seen it: it may be cut in another way the next time
        self._record(recorder)
        self.summary.offset = self._last.end if self._last else source.start

    def _hand_out(self, group: list[_Slot], recorder: Recorder) -> None:
        """Have packets sent once there is room for them and their ends are recorded."""
        room = self.connections * WINDOW - len(group)
        self._wait_for(lambda: len(self._window) <= room, recorder)
        if self._halt.is_set() and recorder.active:
            return
        with self._changed:
            self._window += group
            self._advance()
        self._record(recorder)
        with self._changed:
            self._todo += (slot for slot in group if not slot.sent)
            self._changed.notify_all()

    def _wait_for(self, condition: Callable[[], bool], recorder: Recorder) -> None:
        """Wait until something is so, or nothing more is to be sent."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: condition() or self._halt.is_set(), LOOK_EVERY):
                    return
            self._keep_up(recorder)

    def _keep_up(self, recorder: Recorder) -> None:
        """Do what is to be done now and then."""
        if recorder.due:
            self._record(recorder)
        if self.stopping and not self._told:
            self._told = True
            with self._changed:
                self.events.stopping()
                if not self._rest_matters:
                    self._end_now(None)

    def _record(self, recorder: Recorder) -> None:
        with self._changed:
            last, plan = self._last, [slot.plan for slot in self._window]
        try:
            recorder.record(last, plan)
        except OSError as error:
            self._end(f"cannot write {recorder.path}: {error.strerror}")
        except InUseError as error:
            self._end(str(error))

    def _end(self, why: str | None = None) -> None:
        with self._changed:
            self._end_now(why)

    def _end_now(self, why: str | None, *, refused: bool = False) -> None:
        """End the run, for the reason that came first; the lock is held."""
        if why and not self.summary.stopped:
            self.summary.stopped, self.summary.refused = why, refused
        self._halt.set()
        self._changed.notify_all()

    def _advance(self) -> None:
        """Move the offset over all that is sent; the lock is held."""
        while self._window and self._window[0].sent:
            slot = self._window.popleft()
            self._last = slot.packet
            if not slot.packet.messages:
                self.summary.bytes += slot.packet.end - slot.packet.offset
                self.summary.tally += slot.packet.tally
                self.events.accepted(slot.packet)

    # ---- in a thread for each connection

    def _work(self) -> None:
        """Take packets, one after another, and send each."""
        sender = Sender(self.target)
        try:
            while (slot := self._take()) is not None:
                answer = self._post(sender, slot.packet)
                with self._changed:
                    self._under_way -= 1
                    if answer is not None:
                        self._settle(slot, answer)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  (raised again where somebody sees it)
            with self._changed:
                self._fault, self._under_way = error, 0
                self._end_now(None)
        finally:
            sender.close()

    def _take(self) -> _Slot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._todo or self._halt.is_set())
            if self._halt.is_set():
                return None
            self._under_way += 1
            slot = self._todo.popleft()
            slot.posted = True
            return slot

    def _post(self, sender: Sender, packet: Packet) -> Answer | None:
        """Post a packet until there is a final answer; None when the run ends before that."""
        while not self._halt.wait(self._pauses.left()):
            reused = sender.is_open
            try:
                answer = sender.post(packet.id, packet.body)
            except SSLCertVerificationError as error:
                with self._changed:
                    self._end_now(f"{self.target.url} cannot be trusted: {describe(error)}", refused=True)
                return None
            except (OSError, HTTPException) as error:
                if not reused:  # else it may only have been idle for too long
                    self._pause(f"cannot be reached: {describe(error)}", None)
            else:
                if answer.status not in BUSY and answer.status < SERVER_ERROR:
                    return answer
                self._pause(f"answers {answer.text}", answer.retry_after)
            with self._changed:
                self.summary.retries += 1
        return None

    def _pause(self, why: str, asked: float | None) -> None:
        """Leave the distributor alone for a while; end the run when it has been in trouble for too long."""
        with self._changed:
            seconds = self._pauses.begin(asked)
            if seconds is None:
                self._end_now(f"{self.target.url} {why}; given up, try again later")
            else:
                self.events.waiting(why, seconds)

    def _settle(self, slot: _Slot, answer: Answer) -> None:
        """Do what a final answer asks for; the lock is held."""
        packet = slot.packet
        if answer.accepted:
            slot.sent = True
            self._pauses.end()
            self._advance()
            self.summary.packets += 1
            self.summary.messages += packet.messages
            self.summary.bytes += packet.end - packet.offset
            self.summary.tally += packet.tally
            self.events.accepted(packet)
        elif answer.status in WRONG_DOOR or answer.status < 400:  # noqa: PLR2004  (redirections are not followed)
            self._end_now(f"{self.target.url} answers {answer.text}; {answer.advice}", refused=True)
        else:
            slot.refused = True
            advice = "; try a smaller --batch-bytes" if answer.status == TOO_LARGE else ""
            place = f"the {packet.messages} messages of bytes {packet.offset} to {packet.end}"
            self._end_now(f"{self.target.url} refuses {place}: {answer.text}{advice}", refused=True)


class Pauses:
    """When to leave a distributor alone, for all connections together. Not for two threads at once, but for ``left``.

    One pause begins at a time: what the other connections meet meanwhile is the same trouble.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._row = 0  # pauses without a success in between
        self._trouble_since = 0.0  # time.monotonic(); counts while there is a row
        self._until = 0.0

    def left(self) -> float:
        """Return the seconds to wait before the next request, spread a little so that not all come at once."""
        left = self._until - time.monotonic()
        return left + random.uniform(0, 0.1 * left) if left > 0 else 0.0  # noqa: S311  (no secret)

    def begin(self, asked: float | None) -> float | None:
        """Begin a pause, as long as was asked for; return its seconds, or None when patience would be over by then."""
        now = time.monotonic()
        if now >= self._until:
            self._trouble_since = self._trouble_since if self._row else now
            self._row += 1
            longest = min(CAP, BASE * 2 ** min(self._row - 1, 20))
            self._until = now if asked is not None else now + random.uniform(longest / 2, longest)  # noqa: S311
        if asked is not None:
            self._until = max(self._until, now + max(asked, BASE))
        return None if self._until - self._trouble_since > self._patience else self._until - now

    def end(self) -> None:
        """Note a success."""
        self._row = 0


class Recorder:
    """Keeps the offset file of one source, if there is one."""

    def __init__(self, source: Log | Stream, offsets: OffsetFile | None) -> None:
        self._source, self._offsets = source, offsets
        self._saved: Position | None = None
        self._next = 0.0
        self.active = offsets is not None and isinstance(source, Log)
        self.path = offsets.path if offsets else None

    @property
    def due(self) -> bool:
        """Whether it is time to record how far things are."""
        return self.active and time.monotonic() >= self._next

    def record(self, last: Packet | None, plan: list[tuple[int, int]]) -> None:
        """Record what is new, also if somebody has taken the file away. Raises InUseError and OSError."""
        if self._offsets is None or not isinstance(self._source, Log):
            return
        self._next = time.monotonic() + RECORD_EVERY
        position = self._source.reached(last, plan)
        written = self._saved.written if self._saved else 0  # that alone is not worth a sync
        if msgspec.structs.replace(position, written=written) != self._saved or not self._offsets.has_its_name:
            self._offsets.save(position)
            self._saved = position
