"""Rings in file format 1, as fastdist wrote them before format 2: read here and written nowhere.

Such a file is two copies of a header and a data area that is written round and round. A record's position is the bytes
written before it, its place in the area that modulo the capacity; what lies between the positions ``head`` and ``tail``
and is not done waits to be delivered. All checksums are seeded with the ring's salt, so that neither another ring's
records nor a body that looks like a record is ever taken for one.

Damage costs only the packets it hit: what is no record is skipped up to the next sound one, either header copy is
enough, and without sound positions all of the area counts as in use. A record that stood in the way was moved: the old
one counts unless its copy is found, rather twice than never.

The file is read with ``pread``, a window at a time. What is missing or cannot be read is taken for zeros, and named.
"""

from __future__ import annotations

import os
import struct
import uuid
from typing import TYPE_CHECKING, Final, NamedTuple

from fastdist._core import RingError, checksum

if TYPE_CHECKING:
    from collections.abc import Iterator

_VERSION: Final = 1
_MAGIC: Final = b"fdring\r\n"
_COPIES: Final = (0, 32768)  # where the header is in the file
_AREA: Final = 65536  # where the data area begins; its capacity is a multiple of this
_WINDOW: Final = 1 << 20  # bytes
_PAGE: Final = 4096

_HEADER: Final = struct.Struct("=8sIIqQ16s16sq qqQI")  # in the machine's byte order, as all here
_FIXED: Final = 72  # bytes of a header up to the head: what its checksum covers
_RECORD: Final = struct.Struct("=IIqQ16sqQIIBBHI IIII")
_SEALED, _STATE = 8, 72  # of a record: where what its head_crc covers begins, and where it ends
_RECORD_MAGIC: Final = 0xFD5EC0DE
_RECORD_BYTES: Final = struct.pack("=I", _RECORD_MAGIC)
_GAP_MAGIC: Final = 0xFD5E0FF5  # in the place of head_crc stands the gap's length, in 8-byte words
_MOVED: Final = 0x2CC32CC3  # states; any other word than these two means that the packet waits
_DONE: Final = 0x6E3C6E3C


class Format1Packet(NamedTuple):
    """A packet that waits; its fields are the arguments of ``PacketRing.push``."""

    body: bytes
    key: str | None  # the Idempotency-Key; without one the packet's id is ``packet_id``
    packet_id: bytes  # UUIDv7
    messages: int
    emitter: int  # hash of the emitterId
    accepted_ns: int  # wall clock
    attempts: int
    flags: int

    @property
    def id(self) -> str:
        """The packet's id as the API shows it."""
        return self.key or str(uuid.UUID(bytes=self.packet_id))


class _Header(NamedTuple):
    magic: bytes
    version: int
    header_crc: int  # of the fixed part, this field taken as 0
    capacity: int
    salt: int
    ring_id: bytes
    boot_id: bytes
    created_ns: int
    head: int
    tail: int
    next_sequence: int
    position_crc: int  # of the three

    @property
    def is_possible(self) -> bool:
        return self.capacity > 0 and self.capacity % _AREA == 0


class _Record(NamedTuple):
    magic: int
    head_crc: int
    position: int
    sequence: int
    packet_id: bytes
    accepted_ns: int
    emitter: int
    body_length: int
    messages: int
    key_length: int
    flags: int
    reserved: int
    body_crc: int  # of key and body
    state: int
    attempts: int
    words_to_copy: int  # of a moved record: 8-byte words to the end of its copy
    moved: int

    @property
    def size(self) -> int:
        return (_RECORD.size + self.key_length + self.body_length + 7) & ~7


def is_format1(fd: int) -> bool:
    """Return whether the open file has a sound header of format 1, and none of a newer format. Raises OSError."""
    versions = {header.version for header, _ in _headers(_File(fd)) if header is not None}
    return bool(versions) and max(versions) == _VERSION


def read(fd: int) -> Format1Ring:
    """Return the ring in an open file for which ``is_format1`` holds. Raises OSError, RingError: it cannot be read."""
    return Format1Ring(_File(fd))


