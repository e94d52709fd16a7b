"""What is put together or kept of bytes: a buffer that grows, text appended where there is room, pieces sent in one call."""

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

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


cdef enum:
    PIECES = 1024            # that the kernel takes in one call
    APART = 4096             # bytes from which on it is cheaper to send something from where it is than to copy it first

cdef struct Pieces:          # bytes that are sent in one call
    char *begun              # of the piece that is being put together
    char *end
    int64_t size             # of those that are whole
    int count
    iovec[PIECES] parts


cdef inline void begin_pieces(Pieces *pieces, char *room) noexcept nogil:
    """Begin, with room for all that is not sent from where it is."""
    pieces.begun = pieces.end = room
    pieces.size, pieces.count = 0, 0


cdef inline int64_t size_of_pieces(Pieces *pieces) noexcept nogil:
    return pieces.size + (pieces.end - pieces.begun)


cdef void end_pieces(Pieces *pieces) noexcept nogil:
    """What was put together is a piece of its own."""
    pieces.parts[pieces.count].iov_base, pieces.parts[pieces.count].iov_len = pieces.begun, pieces.end - pieces.begun
    pieces.size += pieces.end - pieces.begun
    pieces.count += 1
    pieces.begun = pieces.end


cdef inline void add_piece(Pieces *pieces, const void *p, int64_t n) noexcept nogil:
    """Add bytes, which stay where they are until all is sent."""
    if n < APART or pieces.count + 3 > PIECES:
        pieces.end = append(pieces.end, p, n)
        return
    end_pieces(pieces)
    pieces.parts[pieces.count].iov_base, pieces.parts[pieces.count].iov_len = <void *>p, n
    pieces.size += n
    pieces.count += 1
