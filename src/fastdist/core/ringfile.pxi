"""A ring's file: where its bytes are, how they are written, and how they are read.

The file is a header (two copies), the data, and a table of marks: what changes later of a record, one mark of eight bytes
for each, by the record's number. Facts it rests on:
1. A file is written with ``pwrite`` and mapped for reading only. A store to a mapping costs a fault for each page after
   each sync, and a fault that meets a commit of the file system waits for it; what was written is seen in the mapping at
   once, and survives the process as a store does.
2. What is appended is collected, and written once in an event-loop iteration (``write``), before any of it is
   acknowledged. A large record is written from where it lies. What was written last is kept (``kept_at``): it is sent from
   there, since nothing that happens to the file changes it.
3. Marks are collected and written in runs in the same way. A mark is sealed with the number and position of its record,
   which no two records have in common, so a stale or damaged one does not count; the packet counts then as it was
   accepted, rather twice than never.
4. A page that is written to for the first time in a lap is written to its end: the kernel would have to read the rest.
5. The header is written seldom. It says where the queue begins at least (``head``), and how far records may reach
   (``limit``); it is written before anything beyond that.
6. In memory (a memfd), and for a private look at a file, stores go to the mapping at once: then ``direct`` is true, and
   nothing is ever collected.
"""

cdef extern from "<sys/uio.h>" nogil:
    ssize_t pwritev(int fd, const iovec *pieces, int count, int64_t offset)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_pread "pread"(int fd, void *room, size_t n, int64_t offset)
    ssize_t c_pwrite "pwrite"(int fd, const void *data, size_t n, int64_t offset)

# What has become of a record since it was written. Two of them differ in many bits, and a mark has a checksum.
cdef enum:
    QUEUED = 0x51AA
    MOVED = 0x2CC3
    DONE = 0x6E3C

cdef struct Record:
    uint32_t magic
    uint32_t head_crc        # of what follows, to the end of the struct
    int64_t position         # where the record starts, in bytes since the ring was made: tells laps apart
    uint64_t number          # of the record: grows with the position, and is never used again. Says where its mark is
    uint64_t sequence        # of the push, from 1; a moved record keeps it
    uint8_t id[16]           # UUIDv7, unless there is a key
    int64_t accepted_ns      # wall clock of the run (clock_offset)
    uint64_t emitter         # hash of the emitterId
    uint32_t body_length     # bytes
    uint32_t messages
    uint8_t key_length       # of the Idempotency-Key that stands before the body; 0: none
    uint8_t flags
    uint8_t copied           # 1: a copy: of a record that stood in the way, or that another ring held
    uint8_t reserved
    uint32_t body_crc        # of key and body

cdef struct Mark:
    uint16_t state
    uint16_t attempts        # begun; 65535: so many or more
    uint32_t check           # of the two and the record's position and number

cdef struct Change:
    uint64_t number
    Mark mark

cdef struct Positions:       # what changes of the header
    int64_t head             # nothing before it counts
    int64_t tail             # where the next record is to be, when this was written
    int64_t limit            # no record ends beyond
    uint64_t next_sequence
    uint64_t next_number
    int64_t trusted          # a sync has covered all before it; -1: one has failed since

cdef struct Saved:
    Positions positions
    uint32_t check           # of them
    uint32_t reserved

cdef struct Header:
    char magic[8]
    uint32_t version
    uint32_t header_crc      # of the fixed part: magic to created_ns, this field taken as 0
    int64_t capacity
    uint64_t salt            # seeds every checksum, so that no body can imitate a record
    uint8_t ring_id[16]
    uint8_t boot_id[16]
    int64_t created_ns
    Saved saved

