# HTTP/1.1 messages as both sides read them.
from libc.stdint cimport int64_t

ctypedef unsigned char uchar

cdef struct Span:
    const uchar *p
    Py_ssize_t n

cdef enum Method:
    OTHER = 0
    GET
    HEAD
    POST
    OPTIONS

cdef struct RequestHead:
    int status               # 0: well-formed; else the status to answer with, and `fault` says why
    const char *fault
    Method method
    Span method_text
    Span target              # origin-form (an absolute-form is cut down to it), or "*"
    Span path                # the target without its query
    int minor                # of HTTP/1.x
    int64_t content_length   # -1: none
    bint chunked
    bint keep_alive
    bint closes              # Connection: close, whatever else it says
    bint expects_continue
    bint expects_other
    Span content_type
    bint encoded             # a Content-Encoding other than identity
    Span key                 # Idempotency-Key
    int64_t wait             # of Prefer, seconds; -1: none
    Span authorization
    Span origin
    int keys                 # how many Idempotency-Key fields there were

cdef struct ReplyHead:
    int status
    int64_t content_length   # -1: none
    bint chunked
    bint keep_alive
    int64_t retry_after      # seconds; -1: none
    bint dated               # Retry-After is a date, in `retry_date`
    Span retry_date

cdef enum:
    HEAD_INCOMPLETE = 0
    HEAD_BROKEN = -1

cdef enum:
    CHUNK_MORE = 0           # all input was used
    CHUNK_DATA               # `piece` holds some of the body
    CHUNK_END                # the body and its trailers are over
    CHUNK_BROKEN
    CHUNK_TRAILERS_TOO_LONG
    CHUNK_TOO_LARGE          # the size lines say so, whether or not the data is there

cdef struct Chunked:
    int state
    int64_t left             # bytes of the present chunk
    int64_t room             # bytes that further chunks may have
    int digits
    int64_t line             # length so far of an extension, or of all trailers

cdef const char *BAD_LINE    # what HEAD_BROKEN means

cdef Py_ssize_t find_head_end(const uchar *p, Py_ssize_t n, Py_ssize_t *scanned, bint strict) noexcept nogil
cdef void parse_request_head(const uchar *p, Py_ssize_t n, RequestHead *head) noexcept nogil
cdef bint parse_reply_head(const uchar *p, Py_ssize_t n, ReplyHead *head) noexcept nogil
cdef void chunked_start(Chunked *c) noexcept nogil
cdef int chunked_next(Chunked *c, const uchar **at, const uchar *end, Span *piece, int64_t line_limit) noexcept nogil
cdef int chunked_next_strict(Chunked *c, const uchar **at, const uchar *end, Span *piece, int64_t line_limit) noexcept nogil
cdef bint same(Span span, const char *lower_case, Py_ssize_t n) noexcept nogil
cdef Span trim(const uchar *p, const uchar *end) noexcept nogil
