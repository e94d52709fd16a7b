"""Content decoding: what was encoded comes out, if it is whole, not too large, and nothing is behind it."""

from __future__ import annotations

import gzip
import os
import random
import tracemalloc
import zlib
from concurrent.futures import Future
from types import SimpleNamespace

import cramjam
import pytest
from agents import header, refusal, request
from hypothesis import example, given
from hypothesis import strategies as st

from fastdist._core import checksum
from fastdist.protocols import encodings
from fastdist.protocols.base import Reason, Refused

zstd = encodings.zstd
MAX = 1 << 20


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def framed(data):
    out = encodings.SNAPPY_MAGIC
    for at in range(0, len(data), 65536):
        piece = data[at : at + 65536]
        crc = checksum(piece)
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        block = masked.to_bytes(4, "little") + bytes(cramjam.snappy.compress_raw(piece))
        out += b"\0" + len(block).to_bytes(3, "little") + block
    return out


PACKERS = {
    "gzip": gzip.compress,
    "GZip": lambda data: gzip.compress(data[:3]) + gzip.compress(data[3:]) + gzip.compress(b""),
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "zlib": zlib.compress,
    "Deflate": raw_deflate,
    "zstd": zstd.compress,
    "ZSTD": lambda data: zstd.compress(data[:3]) + zstd.compress(data[3:]),
    "snappy": lambda data: bytes(cramjam.snappy.compress_raw(data)),
    "Snappy": framed,
    "x-snappy-framed": lambda data: bytes(cramjam.snappy.compress(data)) or encodings.SNAPPY_MAGIC,
}


def decode(body, coding, max_body=MAX):
    work = encodings.decode(request("/ingest", body, content_encoding=coding), max_body)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def reason(body, coding, max_body=MAX):
    with pytest.raises(Refused) as caught:
        decode(body, coding, max_body)
    return caught.value.reason


@pytest.mark.parametrize("coding", PACKERS)
@given(data=st.binary(max_size=2000))
@example(b"")
@example(b"log line\n" * 30_000)
@example(random.Random(1).randbytes(300_000))
def test_what_was_encoded_comes_out(coding, data):
    assert decode(PACKERS[coding](data), coding) == data


@pytest.mark.parametrize("coding", PACKERS)
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_what_ends_with_a_piece_comes_out(coding, pieces):
    for data in (random.Random(pieces).randbytes(pieces * encodings.PIECE), bytes(pieces * encodings.PIECE)):
        for size in (len(data) - 1, len(data)):
            assert decode(PACKERS[coding](data[:size]), coding) == data[:size]


@pytest.mark.parametrize("coding", ["", "identity", " Identity , "])
def test_identity_is_left_alone(coding):
    assert decode(b"\x1f\x8bas it is", coding) == b"\x1f\x8bas it is"


def test_codings_are_undone_in_reverse_order():
    assert decode(zstd.compress(gzip.compress(b"x" * 99)), "gzip, zstd") == b"x" * 99


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, br", "x", "gzip, " * 9 + "gzip"])
def test_unknown_codings_are_415(coding):
    error, reply = refusal("/ingest", b"{}", content_encoding=coding)
    assert (error.reason, reply.status) == (Reason.UNSUPPORTED, 415)
    assert header(reply, "Accept-Encoding") == "gzip, deflate, zstd, snappy"


@pytest.mark.parametrize("coding", PACKERS)
def test_a_body_cut_anywhere_is_400(coding):
    data = b"some log lines, some log lines\n" * 9
    whole = PACKERS[coding](data)
    cuts = [cut for cut in range(len(whole)) if cut != len(encodings.SNAPPY_MAGIC) or "snappy" not in coding.lower()]
    for cut in cuts:
        try:
            assert decode(whole[:cut], coding) in (b"", data[:3], data)  # between two members
        except Refused as error:
            assert error.reason is Reason.MALFORMED  # noqa: PT017 - the other outcome is no exception


@pytest.mark.parametrize("coding", PACKERS)
@pytest.mark.parametrize("noise", [b"\0", b"x", b"noise behind the end", b"\0" * 100])
def test_noise_behind_the_end_is_400(coding, noise):
    assert reason(PACKERS[coding](b"data" * 100) + noise, coding) is Reason.MALFORMED


