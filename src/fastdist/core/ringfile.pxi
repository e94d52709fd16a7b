"""A ring's file: where its bytes are, how they are written, and how they are read.

The file is a header (two copies), the data, and a table of marks: what changes later of a record, one mark of eight bytes
for each, by the record's number. Facts it rests on:
1. A file is written with ``pwrite`` and mapped for reading only. A store to a mapping costs a fault for each page after
   each sync, and a fault that meets a commit of the file system waits for it; what was written is seen in the mapping at
   once, and survives the process as a store does.
2. What is appended is collected, and written once for all that was read together (``write``), before any of it is
   acknowledged. A large record is written from where it lies. What was written last is kept (``kept_at``): it is sent from
   there, since nothing that happens to the file changes it.
3. Marks are kept in memory, and pages of them that have changed are written whole: so nothing is read for that, and what
   could not be written is written later. A mark is sealed with the number and position of its record, which no two records
   have in common, so a stale or damaged one does not count; the packet counts then as it was accepted, rather twice than
   never.
4. A page that is written to for the first time in a lap is written to its end: the kernel would have to read the rest.
5. The header is written seldom. It says where the queue begins at least (``head``), and how far records may reach
   (``limit``); it is written before anything beyond that.
6. In memory (a memfd), and for a private look at a file, stores go to the mapping at once: then ``direct`` is true, and
   nothing is ever collected.
7. To touch a page of the mapping that the disk cannot read ends the process. So all that a predecessor has left is read
   with ``pread`` first (``look``), and zeros cover what cannot be read.
"""

cdef extern from "<sys/uio.h>" nogil:
    ssize_t pwritev(int fd, const iovec *pieces, int count, int64_t offset)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_pread "pread"(int fd, void *room, size_t n, int64_t offset)
    ssize_t c_pwrite "pwrite"(int fd, const void *data, size_t n, int64_t offset)

cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE
    int fallocate(int fd, int mode, int64_t offset, int64_t n)

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

cdef struct Gap:             # that could not be written yet
    int64_t position
    int64_t size

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
    PAGE = 4096
    MARKS_A_PAGE = 512
    NOTED = 64               # pages of marks with changes that are noted one by one
    PAGES_AT_ONCE = 2048     # of marks that are written at once
    PIECE = 1 << 20          # bytes that are read, or written again, at a time

cdef enum:                   # what is known of a page of marks
    LOADED = 1               # it was read, or tried
    CHANGED = 2              # since it was written

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


class RingError(Exception):
    """The file is no ring, or one that cannot be opened as it is; the text says why."""


class CutShortError(RingError):
    """The header is sound and speaks of ``capacity`` bytes, which the file does not have."""

    def __init__(self, capacity):
        super().__init__(f"the file is shorter than the {capacity} bytes its header speaks of")
        self.capacity = capacity


class OtherFormatError(RingError):
    """Another version has written the file, in ``format``."""

    def __init__(self, version):
        text = f"written in format {version} by a newer version; this one reads format {FORMAT}" if version > FORMAT else (
            f"written in format {version} by an older version")
        super().__init__(text)
        self.format = version


class DamagedError(RingError):
    """A packet in the ring is not as it was written."""


class NewerFormatError(OtherFormatError):
    """A newer version has written the file, and only that can read it."""


