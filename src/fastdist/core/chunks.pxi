"""Chunked bodies (RFC 9112, 7.1): shown to httptools line by line, so that it is known where the message ends."""

cdef enum ChunkEvent:
    CHUNK_MORE = 0           # go on, if there is more input
    CHUNK_DATA               # `piece` holds some of the body
    CHUNK_END                # the body and its trailers are over
    CHUNK_BROKEN
    CHUNK_TOO_LONG           # an extension, or the trailers
    CHUNK_TOO_LARGE          # the size lines say so, whether or not the data is there

cdef bytes CHUNKED_REQUEST = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
cdef bytes CHUNKED_REPLY = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

cdef enum ChunkPart:
    CHUNK_SIZE_LINE = 0
    CHUNK_CONTENT
    CHUNK_CONTENT_END        # the CR LF behind it
    CHUNK_TRAILERS


@cython.final
cdef class ChunkedBody:
    """Reads chunked bodies, one after the other; ``reply``: of replies. Extensions and trailers are read and dropped."""

    cdef bint reply
    cdef object parser               # None where no body is under way; the two refer to one another
    cdef ChunkPart part
    cdef bint over
    cdef ChunkEvent failed           # what is wrong; CHUNK_MORE: nothing
    cdef bint spent                  # the parser reads no further body: a trailer says Connection: close, or the like
    cdef bint sized                  # the digits of the size are over
    cdef int64_t left                # bytes of the present chunk
    cdef int64_t room                # bytes that further chunks may have
    cdef int64_t line, line_limit    # bytes of the size line so far, or of all trailers

    def __cinit__(self, bint reply):
        self.reply = reply

    cdef int begin(self, int64_t room, int64_t line_limit) except -1:
        """Be ready for a body of at most ``room`` bytes; size lines, and all trailers together, have at most ``line_limit``."""
        self.room, self.line_limit = room, line_limit
        self.part, self.over, self.sized, self.left, self.line = CHUNK_SIZE_LINE, False, False, 0, 0
        self.failed = CHUNK_MORE
        if self.parser is None or self.spent:
            self.spent = False
            self.parser = reply_parser(self, False) if self.reply else HttpRequestParser(self)
        self.parser.feed_data(CHUNKED_REPLY if self.reply else CHUNKED_REQUEST)
        return 0

    def on_message_complete(self):
        """Called by httptools when the body is over."""
        self.over, self.spent = True, not self.parser.should_keep_alive()

    cdef int read(self, const uchar **at, const uchar *end, Span *piece) except -1:
        """Read on at ``at``, which must not be the end, and move that; return at the first event. A fault is told again."""
        cdef const uchar *p = at[0]
        cdef const uchar *feed = NULL
        cdef Py_ssize_t n = end - p
        if unlikely(self.failed != CHUNK_MORE):
            return self.failed
        if self.part == CHUNK_CONTENT:
            piece.p, piece.n = p, min(n, self.left)
            n = piece.n
            if end - p >= self.left + 2 and p[n] == c'\r' and p[n + 1] == c'\n':
                n += 2  # its end is as good as read with it
        else:
            feed = <const uchar *>memchr(p, c'\n', n)
            if feed != NULL:
                n = feed + 1 - p
            if self.part == CHUNK_SIZE_LINE and not self.sized and not self.read_size(p, n):
                return self.fail(CHUNK_TOO_LARGE)
            if (self.part == CHUNK_SIZE_LINE and self.left == 0 and feed != NULL and end - feed > 2 and feed[1] == c'\r'
                    and feed[2] == c'\n' and n + 2 <= self.line_limit - self.line):
                n += 2  # nor does a last chunk without trailers come in two
            if n > self.line_limit - self.line:
                n, feed = self.line_limit - self.line, NULL
                if n == 0:
                    return self.fail(CHUNK_TOO_LONG)
            self.line += n
        try:
            self.parser.feed_data(PyMemoryView_FromMemory(<char *>p, n, PyBUF_READ))
        except HttpParserUpgrade:
            pass  # in a trailer, which means nothing
        except HttpParserError:
            return self.fail(CHUNK_BROKEN)
        at[0] = p + n
        if self.over:
            return CHUNK_END
        if self.part == CHUNK_CONTENT:
            self.left -= piece.n
            if n > piece.n:
                self.part, self.line = CHUNK_SIZE_LINE, 0
            elif self.left == 0:
                self.part, self.line = CHUNK_CONTENT_END, 0
            return CHUNK_DATA
        if feed != NULL:
            self.end_line()
        return CHUNK_MORE

    cdef bint read_size(self, const uchar *p, Py_ssize_t n) noexcept:
        """Read on in the size; say whether there is room for it."""
        cdef Py_ssize_t i
        cdef int digit
        for i in range(n):
            digit = hex_value(p[i])
            if digit < 0:
                self.sized = True
                break
            if self.left > self.room >> 4:
                return False
            self.left = self.left * 16 + digit
        return self.left <= self.room

    cdef void end_line(self) noexcept:
        if self.part == CHUNK_SIZE_LINE:
            self.part = CHUNK_CONTENT if self.left else CHUNK_TRAILERS
            self.room -= self.left
            self.sized, self.line = False, 0
        elif self.part == CHUNK_CONTENT_END:
            self.part, self.line = CHUNK_SIZE_LINE, 0

    cdef int fail(self, ChunkEvent event) noexcept:
        self.failed = event
        self.close()
        return event

    cdef void close(self) noexcept:
        """Let go of the parser."""
        self.parser = None


cdef inline int hex_value(uchar c) noexcept nogil:
    if c'0' <= c <= c'9':
        return c - c'0'
    c |= 32
    return c - c'a' + 10 if c'a' <= c <= c'f' else -1
