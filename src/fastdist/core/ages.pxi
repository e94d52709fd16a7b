"""Which unclaimed record of a ring is the oldest.

Mostly the first, as packets are stamped when they are pushed. But copies keep their time, and so do packets that others have
stamped. Those that are older than one before them are kept in mind: the oldest, then the oldest behind that, and so on.
"""

cdef struct Late:
    int64_t position         # of an unclaimed record that is older than one before it
    int64_t accepted_ns


@cython.final
cdef class LateRecords:
    """Records that are older than one before them, in the order of their positions and so of their ages."""

    cdef Late *items
    cdef Py_ssize_t first, count, room
    cdef int64_t newest_ns             # when the newest packet was accepted, of those that were pushed

    def __dealloc__(self):
        free(self.items)

    cdef inline void note(self, const Record *record, int64_t cursor) noexcept nogil:
        """Note a record behind the last; those before ``cursor`` were claimed."""
        if likely(record.accepted_ns >= self.newest_ns):
            self.newest_ns = record.accepted_ns
        else:
            self._add(record.position, record.accepted_ns, cursor)

    cdef void _add(self, int64_t position, int64_t accepted_ns, int64_t cursor) noexcept nogil:
        cdef Late *grown
        while self.count > self.first and self.items[self.count - 1].accepted_ns >= accepted_ns:
            self.count -= 1
        self.drop_before(cursor)
        if self.count == self.room:
            grown = <Late *>realloc(self.items, 2 * (self.room + 32) * sizeof(Late))
            if grown == NULL:
                return  # it will seem younger than it is
            self.items, self.room = grown, 2 * (self.room + 32)
        self.items[self.count].position, self.items[self.count].accepted_ns = position, accepted_ns
        self.count += 1

    cdef int64_t oldest(self, int64_t cursor) noexcept nogil:
        """Return when the oldest of them was accepted, FOREVER without any."""
        self.drop_before(cursor)
        return self.items[self.first].accepted_ns if self.first < self.count else FOREVER

    cdef void drop_before(self, int64_t cursor) noexcept nogil:
        """Forget those that were claimed since; give memory back that so few do not need."""
        cdef Late *shrunk
        while self.first < self.count and self.items[self.first].position < cursor:
            self.first += 1
        if self.items == NULL or (self.first <= self.count // 2 and self.count):
            return
        self.count -= self.first
        memmove(self.items, self.items + self.first, self.count * sizeof(Late))
        self.first = 0
        if self.room > 8 * (self.count + 32):
            shrunk = <Late *>realloc(self.items, 2 * (self.count + 32) * sizeof(Late))
            if shrunk != NULL:
                self.items, self.room = shrunk, 2 * (self.count + 32)

    cdef void drop_from(self, int64_t position) noexcept nogil:
        """Forget those that have never been there."""
        while self.count > self.first and self.items[self.count - 1].position >= position:
            self.count -= 1

    cdef void clear(self) noexcept nogil:
        """Forget all."""
        self.first = self.count = self.newest_ns = 0
