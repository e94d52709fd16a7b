"""The shipper: sends logs packet by packet, several at a time, and records how far each log has been accepted.

The rules:

1. A packet counts as sent once the distributor has accepted it. What counts for the log is the offset up to which all
   packets are sent, without a gap.
2. Where offsets are recorded, a packet's end is recorded before the packet is sent (see ``offsets``).
3. What is tried again and when to give up is decided in ``retry``. A packet that is refused ends the run: it must be
   looked at, and nothing is skipped.
4. When asked to stop, it lets the requests in flight finish and begins no other. But what has been read of a stream,
   or of a log that is followed, is sent nevertheless: it may not be there to be read again.
5. Memory is bounded: packets in flight or waiting are at most ``WINDOW`` for each connection.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from fastdist.client import retry
from fastdist.client.connection import Connection
from fastdist.client.logfile import Log
from fastdist.client.offsets import InUseError
from fastdist.client.output import plural, size_text
from fastdist.client.packing import TALLIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fastdist.client.connection import Response, Target
    from fastdist.client.logfile import Stream
    from fastdist.client.offsets import OffsetFile
    from fastdist.client.packing import Packet
    from fastdist.client.send_view import SendView

WINDOW = 4  # packets a connection
RECORD_EVERY = 1.0  # seconds between offsets that are recorded for their own sake
LOOK_EVERY = 0.2  # seconds
TOO_LARGE = 413


class Summary(retry.Summary):
    """How it went."""

    packets: int = 0
    messages: int = 0
    bytes: int = 0  # of the log
    tally: Counter[str] = msgspec.field(default_factory=Counter)
    unsent: int = 0  # messages that were read from a stream

    def lines(self, seconds: float) -> list[str]:
        """Return the same for a person; ``seconds``: how long it took."""
        rate = self.messages / seconds if seconds else 0
        packets = f"{plural(self.messages, 'message')} in {plural(self.packets, 'packet')}"
        lines = [f"sent {packets}, {size_text(self.bytes)} in {seconds:.1f} s ({rate:,.0f} messages/s)"]
        if self.retries:
            lines.append(f"retries: {self.retries}")
        lines += [f"{what}: {self.tally[name]}" for name, what in TALLIES.items() if self.tally[name]]
        if self.unsent:
            lines.append(f"read but NOT sent: {plural(self.unsent, 'message')} at least")
        return lines


@dataclass(slots=True, eq=False)
class _Slot:
    """A packet of the window, and what became of it."""

    packet: Packet
    posted: bool  # by this run, or perhaps by an earlier one
    response: Response | None = None  # the final one
    fault: BaseException | None = None

    @property
    def sent(self) -> bool:
        """Whether nothing of it is left to send."""
        return not self.packet.messages or (self.response is not None and self.response.accepted)

    @property
    def plan(self) -> tuple[int, int]:
        """Its end and how it was cut, as an offset file has it: a refused one must be cut again."""
        return self.packet.end, 0 if self.response and not self.response.accepted else self.packet.cut


class Shipper(retry.Run):
    """Sends logs to one distributor. Set ``stopping`` to have it end in good order.

    That is a plain attribute because a signal handler sets it, which may take no lock. The connections' threads only
    post packets; all that is kept of them belongs to the thread that calls ``run``.
    """

    def __init__(self, target: Target, connections: int, patience: float, view: SendView) -> None:
        super().__init__(target.url, patience, view.waiting)
        self.target, self.connections, self.view = target, connections, view
        self.has_token = bool(target.token)
        self.summary: Summary = Summary()
        self.stopping = self._stop_shown = False
        self._source: Log | Stream
        self._offsets: OffsetFile | None
        self._must_finish = False  # also when asked to stop: what was read is sent
        self._record_at = 0.0  # time.monotonic()
        self._last: Packet | None = None  # up to which everything is sent
        self._window: deque[_Slot] = deque()  # in the log's order, from the first packet that is not sent
        self._in_flight = 0  # packets that the threads have or will get
        self._todo: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()  # None ends a thread
        self._done: queue.SimpleQueue[_Slot] = queue.SimpleQueue()

    def is_stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self.stopping

    def run(self, sources: Iterable[Log | Stream], offsets: OffsetFile | None, *, follow: bool) -> Summary:
        """Send one source after another; return how it went. Raises OSError and ValueError for unreadable logs."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.connections)]
        for thread in threads:
            thread.start()
        try:
            for source in sources:
                self._ship(source, offsets if isinstance(source, Log) else None, follow=follow)
                if self.halt.is_set():
                    break
        except KeyboardInterrupt:
            threads = []  # do not wait for what is in flight
            raise
        finally:
            self.end()
            for _ in threads:
                self._todo.put(None)
            for thread in threads:
                while thread.is_alive():  # with a time-out: a signal just before a wait without one is seen after it
                    thread.join(LOOK_EVERY)
        return self.summary

    def _work(self) -> None:
        """Post packets, one after another: a connection's thread."""
        connection = Connection(self.target)
        while (slot := self._todo.get()) is not None:
            try:
                if not self.halt.is_set():
                    slot.posted = True
                    slot.response = self.post(connection, slot.packet.id, slot.packet.body)
                    if slot.response and not slot.response.accepted:
                        self._end_refused(slot.packet, slot.response)
            except BaseException as error:  # noqa: BLE001  (raised again by ``_settle``)
                slot.fault = error
            self._done.put(slot)
        connection.close()

    def _end_refused(self, packet: Packet, response: Response) -> None:
        what = f"the {packet.messages} messages of bytes {packet.offset} to {packet.end}"
        advice = "; try a smaller --batch-bytes" if response.status == TOO_LARGE else ""
        self.end(f"{self.target.url} refuses {what}: {response.text}{advice}", permanent=True)

    def _ship(self, source: Log | Stream, offsets: OffsetFile | None, *, follow: bool) -> None:
        """Send a source until it ends or the run does."""
        self._source, self._offsets, self._last = source, offsets, None
        self._must_finish = follow or not source.resumable
        with self.lock:
            self.view.begin(source)
        group_size = max(1, self.connections * WINDOW // 2) if offsets else 1  # so that a record is for many packets
        in_doubt = source.in_doubt
        group: list[_Slot] = []
        for packet in source.packets(self.is_stopping, follow=follow):
            if packet is not None:
                group.append(_Slot(packet, posted=packet.end in in_doubt))
            if group and (packet is None or len(group) >= group_size):
                self._hand_out(group)
                group = []
            self._keep_up()
            if self.halt.is_set():
                break
        if group:
            self._hand_out(group)
        self._wait_for(lambda: not self._window)
        while self._in_flight:
            self._settle(LOOK_EVERY)
        if not source.resumable:
            self.summary.unsent += sum(slot.packet.messages for slot in self._window if not slot.sent)
        while self._window and not self._window[-1].posted:
            self._window.pop()  # it was never sent: it may be cut in another way the next time
        self._record()

    def _hand_out(self, group: list[_Slot]) -> None:
        """Queue packets for the threads once there is room for them and their ends are recorded."""
        room = self.connections * WINDOW - len(group)
        self._wait_for(lambda: len(self._window) <= room)
        if self.halt.is_set() and self._offsets:
            return
        self._window += group
        self._advance()
        self._record()
        for slot in group:
            if not slot.sent:
                self._in_flight += 1
                self._todo.put(slot)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or nothing more may be sent."""
        while not condition() and not self.halt.is_set():
            self._settle(LOOK_EVERY)
            self._keep_up()

    def _keep_up(self) -> None:
        """Do the periodic work; begin to stop when asked to."""
        self._settle(0)
        if time.monotonic() >= self._record_at:
            self._record()
        if self.stopping and not self._stop_shown:
            self._stop_shown = True
            with self.lock:
                self.view.stopping()
            if not self._must_finish:
                self.end()

    def _settle(self, timeout: float) -> None:
        """Take note of the packets that have a response; wait for the first of them for so many seconds."""
        while self._in_flight:
            try:
                slot = self._done.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = 0
            self._in_flight -= 1
            if slot.fault is not None:
                raise slot.fault
            if slot.sent:
                self._advance()
                self.summary.packets += 1
                self._count(slot.packet)

    def _advance(self) -> None:
        """Move the offset over all that is sent."""
        while self._window and self._window[0].sent:
            self._last = self._window.popleft().packet
            if not self._last.messages:
                self._count(self._last)

    def _count(self, packet: Packet) -> None:
        self.summary.messages += packet.messages
        self.summary.bytes += packet.end - packet.offset
        self.summary.tally += packet.tally
        with self.lock:
            self.view.accepted(packet)

    def _record(self) -> None:
        """Record how far the log is sent, also if the offset file was deleted meanwhile."""
        if self._offsets is None or not isinstance(self._source, Log):
            return
        self._record_at = time.monotonic() + RECORD_EVERY
        try:
            self._offsets.save(self._source.reached(self._last, [slot.plan for slot in self._window]))
        except OSError as error:
            self.end(f"cannot write {self._offsets.path}: {error.strerror}")
        except InUseError as error:
            self.end(str(error))