@cython.final
cdef class RingFile:
    """The open file of a ring (``fd``, which is duplicated); ``direct``: stores go to the mapping, which is ``shared`` or not."""

    cdef int fd
    cdef bint direct, shared
    cdef bint broken               # a page of the data or the header cannot be read: what is written there may be lost
    cdef int failed                # errno of the last write that has failed
    cdef uchar *data               # `capacity` bytes, mapped twice in a row: no record is ever split
    cdef Mark *marks               # mapped from a memfd that is written to directly, else in memory
    cdef int64_t capacity
    cdef uint64_t slots            # marks there are
    cdef uint32_t seed
    cdef Header header             # as it was written last
    cdef int64_t written           # position: what is before it is in the file
    cdef int64_t saved_head, limit # as the header has them
    cdef int64_t rewriting         # position: from it on records are being written again, by another thread; else FOREVER
    cdef uchar *kept               # two halves of KEPT bytes, filled in turn with what is appended
    cdef int64_t[2] begins, ends   # positions of what is in them
    cdef int half                  # that is being filled; what comes from `written` on is in it
    cdef uchar *pages              # for each page of marks: LOADED, CHANGED
    cdef uint64_t[NOTED] noted     # pages that are CHANGED, `noted_count` of them
    cdef int noted_count           # above NOTED: `pages` has to tell
    cdef Gap *gaps                 # by position
    cdef Py_ssize_t gap_count, gap_room
    cdef int64_t readable          # position: up to it the pages were seen to be readable
    cdef readonly list unreadable  # (offset in the file, bytes, errno) of parts that are not

    def __cinit__(self, int fd, bint direct, bint shared):
        self.fd = -1
        self.direct, self.shared = direct, shared
        self.unreadable, self.rewriting = [], FOREVER
        self.fd = os.dup(fd)

    def __dealloc__(self):
        self.unmap()
        if self.fd >= 0:
            close(self.fd)
        free(self.kept)
        free(self.gaps)

    # ---- mapping

    cdef void unmap(self) noexcept:
        if self.data != NULL:
            munmap(self.data, 2 * self.capacity)
        if self.marks != NULL:
            munmap(self.marks, self.slots * sizeof(Mark))
        free(self.pages)
        self.data, self.marks, self.pages = NULL, NULL, NULL

    cdef int map(self, int64_t capacity) except -1:
        """Map the data and the marks. Raises CutShortError, OSError."""
        cdef int protection = PROT_READ | PROT_WRITE if self.direct else PROT_READ
        # A private look changes few pages, if any: it is not to be refused because memory for all of them is lacking.
        cdef int sharing = MAP_SHARED if self.shared else MAP_PRIVATE | MAP_NORESERVE
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
        if self.direct and self.shared:
            table = mmap(NULL, self.slots * sizeof(Mark), protection, sharing, self.fd, HEADER_BYTES + capacity)
        else:
            table = mmap(NULL, self.slots * sizeof(Mark), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if table == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.marks = <Mark *>table
        self.pages = <uchar *>calloc(self.slots // MARKS_A_PAGE, 1)
        if not self.direct and self.kept == NULL:
            self.kept = <uchar *>malloc(2 * KEPT)
        if self.pages == NULL or not self.direct and self.kept == NULL:
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

    cdef int64_t next_kept(self, int64_t position) noexcept nogil:
        """Return where the first record behind a position is that is kept, FOREVER without one."""
        cdef int64_t found = FOREVER
        cdef int half
        for half in range(2):
            if position < self.begins[half] < self.ends[half]:
                found = min(found, self.begins[half])
        return found

    cdef inline int64_t staged(self) noexcept nogil:
        """Return how many bytes are collected and not written yet."""
        return max(0, self.ends[self.half] - self.written)

    cdef inline bint collects(self, int64_t tail, int64_t size) noexcept nogil:
        """Whether small records of ``size`` bytes in all, behind ``tail``, are written in one piece with what is collected."""
        return tail == self.ends[self.half] and tail + size - self.begins[self.half] <= KEPT

    # ---- reading what may be damaged

    cdef int look(self, int64_t position) except -1:
        """See to it that all before ``position`` can be read: where the disk has an error there are zeros from now on."""
        cdef int64_t start, end, offset
        if self.direct and self.shared:
            return 0
        while self.readable < position:
            start = self.readable % self.capacity
            end = min(self.capacity, (start & ~<int64_t>(PIECE - 1)) + PIECE)
            if self._try_to_read(HEADER_BYTES + start, end - start):
                for offset in range(start & ~<int64_t>(PAGE - 1), end, PAGE):
                    if self._cannot_read(HEADER_BYTES + offset, self._try_to_read(HEADER_BYTES + offset, PAGE)):
                        self.broken = True
                        self._cover(self.data + offset)
                        self._cover(self.data + self.capacity + offset)
            self.readable += end - start
        return 0

    cdef int load_mark(self, uint64_t number) except -1:
        """Read the page that has a record's mark; zeros take the place of one that cannot be read."""
        cdef int64_t page = <int64_t>(number % self.slots // MARKS_A_PAGE)
        cdef int64_t offset = HEADER_BYTES + self.capacity + page * PAGE
        if self.pages[page] & LOADED or (self.direct and self.shared):
            return 0
        self.pages[page] |= LOADED
        self._cannot_read(offset, read_all(self.fd, self.marks + page * MARKS_A_PAGE, PAGE, offset))
        return 0

    cdef bint _cannot_read(self, int64_t offset, int failed) except -1:
        """Note a page that cannot be read (``failed``: errno); say whether it is news."""
        if failed == 0 or (offset, PAGE, failed) in self.unreadable:  # it was seen in the lap before
            return False
        self.unreadable.append((offset, PAGE, failed))
        return True

    cdef int _try_to_read(self, int64_t offset, int64_t n) except -1:
        """Return 0, or an errno."""
        cdef uchar *room = <uchar *>malloc(n)
        cdef int failed
        if room == NULL:
            raise MemoryError
        with nogil:  # it may take seconds, and other threads have heartbeats to send
            failed = read_all(self.fd, room, n, offset)
        free(room)
        return failed

    cdef int _cover(self, uchar *page) except -1:
        """Have zeros in the place of a page that cannot be read."""
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
        failed = self._write(p, part, HEADER_BYTES + offset)
        if failed == 0 and part < n:
            failed = self._write(<const uchar *>p + part, n - part, HEADER_BYTES)
        return failed

    cdef int _write(self, const void *p, int64_t n, int64_t offset) noexcept nogil:
        cdef int failed = write_all(self.fd, p, n, offset)
        if unlikely(failed):
            self.failed = failed
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
            self.failed = failed = EFBIG  # the header is written before that: see PacketRing.put_packet
        if failed:
            return failed
        pieces[0].iov_base, pieces[0].iov_len = <void *>head, sizeof(Record)
        pieces[1].iov_base, pieces[1].iov_len = <void *>key, head.key_length
        pieces[2].iov_base, pieces[2].iov_len = <void *>body, head.body_length
        pieces[3].iov_base, pieces[3].iov_len = ZEROS, pad + self.rest_of_page(head.position, head.position + size)
        failed = write_pieces(self.fd, pieces, 4, HEADER_BYTES + head.position % self.capacity)
        if failed == 0:
            self.written = head.position + size
        else:
            self.failed = failed
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
        cdef int64_t n = self.staged()
        cdef uchar *staged = self.kept + self.half * KEPT + (self.written - self.begins[self.half])
        cdef int failed
        if n == 0:
            return 0
        if offset + n > self.capacity:
            failed = self.put(self.written, staged, n)
        else:
            pieces[0].iov_base, pieces[0].iov_len = staged, n
            pieces[1].iov_base, pieces[1].iov_len = ZEROS, self.rest_of_page(self.written, tail)
            failed = write_pieces(self.fd, pieces, 2, HEADER_BYTES + offset)
        if failed:
            self.failed = failed
            self.forget_staged()
        else:
            self.written = tail
        return failed

    cdef inline int64_t rest_of_page(self, int64_t start, int64_t end) noexcept nogil:
        """Return how many zeros are to follow what is written between two positions, see 4 above.

        None into a page that was written to before, or where a record can be that still counts.
        """
        cdef int64_t rest = -end & (PAGE - 1)
        cdef bint begun = start % PAGE != 0 and start // PAGE == (end - 1) // PAGE
        return 0 if begun or end + rest > self.saved_head + self.capacity else rest

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
        cdef Mark sealed = self.mark_for(record.number, record.position, mark.state, mark.attempts)
        if mark.check == sealed.check and (mark.state == QUEUED or mark.state == MOVED or mark.state == DONE):
            return mark
        return self.mark_for(record.number, record.position, QUEUED, 0)

    cdef void mark(self, uint64_t number, int64_t position, uint16_t state, uint32_t attempts) noexcept nogil:
        """Note what has become of the record with this number and position."""
        cdef uint64_t slot = number % self.slots, page = slot // MARKS_A_PAGE
        self.marks[slot] = self.mark_for(number, position, state, attempts)
        if self.direct or self.pages[page] & CHANGED:
            return
        self.pages[page] |= CHANGED
        if self.noted_count < NOTED:
            self.noted[self.noted_count] = page
        self.noted_count = min(self.noted_count, NOTED) + 1

    cdef int write_marks(self) noexcept nogil:
        """Write the pages of marks that have changed, PAGES_AT_ONCE at most; return 0, or an errno: the rest is kept for later."""
        cdef uint64_t page, first, count = self.slots // MARKS_A_PAGE
        cdef int i, failed = 0, written = 0
        if self.noted_count == 0:
            return 0
        if likely(self.noted_count <= NOTED):
            for i in range(self.noted_count):
                failed = self._write_page(self.noted[i], 1) or failed
            if failed == 0:
                self.noted_count = 0
                return 0
            self.noted_count = NOTED + 1
            return failed
        page = 0
        while page < count and failed == 0 and written < PAGES_AT_ONCE:
            if not self.pages[page] & CHANGED:
                page += 1
                continue
            first = page
            while page < count and self.pages[page] & CHANGED and page - first < PIECE // PAGE:
                page += 1
            failed = self._write_page(first, page - first)
            written += <int>(page - first)
        if failed == 0 and page == count:
            self.noted_count = 0
        return failed

    cdef int _write_page(self, uint64_t page, int64_t count) noexcept nogil:
        """Write so many pages of marks; return 0, or an errno."""
        cdef int failed = self._write(self.marks + page * MARKS_A_PAGE, count * PAGE,
                                      HEADER_BYTES + self.capacity + page * PAGE)
        cdef int64_t i
        if failed == 0:
            for i in range(count):
                self.pages[page + i] &= ~CHANGED
        return failed

    # ---- gaps

    cdef void put_gap(self, int64_t position, int64_t size) noexcept nogil:
        """Have what lies there passed over from now on."""
        cdef int64_t part
        while size > 0:
            part = min(size, 8 * <int64_t>0xFFFFFFFF)
            if self._write_gap(position, part) != 0:
                self._keep_gap(position, part)
            position += part
            size -= part

    cdef int _write_gap(self, int64_t position, int64_t size) noexcept nogil:
        cdef uint32_t[2] gap
        gap[0], gap[1] = GAP_MAGIC, <uint32_t>(size // 8)
        return EBUSY if position >= self.rewriting else self.put(position, gap, sizeof(gap))

    cdef void _keep_gap(self, int64_t position, int64_t size) noexcept nogil:
        cdef Gap *grown
        cdef Py_ssize_t at = self.gap_count
        if at == self.gap_room:
            grown = <Gap *>realloc(self.gaps, 2 * (self.gap_room + 8) * sizeof(Gap))
            if grown == NULL:
                return  # it is found once more
            self.gaps, self.gap_room = grown, 2 * (self.gap_room + 8)
        while at > 0 and self.gaps[at - 1].position > position:
            self.gaps[at] = self.gaps[at - 1]
            at -= 1
        self.gaps[at].position, self.gaps[at].size = position, size
        self.gap_count += 1

    cdef int64_t gap_at(self, int64_t position, int64_t end) noexcept nogil:
        """Return the bytes of the gap that is there and ends by ``end``; 0 without one."""
        cdef Record *record = self.at(position)
        cdef Py_ssize_t i
        if record.magic == GAP_MAGIC and 0 < gap_bytes(record) <= end - position:
            return gap_bytes(record)
        for i in range(self.gap_count):
            if self.gaps[i].position == position and self.gaps[i].size <= end - position:
                return self.gaps[i].size
        return 0

    cdef int write_gaps(self, int64_t head) noexcept nogil:
        """Write those that could not be written yet and are not behind the queue; return 0, or an errno."""
        cdef Py_ssize_t i, kept = 0
        cdef int failed = 0
        for i in range(self.gap_count):
            if self.gaps[i].position >= head and (failed or self._write_gap(self.gaps[i].position, self.gaps[i].size)):
                failed = failed or self.failed or EBUSY
                self.gaps[kept] = self.gaps[i]
                kept += 1
        self.gap_count = kept
        return failed

    # ---- the header

    cdef int save(self, Positions *positions) noexcept nogil:
        """Write the header with these positions to both copies, one after the other; return 0, or an errno.

        Whenever the process dies, one of the copies is whole. One that cannot be written is as good as lost: the other will do.
        What never changes is written as well: it may have been damaged, and without it nothing here will be found.
        """
        cdef int[2] failed
        cdef int copy
        cdef Header *header = &self.header
        header.saved.positions = positions[0]
        header.saved.check = crc32c(self.seed, positions, sizeof(Positions))
        failed[0] = failed[1] = 0
        if self.shared:
            for copy in range(2):
                failed[copy] = write_all(self.fd, header, sizeof(Header), copy * SECOND_COPY)
        if failed[0] and failed[1]:
            self.failed = failed[0]
            return failed[0]
        self.saved_head, self.limit = positions.head, positions.limit
        return 0

    # ---- after a sync that failed

    cdef int write_again(self, int64_t start, int64_t end, uint64_t first, uint64_t last) noexcept nogil:
        """Write again what lies between two positions, and the marks of the records of these numbers; return 0, or an errno.

        In any thread: nothing else writes there before ``end`` meanwhile, see ``rewriting``, and marks are of one word each.
        A page that cannot be read any more stays as it is on the disk.
        """
        cdef int failed = 0
        cdef int64_t part
        cdef uint64_t at, count
        while start < end and failed == 0:
            part = min(end - start, PIECE, self.capacity - start % self.capacity)
            failed = self._write_piece_again(start % self.capacity, part)
            start += part
        if first < last:  # numbers may be left out, places of marks are not
            last = first + (last - first - 1) % self.slots + 1
            # Whole pages: of one that the disk cannot read the kernel would have to read the rest.
            first -= first % MARKS_A_PAGE
            last = min(last + (MARKS_A_PAGE - 1 - (last - 1) % MARKS_A_PAGE), first + self.slots)
        while first < last and failed == 0:
            at = first % self.slots
            count = min(last - first, PIECE // sizeof(Mark), self.slots - at)
            failed = write_all(self.fd, self.marks + at, count * sizeof(Mark),
                               HEADER_BYTES + self.capacity + at * sizeof(Mark))
            first += count
        return failed

    cdef int _write_piece_again(self, int64_t at, int64_t n) noexcept nogil:
        cdef uchar[PAGE] room
        cdef int64_t part
        # In the kernel a page that cannot be read is an error, which ends nothing.
        cdef int failed = EFAULT if self.broken else write_all(self.fd, self.data + at, n, HEADER_BYTES + at)
        if likely(failed != EFAULT):
            return failed
        failed = 0
        while n > 0 and failed == 0:
            part = min(n, PAGE - at % PAGE)
            if read_all(self.fd, room, part, HEADER_BYTES + at) == 0:
                failed = write_all(self.fd, room, part, HEADER_BYTES + at)
            n -= part
            at += part
        return failed


cdef int read_all(int fd, void *room, int64_t n, int64_t offset) noexcept nogil:
    """Read bytes from a place in a file; return 0, or an errno: EIO also for what lies behind its end."""
    cdef ssize_t got
    while n > 0:
        got = c_pread(fd, room, n, offset)
        if got <= 0:
            if got < 0 and errno == EINTR:
                continue
            return errno if got < 0 else EIO
        room = <uchar *>room + got
        offset += got
        n -= got
    return 0


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


cdef int raise_errno(int code) except -1:
    """Raise OSError for an errno; 0: do not."""
    if code:
        raise OSError(code, os.strerror(code))
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


cdef const uchar *record_body(const Record *record) noexcept nogil:
    return <const uchar *>record + sizeof(Record) + record.key_length


cdef size_t write_id(const Record *record, char *text) noexcept nogil:
    """Write the packet's id to ``text`` (ID_TEXT bytes) and return its length."""
    cdef size_t length = min(<int>record.key_length, ID_TEXT)
    if length:
        memcpy(text, <const uchar *>record + sizeof(Record), length)
        return length
    write_uuid(record.id, text)
    return 36


cdef str record_id(Record *record):
    cdef char[64] text
    cdef size_t n = write_id(record, text)
    return text[:n].decode("latin-1")
