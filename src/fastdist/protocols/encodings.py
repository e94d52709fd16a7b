"""Content-Encoding: bodies as they were before their senders packed them.

The rules:

1. No more than ``max_body`` bytes come out, and memory is of that order: decoding stops there (413). Sizes that a body
   claims to have are not believed.
2. A body that is cut, broken, or followed by anything is refused (400): nothing of it is used.
3. Decoding yields after each slice, so that others have their turn. A raw block of snappy can only be decoded at once:
   a large one is by another thread, as the library releases the interpreter's lock.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import cramjam

from fastdist._core import checksum
from fastdist.protocols.base import Reason, Refused, Slices

try:
    from isal import isal_zlib as zlib
except ImportError:  # there are processors that it is not made for
    import zlib  # type: ignore[no-redef]

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from fastdist.exchange import Request

    Decoding = Generator[Any, None, bytes]  # yields how many bytes there are, or None: see base.Work

ACCEPTED: Final = b"Accept-Encoding: gzip, deflate, zstd, snappy\r\n"
MAX_CODINGS: Final = 3  # of one body, within each other
MAX_MEMBERS: Final = 4096  # of gzip, frames of zstd, chunks of snappy without data
SMALL: Final = 64 * 1024  # bytes by which a body may grow without that being told
PIECE: Final = 64 * 1024  # bytes that are decoded at once
FIRST_INPUT: Final = 512  # bytes that a member is begun with: what it leaves of them is copied
GZIP, ZLIB, RAW_DEFLATE = 31, 15, -15  # window bits
MIN_WINDOW_LOG: Final = 23  # RFC 8878: what every decoder should support, 8 MiB
_ERRORS: Final[tuple[type[Exception], ...]] = (zlib.error, zstd.ZstdError)  # type: ignore[assignment]  # isal's stub
SNAPPY_MAGIC: Final = b"\xff\x06\x00\x00sNaPpY"
SNAPPY_CHUNK: Final = 65536  # bytes of a chunk of framed snappy, decoded
SNAPPY_RATIO: Final = 22  # bytes that a byte of a block decodes to: at best three are a copy of 64
LARGE_BLOCK: Final = 512 * 1024  # bytes that a raw block decodes to which takes a good part of a slice for that


def decode(request: Request, max_body: int, *, meaningless: str = "") -> Decoding:
    """Decode a request's body. ``meaningless``: a coding that is not to be looked at. Raises Refused."""
    body = request.body
    for name in reversed(codings(request.headers.get("content-encoding", ""))):
        if name != meaningless:
            body = yield from _DECODERS[name](body, max_body)
    if len(body) > max_body:
        raise too_large(max_body)
    if len(body) > len(request.body) + SMALL:
        yield len(body)
    return body


def codings(header: str) -> list[str]:
    """Return the content codings of a body, in the order in which they were applied, without ``identity``."""
    names = [name.strip().lower() for name in header.split(",")]
    names = [name for name in names if name not in ("", "identity")]
    for name in names:
        if name not in _DECODERS:
            detail = f"Content-Encoding {name} is not understood; use gzip, deflate, zstd or snappy"
            raise Refused(Reason.UNSUPPORTED, detail, headers=ACCEPTED)
    if len(names) > MAX_CODINGS:
        raise Refused(Reason.UNSUPPORTED, f"more than {MAX_CODINGS} content codings", headers=ACCEPTED)
    return names


def too_large(max_body: int) -> Refused:
    """Return the refusal of a body that is larger than it may be, as it was sent or decoded."""
    return Refused(Reason.TOO_LARGE, f"the body, decoded, is larger than server.max_body ({max_body} bytes)")


def _broken(name: str, what: str) -> Refused:
    return Refused(Reason.MALFORMED, f"the body is not {name}: {what}")


def _gzip(body: bytes, max_body: int) -> Decoding:
    return _members("gzip", body, max_body, lambda: _Inflate(GZIP))


def _deflate(body: bytes, max_body: int) -> Decoding:
    # RFC 9110 has zlib's format in mind; what its header cannot be is a bare deflate stream, as some clients send it.
    is_zlib = len(body) > 1 and body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0  # noqa: PLR2004
    return _members("deflate", body, max_body, lambda: _Inflate(ZLIB if is_zlib else RAW_DEFLATE), members=1)


def _zstd(body: bytes, max_body: int) -> Decoding:
    log = max(MIN_WINDOW_LOG, (max_body - 1).bit_length())
    parameter = zstd.DecompressionParameter.window_log_max
    options = {int(parameter): min(log, parameter.bounds()[1])}
    try:
        info = zstd.get_frame_info(body)
    except zstd.ZstdError as error:
        raise _broken("zstd", str(error)) from None
    if info.decompressed_size is not None and info.decompressed_size > max_body:  # its window may be too large as well
        raise too_large(max_body)
    return _members("zstd", body, max_body, lambda: zstd.ZstdDecompressor(options=options))