class Format1Ring:
    """What is in a ring of format 1; the file stays as it is.

    ``waiting`` reads it. At its end, ``undone`` packets with records of ``undone_bytes`` were yielded, ``corrupt``
    records (or what was taken for one) were lost, and ``damage`` lists all that is wrong: (offset in the file, what).
    ``notes`` is the same of what a kill may leave, and costs nothing.
    """

    def __init__(self, file: _File) -> None:
        self.damage, self.notes = file.damage, list[tuple[int, str]]()
        self.corrupt = self.undone = self.undone_bytes = 0
        self._file = file
        self._next_sound = 0  # position of the record behind damage that was searched for last
        copies = self._sound_copies()
        header, _ = copies[-1]
        self.capacity = header.capacity
        if not header.is_possible:
            raise RingError(f"a capacity of {self.capacity} bytes, which no ring has")
        if file.size < _AREA + self.capacity:
            self.damage.append((file.size, f"cut short: {_AREA + self.capacity - file.size} bytes are missing"))
        self._area = _Area(file, header)
        self._head, self._tail = self._ends(copies)

    @property
    def used(self) -> int:
        """Bytes between head and tail: no less than the records of all that waits."""
        return self._tail - self._head

    def waiting(self) -> Iterator[Format1Packet]:
        """Yield each packet that waits, in the ring's order, then moved ones whose copy was lost; for one call only."""
        moved: dict[int, _Record] = {}  # by sequence, those whose copy is yet to be met
        position = self._head
        while position < self._tail:
            record = self._area.record(position)
            if not self._area.is_sound(record, position, self._tail):
                position = self._skip(record, position)
                continue
            position += record.size
            packet = self._packet(record) if record.state != _DONE else None
            if packet is None and record.state != _DONE:  # damaged, and so no copy: the old one still counts
                continue
            self._settle(record, moved)
            if record.state == _MOVED:
                moved[record.sequence] = record
            elif packet is not None:
                yield self._counted(packet, record)
        for record in moved.values():
            packet = self._packet(record)
            if packet is not None:
                yield self._counted(packet, record)

    def _sound_copies(self) -> list[tuple[_Header, int]]:
        """Return the sound header copies of this ring and where they are, at least one."""
        found = _headers(self._file)
        copies = [(header, offset) for header, offset in found if header is not None]
        if not copies:
            raise RingError("no intact ring header")
        stray = self._stray(copies)
        for copy in found:
            if copy[0] is None:
                self.damage.append((copy[1], "header copy"))
            elif copy == stray:
                self.damage.append((copy[1], "header copy of another ring"))
        return [copy for copy in copies if copy != stray]

    def _stray(self, copies: list[tuple[_Header, int]]) -> tuple[_Header, int] | None:
        """Return which copy is another ring's, None without one: that whose salt fewer of the records have."""
        if len({(header.salt, header.ring_id) for header, _ in copies}) == 1:
            return None
        return min(reversed(copies), key=lambda copy: self._count(copy[0]))

    def _count(self, header: _Header) -> int:
        return sum(1 for _ in _Area(self._file, header).all_records()) if header.is_possible else 0

    def _ends(self, copies: list[tuple[_Header, int]]) -> tuple[int, int]:
        """Return head and tail: of the copy that knows of more, or found by the records when both are torn."""
        sound = [header for header, _ in copies if header.position_crc == _position_crc(header)]
        torn = [(offset, "positions in a header copy") for header, offset in copies if header not in sound]
        if sound:
            self.notes += torn  # a process was killed while it wrote one of them
            latest = max(sound, key=lambda header: (header.next_sequence, header.head))
            return latest.head, latest.tail
        self.damage += torn
        tail = max((position + size for position, size in self._area.all_records()), default=0)
        first = tail - self.capacity
        return min((position for position, _ in self._area.all_records() if position >= first), default=tail), tail

    def _skip(self, record: _Record, position: int) -> int:
        """Return where to go on behind what is no record: at the end of a gap, else at the next sound record."""
        if self._next_sound <= position:
            self._next_sound = self._area.next_sound(position + 8, self._tail)
        if record.magic == _GAP_MAGIC and 0 < 8 * record.head_crc <= self._next_sound - position:
            return position + 8 * record.head_crc
        self._report(position, f"{self._next_sound - position} bytes that are no record")
        return self._next_sound

    def _packet(self, record: _Record) -> Format1Packet | None:
        """Return the packet of a record whose head is sound; None, and it is reported, when the rest is not."""
        length = record.key_length
        payload = self._area.bytes_at(record.position + _RECORD.size, length + record.body_length)
        packet = Format1Packet(
            payload[length:],
            payload[:length].decode("latin-1") if length else None,
            record.packet_id,
            record.messages,
            record.emitter,
            record.accepted_ns,
            record.attempts,
            record.flags,
        )
        if checksum(payload, self._area.seed) == record.body_crc:
            return packet
        self._report(record.position, f"checksum of packet {packet.id}")
        return None

    def _settle(self, record: _Record, moved: dict[int, _Record]) -> None:
        """Take a moved record off the list when this is its copy.

        One that is done is if the moved record points to it. It may be an earlier copy: after a power cut a record may
        be as it was before it was moved, and be moved once more.
        """
        old = moved.get(record.sequence)
        if old is not None and (
            record.state != _DONE or old.position + 8 * old.words_to_copy == record.position + record.size
        ):
            del moved[record.sequence]

    def _counted(self, packet: Format1Packet, record: _Record) -> Format1Packet:
        self.undone += 1
        self.undone_bytes += record.size
        return packet

    def _report(self, position: int, what: str) -> None:
        self.corrupt += 1
        self.damage.append((_AREA + position % self.capacity, what))


