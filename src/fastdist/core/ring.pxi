"""The packet ring: queue, store and in-flight table of one worker, in a shared mapping (memfd or file).

Facts it rests on:
1. One process writes a ring at a time. Positions are bytes since the ring was made and only grow; the place of a record
   is its position modulo the capacity. The data area is mapped twice in a row, so every record is contiguous.
2. A push writes the record, then publishes the tail. A process that dies in between leaves nothing behind.
3. Records are done out of order; the head moves over done ones. What lies between head and tail and is not done has not
   been delivered, whatever else was lost: the ring is the truth, counters are reconciled with it.
4. A claimed record is known by its handle, because it may move: when records at the head cannot be delivered and space
   runs short, they are copied to the tail (same sequence, id, time, attempts). The old one counts until the copy is synced.
5. Both header copies carry the positions, each with a checksum of its own; either copy is enough. They are written one
   after the other, so whenever the process dies one of them is whole. All checksums are seeded with the ring's salt, so
   neither another ring's records nor a body that looks like a record is ever taken for one.
6. What is synced is a position: ``mark_synced`` tells that all before it is on stable storage. A sync reads
   ``tail_position`` first. After a sync that failed it is unknown what reached the disk: what was not synced before is
   withdrawn, and everything is written again (``write_again``). The header keeps that position, or that a sync has failed
   (``forget_synced``), for the process that opens the ring next: a process that was killed cannot tell.
7. Opening a ring writes only what has to change: a backlog is not to be copied, or written back, for being looked at.
8. Packets are stamped with the monotonic clock plus ``clock_offset``: the wall clock, but that it does not jump when that
   is set. So spans are right within a run, whose processes all have one offset, and as good as the clocks over restarts.
"""

cdef enum:
    PUSHED = 0
    RING_FULL
    TOO_BIG

cdef enum:
    WAITED = 1           # flag of a record: an emitter waits for its delivery (Prefer: wait)

cdef enum:
    ID_TEXT = 64         # the longest id, in characters

# The states have a large Hamming distance: a flipped bit never turns one into another.
cdef enum:
    QUEUED = 0x51AA51AA
    MOVED = 0x2CC32CC3
    DONE = 0x6E3C6E3C

cdef struct Record:
    # Sealed by head_crc (from position to body_crc), once, when the record is written.
    uint32_t magic
    uint32_t head_crc
    int64_t position         # where the record starts, in bytes since the ring was made: tells laps apart
    uint64_t sequence        # of the push, from 1; a moved record keeps it
    uint8_t id[16]           # UUIDv7, unless there is a key
    int64_t accepted_ns      # wall clock of the run (clock_offset)
    uint64_t emitter         # hash of the emitterId
    uint32_t body_length     # bytes
    uint32_t messages
    uint8_t key_length       # of the Idempotency-Key that stands before the body; 0: none
    uint8_t flags
    uint16_t reserved
    uint32_t body_crc        # of key and body
    # Changed in place during the record's life.
    uint32_t state
    uint32_t attempts        # begun
    uint32_t handle          # while claimed; else 0 or stale (is_claimed tells). Of a moved one: 8-byte words to its copy's end
    uint32_t moved           # 1: a copy: of a record that stood in the way, or that another ring held

cdef struct Entry:
    int64_t position         # of the record, which may be moved while it is claimed
    int64_t since_ns         # monotonic clock: when it joined the list it is in
    uint32_t next            # handle of the next in that list; 0 ends it
    uint32_t flags           # for the list's owner

cdef struct Header:
    char magic[8]
    uint32_t version
    uint32_t header_crc      # of the fixed part: magic to created_ns, this field taken as 0
    int64_t capacity
    uint64_t salt            # seeds every checksum, so that no body can imitate a record
    uint8_t ring_id[16]
    uint8_t boot_id[16]
    int64_t created_ns
    int64_t head             # changes from here on
    int64_t tail
    uint64_t next_sequence
    uint32_t position_crc    # of the three
    uint32_t reserved
    int64_t trusted          # position: a sync has covered all before it; -1: one has failed since
    uint32_t trusted_crc     # of that

cdef enum:
    HEADER_BYTES = 65536     # both copies; a whole number of pages wherever Linux runs
    SECOND_COPY = 32768
    FORMAT = 1
    RECORD_MAGIC = 0xFD5EC0DE
    GAP_MAGIC = 0xFD5E0FF5   # followed by the gap's length in 8-byte words
    MOVES_A_PUSH = 16
    A_COPY = 0x100           # beside the flags of a push: of a packet another ring holds
    A_STEP = 1000000000      # ns by which the wall clock has to differ from what it was to have been set

cdef int64_t FOREVER = 0x7FFFFFFFFFFFFFFF
cdef char *HEADER_MAGIC = b"fdring\r\n"