class _Inflate:
    """A zlib object with the methods of zstd's: it keeps the input that it has not used."""

    def __init__(self, window: int) -> None:
        self._zlib = zlib.decompressobj(window)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        return self._zlib.decompress(data or self._zlib.unconsumed_tail, max_length)


def _members(name: str, body: bytes, max_body: int, decoder: Callable[[], Any], members: int = MAX_MEMBERS) -> Decoding:
    """Decode members that follow each other: at least one, and nothing behind the last."""
    view, at, size, out, slices = memoryview(body), 0, 0, [], Slices()
    for _ in range(members):
        member, step = decoder(), FIRST_INPUT
        while not member.eof:
            hungry = member.needs_input
            data = view[at : at + step] if hungry else b""
            at += len(data)
            step = min(step * 2, PIECE)
            try:
                piece = member.decompress(data, min(PIECE, max_body - size + 1))
            except _ERRORS as error:
                raise _broken(name, str(error)) from None
            if hungry and not data and not piece and not member.eof:
                raise _broken(name, "it is cut")
            size += len(piece)
            if size > max_body:
                raise too_large(max_body)
            out.append(piece)
            if slices.over():
                yield size
        at -= len(member.unused_data)
        if at == len(body):
            return b"".join(out)
    raise _broken(name, "there is more behind its end" if members == 1 else f"it has more than {members} members")


def _snappy(body: bytes, max_body: int) -> Decoding:
    return _snappy_frames(body, max_body) if body.startswith(SNAPPY_MAGIC) else snappy_block(body, max_body)


def snappy_block(body: bytes, max_body: int) -> Decoding:
    """Decode a raw block of snappy. Raises Refused."""
    size = _block_size(body, max_body)
    if size <= LARGE_BLOCK:
        return _block(body, max_body)
    future = _thread().submit(_block, body, max_body)
    try:
        while not future.done():
            yield min(size, SNAPPY_RATIO * len(body))  # which may be there before this is asked again
    finally:
        future.cancel()  # its request may be gone
    return future.result()


def _block(body: bytes | memoryview, max_body: int) -> bytes:
    _block_size(body, max_body)
    try:
        return bytes(cramjam.snappy.decompress_raw(body))
    except cramjam.DecompressionError as error:
        raise _broken_block(error) from None


def _block_size(body: bytes | memoryview, max_body: int) -> int:
    """Return how many bytes a block claims to decode to; no more come out of it."""
    try:
        size = cramjam.snappy.decompress_raw_len(body)
    except cramjam.DecompressionError as error:
        raise _broken_block(error) from None
    if size > max_body:
        raise too_large(max_body)
    return size


def _broken_block(error: cramjam.DecompressionError) -> Refused:
    return _broken("snappy", str(error).removeprefix("snappy: "))


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="snappy")


def _snappy_frames(body: bytes, max_body: int) -> Decoding:
    """Decode snappy's framing format: chunks of a type, 24 bits of length, and a checksum before the data."""
    view, at, size, skipped, out, slices = memoryview(body), 0, 0, 0, [], Slices()
    while at < len(body):
        kind, length = body[at], int.from_bytes(body[at + 1 : at + 4], "little")
        at += 4
        chunk = view[at : at + length]
        at += length
        if at > len(body) or (kind == 0xFF and chunk != SNAPPY_MAGIC[4:]) or 0x02 <= kind < 0x80:  # noqa: PLR2004
            raise _broken("snappy", f"there is no whole chunk before byte {min(at, len(body))}")
        if kind > 0x01:  # padding, and what may be skipped
            skipped += 1
            if skipped > MAX_MEMBERS:
                raise _broken("snappy", f"more than {MAX_MEMBERS} chunks have no data")
        else:
            piece = _chunk(kind, chunk)
            size += len(piece)
            if size > max_body:
                raise too_large(max_body)
            out.append(piece)
        if slices.over():
            yield size
    return b"".join(out)


def _chunk(kind: int, chunk: memoryview) -> bytes:
    data = chunk[4:]
    try:
        piece = bytes(data) if kind else _block(data, SNAPPY_CHUNK)
    except Refused as error:  # also one that is larger than a chunk may be
        raise _broken("snappy", error.detail) from None
    crc = checksum(piece)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if len(chunk) < 4 or len(piece) > SNAPPY_CHUNK or masked != int.from_bytes(chunk[:4], "little"):  # noqa: PLR2004
        raise _broken("snappy", "the checksum of a chunk is wrong")
    return piece


_DECODERS: Final[dict[str, Callable[[bytes, int], Decoding]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "zlib": _deflate,  # the Collector's name for it
    "zstd": _zstd,
    "snappy": _snappy,
    "x-snappy-framed": _snappy,
}
