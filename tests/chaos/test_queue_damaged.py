"""Queue files that were damaged while not in use: what is intact is delivered, what is not is counted.

One queue is made by a distributor that is killed with packets waiting; each experiment damages a copy of it.
"""

from __future__ import annotations

import random
import shutil
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest
from experiment import DELIVERY, Experiment, form, in_flight

from fastdist._core import FORMAT_VERSION, HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECOND_COPY = 32768
MAGIC = struct.pack("<I", 0xFD5EC0DE)
RECORD, BODY_LENGTH, KEY_LENGTH = 80, 64, 72  # bytes of a record before its key; offsets in it
SMALLEST, MARK = 128, 8  # bytes of a record at least, and of its mark, behind the data
PAGE = 4096
SETTINGS = {"queue": {"capacity": "1MiB"}, "delivery": DELIVERY}


class Place(NamedTuple):
    """A packet that waits: where its record is."""

    name: str
    file: str
    offset: int  # in the file; may go on at the beginning of the data
    size: int


class Queue(NamedTuple):
    """The experiment that left the queue, and what waits in it."""

    source: Experiment
    places: list[Place]
    capacity: int


def capacity_of(file_size: int) -> int:
    """Return how many bytes of a ring's file are its data."""
    return (file_size - HEADER_SIZE) * SMALLEST // (SMALLEST + MARK)