cdef enum:
    HEADER_BYTES = 65536     # both copies; a whole number of pages wherever Linux runs
    SECOND_COPY = 32768
    FORMAT = 2
    RECORD_MAGIC = 0xFD5EC0DE
    GAP_MAGIC = 0xFD5E0FF5   # followed by the gap's length in 8-byte words
    SMALLEST = 128           # bytes of a record at least, so that there is a mark for each that has room
    KEPT = 256 << 10         # bytes that are collected at most, and of each half of what is kept
    LARGE = 32 << 10         # bytes of a record from which on it is written at once, from where it is
    RUN = 2048               # marks written at a time
    CHANGES = 4096           # marks collected at most
    PAGE = 4096
    PIECE = 1 << 20          # bytes that are read, or written again, at a time

cdef char *HEADER_MAGIC = b"fdring\r\n"
cdef int64_t FOREVER = 0x7FFFFFFFFFFFFFFF
cdef uchar[PAGE] ZEROS


cdef inline int64_t size_of(int64_t key_length, int64_t body_length) noexcept nogil:
    """Return the bytes that a record takes."""
    return max(SMALLEST, (<int64_t>sizeof(Record) + key_length + body_length + 7) & ~<int64_t>7)


cdef inline int64_t record_size(const Record *record) noexcept nogil:
    return size_of(record.key_length, record.body_length)


cdef inline int64_t gap_bytes(const Record *record) noexcept nogil:
    return 8 * <int64_t>record.head_crc


