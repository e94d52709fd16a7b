"""Messages of the stream: what is read is what was written, and nothing else is ever read."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdist._core import checksum
from fastdist.storage.jetstream.message import DamagedError, NewerFormatError, StoredPacket, decode, encode

PACKETS = st.builds(
    StoredPacket,
    id=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64),
    body=st.binary(min_size=1, max_size=300),
    emitter=st.integers(0, 2**64 - 1),
    messages=st.integers(0, 2**32 - 1),
    accepted_ns=st.integers(0, 2**63 - 1),
    attempts=st.integers(0, 2**32 - 1),
    inbox=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=60),
)
TWO = [StoredPacket("id-1", b"{}", 2**64 - 1, 3, 10**18, 2, "_INBOX.x"), StoredPacket("id-2", b"\xff" * 40)]


def sealed(start, body):
    """Return a message with the checksum it has to have."""
    return start + checksum(start + body).to_bytes(4, "little") + body


@given(st.lists(PACKETS, min_size=1, max_size=20))
def test_what_is_read_is_what_was_written(packets):
    assert decode(encode(packets)) == packets


@pytest.mark.parametrize("bit", range(8))
def test_every_damaged_byte_is_noticed(bit):
    whole = encode(TWO)
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        with pytest.raises(DamagedError):
            decode(bytes(damaged))


def test_a_message_cut_anywhere_is_noticed():
    whole = encode(TWO)
    for length in range(len(whole)):
        with pytest.raises(DamagedError):
            decode(whole[:length])
    with pytest.raises(DamagedError):
        decode(whole + b"\0")


@given(st.binary(max_size=200))
@example(b"")
@example(b"FDM")
@example(b"FDM\x01" + bytes(4))
def test_other_bytes_are_not_a_message(data):
    with pytest.raises(DamagedError):
        decode(data)


@given(st.integers(2, 255), st.binary(max_size=50))
def test_newer_formats_are_told_apart(number, body):
    with pytest.raises(NewerFormatError) as caught:
        decode(sealed(b"FDM" + bytes([number]), body))
    assert caught.value.format == number


@given(st.binary(max_size=100))
def test_right_checksum_alone_is_not_enough(body):
    try:
        packets = decode(sealed(b"FDM\x01", body))
    except DamagedError:
        return
    assert packets


@pytest.mark.parametrize(
    "packet",
    [
        [],
        ["", b"x"],
        ["id", b""],
        ["id", "text"],
        ["id", b"x", -1],
        ["id", b"x", 0, 2**32],
        ["id", b"x", 0, 1, -1],
        ["id", b"x", 0, 1, 0, 0, 7],
        "id",
    ],
)
def test_packets_out_of_shape_are_damage(packet):
    with pytest.raises(DamagedError):
        decode(sealed(b"FDM\x01", msgspec.msgpack.encode([packet])))


def test_message_without_packets_is_damage():
    with pytest.raises(DamagedError):
        decode(encode([]))


def test_members_of_later_versions_ignored():
    known = ["id", b"x", 1, 2, 3, 4, "inbox"]
    later = sealed(b"FDM\x01", msgspec.msgpack.encode([[*known, "new", {"a": 1}], [*known, None]]))
    assert decode(later) == [StoredPacket("id", b"x", 1, 2, 3, 4, "inbox")] * 2


def test_members_that_an_earlier_one_lacked():
    assert decode(sealed(b"FDM\x01", msgspec.msgpack.encode([["id", b"x"]]))) == [StoredPacket("id", b"x")]