@pytest.mark.parametrize("coding", PACKERS)
@given(data=st.binary(max_size=300), place=st.integers(0, 1000), bit=st.integers(0, 7))
def test_damage_is_an_error_or_harmless(coding, data, place, bit):
    body = bytearray(PACKERS[coding](data))
    body[place % len(body)] ^= 1 << bit
    try:
        assert len(decode(bytes(body), coding)) <= MAX
    except Refused as error:
        assert error.reason in (Reason.MALFORMED, Reason.TOO_LARGE)  # noqa: PT017 - the other outcome is no exception


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "snappy", "x-snappy-framed"])
@given(body=st.binary(max_size=300))
def test_noise_is_an_error(coding, body):
    try:
        decode(body, coding)
    except Refused as error:
        assert error.reason in (Reason.MALFORMED, Reason.TOO_LARGE)  # noqa: PT017 - the other outcome is no exception


@pytest.mark.parametrize("coding", PACKERS)
def test_limit_is_exact(coding):
    data = os.urandom(5000) + b"x" * 5000
    assert decode(PACKERS[coding](data), coding, len(data)) == data
    assert reason(PACKERS[coding](data), coding, len(data) - 1) is Reason.TOO_LARGE


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "snappy", "x-snappy-framed"])
def test_a_bomb_costs_memory_like_max_body(coding):
    bomb = PACKERS[coding](bytes(64 << 20))
    tracemalloc.start()
    assert reason(bomb, coding) is Reason.TOO_LARGE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff\xff\xff\x0f\x00",  # snappy: 4 GiB
        b"\xff\xff\xff\xff\xff\xff\xff\x00",
        b"\x80\x80\x40" + b"\0",  # 1 MiB, and nothing of it
    ],
)
def test_snappy_sizes_are_not_believed(body):
    assert reason(body, "snappy") in (Reason.TOO_LARGE, Reason.MALFORMED)


@pytest.mark.parametrize("size", [-1, 0, 1, 700_000])
def test_large_block_is_decoded_beside(size, monkeypatch):
    """By another thread, whose errors are told as well; small ones at once."""
    data = random.Random(size).randbytes(encodings.LARGE_BLOCK + size)
    block = PACKERS["snappy"](data)
    outcome, submitted, thread = [], [], encodings._thread()

    def submit(*args):
        submitted.append(thread.submit(*args))
        return submitted[-1]

    def steps():
        outcome.append((yield from encodings.snappy_block(block, len(data))))

    monkeypatch.setattr(encodings, "_thread", lambda: SimpleNamespace(submit=submit))
    for _ in steps():
        pass
    assert outcome == [data]
    assert len(submitted) == (size > 0)
    assert reason(block, "snappy", len(data) - 1) is Reason.TOO_LARGE
    assert reason(block[:-1], "snappy", len(data)) is Reason.MALFORMED


def test_blocks_count_while_they_are_decoded(monkeypatch):
    """Very many may be decoded before the first of them is asked for."""
    submitted = []

    def submit(*_):
        submitted.append(Future())
        return submitted[-1]

    monkeypatch.setattr(encodings, "_thread", lambda: SimpleNamespace(submit=submit))
    work = encodings.snappy_block(PACKERS["snappy"](bytes(MAX - 1)), MAX)
    assert next(work) == MAX - 1
    work.close()
    assert submitted[0].cancelled()
    claims = encodings.snappy_block(b"\x80\x80\x40" + bytes(9), MAX)
    assert next(claims) < 1000, "so short a block has no 1 MiB"


def test_zstd_with_a_huge_window_is_refused():
    parameter = zstd.CompressionParameter
    packer = zstd.ZstdCompressor(options={parameter.window_log: 30, parameter.content_size_flag: 0})
    body = packer.compress(b"x" * 100) + packer.flush()
    assert reason(body, "zstd") in (Reason.MALFORMED, Reason.TOO_LARGE)


def test_very_many_members_end():
    assert reason(gzip.compress(b"") * 10_000, "gzip") is Reason.MALFORMED
    assert reason(zstd.compress(b"") * 10_000, "zstd") is Reason.MALFORMED
    assert decode(gzip.compress(b"ab") * 1000, "gzip") == b"ab" * 1000


def test_decoding_goes_on_in_slices(monkeypatch):
    monkeypatch.setattr("fastdist.protocols.base.SLICE_NS", 0)
    work = encodings.decode(request("/ingest", gzip.compress(bytes(MAX)), content_encoding="gzip"), MAX)
    assert sum(1 for _ in work) > 3
