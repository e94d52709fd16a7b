"""A power cut in a model: which pages of a ring's file were written is chance, but for what a sync has covered.

What the disk holds of each block after the cut is any state that block was in since the last sync which returned began:
the kernel may write a page back at any time, or never. ``Disk`` keeps all those states. From any choice among them the
ring must give every packet that a finished sync covered and that was not done, and no packet that was never pushed.
A packet that becomes a dead letter is done in the ring as the real ``DeadLetterWriter`` says, and must be in one of the
two after the cut: ``DeadLetterFiles`` is the worst disk for their files, which writes nothing that no sync asks it to.

Blocks are pages of 4 KiB, or sectors of 512 bytes for a disk that tears pages.
"""

from __future__ import annotations

import errno
import os
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from experiment import form
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from ring_disk import redirect

from fastdist._core import FORMAT_VERSION, HEADER_SIZE, PacketRing, file_size
from fastdist.shm.block import SharedBlock
from fastdist.storage import dead_letter_writer
from fastdist.storage.dead_letter_format import decoded
from fastdist.storage.dead_letter_writer import DeadLetterWriter, PendingDeadLetter

if TYPE_CHECKING:
    from collections.abc import Callable


CAPACITY = 65536
SIZE = file_size(CAPACITY)
RECORD = 80  # bytes of a record besides key and body
POSITIONS = (72, 32768 + 72)  # where the header's two copies keep head, tail and the like
DATA = slice(HEADER_SIZE, HEADER_SIZE + CAPACITY)
MARKS = slice(DATA.stop, SIZE)


class Disk:
    """The file as the page cache has it (``fd``), and the states of each block that may be on the disk."""

    def __init__(self, image: bytes, block: int) -> None:
        self.block = block
        self.fd = os.memfd_create("ring")
        os.pwrite(self.fd, image, 0)
        self._cached = self._cut(image)
        self.states = [[block] for block in self._cached]
        self._since_sync: list[list[bytes]] | None = None
        self.unseen = False  # whether what is written now will turn out not to have been

    def _cut(self, image: bytes) -> list[bytes]:
        return [image[at : at + self.block] for at in range(0, SIZE, self.block)]

    def note(self) -> None:
        """Note the blocks that have changed: each may be written back as it is now."""
        if self.unseen:
            return
        for at, block in enumerate(self._cut(os.pread(self.fd, SIZE, 0))):
            if block != self._cached[at]:
                self._cached[at] = block
                self.states[at].append(block)
                if self._since_sync is not None:
                    self._since_sync[at].append(block)

    def begin_sync(self) -> None:
        self.note()
        self._since_sync = [[block] for block in self._cached]

    def end_sync(self) -> None:
        """Older states than those since the sync began are gone for good."""
        assert self._since_sync is not None
        self.note()
        self.states, self._since_sync = self._since_sync, None

    def after_a_cut(self, chance: random.Random, newness: float) -> bytes:
        """Return what is on the disk: of each block the latest state with probability ``newness``, else any."""
        self.note()
        return b"".join(states[-1] if chance.random() < newness else chance.choice(states) for states in self.states)

    def close(self) -> None:
        os.close(self.fd)


class DeadLetterFiles:
    """The files of dead letters as a writer sees them: ids that were written, and those that no cut can take."""

    wants_sync = False  # a file is never full

    def __init__(self) -> None:
        self.cached: set[str] = set()
        self.synced: set[str] = set()

    @property
    def unsettled(self) -> int:
        return len(self.cached - self.synced)

    def write(self, line: bytes) -> None:
        dead_letter = decoded(line)
        assert dead_letter is not None
        self.cached.add(dead_letter.id)

    def begin_sync(self) -> Callable[[], None]:
        covered = set(self.cached)
        return lambda: self.synced.update(covered)

    def settle(self, error: OSError | None = None) -> bool:
        if error is not None:
            self.cached &= self.synced
        return error is None


def body_of(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch):
    monkeypatch.setattr(dead_letter_writer, "time", SimpleNamespace(monotonic_ns=lambda: 0))