@cython.final
cdef class RingFile:
    """The open file of a ring (``fd``, which is duplicated); ``direct``: stores go to the mapping, which is ``shared`` or not."""

    cdef int fd
    cdef bint direct, shared
    cdef bint broken               # a page of the data cannot be read: what is written there could not be sent
    cdef uchar *data               # `capacity` bytes, mapped twice in a row: no record is ever split
    cdef Mark *marks
    cdef int64_t capacity
    cdef uint64_t slots            # marks there are
    cdef uint32_t seed
    cdef int64_t written           # position: what is before it is in the file
    cdef int64_t saved_head, limit # as the header has them
    cdef uchar *kept               # two halves of KEPT bytes, filled in turn with what is appended
    cdef int64_t[2] begins, ends   # positions of what is in them
    cdef int half                  # that is being filled; what comes from `written` on is in it
    cdef Change *changes           # CHANGES of them
    cdef int change_count
    cdef int64_t readable_marks    # offset of the page of marks that was last seen to be readable
    cdef int64_t readable          # position: up to it the pages were seen to be readable
    cdef readonly list unreadable  # (offset in the file, bytes, errno) of parts that are not

    def __cinit__(self, int fd, bint direct, bint shared):
        self.fd = -1
        self.direct, self.shared = direct, shared
        self.unreadable, self.readable_marks = [], -1
        self.fd = os.dup(fd)

    def __dealloc__(self):
        self.unmap()
        if self.fd >= 0:
            close(self.fd)
        free(self.kept)
        free(self.changes)

    # ---- mapping

    cdef void unmap(self) noexcept:
        if self.data != NULL:
            munmap(self.data, 2 * self.capacity)
        if self.marks != NULL:
            munmap(self.marks, self.slots * sizeof(Mark))
        self.data, self.marks = NULL, NULL

    cdef int map(self, int64_t capacity) except -1:
        """Map the data and the marks. Raises CutShortError, OSError."""
        cdef int protection = PROT_READ | PROT_WRITE if self.direct else PROT_READ
        cdef int sharing = MAP_SHARED if self.shared else MAP_PRIVATE
        cdef uchar *base
        cdef void *table
        cdef int half
        if os.fstat(self.fd).st_size < file_size(capacity):
            raise CutShortError(capacity)
        base = <uchar *>mmap(NULL, 2 * capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if base == <uchar *>MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.data, self.capacity, self.slots = base, capacity, capacity // SMALLEST
        for half in range(2):
            if mmap(base + half * capacity, capacity, protection, sharing | MAP_FIXED, self.fd, HEADER_BYTES) == MAP_FAILED:
                raise OSError(errno, os.strerror(errno))
        table = mmap(NULL, self.slots * sizeof(Mark), protection, sharing, self.fd, HEADER_BYTES + capacity)
        if table == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.marks = <Mark *>table
        if not self.direct and self.kept == NULL:
            self.kept = <uchar *>malloc(2 * KEPT)
            self.changes = <Change *>malloc(CHANGES * sizeof(Change))
            if self.kept == NULL or self.changes == NULL:
                raise MemoryError
        return 0

    cdef inline Record *at(self, int64_t position) noexcept nogil:
        return <Record *>(self.data + position % self.capacity)

    cdef inline Record *kept_at(self, int64_t position) noexcept nogil:
        """Return the record at a position as it was appended, NULL if it is not kept any more."""
        cdef int half
        for half in range(2):
            if self.begins[half] <= position < self.ends[half]:
                return <Record *>(self.kept + half * KEPT + (position - self.begins[half]))
        return NULL

    cdef inline int64_t staged(self) noexcept nogil:
        """Return how many bytes are collected and not written yet."""
        return max(0, self.ends[self.half] - self.written)

    # ---- reading what may be damaged

    cdef int look(self, int64_t position) except -1:
        """See to it that all before ``position`` can be read: where the disk has an error there are zeros from now on."""
        cdef int64_t start, end, offset
        cdef int failed
        if self.direct and self.shared:
            return 0
        while self.readable < position:
            start = self.readable % self.capacity
            end = min(self.capacity, (start & ~<int64_t>(PIECE - 1)) + PIECE)
            if self._try_to_read(HEADER_BYTES + start, end - start):
                for offset in range(start & ~<int64_t>(PAGE - 1), end, PAGE):
                    failed = self._try_to_read(HEADER_BYTES + offset, PAGE)
                    if failed and (HEADER_BYTES + offset, PAGE, failed) not in self.unreadable:  # or seen in the lap before
                        self.unreadable.append((HEADER_BYTES + offset, PAGE, failed))
                        self.broken = True
                        self._cover(self.data + offset)
                        self._cover(self.data + self.capacity + offset)
            self.readable += end - start
        return 0

    cdef int look_at_mark(self, uint64_t number) except -1:
        """See to it that a record's mark can be read."""
        cdef int64_t offset = <int64_t>(number % self.slots) * <int64_t>sizeof(Mark) & ~<int64_t>(PAGE - 1)
        cdef int failed
        if offset == self.readable_marks or (self.direct and self.shared):
            return 0
        self.readable_marks = offset
        failed = self._try_to_read(HEADER_BYTES + self.capacity + offset, PAGE)
        if failed:
            self.unreadable.append((HEADER_BYTES + self.capacity + offset, PAGE, failed))
            self._cover(<uchar *>self.marks + offset)
        return 0

    cdef int _try_to_read(self, int64_t offset, int64_t n) except -1:
        """Return 0, or an errno. What lies behind the end of a file that is cut meanwhile is another matter."""
        cdef uchar *room = <uchar *>malloc(n)
        cdef ssize_t got
        cdef int failed = 0
        if room == NULL:
            raise MemoryError
        while n > 0:
            got = c_pread(self.fd, room, n, offset)
            if got < 0 and errno == EINTR:
                continue
            if got <= 0:
                failed = errno if got < 0 else 0
                break
            n -= got
            offset += got
        free(room)
        return failed

    cdef int _cover(self, uchar *page) except -1:
        """Have zeros in the place of a page that cannot be read: to look at that would end the process."""
        if mmap(page, PAGE, PROT_READ | (PROT_WRITE if self.direct else 0), MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                0) == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        return 0

    cdef bint sound(self, const Record *record, int64_t position, int64_t end) noexcept nogil:
        """Whether a whole record with this position starts here and ends by ``end``; says nothing of its body."""
        return (record.magic == RECORD_MAGIC and record.position == position and record.head_crc == self.seal_of(record)
                and position + record_size(record) <= end)

    cdef bint body_sound(self, const Record *record) noexcept nogil:
        return record.body_crc == crc32c(self.seed, <const char *>record + sizeof(Record),
                                         <size_t>record.key_length + record.body_length)

    cdef uint32_t seal_of(self, const Record *record) noexcept nogil:
        return crc32c(self.seed, &record.position, sizeof(Record) - 2 * sizeof(uint32_t))

    # ---- writing records

    cdef int put(self, int64_t position, const void *p, int64_t n) noexcept nogil:
        """Write bytes at a position now; return 0, or the errno of what went wrong."""
        cdef int64_t offset = position % self.capacity
        cdef int64_t part = min(n, self.capacity - offset)
        cdef int failed
        if self.direct:
            memcpy(self.data + offset, p, n)
            return 0
        failed = write_all(self.fd, p, part, HEADER_BYTES + offset)
        if failed == 0 and part < n:
            failed = write_all(self.fd, <const uchar *>p + part, n - part, HEADER_BYTES)
        return failed

    cdef int append(self, const Record *head, const uchar *key, const uchar *body) noexcept nogil:
        """Put a record behind the last; return 0, or an errno. It is in the file when ``write`` has returned 0."""
        cdef int64_t size = record_size(head)
        cdef int64_t n = <int64_t>sizeof(Record) + head.key_length
        cdef bint wraps = head.position % self.capacity + size > self.capacity
        cdef uchar *at
        cdef int failed
        if self.direct:
            at = self.data + head.position % self.capacity
        elif size < LARGE or (wraps and size <= KEPT):
            if head.position != self.ends[self.half] or head.position + size - self.begins[self.half] > KEPT:
                failed = self.write(head.position)
                if failed:
                    return failed
                self.half ^= 1
                self.begins[self.half] = head.position
            at = self.kept + self.half * KEPT + (head.position - self.begins[self.half])
            self.ends[self.half] = head.position + size
        elif wraps:
            return self._put_in_pieces(head, key, body, size)
        else:
            return self._append_large(head, key, body, size)
        if head.key_length:
            memcpy(at + sizeof(Record), key, head.key_length)
        memcpy(at + n, body, head.body_length)
        if self.direct:
            release_fence()  # the head last: a process that is killed leaves no record of which a part is missing
            self.written = head.position + size
        else:
            memset(at + n + head.body_length, 0, size - n - head.body_length)
        memcpy(at, head, sizeof(Record))
        return 0

    cdef int _append_large(self, const Record *head, const uchar *key, const uchar *body, int64_t size) noexcept nogil:
        cdef iovec[4] pieces
        cdef int64_t pad = size - sizeof(Record) - head.key_length - head.body_length
        cdef int failed = self.write(head.position)
        if failed == 0 and head.position + size > self.limit:
            failed = EFBIG  # the header is written before that: see PacketRing.push_packet
        if failed:
            return failed
        pieces[0].iov_base, pieces[0].iov_len = <void *>head, sizeof(Record)
        pieces[1].iov_base, pieces[1].iov_len = <void *>key, head.key_length
        pieces[2].iov_base, pieces[2].iov_len = <void *>body, head.body_length
        pieces[3].iov_base, pieces[3].iov_len = ZEROS, pad
        failed = write_pieces(self.fd, pieces, 4, HEADER_BYTES + head.position % self.capacity)
        if failed == 0:
            self.written = head.position + size
        return failed

    cdef int _put_in_pieces(self, const Record *head, const uchar *key, const uchar *body, int64_t size) noexcept nogil:
        cdef int64_t at = head.position + <int64_t>sizeof(Record)
        cdef int failed = self.write(head.position) or self.put(at, key, head.key_length)
        failed = failed or self.put(at + head.key_length, body, head.body_length) or self.put(head.position, head, sizeof(Record))
        if failed == 0:
            self.written = head.position + size
        return failed

    cdef int write(self, int64_t tail) noexcept nogil:
        """Write what was collected, up to ``tail``; return 0, or an errno: then it is given up, as if it had never come."""
        cdef iovec[2] pieces
        cdef int64_t offset = self.written % self.capacity
        cdef int64_t n = self.staged(), pad = -tail & (PAGE - 1)
        cdef uchar *staged = self.kept + self.half * KEPT + (self.written - self.begins[self.half])
        cdef int failed
        if n == 0:
            return 0
        if offset + n > self.capacity:
            failed = self.put(self.written, staged, n)
        else:
            pieces[0].iov_base, pieces[0].iov_len = staged, n
            pieces[1].iov_base, pieces[1].iov_len = ZEROS, pad
            # Only into a page that nothing was written to, and where no record can be: the rest of it is free.
            if (offset % PAGE and offset // PAGE == (offset + n - 1) // PAGE) or tail + pad > self.saved_head + self.capacity:
                pieces[1].iov_len = 0
            failed = write_pieces(self.fd, pieces, 2, HEADER_BYTES + offset)
        if failed:
            self.forget_staged()
        else:
            self.written = tail
        return failed

    cdef void forget_staged(self) noexcept nogil:
        """Forget what was collected and is not written."""
        self.ends[self.half] = min(self.ends[self.half], self.written)

    cdef void forget_kept(self) noexcept nogil:
        """Forget what is kept of what was written."""
        self.begins[0] = self.begins[1] = self.ends[0] = self.ends[1] = 0

    # ---- marks

    cdef Mark mark_for(self, uint64_t number, int64_t position, uint16_t state, uint32_t attempts) noexcept nogil:
        cdef Mark mark
        cdef uint64_t[2] whose
        whose[0], whose[1] = number, <uint64_t>position
        mark.state, mark.attempts = state, <uint16_t>min(attempts, 0xFFFF)
        mark.check = crc32c(crc32c(self.seed, whose, sizeof(whose)), &mark, 4)
        return mark

    cdef Mark read_mark(self, const Record *record) noexcept nogil:
        """Return the record's mark, or that of a new record."""
        cdef Mark mark = self.marks[record.number % self.slots]
        cdef Mark sealed
        cdef int i
        for i in range(self.change_count):  # none, unless the last could not be written
            if self.changes[i].number == record.number % self.slots:
                mark = self.changes[i].mark
        sealed = self.mark_for(record.number, record.position, mark.state, mark.attempts)
        if mark.check == sealed.check and (mark.state == QUEUED or mark.state == MOVED or mark.state == DONE):
            return mark
        return self.mark_for(record.number, record.position, QUEUED, 0)

    cdef void mark(self, uint64_t number, int64_t position, uint16_t state, uint32_t attempts) noexcept nogil:
        """Note what has become of the record with this number and position."""
        cdef Mark mark = self.mark_for(number, position, state, attempts)
        if self.direct:
            self.marks[number % self.slots] = mark
            return
        if self.change_count == CHANGES and self.write_marks() != 0:
            self.change_count = 0  # they are lost, but nothing else
        self.changes[self.change_count].number = number % self.slots
        self.changes[self.change_count].mark = mark
        self.change_count += 1

    cdef int write_marks(self) noexcept nogil:
        """Write the marks that were collected, in runs; return 0, or an errno: then they are kept for the next time."""
        cdef Mark[RUN] run
        cdef int failed = 0, i = 0, begun
        cdef uint64_t low, high, number
        while i < self.change_count:
            begun = i
            low = high = self.changes[i].number
            while i < self.change_count:
                number = self.changes[i].number
                if max(high, number) - min(low, number) >= RUN:
                    break
                low, high = min(low, number), max(high, number)
                i += 1
            memcpy(run, self.marks + low, (high - low + 1) * sizeof(Mark))
            for begun in range(begun, i):
                run[self.changes[begun].number - low] = self.changes[begun].mark
            failed = write_all(self.fd, run, (high - low + 1) * sizeof(Mark),
                               HEADER_BYTES + self.capacity + low * sizeof(Mark)) or failed
        if failed == 0:
            self.change_count = 0
        return failed

    # ---- the header

    cdef int save(self, Positions *positions) noexcept nogil:
        """Write the positions to both copies, one after the other; return 0, or an errno.

        Whenever the process dies, one of the copies is whole. One that cannot be written is as good as lost: the other will do.
        """
        cdef Saved saved
        cdef int[2] failed
        cdef int copy
        cdef int64_t offset = <int64_t>(<char *>&(<Header *>NULL).saved - <char *>NULL)
        saved.positions = positions[0]
        saved.check = crc32c(self.seed, positions, sizeof(Positions))
        failed[0] = failed[1] = 0
        if self.shared:
            for copy in range(2):
                failed[copy] = write_all(self.fd, &saved, sizeof(Positions) + sizeof(uint32_t), copy * SECOND_COPY + offset)
        if failed[0] and failed[1]:
            return failed[0]
        self.saved_head, self.limit = positions.head, 0 if self.broken else positions.limit
        return 0

    # ---- after a sync that failed

    cdef int write_again(self, int64_t start, int64_t end, uint64_t first, uint64_t last) noexcept nogil:
        """Write again what lies between two positions, and the marks of the records of these numbers; return 0, or an errno."""
        cdef int failed = 0
        cdef int64_t part
        cdef uint64_t at, count
        while start < end and failed == 0:
            part = min(end - start, PIECE, self.capacity - start % self.capacity)
            failed = write_all(self.fd, self.at(start), part, HEADER_BYTES + start % self.capacity)
            start += part
        if first < last:  # numbers may be left out, places of marks are not
            last = first + (last - first - 1) % self.slots + 1
        while first < last and failed == 0:
            at = first % self.slots
            count = min(last - first, PIECE // sizeof(Mark), self.slots - at)
            failed = write_all(self.fd, self.marks + at, count * sizeof(Mark),
                               HEADER_BYTES + self.capacity + at * sizeof(Mark))
            first += count
        return failed


cdef int write_all(int fd, const void *p, int64_t n, int64_t offset) noexcept nogil:
    """Write bytes to a place in a file; return 0, or an errno."""
    cdef ssize_t taken
    while n > 0:
        taken = c_pwrite(fd, p, n, offset)
        if taken < 0:
            if errno != EINTR:
                return errno
            continue
        p = <const uchar *>p + taken
        offset += taken
        n -= taken
    return 0


cdef int write_pieces(int fd, iovec *pieces, int count, int64_t offset) noexcept nogil:
    """Write pieces in a row to a place in a file; return 0, or an errno. Changes ``pieces``."""
    cdef ssize_t taken
    cdef size_t part
    while count > 0:
        if pieces.iov_len == 0:
            pieces += 1
            count -= 1
            continue
        taken = pwritev(fd, pieces, count, offset)
        if taken < 0:
            if errno != EINTR:
                return errno
            continue
        offset += taken
        while count > 0 and taken > 0:
            part = min(<size_t>taken, pieces.iov_len)
            pieces.iov_base = <uchar *>pieces.iov_base + part
            pieces.iov_len -= part
            taken -= part
            if pieces.iov_len == 0:
                pieces += 1
                count -= 1
    return 0


def record_bytes(int64_t key_length, int64_t body_length):
    """Return how many bytes of a ring a packet takes, with a key and a body of these lengths in bytes."""
    return size_of(key_length, body_length)


def file_size(int64_t capacity):
    """Return the size in bytes of the file or memfd that holds a ring of ``capacity`` bytes."""
    capacity = round_capacity(capacity)
    return HEADER_BYTES + capacity + capacity // SMALLEST * <int64_t>sizeof(Mark)


def round_capacity(int64_t capacity):
    """Return ``capacity`` rounded up to whole pages (of the largest size Linux has)."""
    return max(HEADER_BYTES, (capacity + HEADER_BYTES - 1) // HEADER_BYTES * HEADER_BYTES)
