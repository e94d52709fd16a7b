"""Makes the files beside it: rings of format 1, and what the version that wrote them recovered of each.

It ran with the last version that wrote format 1, commit 0bb0a3d, and needs that one to run again:

    PYTHONPATH=tests .venv/bin/python tests/data/format1/make.py

Each ``<name>.fdq.gz`` is a ring's file. ``<name>.json`` has what ``PacketRing`` said of it: the packets in the ring's
order, the damage, the count of corrupt records. That of a file that was cut short is of one that was given its length
again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import uuid
from pathlib import Path

from support import Distributor, Mocks, own_body, running

from fastdist._core import FLAG_WAITED, FORMAT_VERSION, HEADER_SIZE, STATES, PacketRing, file_size

HERE = Path(__file__).parent
CAPACITY = 65536
SECOND_COPY = 32768
POSITIONS = 72  # of a header, where they begin
LENGTH, STATE, RECORD = 56, 72, 88  # of a record: where body_length and state are, and where its key begins
WORDS = {name: word for word, name in STATES.items()}


class Ring:
    """A ring in memory, and where in its file each packet is that was pushed, by its number."""

    def __init__(self):
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, file_size(CAPACITY))
        self.ring = PacketRing(self.fd, CAPACITY)
        self.offsets = []

    def push(self, count, *, size=0):
        """Push so many packets; every third has a key, and each other fields than the one before."""
        for n in range(len(self.offsets), len(self.offsets) + count):
            key = f"key-{n}" if n % 3 == 2 else None
            body = own_body(f"emitter-{n}") + b" " * size
            options = {"messages": 1 + n % 2, "emitter": 2**64 - 1 - n, "accepted_ns": 1_750_000_000_000_000_000 + n}
            packet_id = uuid.UUID(int=0x0197_0000_0000_7000_8000_0000_0000_0000 + n)
            self.offsets.append(HEADER_SIZE + self.ring.tail_position % CAPACITY)
            flags = FLAG_WAITED if n % 5 == 4 else 0
            assert self.ring.push(body, key, packet_id=packet_id.bytes, attempts=n % 4, flags=flags, **options)
        return self

    def claim(self, count):
        return [self.ring.claim() for _ in range(count)]

    def finish(self, handles):
        for handle in handles:
            self.ring.done(handle)
        return self

    def go_round(self, until):
        """Push and finish packets until the next record starts at or behind this position."""
        while self.ring.tail_position < until:
            assert self.ring.push(bytes(1000))
            self.finish(self.claim(1))
        return self

    def patched(self, *patches):
        """Return the file with some bytes changed: (offset, bytes)."""
        data = bytearray(os.pread(self.fd, file_size(CAPACITY), 0))
        for offset, content in patches:
            data[offset : offset + len(content)] = content
        return bytes(data)


def moved():
    """Return a ring with three moved records, and where the first one's copy is; the second's is done."""
    ring = Ring().push(3, size=1500)
    first, second, third = ring.claim(3)
    tail, count = 0, 0
    while count < 3:  # a push that moves a record makes the tail grow by more than its own
        tail = ring.ring.tail_position
        assert ring.ring.push(bytes(1000))
        if ring.ring.tail_position - tail > RECORD + 1000:
            count = ring.patched().count(WORDS["moved"].to_bytes(4, "little"))
        ring.finish(ring.claim(1))
    ring.finish([second]).push(3)
    assert ring.ring.packet(first).body != ring.ring.packet(third).body
    image = ring.patched()
    body = ring.ring.packet(first).body
    return ring, image.index(body, image.index(body) + 1)


def after_service():
    """Return the file of a service that delivered some packets and was killed with others in its queue."""
    with tempfile.TemporaryDirectory() as folder:
        mocks = Mocks(("A1",))
        settings = {"server": {"workers": 1}, "queue": {"durability": "disk", "capacity": "1MiB"}}
        fastdist = Distributor(Path(folder), mocks, settings)
        with running(mocks, fastdist):
            for n in range(5):
                fastdist.post(own_body(f"delivered-{n}"), Authorization="")
            fastdist.wait_at_rest()
            mocks.kill_all()
            fastdist.wait_for_states("offline")
            for n in range(20):
                options = {"Idempotency_Key": f"order-{n}"} if n % 4 == 0 else {}
                status, _, _ = fastdist.post(own_body(f"waiting-{n}"), **options)
                assert status == 202
            fastdist.kill_all()
            (file,) = Path(folder).glob("data/*.fdq")
            return file.read_bytes()


def files():
    """Yield (name, what is in the file)."""
    yield "plain", Ring().push(12).patched()
    wrapped = Ring().go_round(CAPACITY - 1000).push(12)
    assert wrapped.offsets[-1] < wrapped.offsets[0]
    yield "wrapped", wrapped.patched()
    some_done = Ring().push(12)
    yield "done-between", some_done.finish(some_done.claim(12)[3::2]).patched()
    ring, copy = moved()
    yield "moved", ring.patched()
    yield "moved-copy-damaged", ring.patched((copy, b"\0"))
    yield "moved-original-damaged", ring.patched((ring.offsets[0] + RECORD, b"\0"))
    ring = Ring().push(12)
    yield "damaged-body", ring.patched((ring.offsets[4] + RECORD + 20, b"\0\0"))
    yield "damaged-length", ring.patched((ring.offsets[4] + LENGTH, b"\xff\xff\xff"))
    yield "damaged-state", ring.patched((ring.offsets[4] + STATE, b"\xff"))
    yield "lost-part", ring.patched((ring.offsets[3], bytes(500)))
    yield "first-header-gone", ring.patched((0, bytes(4096)))
    yield "second-header-gone", ring.patched((SECOND_COPY, b"\xff" * 4096))
    yield "foreign-header", ring.patched((0, os.pread(Ring().push(40).fd, 4096, 0)))
    yield "one-torn-position", ring.patched((POSITIONS + 8, b"\x01"))
    yield "torn-positions", wrapped.patched((POSITIONS + 8, b"\x01"), (SECOND_COPY + POSITIONS + 8, b"\x01"))
    yield "cut-short", ring.patched()[: ring.offsets[9] + 40]
    yield "service", after_service()


def expected(content):
    """Return what PacketRing makes of a file."""
    fd = os.memfd_create("ring")
    os.pwrite(fd, content, 0)
    os.ftruncate(fd, max(len(content), file_size(CAPACITY)))
    ring = PacketRing(fd, private=True)
    packets = []
    for packet in ring.waiting():
        fields = packet._asdict() | {"body": hashlib.sha256(packet.body).hexdigest(), "length": len(packet.body)}
        del fields["sequence"]
        packets.append(fields)
    os.close(fd)
    return {
        "capacity": ring.capacity,
        "undone": ring.undone,
        "undone_bytes": ring.undone_bytes,
        "corrupt": ring.corrupt,
        "damage": ring.damage,
        "notes": ring.notes,
        "packets": packets,
    }


def main():
    assert FORMAT_VERSION == 1, "this fastdist does not write format 1"
    for name, content in files():
        (HERE / f"{name}.fdq.gz").write_bytes(gzip.compress(content, mtime=0))
        (HERE / f"{name}.json").write_text(json.dumps(expected(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