sizes = st.one_of(st.integers(0, 300), st.integers(300, 5000), st.just(CAPACITY // 2 - RECORD - 16))


class PowerCuts(RuleBasedStateMachine):
    """A ring in use, with syncs that take their time, cuts, and processes that die."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: dict[str, bytes] = {}  # of all that was ever pushed
        self.undone: dict[str, int] = {}  # not done: where the record of the push ends
        self.times: dict[str, int] = {}  # not done: how often it is in the ring (more than once only after a cut)
        self.safe: set[str] = set()  # covered by a sync that has finished
        self.delivered: set[str] = set()  # at least once
        self.claimed: dict[int, str] = {}
        self.syncing: int | None = None  # the position the sync under way will cover
        self.number = 0
        self.dead_letters = DeadLetterFiles()  # outlive processes
        self.only_dead_letters: set[str] = set()  # were safe in the ring until it let go of them for their dead letters
        block = SharedBlock.create(1, 1)
        os.close(block.fd)
        self.counters = block.rows[0]

    @initialize(block=st.sampled_from([4096, 4096, 512]), waits=st.booleans())
    def create(self, block: int, waits: bool) -> None:  # noqa: FBT001  (hypothesis passes by name)
        self.block, self.waits = block, waits
        fd = os.memfd_create("ring")
        os.ftruncate(fd, SIZE)
        PacketRing(fd, CAPACITY)
        self.open(os.pread(fd, SIZE, 0))
        os.close(fd)

    def open(self, image: bytes) -> None:
        self.disk = Disk(image, self.block)
        self.ring = PacketRing(self.disk.fd, claims_wait_for_sync=self.waits)
        self.disk.note()
        self.begin_writing()

    def begin_writing(self) -> None:
        """Begin as a new process does."""
        self.writer = DeadLetterWriter(
            self.dead_letters,
            self.counters,  # type: ignore[arg-type]
            lambda _ring, _sequence: None,
            lambda work, done: self.dead_letter_syncs.append((work, done)),
            0.0 if self.waits else 3600.0,
        )
        self.dead_letter_syncs: list[tuple[Callable[[], None], Callable[[OSError | None], None]]] = []
        self.refused: dict[int, str] = {}  # handles that were given to the writer

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.cut_the_power(seed=1, newness=0.5)
            self.disk.close()

    # ---- daily life

    @rule(size=sizes)
    def push(self, size: int) -> None:
        self.number += 1
        name = f"packet-{self.number}"
        body = body_of(self.number, size)
        if self.ring.push(body, name):
            self.bodies[name] = body
            self.undone[name] = self.ring.tail_position
            self.times[name] = 1
        self.disk.note()

    @rule(most=st.integers(1, 10))
    def claim(self, most: int) -> None:
        for _ in range(most):
            handle = self.ring.claim()
            if not handle:
                break
            name = self.ring.packet_id(handle)
            self.claimed[handle] = name
        self.disk.note()

    @precondition(lambda self: self.claimed)
    @rule(n=st.integers(0, 1000))
    def done(self, n: int) -> None:
        handle = sorted(self.claimed)[n % len(self.claimed)]
        name = self.claimed.pop(handle)
        self.ring.done(handle)
        self.delivered.add(name)
        self.times[name] -= 1
        if self.times[name] == 0:
            del self.undone[name], self.times[name]
        self.disk.note()

    @precondition(lambda self: self.claimed)
    @rule(n=st.integers(0, 1000))
    def release(self, n: int) -> None:
        handle = sorted(self.claimed)[n % len(self.claimed)]
        del self.claimed[handle]
        self.ring.release(handle)
        self.disk.note()

    # ---- dead letters

    @precondition(lambda self: self.claimed)
    @rule(n=st.integers(0, 1000), most=st.integers(1, 10))
    def refuse(self, n: int, most: int) -> None:
        """Have packets become dead letters; with durability disk their sync comes later."""
        for handle in sorted(self.claimed)[n % len(self.claimed) :][:most]:
            self.refused[handle] = self.claimed.pop(handle)
            self.writer.add(PendingDeadLetter(self.ring, handle, "refused", "A1", 422, None))
        self.note_dead_letters()

    @rule(size=st.integers(0, 3000))
    def refuse_what_is_synced(self, size: int) -> None:
        self.push(size)
        self.sync()
        self.claim(10)
        if self.claimed:
            self.refuse(0, 10)
        self.sync()

    @rule()
    def begin_sync_of_dead_letters(self) -> None:
        self.writer.tick(1 << 62)
        self.note_dead_letters()

    @precondition(lambda self: self.dead_letter_syncs)
    @rule(fails=st.sampled_from([False, False, True]))
    def end_sync_of_dead_letters(self, fails: bool) -> None:  # noqa: FBT001
        work, done = self.dead_letter_syncs.pop(0)
        if not fails:
            work()
        done(OSError(errno.EIO, "Input/output error") if fails else None)
        self.note_dead_letters()

    def note_dead_letters(self) -> None:
        """See which packets the ring has let go of, because their dead letters are safe as the writer thinks."""
        self.disk.note()
        left = {dead_letter.handle for dead_letter in [*self.writer.unwritten, *self.writer.written]}
        for handle in self.refused.keys() - left:
            name = self.refused.pop(handle)
            self.times[name] -= 1
            if self.times[name] == 0:
                del self.undone[name], self.times[name]
                if name in self.safe:
                    self.only_dead_letters.add(name)

    @rule(packets=st.integers(1, 30), size=st.sampled_from([0, 500, 3000, 9000]), sync_every=st.integers(1, 12))
    def let_others_pass(self, packets: int, size: int, sync_every: int) -> None:
        """Hold what is claimed now, and deliver others, so that the ring goes round and records have to be moved."""
        for i in range(packets):
            self.push(size)
            if self.waits or i % sync_every == 0:
                self.sync()
            before = set(self.claimed)
            self.claim(1)
            for handle in set(self.claimed) - before:
                self.done(sorted(self.claimed).index(handle))

    # ---- syncs

    @precondition(lambda self: self.syncing is None)
    @rule()
    def begin_sync(self) -> None:
        self.syncing = self.ring.tail_position
        self.disk.begin_sync()

    @precondition(lambda self: self.syncing is not None)
    @rule()
    def end_sync(self) -> None:
        self.disk.end_sync()
        self.ring.mark_synced(self.syncing)
        self.disk.note()
        self.safe |= {name for name, end in self.undone.items() if end <= self.syncing}
        self.syncing = None

    @rule()
    def sync(self) -> None:
        if self.syncing is None:
            self.begin_sync()
        self.end_sync()

    @precondition(lambda self: not self.refused)
    @rule(seed=st.integers(0, 2**32), newness=st.sampled_from([0.0, 0.5, 0.9]), killed=st.booleans())
    def fail_to_sync(self, seed: int, newness: float, killed: bool) -> None:  # noqa: FBT001
        """Any page that the kernel takes for written may not be on the disk: all that counts is written again.

        By the process itself, or, if that was ``killed`` just then, by its successor.
        """
        self.syncing = self.disk._since_sync = None
        if self.waits:
            self.ring.withdraw_unsynced()
            left = self.look()
            assert self.safe & self.undone.keys() <= left.keys()
            self.take_over_but_claims(left)
        self.ring.forget_synced()
        if killed:
            self.succeed()
        image = self.disk.after_a_cut(random.Random(seed), newness)
        on_disk = os.memfd_create("disk")
        os.pwrite(on_disk, image, 0)
        cache = redirect(self.disk.fd, on_disk)  # what the ring writes goes there, while it sees the page cache
        self.ring.write_again()
        assert self.look() == self.look(cache)
        os.close(redirect(self.disk.fd, cache))
        os.close(cache)
        os.close(on_disk)
        self.ring.write_again()
        self.disk.note()

    # ---- the worst

    @rule(seed=st.integers(0, 2**32), newness=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
    def cut_the_power(self, seed: int, newness: float) -> None:
        image = self.disk.after_a_cut(random.Random(seed), newness)
        self.start_again(image)

    @rule(seed=st.integers(0, 2**32), newness=st.sampled_from([0.0, 0.5, 0.9]))
    def cut_the_power_while_the_positions_are_written(self, seed: int, newness: float) -> None:
        """Neither copy of head and tail is whole: each was written back in the midst of a change."""
        chance = random.Random(seed)
        image = bytearray(self.disk.after_a_cut(chance, newness))
        for offset in POSITIONS:
            image[offset : offset + 52] = chance.randbytes(52)
        self.start_again(bytes(image))

    @rule(synced=st.booleans())
    def kill_the_process(self, synced: bool) -> None:  # noqa: FBT001
        """The page cache stays as it is. A successor may get to sync what it finds, or meet its end before that."""
        before = dict(self.times)
        self.succeed()
        assert self.times == before
        if synced:
            self.sync()

    def succeed(self) -> None:
        """Go on as the successor of a process that was killed."""
        self.syncing = None
        self.ring = PacketRing(self.disk.fd, claims_wait_for_sync=self.waits)
        self.disk.note()
        self.begin_writing()
        self.take_over(self.look())
        self.safe &= self.times.keys()

    def start_again(self, image: bytes) -> None:
        self.dead_letters.cached = set(self.dead_letters.synced)
        expected = (self.safe & self.undone.keys() | self.only_dead_letters) - self.dead_letters.synced - self.delivered
        self.disk.close()
        self.syncing = None
        self.open(image)
        found = self.look()
        lost = expected - found.keys()
        assert not lost, f"lost {sorted(lost)}; damage {self.ring.damage}"
        self.take_over(found)
        self.safe = set(found)  # they come from the disk

    @rule(size=sizes, part=st.floats(0.0, 1.0))
    def kill_the_process_in_a_push(self, size: int, part: float) -> None:
        """Of the last write only the beginning was made."""
        before = os.pread(self.disk.fd, SIZE, 0)
        known = dict(self.times)
        self.push(size)
        after = os.pread(self.disk.fd, SIZE, 0)
        new = self.times.keys() - known.keys()
        if new and before[MARKS] == after[MARKS]:  # else there was more than one write
            (name,) = new
            end = (self.undone[name] - 1) % CAPACITY + 1 + HEADER_SIZE
            start = max(DATA.start, end - RECORD - len(name) - size)
            cut = start + int(part * (end - start))
            os.pwrite(self.disk.fd, before[cut:end], cut)
            del self.times[name], self.undone[name]
            found = self.look()
            if name in found:
                self.times[name], self.undone[name] = 1, self.ring.tail_position
        self.kill_the_process(synced=False)
        assert not self.ring.damage

    @precondition(lambda self: self.claimed)
    @rule(size=sizes, most=st.integers(1, 10), marks_first=st.booleans(), part=st.floats(0.0, 1.0))
    def kill_the_process_between_data_and_marks(
        self,
        size: int,
        most: int,
        marks_first: bool,  # noqa: FBT001
        part: float,
    ) -> None:
        """A push, which may move records, attempts and deliveries: of the data nothing was written, or of the marks.

        Or of the marks only the beginning. (Marks are written before the copy of a record, and after what is pushed.)
        """
        before = os.pread(self.disk.fd, SIZE, 0)
        known = set(self.times)
        self.disk.unseen = True
        self.push(size)
        left = set(self.times)
        for handle in sorted(self.claimed)[:most]:
            self.ring.count_attempt(handle)
        for _ in range(min(most, len(self.claimed))):
            self.done(most)
        after = os.pread(self.disk.fd, SIZE, 0)
        cut = MARKS.start + int(part * (MARKS.stop - MARKS.start))
        if marks_first:
            os.pwrite(self.disk.fd, before[DATA], DATA.start)
            left = known
        os.pwrite(self.disk.fd, after[MARKS.start : cut] + before[cut:], MARKS.start)
        self.disk.unseen = False
        delivered = left - self.times.keys()
        self.succeed()
        assert left - delivered <= self.times.keys() <= left | known
        if not marks_first and cut == MARKS.start:
            assert self.times.keys() == left

    def look(self, fd: int | None = None) -> dict[str, int]:
        """Return what a copy of the file gives, by id: how often."""
        copy = PacketRing(self.disk.fd if fd is None else fd, private=True)
        found: dict[str, int] = {}
        while handle := copy.claim():
            packet = copy.packet(handle)
            assert self.bodies.get(packet.id) == packet.body, f"{packet.id} has another body"
            found[packet.id] = found.get(packet.id, 0) + 1
        assert copy.undone == sum(found.values())
        return found

    def take_over(self, found: dict[str, int]) -> None:
        """Go on with what is there; what was done before and is there again is to be delivered again."""
        self.claimed.clear()
        self.take_over_but_claims(found)

    def take_over_but_claims(self, found: dict[str, int]) -> None:
        self.times = dict(found)
        self.undone = {name: self.undone.get(name, self.ring.tail_position) for name in found}


PowerCuts.TestCase.settings = settings(
    max_examples=form(60, 800),
    stateful_step_count=form(40, 60),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestPowerCuts = PowerCuts.TestCase


def test_the_model_loses_what_is_not_synced():
    """The model is worth something: without a sync packets do get lost in it."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, SIZE)
    ring = PacketRing(fd, CAPACITY)
    disk = Disk(os.pread(fd, SIZE, 0), 4096)
    ring = PacketRing(disk.fd)
    for number in range(20):
        ring.push(body_of(number, 3000), f"packet-{number}")
        disk.note()
    outcomes = set()
    for seed in range(50):
        os.pwrite(fd, disk.after_a_cut(random.Random(seed), 0.5), 0)
        outcomes.add(PacketRing(fd, private=True).undone)
    assert len(outcomes) > 3
    assert min(outcomes) < 20
    disk.begin_sync()
    disk.end_sync()
    for seed in range(50):
        os.pwrite(fd, disk.after_a_cut(random.Random(seed), 0.5), 0)
        assert PacketRing(fd, private=True).undone == 20
    os.close(fd)
    disk.close()
    assert FORMAT_VERSION == 2, "is the model still that of the format?"


def test_model_loses_unsynced_dead_letters():
    """Here the writer lets packets go when their dead letters are written."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, SIZE)
    PacketRing(fd, CAPACITY)
    model = PowerCuts()
    model.block, model.waits = 4096, False
    model.open(os.pread(fd, SIZE, 0))
    os.close(fd)
    model.writer._run = None
    model.push(100)
    model.sync()
    model.claim(1)
    model.refuse(0, 1)
    model.sync()
    with pytest.raises(AssertionError, match="lost"):
        model.cut_the_power(seed=0, newness=0.0)
    model.disk.close()