def records(name: str, image: bytes) -> Iterator[Place]:
    """Yield the packets in a ring, done or not, found by what their records look like."""
    capacity = capacity_of(len(image))
    data = image[HEADER_SIZE : HEADER_SIZE + capacity] + image[HEADER_SIZE : HEADER_SIZE + capacity // 2]
    at = data.find(MAGIC)
    while 0 <= at < capacity:
        if at % 8 == 0 and struct.unpack_from("<q", data, at + 8)[0] % capacity == at:
            length, key_length = struct.unpack_from("<I", data, at + BODY_LENGTH)[0], data[at + KEY_LENGTH]
            key = data[at + RECORD : at + RECORD + key_length].decode()
            yield Place(key, name, HEADER_SIZE + at, RECORD + key_length + length)
        at = data.find(MAGIC, at + 4)


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    """Let the rings go round at least once, then have packets wait, and kill everything."""
    source = Experiment(tmp_path_factory.mktemp("queue"), [])
    mocks = source.analyzers()
    fastdist = source.serve(SETTINGS)
    emitter = source.emitter(pause=0.0).start().wait_for(6000).stop()
    fastdist.wait_at_rest()  # or the analyzers' backlog takes the room of what is to wait
    mocks.set_all(refuse=True)
    emitter.enough.clear()
    emitter.start().wait_for(1000).stop()
    fastdist.kill_all()
    mocks.set_all(refuse=False)
    source.delivered_before = mocks.delivered()
    waiting = (emitter.accepted | emitter.unknown) - source.delivered_before.keys()
    files = sorted(source.data.glob("ring-*.fdq"))
    places = [place for file in files for place in records(file.name, file.read_bytes()) if place.name in waiting]
    assert len(places) >= 900
    assert {place.name for place in places} >= emitter.accepted - source.delivered_before.keys()
    yield Queue(source, places, capacity_of(files[0].stat().st_size))
    source.close()


class Damaged:
    """A copy of the queue, with what was done to it."""

    def __init__(self, queue: Queue, folder) -> None:
        self.queue = queue
        self.data = folder / "data"
        shutil.copytree(queue.source.data, self.data)
        self.chance = random.Random(random.random())
        self.struck: set[str] = set()  # packets of which a byte was changed

    @property
    def files(self):
        return sorted(self.data.glob("ring-*.fdq"))

    def write(self, file, offset: int, data: bytes) -> None:
        """Overwrite, and note whose records these bytes belong to."""
        with file.open("r+b") as opened:
            opened.seek(offset)
            opened.write(data)
        self.note(file.name, offset, len(data))

    def note(self, name: str, offset: int, length: int) -> None:
        capacity = self.queue.capacity
        for place in self.queue.places:
            for start in (place.offset, place.offset - capacity):  # it may go on at the beginning of the data
                touches = start < offset + length and offset < start + place.size
                if place.file == name and touches and offset >= HEADER_SIZE:
                    self.struck.add(place.name)

    def any_record(self, file) -> Place:
        """Return a packet that waits in this file."""
        return self.chance.choice([place for place in self.queue.places if place.file == file.name])

    def somewhere(self, file) -> int:
        """Return the offset of a byte in the record of a packet that waits."""
        place = self.any_record(file)
        return HEADER_SIZE + (place.offset - HEADER_SIZE + self.chance.randrange(place.size)) % self.queue.capacity


def flip_bits(damaged: Damaged) -> None:
    for file in damaged.files:
        for _ in range(20):
            offset = damaged.somewhere(file)
            byte = file.read_bytes()[offset]
            damaged.write(file, offset, bytes([byte ^ 1 << damaged.chance.randrange(8)]))


def zero_pages(damaged: Damaged) -> None:
    for file in damaged.files:
        for _ in range(4):
            damaged.write(file, damaged.somewhere(file) // PAGE * PAGE, bytes(PAGE))


def overwrite_pages_with_noise(damaged: Damaged) -> None:
    for file in damaged.files:
        for _ in range(4):
            damaged.write(file, damaged.somewhere(file) // PAGE * PAGE, damaged.chance.randbytes(PAGE))


def overwrite_pages_with_other_pages(damaged: Damaged) -> None:
    """Pages of the same file, as of a disk that writes to the wrong place: each record in them is sound in itself."""
    for file in damaged.files:
        image = file.read_bytes()
        for _ in range(4):
            page = damaged.somewhere(file) // PAGE * PAGE
            damaged.write(file, damaged.somewhere(file) // PAGE * PAGE, image[page : page + PAGE])


def cut_the_files(damaged: Damaged) -> None:
    """Cut where a packet that waits begins: behind the last of them there is nothing to be lost."""
    for file in damaged.files:
        size = file.stat().st_size
        offset = damaged.any_record(file).offset
        with file.open("r+b") as opened:
            opened.truncate(offset)
        damaged.note(file.name, offset, size - offset)


def destroy_the_first_header(damaged: Damaged) -> None:
    for file in damaged.files:
        damaged.write(file, 0, damaged.chance.randbytes(PAGE))


def destroy_the_second_header(damaged: Damaged) -> None:
    for file in damaged.files:
        damaged.write(file, SECOND_COPY, bytes(PAGE))


def destroy_the_positions(damaged: Damaged) -> None:
    for file in damaged.files:
        for copy in (0, SECOND_COPY):
            damaged.write(file, copy + 72, damaged.chance.randbytes(52))


def destroy_the_marks(damaged: Damaged) -> None:
    """What was delivered cannot be told from what was not: it may come once more, but nothing is lost."""
    for file in damaged.files:
        size = file.stat().st_size - HEADER_SIZE - damaged.queue.capacity
        damaged.write(file, HEADER_SIZE + damaged.queue.capacity, damaged.chance.randbytes(size))


def destroy_both_headers(damaged: Damaged) -> None:
    file = damaged.files[0]
    for copy in (0, SECOND_COPY):
        damaged.write(file, copy, damaged.chance.randbytes(200))
    damaged.note(file.name, HEADER_SIZE, damaged.queue.capacity)


def put_a_foreign_file_in_its_place(damaged: Damaged) -> None:
    file = damaged.files[0]
    file.write_bytes(b"%PDF-1.7\n" + damaged.chance.randbytes(200_000))
    damaged.note(file.name, HEADER_SIZE, damaged.queue.capacity)


def put_foreign_files_beside_it(damaged: Damaged) -> None:
    (damaged.data / "adopt-0123abcd.fdq").write_bytes(damaged.chance.randbytes(300_000))
    (damaged.data / "ring-7.fdq").write_bytes(b"")
    (damaged.data / "backup.fdq").write_bytes(b"not a queue")
    (damaged.data / "notes.txt").write_text("left by another program")


def put_a_ring_under_another_name(damaged: Damaged) -> None:
    damaged.files[0].rename(damaged.data / "ring-00.fdq")


DAMAGES: list[Callable[[Damaged], None]] = [
    flip_bits,
    zero_pages,
    cut_the_files,
    destroy_the_first_header,
    destroy_the_marks,
    destroy_both_headers,
    put_foreign_files_beside_it,
    *form(
        [],
        [
            overwrite_pages_with_noise,
            overwrite_pages_with_other_pages,
            destroy_the_second_header,
            destroy_the_positions,
            put_a_foreign_file_in_its_place,
            put_a_ring_under_another_name,
        ],
    ),
]


def start_with(experiment: Experiment, queue: Queue, damaged: Damaged, **server: int) -> None:
    experiment.mocks = queue.source.mocks
    experiment.mocks.reset()
    experiment.delivered_before = queue.source.delivered_before
    experiment.emitters = queue.source.emitters
    experiment.serve(SETTINGS | {"server": server})
    assert damaged.data == experiment.data


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("turn", range(form(1, 3)))
def test_all_that_is_intact_is_delivered(experiment, queue, tmp_path, damage, turn):
    damaged = Damaged(queue, tmp_path)
    damage(damaged)
    start_with(experiment, queue, damaged, workers=[2, 1, 3][turn])
    fastdist = experiment.fastdist
    # A record that was done may be taken for one that is not, if that is what was damaged. What was in flight when
    # everything was killed may have been delivered.
    # Without marks, which lie at the end of the file, all may come again that was done since the header was written.
    bound = in_flight(DELIVERY) + 20 * 2
    if damage in (destroy_the_marks, cut_the_files):
        bound += len(queue.source.delivered_before)
    verdict = experiment.judge(
        f"queue: {damage.__name__.replace('_', ' ')}", bound=bound, may_lose=damaged.struck, corrupt=True
    )
    missing = verdict.accepted - len(experiment.emitters[0].accepted & experiment.delivered().keys())
    packets = fastdist.stats()["packets"]
    aside = list(damaged.data.glob("*.damaged-*"))
    if damage in (destroy_both_headers, put_a_foreign_file_in_its_place):
        assert len(aside) == 1, "it is set aside, not deleted"
        assert missing > 0
        assert packets["corrupt"] == 0, "it is not known what was in it"
    elif damage is put_foreign_files_beside_it:
        assert len(aside) == 3
    else:
        assert not aside
        assert not missing or packets["corrupt"] > 0
        assert ("damage in the queue" in fastdist.output) is (
            damage not in (put_a_ring_under_another_name, destroy_the_marks)
        )
    assert not list(damaged.data.glob("adopt-*.fdq"))
    if not damaged.struck:
        assert missing == packets["corrupt"] == 0


def test_newer_version_file_stays_unchanged(experiment, queue, tmp_path):
    damaged = Damaged(queue, tmp_path)
    start_with(experiment, queue, damaged)
    experiment.fastdist.kill_all()
    for name in ("ring-1.fdq", "adopt-00112233.fdq"):
        shutil.rmtree(damaged.data)
        shutil.copytree(queue.source.data, damaged.data)
        made = damaged.data / name
        made.write_bytes(newer((queue.source.data / "ring-1.fdq").read_bytes()))
        before = {path.name: path.read_bytes() for path in damaged.data.glob("*.fdq")}
        status, output = experiment.refused_start()
        assert status == 3
        assert "newer version" in output
        assert str(made) in output
        assert {path.name: path.read_bytes() for path in damaged.data.glob("*.fdq")} == before


def newer(image: bytes) -> bytes:
    """Return the file as it would be in the next format, with sound checksums."""
    changed = bytearray(image)
    for copy in (0, SECOND_COPY):
        struct.pack_into("<I", changed, copy + 8, FORMAT_VERSION + 1)
        struct.pack_into("<I", changed, copy + 12, 0)
        struct.pack_into("<I", changed, copy + 12, crc32c(bytes(changed[copy : copy + 72])))
    return bytes(changed)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