class _Area:
    """The data area, by position, and the records in it; it keeps the window that was read last."""

    def __init__(self, file: _File, header: _Header) -> None:
        self.seed = _seed(header)
        self._file = file
        self._capacity = header.capacity
        self._start, self._window = 0, b""

    def record(self, position: int) -> _Record:
        """Return what is there if a record is."""
        at = self._find(position, _RECORD.size)
        return _Record._make(_RECORD.unpack_from(self._window, at))

    def bytes_at(self, position: int, size: int) -> bytes:
        at = self._find(position, size)
        return self._window[at : at + size]

    def is_sound(self, record: _Record, position: int, end: int) -> bool:
        """Return whether a whole record starts at this position and ends by ``end``; says nothing of its body."""
        if record.magic != _RECORD_MAGIC or record.position != position or position + record.size > end:
            return False
        at = self._find(position, _RECORD.size)
        return record.head_crc == checksum(self._window[at + _SEALED : at + _STATE], self.seed)

    def next_sound(self, start: int, end: int) -> int:
        """Return the position of the next sound record, ``end`` without one."""
        for position in self._candidates(start, end):
            if self.is_sound(self.record(position), position, end):
                return position
        return end

    def all_records(self) -> Iterator[tuple[int, int]]:
        """Yield (position, size) of each sound record there is, of whatever lap, in the file's order."""
        for offset in self._candidates(0, min(self._capacity, self._file.size)):
            record = self.record(offset)
            position = record.position
            if position % self._capacity == offset and self.is_sound(record, position, position + self._capacity):
                yield position, record.size

    def _candidates(self, start: int, end: int) -> Iterator[int]:
        """Yield where a record's magic stands."""
        while start < end:
            at = self._find(start, 8)
            found = self._window.find(_RECORD_BYTES, at)
            if found < 0:
                start += len(self._window) - at
                continue
            found += start - at
            start = (found | 7) + 1
            if found % 8 == 0 and found < end:
                yield found

    def _find(self, position: int, size: int) -> int:
        """See to it that these bytes are in the window, of whatever lap; return where."""
        at = (position - self._start) % self._capacity
        if at + size > len(self._window):
            self._start, self._window = position, self._read(position, size)
            return 0
        return at

    def _read(self, position: int, size: int) -> bytes:
        size = max(min(_WINDOW, self._capacity), size + -size % 8)
        offset = position % self._capacity
        first = min(size, self._capacity - offset)
        return self._file.read(_AREA + offset, first) + self._file.read(_AREA, size - first)


class _File:
    """An open file of which nothing is ever changed; what cannot be read is in ``damage``."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        self.damage: list[tuple[int, str]] = []
        self._fd = fd
        self._unreadable: set[int] = set()  # pages

    def read(self, offset: int, size: int) -> bytes:
        """Return so many bytes; zeros for those behind the file's end, and for pages that cannot be read."""
        pieces, at, end = list[bytes](), offset, offset + size
        while at < end and (piece := self._piece(at, end)):
            pieces.append(piece)
            at += len(piece)
        return b"".join(pieces).ljust(size, b"\0")

    def _piece(self, offset: int, end: int) -> bytes:
        page_end = min(end, offset + _PAGE - offset % _PAGE)
        try:
            return os.pread(self._fd, end - offset, offset)
        except OSError:
            try:  # what can be read before and behind the fault is
                return os.pread(self._fd, page_end - offset, offset)
            except OSError as error:
                self._report(offset // _PAGE, error)
                return bytes(page_end - offset)

    def _report(self, page: int, error: OSError) -> None:
        """List the page unless it is known, or the one before it is."""
        if not {page - 1, page} & self._unreadable:
            self.damage.append((page * _PAGE, f"cannot be read: {error.strerror} (errno {error.errno})"))
        self._unreadable.add(page)


def _headers(file: _File) -> list[tuple[_Header | None, int]]:
    """Return each header copy, None for one that is not sound, and where it is."""
    return [(_header(file.read(offset, _HEADER.size)), offset) for offset in _COPIES]


def _header(data: bytes) -> _Header | None:
    header = _Header._make(_HEADER.unpack(data))
    sealed = data[:12] + bytes(4) + data[16:_FIXED]
    return header if header.magic == _MAGIC and header.header_crc == checksum(sealed) else None


def _seed(header: _Header) -> int:
    return checksum(struct.pack("=Q", header.salt))


def _position_crc(header: _Header) -> int:
    return checksum(struct.pack("=qqQ", header.head, header.tail, header.next_sequence), _seed(header))
