"""Packets that share a message of a stream: the compiled ``claim_bundle`` against what it stands for."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from fastdist._core import FLAG_WAITED, PacketRing, claim_bundle, done_all, file_size, round_capacity
from fastdist.storage.jetstream.message import StoredPacket, decode, whole

AROUND = 67  # bytes of a packet beside its body, at limit


def ring_of(packets):
    fd = os.memfd_create("ring", os.MFD_CLOEXEC)
    capacity = round_capacity(1 << 20)
    os.ftruncate(fd, file_size(capacity))
    ring = PacketRing(fd, capacity, volatile=True, replicated=True)
    for number, (size, key, waits) in enumerate(packets):
        ring.push(
            bytes([number % 256]) * size,
            key,
            packet_id=number.to_bytes(16, "big"),
            messages=number,
            emitter=(1 << 64) - 1 - number,
            accepted_ns=1_800_000_000_000_000_000 + number,
            flags=FLAG_WAITED if waits else 0,
        )
    os.close(fd)
    return ring


def expected(packets, limit, max_bytes):
    """Return how many share the message, and whether one that comes next travels alone."""
    size = 8
    for number, (length, key, waits) in enumerate(packets[:limit]):
        if key or waits or (number and size + AROUND + length > max_bytes):
            return number, True
        size += AROUND + length
    return min(len(packets), limit), False


PACKETS = st.lists(
    st.tuples(st.integers(1, 3000), st.sampled_from([None] * 6 + ["key"]), st.sampled_from([False] * 6 + [True])),
    max_size=40,
)


@given(PACKETS, st.integers(1, 64), st.integers(100, 9000))
def test_bundles_are_what_was_pushed(packets, limit, max_bytes):
    ring = ring_of(packets)
    left, seen, handles_seen = list(packets), 0, []
    while left:
        begin = ring.claim_position
        count, alone = expected(left, limit, max_bytes)
        body, handles, accepted_ns, first, end, other = claim_bundle(ring, limit, max_bytes)
        assert (len(handles), bool(other), first) == (count, alone, begin)
        assert count == 1 or len(body) <= max_bytes
        found = decode(whole(body)) if count else []
        assert found == [ring_packet(ring, handle) for handle in handles]
        assert [packet.messages for packet in found] == list(range(seen, seen + count))
        assert accepted_ns == (found[0].accepted_ns if count else 0)
        assert (end == ring.claim_position) == (not alone)
        if other:
            assert ring.packet(other).messages == seen + count
            handles.append(other)
        done_all(ring, handles)
        handles_seen += handles
        seen += count + alone
        left = left[count + alone :]
    assert claim_bundle(ring, limit, max_bytes) is None
    assert (ring.undone, len(handles_seen)) == (0, len(packets))


def ring_packet(ring, handle):
    packet = ring.packet(handle)
    return StoredPacket(packet.id, packet.body, packet.emitter, packet.messages, packet.accepted_ns)
