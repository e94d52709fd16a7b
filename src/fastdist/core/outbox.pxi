"""Responses that wait until their packets are written, or synced.

A read's responses are kept in a row with those of other connections (``Outbox``), each part with the position of the ring up
to which packets have to be safe before it may leave. There is no object for a response that waits.
"""

cdef struct Part:            # the responses of one read, in the order in which they came
    PyObject *connection     # IngestBase; NULL: it has a `PendingResponse` that waits, and only the packets are counted here
    int64_t position         # of the ring
    int64_t read_ns          # when its requests were read, monotonic
    int64_t messages
    int64_t body_bytes
    Py_ssize_t size          # bytes of responses
    int32_t packets          # accepted by these responses; 0: they are about something else
    int32_t request          # the word that counts an agent's request; 0: none
    bint batch               # the packets are of one request
    bint close               # the last is the last on its connection


@cython.final
cdef class Outbox:
    """Parts in the order of their positions, and their bytes."""

    cdef Part *parts
    cdef Py_ssize_t first, end, room
    cdef Buffer bytes

    def __dealloc__(self):
        while self.first < self.end:
            Py_XDECREF(self.parts[self.first].connection)
            self.first += 1
        free(self.parts)
        release(&self.bytes)

    cdef int add(self, Part *part, const void *data) except -1:
        """Put a part, with ``part.size`` bytes, at the end."""
        cdef Part *grown
        if self.first == self.end:
            self.first = self.end = 0
        if self.end == self.room:
            if self.first > self.room // 2:
                memmove(self.parts, self.parts + self.first, (self.end - self.first) * sizeof(Part))
                self.first, self.end = 0, self.end - self.first
            else:
                grown = <Part *>realloc(self.parts, 2 * (self.room + 32) * sizeof(Part))
                if grown == NULL:
                    raise MemoryError
                self.parts, self.room = grown, 2 * (self.room + 32)
        if part.size:
            keep(&self.bytes, data, part.size)
        Py_XINCREF(part.connection)
        self.parts[self.end] = part[0]
        self.end += 1
        return 0

    cdef inline bint has_until(self, int64_t position) noexcept:
        """Whether there is a part whose packets are before ``position``."""
        return self.first < self.end and self.parts[self.first].position <= position

    cdef Part take(self) noexcept:
        """Take the first part out; its bytes, which begin at ``data()``, stay until ``taken``."""
        self.first += 1
        return self.parts[self.first - 1]

    cdef const char *data(self) noexcept:
        return <const char *>self.bytes.data + self.bytes.start

    cdef void taken(self, Part *part) noexcept:
        """Its bytes are needed no more."""
        self.bytes.start += part.size
        if self.first == self.end:
            self.bytes.start = self.bytes.end = 0
        Py_XDECREF(part.connection)