HEADER_SIZE = HEADER_BYTES
FORMAT_VERSION = FORMAT
FLAG_WAITED = WAITED
STATES = {QUEUED: "queued", MOVED: "moved", DONE: "done"}

Packet = namedtuple("Packet", "sequence id body attempts accepted_ns messages emitter flags")
Packet.__doc__ = "A record as Python sees it: ``body`` is a copy, ``accepted_ns`` nanoseconds of the wall clock, as it is set now."

cdef int64_t record_size(Record *record) noexcept nogil:
    return (<int64_t>sizeof(Record) + record.key_length + record.body_length + 7) & ~<int64_t>7


cdef const unsigned char *record_body(Record *record) noexcept nogil:
    return <unsigned char *>record + sizeof(Record) + record.key_length


cdef size_t write_id(Record *record, char *text) noexcept nogil:
    """Write the packet's id to ``text`` (ID_TEXT bytes) and return its length."""
    if record.key_length:
        memcpy(text, <unsigned char *>record + sizeof(Record), record.key_length)
        return record.key_length
    write_uuid(record.id, text)
    return 36


def file_size(int64_t capacity):
    """Return the size in bytes of the file or memfd that holds a ring of ``capacity`` bytes."""
    return HEADER_BYTES + round_capacity(capacity)


