"""What is put together or kept of bytes: a buffer that grows, and text appended where there is room for it."""

ctypedef unsigned char uchar

cdef struct Buffer:
    uchar *data              # NULL: nothing was ever kept
    Py_ssize_t start
    Py_ssize_t end           # what is kept lies between the two
    Py_ssize_t size


cdef inline Py_ssize_t kept_in(Buffer *buffer) noexcept nogil:
    return buffer.end - buffer.start


cdef void release(Buffer *buffer) noexcept nogil:
    free(buffer.data)
    buffer.data = NULL
    buffer.start = buffer.end = buffer.size = 0


cdef int make_room(Buffer *buffer, Py_ssize_t n) except -1:
    """See to it that ``n`` bytes more have room behind what is kept."""
    cdef Py_ssize_t kept = buffer.end - buffer.start
    cdef uchar *grown
    if buffer.end + n <= buffer.size:
        return 0
    grown = <uchar *>malloc(kept + max(n, kept))
    if grown == NULL:
        raise MemoryError
    if kept:
        memcpy(grown, buffer.data + buffer.start, kept)
    free(buffer.data)
    buffer.data, buffer.start, buffer.end, buffer.size = grown, 0, kept, kept + max(n, kept)
    return 0


cdef int keep(Buffer *buffer, const void *p, Py_ssize_t n) except -1:
    """Keep ``n`` bytes more."""
    make_room(buffer, n)
    memcpy(buffer.data + buffer.end, p, n)
    buffer.end += n
    return 0


cdef inline char *append(char *out, const void *text, Py_ssize_t n) noexcept nogil:
    """Write ``n`` bytes; return where they end."""
    memcpy(out, text, n)
    return out + n


cdef char *append_number(char *out, int64_t number) noexcept nogil:
    """Write a number that is not negative in decimal; return where it ends."""
    cdef char[20] digits
    cdef int n = 20
    while True:
        n -= 1
        digits[n] = <char>(c'0' + number % 10)
        number //= 10
        if number == 0:
            return append(out, digits + n, 20 - n)