def round_capacity(int64_t capacity):
    """Return ``capacity`` rounded up to whole pages (of the largest size Linux has)."""
    return max(HEADER_BYTES, (capacity + HEADER_BYTES - 1) // HEADER_BYTES * HEADER_BYTES)


class RingError(Exception):
    """The file is no ring, or one that cannot be opened as it is; the text says why."""


class CutShortError(RingError):
    """The header is sound and speaks of ``capacity`` bytes, which the file does not have."""

    def __init__(self, capacity):
        super().__init__(f"the file is shorter than the {capacity} bytes its header speaks of")
        self.capacity = capacity


class NewerFormatError(RingError):
    """A newer version has written the file, and only that can read it."""


@cython.final
cdef class PacketRing:
    """A ring over the open file ``fd`` (of ``file_size(capacity)`` bytes, read-write; not closed here).

    ``capacity``: make a new ring; None: open the one that is there (RingError without one) and recover it.
    ``claims_wait_for_sync``: records can be claimed once ``mark_synced`` has covered them (durability fsync).
    ``volatile``: nothing outlives the kernel, so nothing ever waits for a sync (durability memory).
    ``private``: look at a ring without changing it, on a copy (``fd`` may be read-only).
    """

    cdef unsigned char *headers
    cdef unsigned char *data       # `capacity` bytes, mapped twice in a row: no record is ever split
    cdef readonly int64_t capacity
    cdef int64_t head, tail, cursor
    cdef uint64_t next_sequence
    cdef uint32_t seed
    cdef Entry *entries
    cdef uint32_t entry_count, free_entry
    cdef uint32_t released_first, released_last
    cdef readonly uint32_t claimed
    cdef public int64_t clock_offset   # ns from the monotonic clock to the one packets are stamped with
    cdef readonly int64_t undone       # packets pushed and not done
    cdef readonly int64_t undone_bytes # of records, headers included
    cdef readonly int64_t corrupt
    cdef int64_t largest               # bytes of the largest record since the ring was empty, at least
    cdef int64_t synced, settled       # positions: on stable storage up to; nothing but done and moved records up to
    cdef int64_t answered              # position: packets before it are not withdrawn any more
    cdef int64_t trusted               # as the header has it
    cdef bint claims_wait_for_sync
    cdef uint32_t moved_alive
    cdef int64_t moved_oldest_ns
    cdef readonly list damage          # (offset in the file, what) of all that was found wrong
    cdef readonly list notes           # the same of what is no damage: a process was killed while it wrote there
    cdef int sharing

    cdef inline Record *record_of(self, uint32_t handle) noexcept nogil:
        return self.at(self.entries[handle].position)

    cdef inline Record *at(self, int64_t position) noexcept nogil:
        return <Record *>(self.data + position % self.capacity)

    cdef inline bint is_claimed(self, Record *record) noexcept nogil:
        return 0 < record.handle < self.entry_count and self.entries[record.handle].position == record.position

    def __cinit__(self, int fd, capacity=None, bint claims_wait_for_sync=False, bint volatile=False, bint private=False):
        self.damage, self.notes = [], []
        self.sharing = MAP_PRIVATE if private else MAP_SHARED
        self.claims_wait_for_sync = claims_wait_for_sync
        self.synced = self.answered = FOREVER if volatile else 0
        self._map_headers(fd)
        if capacity is None:
            self._open(fd)
        else:
            self._create(fd, round_capacity(capacity))
        self.clock_offset = wall_ns() - mono_ns()
        self.new_entry()  # handle 0 stands for none
        self.claimed = 0
        if capacity is None:
            self._recover()
        self.cursor = self.head

    def __dealloc__(self):
        if self.headers != NULL:
            munmap(self.headers, HEADER_BYTES)
        if self.data != NULL:
            munmap(self.data, 2 * self.capacity)
        free(self.entries)

    # ---- mapping

    def _map_headers(self, int fd):
        cdef void *at
        if os.fstat(fd).st_size < HEADER_BYTES:
            raise RingError("shorter than a ring's header")
        at = mmap(NULL, HEADER_BYTES, PROT_READ | PROT_WRITE, self.sharing, fd, 0)
        if at == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.headers = <unsigned char *>at

    def _map_data(self, int fd, int64_t capacity):
        cdef unsigned char *base
        cdef int half
        if os.fstat(fd).st_size < HEADER_BYTES + capacity:
            raise CutShortError(capacity)
        base = <unsigned char *>mmap(NULL, 2 * capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if base == <unsigned char *>MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.data, self.capacity = base, capacity
        for half in range(2):
            if mmap(base + half * capacity, capacity, PROT_READ | PROT_WRITE, self.sharing | MAP_FIXED, fd,
                    HEADER_BYTES) == MAP_FAILED:
                raise OSError(errno, os.strerror(errno))

    def _create(self, int fd, int64_t capacity):
        cdef Header *header = <Header *>self.headers
        cdef bytes noise = os.urandom(24)
        cdef bytes boot = boot_id()
        self._map_data(fd, capacity)
        memset(self.headers, 0, HEADER_BYTES)
        memcpy(header.magic, HEADER_MAGIC, 8)
        header.version = FORMAT
        header.capacity = capacity
        memcpy(&header.salt, <char *>noise, 8)
        memcpy(header.ring_id, <char *>noise + 8, 16)
        memcpy(header.boot_id, <char *>boot, 16)
        header.created_ns = wall_ns()
        header.header_crc = header_crc(header)
        memcpy(self.headers + SECOND_COPY, self.headers, sizeof(Header))
        self.seed = crc32c(0, &header.salt, 8)
        self.next_sequence = 1
        self.publish()
        self.publish_trusted()

    def _open(self, int fd):
        """Read whichever header copies are sound; of two, the one that knows of more."""
        cdef Header *header = NULL
        cdef Header *copy
        cdef bint known = False
        cdef int i, stray = self._stray_copy(fd)
        newer, torn = 0, []
        for i in range(2):
            copy = <Header *>(self.headers + i * SECOND_COPY)
            if i == stray:
                self.damage.append((i * SECOND_COPY, "header copy of another ring"))
            elif copy.magic[:8] != HEADER_MAGIC[:8] or copy.header_crc != header_crc(copy):
                self.damage.append((i * SECOND_COPY, "header copy"))
            elif copy.version > FORMAT:
                newer = copy.version
            else:
                self.seed = crc32c(0, &copy.salt, 8)
                # The lesser of the two: one copy is written after the other.
                self.trusted = min(self.trusted if header != NULL else FOREVER, trusted_by(copy, self.seed))
                if copy.position_crc != position_crc(copy, self.seed):
                    torn.append((i * SECOND_COPY, "positions in a header copy"))
                elif not known or (copy.next_sequence, copy.head) > (self.next_sequence, self.head):
                    known = True
                    self.head, self.tail, self.next_sequence = copy.head, copy.tail, copy.next_sequence
                header = copy
        if newer:  # though it be one copy: a newer version may have been killed while it changed them
            raise NewerFormatError(f"written in format {newer} by a newer version; this one reads format {FORMAT}")
        if header == NULL:
            raise RingError("no intact ring header")
        if header.capacity != round_capacity(header.capacity):
            raise RingError(f"a capacity of {header.capacity} bytes, which no ring has")
        self._map_data(fd, header.capacity)
        for i in range(2):
            copy = <Header *>(self.headers + i * SECOND_COPY)
            if copy != header:
                memcpy(copy, header, sizeof(Header))
        if known:  # a process was killed while it wrote one copy: what the other is there for
            self.notes += torn
        else:
            self.damage += torn
            self._find_ends()

    def _stray_copy(self, int fd):
        """Return which header copy is another ring's (-1: none): the one whose salt fewer of the records have."""
        cdef Header *copy
        cdef int i
        ids, found = [], []
        for i in range(2):
            copy = <Header *>(self.headers + i * SECOND_COPY)
            if copy.magic[:8] != HEADER_MAGIC[:8] or copy.header_crc != header_crc(copy) or copy.version > FORMAT:
                return -1
            ids.append((copy.salt, copy.ring_id[:16]))
        if ids[0] == ids[1]:
            return -1
        for i in range(2):
            copy = <Header *>(self.headers + i * SECOND_COPY)
            found.append(self._count_records(fd, copy.capacity, crc32c(0, &copy.salt, 8)))
        return 0 if found[0] < found[1] else 1

    def _count_records(self, int fd, int64_t capacity, uint32_t seed):
        """Return how many sound records there would be if the ring had this capacity and seed."""
        cdef int64_t offset
        cdef Record *record
        if capacity != round_capacity(capacity) or os.fstat(fd).st_size < HEADER_BYTES + capacity:
            return 0
        self._map_data(fd, capacity)
        self.seed = seed
        count = 0
        for offset in range(0, capacity, 8):
            record = <Record *>(self.data + offset)
            if record.magic == RECORD_MAGIC and record.position % capacity == offset:
                count += self.sound(record, record.position, record.position + capacity)
        munmap(self.data, 2 * capacity)
        self.data = NULL
        return count

    # ---- recovery

    def _recover(self):
        """Walk from head to tail: count what is not done, skip and report what is damaged."""
        cdef int64_t position, found
        cdef Record *record
        cdef dict moved = {}
        position = self.head
        while position < self.tail:
            record = self.at(position)
            if self.sound(record, position, self.tail):
                self._adopt(record, position, moved)
                position += record_size(record)
                continue
            found = self._next_sound(position + 8)
            if record.magic == GAP_MAGIC and 0 < gap_bytes(record) <= found - position:
                position += gap_bytes(record)
            else:
                self._report(position, f"{found - position} bytes that are no record")
                make_gap(record, found - position)
                position = found
        for position in moved.values():  # its copy never made it
            count_undone(self, self.at(position))
        self.answered = max(self.answered, self.tail)  # what was found is claimable and never to be withdrawn
        self.trusted = min(self.trusted, self.tail)
        self.synced = max(self.synced, max(self.trusted, self.head))
        self.publish()
        self.publish_trusted()
        self.advance()

    cdef int _adopt(self, Record *record, int64_t position, dict moved) except -1:
        if record.sequence >= self.next_sequence:
            self.next_sequence = record.sequence + 1
        self.largest = max(self.largest, record_size(record))
        if record.state != DONE and not self.body_sound(record):
            self._report(position, f"checksum of packet {record_id(record)}")
            # No done record: what it may be a copy of still counts, and would not once this was taken for a good copy.
            make_gap(record, record_size(record))
            return 0
        if record.sequence in moved and self._supersedes(record, position, moved[record.sequence]):
            self._link(moved.pop(record.sequence), position + record_size(record))
        if record.state == MOVED:
            moved[record.sequence] = position
        elif record.state != DONE:  # or a damaged word: rather twice than never
            count_undone(self, record)
        return 0

    cdef bint _supersedes(self, Record *record, int64_t position, int64_t old) noexcept nogil:
        """Whether this copy stands for the moved record there, which counts until the copy is synced.

        One that is done does if it is the one the record speaks of. It may be an earlier one: after a power cut a record
        may be as it was before it was moved, and be moved once more.
        """
        return record.state != DONE or old + 8 * <int64_t>self.at(old).handle == position + record_size(record)

    def _link(self, int64_t position, int64_t end):
        """See to it that the moved record there says where its copy ends."""
        cdef Record *old = self.at(position)
        cdef uint32_t words = <uint32_t>((end - position) // 8)
        if old.handle != words:
            old.handle = words

    def _report(self, int64_t position, str what):
        self.corrupt += 1
        self.damage.append((HEADER_BYTES + position % self.capacity, what))

    def _next_sound(self, int64_t position):
        while position < self.tail and not self.sound(self.at(position), position, self.tail):
            position += 8
        return position

    def _find_ends(self):
        """The positions are gone: take the newest record's end as the tail, and all of the ring as in use."""
        cdef int64_t offset, tail = 0, lowest = FOREVER
        cdef Record *record
        for offset in range(0, self.capacity, 8):
            record = <Record *>(self.data + offset)
            if record.magic == RECORD_MAGIC and record.position % self.capacity == offset:
                if self.sound(record, record.position, record.position + self.capacity):
                    tail = max(tail, record.position + record_size(record))
        for offset in range(0, self.capacity, 8):
            record = <Record *>(self.data + offset)
            if record.magic == RECORD_MAGIC and record.position % self.capacity == offset:
                if tail - self.capacity <= record.position < lowest and self.sound(record, record.position, tail):
                    lowest = record.position
        self.tail, self.head = tail, min(lowest, tail)
        if self.next_sequence <= 0:
            self.next_sequence = 1

    cdef bint sound(self, Record *record, int64_t position, int64_t end) noexcept nogil:
        """Whether a whole record with this position starts here and ends by ``end``; says nothing of its body."""
        return (record.magic == RECORD_MAGIC and record.position == position
                and record.head_crc == crc32c(self.seed, &record.position, <char *>&record.state - <char *>&record.position)
                and position + record_size(record) <= end)

    cdef bint body_sound(self, Record *record) noexcept nogil:
        return record.body_crc == crc32c(self.seed, <char *>record + sizeof(Record),
                                         <size_t>record.key_length + record.body_length)

    cdef void seal(self, Record *record) noexcept nogil:
        record.head_crc = crc32c(self.seed, &record.position, <char *>&record.state - <char *>&record.position)

    # ---- the writer's side

    cdef int push_packet(self, const unsigned char *body, size_t length, const unsigned char *key, size_t key_length,
                         const uint8_t *packet_id, uint32_t messages, uint64_t emitter, int64_t now_ns,
                         int flags) noexcept nogil:
        cdef int64_t size = (<int64_t>sizeof(Record) + key_length + length + 7) & ~<int64_t>7
        cdef Record *record
        cdef unsigned char *payload
        if unlikely(2 * size > self.capacity):
            return TOO_BIG
        # Looked after from half full on: the largest record there may be has to find room for its copy.
        if unlikely(self.capacity - (self.tail - self.head) < size + self.capacity // 2) and not self.make_room(size):
            return RING_FULL
        record = self.at(self.tail)
        payload = <unsigned char *>record + sizeof(Record)
        record.magic = RECORD_MAGIC
        record.position = self.tail
        record.sequence = self.next_sequence
        memcpy(record.id, packet_id, 16)
        record.accepted_ns = now_ns
        record.emitter = emitter
        record.body_length = <uint32_t>length
        record.messages = messages
        record.key_length = <uint8_t>key_length
        record.flags = <uint8_t>(flags & 0xFF)
        record.reserved = 0
        if key_length:
            memcpy(payload, key, key_length)
        memcpy(payload + key_length, body, length)
        record.body_crc = crc32c(self.seed, payload, key_length + length)
        record.state = QUEUED
        record.attempts = 0
        record.handle = 0
        record.moved = 1 if flags & A_COPY else 0
        self.seal(record)
        self.next_sequence += 1
        self.largest = max(self.largest, size)
        self.undone += 1
        self.undone_bytes += size
        self.tail += size
        self.publish()
        return PUSHED

    cdef void publish(self) noexcept nogil:
        cdef Header *copy
        cdef int i
        for i in range(2):
            release_fence()  # the record before the position that speaks of it, one copy before the other
            copy = <Header *>(self.headers + i * SECOND_COPY)
            copy.head, copy.tail, copy.next_sequence = self.head, self.tail, self.next_sequence
            copy.position_crc = position_crc(copy, self.seed)

    cdef void publish_trusted(self) noexcept nogil:
        cdef Header *copy
        cdef int i
        for i in range(2):
            release_fence()
            copy = <Header *>(self.headers + i * SECOND_COPY)
            copy.trusted = self.trusted
            copy.trusted_crc = crc32c(self.seed, &self.trusted, 8)

    cdef bint make_room(self, int64_t size) noexcept nogil:
        """Move claimed records from the head to the tail, some at a time, so they do not pin the ring; say whether ``size`` fits.

        With a file, their old places are free once the copies are synced. Room for one copy is left
        once they are: else a packet that no analyzer takes pins for good a ring that was filled while nothing was claimed. (One
        of more than an eighth of the ring still may: to keep room for any would be to do with half of the ring.)
        """
        cdef int64_t spare, moving, reserve, position = max(self.head, self.settled)
        cdef Record *record
        cdef int moves = 0
        while position < self.cursor and self.undone_bytes <= self.capacity // 4 * 3 and moves < MOVES_A_PUSH:
            record = self.at(position)
            moving = gap_bytes(record) if record.magic == GAP_MAGIC else record_size(record)
            if record.magic == RECORD_MAGIC and record.state == QUEUED:
                spare = self.capacity - (self.tail - self.head)
                if spare < moving or spare + position - self.head >= size + max(self.capacity // 4, moving):
                    break
                if record.moved and position + moving > self.synced:
                    break  # a copy: it has not even arrived
                self.move(record, moving)
                self.advance()
                moves += 1
            position = max(position + moving, self.head)
        self.settled = position
        spare = self.capacity - (self.tail - self.head)
        reserve = min(max(self.largest, size), self.capacity // 8)
        return spare >= size and spare + position - self.head >= size + reserve

    cdef void move(self, Record *old, int64_t size) noexcept nogil:
        cdef Record *copy = self.at(self.tail)
        memcpy(copy, old, size)
        copy.position = self.tail
        copy.moved = 1
        self.seal(copy)
        self.entries[old.handle].position = self.tail
        old.state = MOVED
        old.handle = <uint32_t>((self.tail + size - old.position) // 8)
        if not old.moved:
            count_moved(self, copy)
        self.tail += size
        self.publish()

    # ---- the reader's side

    cdef bint has_unclaimed(self) noexcept nogil:
        return self.released_first != 0 or self.cursor < (self.answered if self.claims_wait_for_sync and self.answered < self.tail else self.tail)

    cdef uint32_t claim_next(self) except? 0:
        """Return a handle on the oldest unclaimed record, 0 without one."""
        cdef Record *record
        cdef uint32_t handle = self.released_first
        cdef int64_t limit = self.tail
        if handle:
            self.released_first = self.entries[handle].next
            if not self.released_first:
                self.released_last = 0
            self.entries[handle].next = 0
            self.claimed += 1
            return handle
        if self.claims_wait_for_sync and self.answered < limit:
            limit = self.answered
        while self.cursor < limit:
            record = self.at(self.cursor)
            if unlikely(record.magic == GAP_MAGIC):
                self.cursor += gap_bytes(record)
                continue
            if unlikely(record.state != QUEUED or self.is_claimed(record)):  # done, or a copy that moved here claimed
                self.cursor += record_size(record)
                continue
            handle = self.new_entry()
            self.entries[handle].position = self.cursor
            self.entries[handle].next = 0
            self.entries[handle].flags = 0
            record.handle = handle
            self.cursor += record_size(record)
            self.claimed += 1
            return handle
        return 0

    cdef void give_back(self, uint32_t handle) noexcept nogil:
        """Undo a claim: the record is the next but those given back before to be claimed again."""
        self.entries[handle].next = 0
        self.give_all_back(handle, handle, 1)

    cdef void give_all_back(self, uint32_t first, uint32_t last, int64_t count) noexcept nogil:
        """Undo ``count`` claims, of a list from ``first`` to ``last``: however many, that is one link."""
        if self.released_last:
            self.entries[self.released_last].next = first
        else:
            self.released_first = first
        self.released_last = last
        self.claimed -= <uint32_t>count

    cdef void finish(self, uint32_t handle) noexcept nogil:
        """The claimed packet was delivered, or is safe elsewhere: its record is done and the handle free."""
        cdef Entry *entry = &self.entries[handle]
        cdef Record *record = self.at(entry.position)
        record.state = DONE
        self.undone -= 1
        self.undone_bytes -= record_size(record)
        self.claimed -= 1
        if unlikely(record.moved):
            self.moved_alive -= 1
            if record.accepted_ns == self.moved_oldest_ns:
                self.moved_oldest_ns = 0  # `oldest` looks for the next one
        if entry.position == self.head:
            self.advance()
        entry.position = -1
        entry.next = self.free_entry
        self.free_entry = handle

    cdef void advance(self) noexcept nogil:
        """Move the head over all that is done."""
        cdef int64_t head = self.head
        cdef Record *record
        while head < self.tail:
            record = self.at(head)
            if record.magic == GAP_MAGIC:
                head += gap_bytes(record)
            elif record.state == DONE or (record.state == MOVED and head + 8 * <int64_t>record.handle <= self.synced):
                head += record_size(record)
            else:
                break
        if self.cursor < head:
            self.cursor = head
        if head != self.head:
            self.head = head
            if head == self.tail:
                self.largest = 0
            self.publish()

    cdef int64_t past_gaps(self, int64_t position, int64_t end) noexcept nogil:
        """Return where the next record is, from ``position`` on, where one or a gap begins; ``end`` without one before."""
        while position < end and self.at(position).magic == GAP_MAGIC:
            position += gap_bytes(self.at(position))
        return position

    cdef int64_t oldest(self) noexcept nogil:
        """Return when the oldest packet not done was accepted (see ``clock_offset``), 0 without any."""
        cdef int64_t position = max(self.head, self.settled), first = 0, moved = FOREVER
        cdef Record *record
        if self.undone == 0:
            return 0
        position = self.past_gaps(position, self.tail)
        while position < self.tail:
            record = self.at(position)
            if record.state == QUEUED:
                first = first or record.accepted_ns
                if self.moved_alive == 0 or self.moved_oldest_ns:
                    break
                if record.moved:
                    moved = min(moved, record.accepted_ns)
            position = self.past_gaps(position + record_size(record), self.tail)
        if self.moved_alive == 0:
            return first
        self.moved_oldest_ns = self.moved_oldest_ns or moved
        return min(first, self.moved_oldest_ns)

    cdef uint32_t new_entry(self) except? 0:
        cdef uint32_t handle = self.free_entry, count, i
        cdef Entry *grown
        if likely(handle):
            self.free_entry = self.entries[handle].next
            return handle
        count = self.entry_count * 2 if self.entry_count else 1024
        grown = <Entry *>realloc(self.entries, count * sizeof(Entry))
        if grown == NULL:
            raise MemoryError
        self.entries = grown
        handle = self.entry_count
        for i in range(handle + 1, count):  # chain the rest of the new part
            grown[i].position = -1
            grown[i].next = i + 1 if i + 1 < count else 0
        self.free_entry = handle + 1
        self.entry_count = count
        return handle

    # ---- for Python

    def push(self, bytes body, str key=None, *, bytes packet_id=bytes(16), uint32_t messages=1, uint64_t emitter=0,
             int64_t accepted_ns=0, uint32_t attempts=0, int flags=0):
        """Append a packet; return its sequence, 0 when the ring is full. ValueError: it is too large for this ring."""
        cdef bytes name = key.encode("ascii") if key is not None else b""
        if len(name) > ID_TEXT or len(packet_id) != 16:
            raise ValueError("a key has at most 64 characters, an id 16 bytes")
        cdef int result = self.push_packet(<const unsigned char *>body, len(body), <const unsigned char *>name, len(name),
                                           <const uint8_t *>packet_id, messages, emitter,
                                           accepted_ns or mono_ns() + self.clock_offset, flags)
        if result == TOO_BIG:
            raise ValueError(f"a packet of {len(body)} bytes is over half of a ring of {self.capacity}")
        if result == RING_FULL:
            return 0
        if attempts:
            self.at(self.tail - record_size_of(len(name), len(body))).attempts = attempts
        return self.next_sequence - 1

    def adopt(self, PacketRing other, uint32_t handle):
        """Append a copy of a packet that ``other`` holds claimed: same id, time and attempts, a new sequence.

        Return its sequence, 0 when the ring is full. ValueError: it is too large for this ring.
        """
        cdef Record *copy
        cdef Record *record = other.record_of(other._checked(handle))
        cdef const unsigned char *key = <unsigned char *>record + sizeof(Record)
        cdef int64_t size = record_size(record)
        cdef int result = self.push_packet(record_body(record), record.body_length, key, record.key_length, record.id,
                                           record.messages, record.emitter, record.accepted_ns, A_COPY)
        if result == TOO_BIG:
            raise ValueError(f"a packet of {record.body_length} bytes is over half of a ring of {self.capacity}")
        if result == RING_FULL:
            return 0
        copy = self.at(self.tail - size)
        copy.attempts = record.attempts
        count_moved(self, copy)
        return self.next_sequence - 1

    def claim(self):
        """Return a handle on the oldest unclaimed packet, 0 without one."""
        return self.claim_next()

    def done(self, uint32_t handle):
        """Mark a claimed packet as delivered (or safe elsewhere)."""
        self.finish(self._checked(handle))

    def release(self, uint32_t handle):
        """Give a claimed packet back, to be claimed again."""
        self.give_back(self._checked(handle))

    def packet(self, uint32_t handle):
        """Return the claimed packet as a ``Packet``."""
        return packet_of(self, self.record_of(self._checked(handle)))

    def sequence(self, uint32_t handle):
        """Return the sequence of the claimed packet, which unlike its handle is never used again."""
        return self.record_of(self._checked(handle)).sequence

    def packet_id(self, uint32_t handle):
        """Return the id of the claimed packet."""
        return record_id(self.record_of(self._checked(handle)))

    def attempts(self, uint32_t handle):
        """Return how many attempts to send the claimed packet were begun."""
        return self.record_of(self._checked(handle)).attempts

    def count_attempt(self, uint32_t handle):
        """Note in the record that an attempt begins; return the new number of attempts."""
        cdef Record *record = self.record_of(self._checked(handle))
        record.attempts += 1
        return record.attempts

    def waiting(self):
        """Yield each packet that is to be claimed, in the ring's order; nothing is claimed by that, or written."""
        cdef int64_t position = self.past_gaps(self.head, self.tail)
        cdef Record *record
        while position < self.tail:
            record = self.at(position)
            position = self.past_gaps(position + record_size(record), self.tail)
            if record.state == QUEUED and not self.is_claimed(record):
                yield packet_of(self, record)

    def totals_of_latest(self, int64_t count):
        """Return (messages, bytes of bodies) of the latest ``count`` packets that were pushed; copies do not count."""
        cdef int64_t position, turn, skip = 0, messages = 0, body_bytes = 0
        cdef Record *record
        for turn in range(2):  # first count all there are
            skip = max(0, skip - count)
            position = self.past_gaps(self.head, self.tail)
            while position < self.tail:
                record = self.at(position)
                position = self.past_gaps(position + record_size(record), self.tail)
                if record.moved:
                    continue
                if turn == 0:
                    skip += 1
                elif skip:
                    skip -= 1
                else:
                    messages += record.messages
                    body_bytes += record.body_length
        return messages, body_bytes

    def pushed_between(self, int64_t start, int64_t end):
        """Return (packets, messages, bytes of bodies) of what lies between two positions and waits to be claimed.

        Copies do not count: what they are copies of was counted long ago.
        """
        cdef int64_t at = self.past_gaps(max(start, self.head), end), packets = 0, messages = 0, body_bytes = 0
        cdef Record *record
        while at < end:
            record = self.at(at)
            if record.state == QUEUED and not record.moved:
                packets += 1
                messages += record.messages
                body_bytes += record.body_length
            at = self.past_gaps(at + record_size(record), end)
        return packets, messages, body_bytes

    def withdraw_unsynced(self):
        """Take back what was pushed since the last sync; return (packets, messages, bytes of bodies).

        Only for a ring whose claims wait for a sync: no analyzer has these packets yet. Copies stay: what they are copies of
        was answered for long ago.
        """
        cdef int64_t position = self.past_gaps(max(self.answered, self.head), self.tail)
        cdef int64_t packets = 0, messages = 0, body_bytes = 0
        cdef Record *record
        while position < self.tail:
            record = self.at(position)
            if record.state == QUEUED and not self.is_claimed(record) and not record.moved:
                record.state = DONE
                packets += 1
                messages += record.messages
                body_bytes += record.body_length
                self.undone -= 1
                self.undone_bytes -= record_size(record)
            position = self.past_gaps(position + record_size(record), self.tail)
        self.advance()
        return packets, messages, body_bytes

    def write_again(self):
        """Have the kernel write again with the next sync what may not have reached the disk though its pages are clean.

        That is all behind the position that a sync is known to have covered; after one that failed, all that counts.
        """
        cdef int64_t position, start = max(self.head, self.trusted)
        for position in range(0, HEADER_BYTES, 4096):
            touch(self.headers + position)
        if start < self.tail:
            for position in range(start & ~<int64_t>4095, self.tail, 4096):
                touch(self.data + position % self.capacity)

    def mark_synced(self, int64_t position):
        """All bytes up to ``position`` (a former ``tail_position``) are on stable storage."""
        self.synced = max(self.synced, position)
        self.answered = max(self.answered, position)
        self.trusted = max(self.trusted, position)
        self.publish_trusted()
        self.advance()

    def forget_synced(self):
        """A sync has failed: until one succeeds, what is in this ring does not count as written."""
        self.trusted = -1
        self.publish_trusted()

    @property
    def tail_position(self):
        """Where the next record will start, in bytes since the ring was made."""
        return self.tail

    @property
    def next_sequence_number(self):
        """The sequence the next packet will get; pushes so far, plus one."""
        return self.next_sequence

    @property
    def synced_position(self):
        """Up to where everything has reached stable storage."""
        return self.synced

    @property
    def has_more(self):
        """Whether there are packets to claim."""
        return self.has_unclaimed()

    @property
    def used(self):
        """Bytes between head and tail, including done records that the head has yet to pass."""
        return self.tail - self.head

    @property
    def oldest_ns(self):
        """When the oldest packet not done was accepted (monotonic ns + ``clock_offset``), 0 without any."""
        return self.oldest()

    def _checked(self, uint32_t handle):
        if 0 < handle < self.entry_count and self.entries[handle].position >= 0:
            return handle
        raise ValueError(f"{handle} is no handle of a claimed packet")


cdef int64_t record_size_of(size_t key_length, size_t body_length) noexcept nogil:
    return (<int64_t>sizeof(Record) + key_length + body_length + 7) & ~<int64_t>7


cdef object packet_of(PacketRing ring, Record *record):
    cdef int64_t step = wall_ns() - mono_ns() - ring.clock_offset  # what the wall clock was set by meanwhile
    return Packet(record.sequence, record_id(record), record_body(record)[:record.body_length], record.attempts,
                  record.accepted_ns + (step if abs(step) > A_STEP else 0), record.messages, record.emitter, record.flags)


cdef str record_id(Record *record):
    cdef char[64] text
    cdef size_t n = write_id(record, text)
    return text[:n].decode("latin-1")


cdef void count_moved(PacketRing ring, Record *copy) noexcept nogil:
    if ring.moved_alive == 0 or copy.accepted_ns < ring.moved_oldest_ns:
        ring.moved_oldest_ns = copy.accepted_ns
    ring.moved_alive += 1


cdef void count_undone(PacketRing ring, Record *record) noexcept nogil:
    if record.state != QUEUED:
        record.state = QUEUED
    ring.undone += 1
    ring.undone_bytes += record_size(record)
    if record.moved:
        count_moved(ring, record)


cdef int64_t gap_bytes(Record *record) noexcept nogil:
    return 8 * <int64_t>record.head_crc


cdef void make_gap(Record *record, int64_t size) noexcept nogil:
    record.magic = GAP_MAGIC
    record.head_crc = <uint32_t>(size // 8)


cdef uint32_t header_crc(Header *header) noexcept nogil:
    cdef Header fixed = header[0]
    fixed.header_crc = 0
    return crc32c(0, &fixed, <char *>&fixed.head - <char *>&fixed)


cdef uint32_t position_crc(Header *header, uint32_t seed) noexcept nogil:
    return crc32c(seed, &header.head, <char *>&header.position_crc - <char *>&header.head)


cdef int64_t trusted_by(Header *header, uint32_t seed) noexcept nogil:
    return header.trusted if header.trusted_crc == crc32c(seed, &header.trusted, 8) else -1


cdef bytes boot_id():
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except OSError:
        return bytes(16)
