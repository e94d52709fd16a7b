"""Reading HTTP/1.1 (RFC 9112): where a head ends, what it says, and how a chunked body comes apart.

Nothing here allocates, keeps a pointer or touches Python. A head is looked for first (``find_head_end``, which remembers
how far it got, so a head that drips in is scanned once) and parsed in one pass when it is whole: no state is split over
reads, so there is nothing to get wrong at a packet boundary.

Requests are read strictly. Whatever two parsers might read differently (bare CR or LF, folded lines, white space before
a colon, two lengths, a length and a coding) is broken, for a front end before us may have read it the other way. Replies
are read as RFC 9112 lets a recipient: a bare LF ends a line.
"""

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

cdef extern from "arpa/inet.h" nogil:
    int AF_INET6
    cdef struct in6_addr:
        pass
    int inet_pton(int family, const char *text, void *address)

cdef enum:
    TOKEN = 1                # tchar of RFC 9110
    VALUE = 2                # field content: HTAB, SP, visible ASCII, obs-text
    TARGET = 4               # request-target: visible ASCII but #, and bytes above it as clients send them
    NAME = 8                 # a host's name as it stands: unreserved and sub-delims of RFC 3986, but no comma: two Hosts in one
    LONGEST_ADDRESS = 45     # of an IPv6 address

cdef unsigned char[256] KINDS

cdef const char *BAD_LINE = b"a line does not end in CR LF, or holds a control character"


cdef void prepare() noexcept:
    cdef int c
    for c in range(256):
        KINDS[c] = 0
        if c == 9 or (c >= 32 and c != 127):
            KINDS[c] |= VALUE
        if c > 32 and c != 127 and c != c'#':
            KINDS[c] |= TARGET
    for c in b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        KINDS[c] |= TOKEN
    for c in b"-._~!$&'()*+;=0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        KINDS[c] |= NAME

prepare()


cdef Py_ssize_t find_head_end(const uchar *p, Py_ssize_t n, Py_ssize_t *scanned, bint strict) noexcept nogil:
    """Return the length of the head that starts at ``p``, HEAD_INCOMPLETE or (strict only) HEAD_BROKEN.

    ``scanned`` is 0 for a new head and belongs to this function between calls: the start of the line it is in. With
    ``strict`` a line that does not end in CR LF is broken, and so is an unfinished head that holds a control character:
    whoever speaks another protocol learns so at once.
    """
    cdef const uchar *start = p + scanned[0]
    cdef const uchar *line = start
    cdef const uchar *end = p + n
    cdef const uchar *feed
    while line < end:
        feed = <const uchar *>memchr(line, c'\n', end - line)
        if feed == NULL:
            break
        if feed > line and feed[-1] == c'\r':
            if feed == line + 1 and line > p:
                return feed + 1 - p
        elif strict:
            return HEAD_BROKEN
        elif feed == line and line > p:
            return feed + 1 - p
        line = feed + 1
    scanned[0] = line - p
    return HEAD_BROKEN if strict and holds_control(start, end) else HEAD_INCOMPLETE


cdef bint holds_control(const uchar *p, const uchar *end) noexcept nogil:
    """Whether there is a control character but HTAB and CR LF; a CR at the end may be half of that."""
    while p < end:
        if unlikely(not KINDS[p[0]] & VALUE):
            if p[0] != c'\r' or (p + 1 < end and p[1] != c'\n'):
                return True
            p += 1
        p += 1
    return False


cdef inline uchar lower(uchar c) noexcept nogil:
    return c | 32 if c'A' <= c <= c'Z' else c


cdef bint same(Span span, const char *lower_case, Py_ssize_t n) noexcept nogil:
    """Whether the text is ``lower_case`` (``n`` bytes), whatever its own case."""
    cdef Py_ssize_t i
    if span.n != n:
        return False
    for i in range(n):
        if lower(span.p[i]) != <uchar>lower_case[i]:
            return False
    return True


cdef Span trim(const uchar *p, const uchar *end) noexcept nogil:
    """Return what is between ``p`` and ``end`` without the optional white space around it."""
    cdef Span span
    while p < end and (p[0] == c' ' or p[0] == c'\t'):
        p += 1
    while end > p and (end[-1] == c' ' or end[-1] == c'\t'):
        end -= 1
    span.p, span.n = p, end - p
    return span


cdef Span element(const uchar **at, const uchar *end, uchar separator) noexcept nogil:
    """Return the next element of a list and step over its separator; one in a quoted string does not count."""
    cdef const uchar *start = at[0]
    cdef const uchar *p = start
    cdef bint quoted = False
    while p < end and (quoted or p[0] != separator):
        if p[0] == c'"':
            quoted = not quoted
        elif quoted and p[0] == c'\\' and p + 1 < end:
            p += 1
        p += 1
    at[0] = p + 1 if p < end else end
    return trim(start, p)


cdef inline void refuse(RequestHead *head, int status, const char *fault) noexcept nogil:
    if head.status == 0:
        head.status, head.fault = status, fault


# ---- requests

cdef void parse_request_head(const uchar *p, Py_ssize_t n, RequestHead *head) noexcept nogil:
    """Fill ``head`` from the ``n`` bytes of a head that ``find_head_end`` (strict) has found whole."""
    request_head(p, n, head)
    if unlikely(head.status != 0) and holds_control(p, p + n):
        head.status, head.fault = 400, BAD_LINE  # of several faults the one that is found also before the head is whole


cdef void request_head(const uchar *p, Py_ssize_t n, RequestHead *head) noexcept nogil:
    cdef const uchar *end = p + n - 2  # the empty line
    cdef const uchar *line_end
    cdef const uchar *colon
    cdef int hosts = 0, codings = 0
    memset(head, 0, sizeof(RequestHead))
    head.content_length = head.wait = -1
    line_end = <const uchar *>memchr(p, c'\n', n)
    if not request_line(p, line_end - 1, head):
        return
    head.keep_alive = head.minor >= 1
    p = line_end + 1
    while p < end:
        line_end = <const uchar *>memchr(p, c'\n', end - p)
        colon = p
        while KINDS[colon[0]] & TOKEN:
            colon += 1
        if unlikely(colon == p or colon[0] != c':'):
            refuse(head, 400, "a folded header line" if p[0] == c' ' or p[0] == c'\t' else "a header name is not a token followed by a colon")
            return
        request_field(head, p, colon - p, colon + 1, line_end - 1, &hosts, &codings)
        if unlikely(head.status != 0):
            return
        p = line_end + 1
    head.keep_alive = head.keep_alive and not head.closes
    if hosts > 1 or (hosts == 0 and head.minor >= 1):
        refuse(head, 400, "more than one Host header" if hosts else "no Host header")
    elif codings and head.content_length >= 0:
        refuse(head, 400, "both Content-Length and Transfer-Encoding")
    elif codings and head.minor == 0:
        refuse(head, 400, "Transfer-Encoding in HTTP/1.0")


cdef bint request_line(const uchar *p, const uchar *end, RequestHead *head) noexcept nogil:
    """Parse ``method SP request-target SP HTTP/1.x``; ``end`` is at the CR."""
    cdef const uchar *at = p
    cdef const uchar *query
    while KINDS[at[0]] & TOKEN:
        at += 1
    head.method_text.p, head.method_text.n = p, at - p
    if at == p or at[0] != c' ':
        refuse(head, 400, "the request line does not start with a method and a space")
        return False
    head.method = method_of(p, at - p)
    p = at + 1
    at = p
    while KINDS[at[0]] & TARGET:
        at += 1
    head.target.p, head.target.n = p, at - p
    if at == p or at[0] != c' ':
        refuse(head, 400, "the target has a fragment (#)" if at[0] == c'#' else "the request line has no target")
        return False
    at += 1
    if end - at != 8 or memcmp(at, b"HTTP/", 5) != 0 or at[6] != c'.' or not (c'0' <= at[5] <= c'9' and c'0' <= at[7] <= c'9'):
        refuse(head, 400, "the request line does not end with an HTTP version")
        return False
    if at[5] != c'1':
        refuse(head, 505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        return False
    head.minor = at[7] - c'0'
    if not origin_form(head):
        refuse(head, 400, "the target is neither a path, a URL with a host nor *")
        return False
    query = <const uchar *>memchr(head.target.p, c'?', head.target.n)
    head.path = head.target
    if query != NULL:
        head.path.n = query - head.path.p
    return True


cdef bint origin_form(RequestHead *head) noexcept nogil:
    """Cut an absolute-form target (RFC 9112, 3.2.2) down to its path; accept a path, ``*`` for OPTIONS, host:port for CONNECT."""
    cdef Span target = head.target
    cdef Span scheme, authority
    cdef const uchar *path
    cdef const uchar *end = target.p + target.n
    if head.method_text.n == 7 and memcmp(head.method_text.p, b"CONNECT", 7) == 0:  # answered 405, as any method unknown here
        return names_host(target)
    if target.p[0] == c'/':
        return True
    if target.n == 1 and target.p[0] == c'*':
        return head.method == OPTIONS
    scheme.p, scheme.n = target.p, 7
    if target.n > 7 and same(scheme, b"http://", 7):
        target.p += 7
    else:
        scheme.n = 8
        if target.n <= 8 or not same(scheme, b"https://", 8):
            return False
        target.p += 8
    path = target.p
    while path < end and path[0] != c'/' and path[0] != c'?':
        path += 1
    authority.p, authority.n = target.p, path - target.p
    if not names_host(authority):  # nor is there a user in it (RFC 9110, 4.2.4)
        return False
    if path < end and path[0] == c'/':
        head.target.p, head.target.n = path, end - path
    else:  # no path: the root, or for OPTIONS the server as a whole (its query is nobody's)
        head.target.p, head.target.n = b"*" if head.method == OPTIONS else b"/", 1
    return True


cdef bint names_host(Span authority) noexcept nogil:
    """Whether it is ``host [":" port]`` (RFC 9110, 7.2): a name, which is not empty, an IPv4 or a bracketed IPv6 address."""
    cdef const uchar *p = authority.p
    cdef const uchar *end = authority.p + authority.n
    cdef int port = 0
    if p < end and p[0] == c'[':
        p = <const uchar *>memchr(p, c']', end - p)
        if p == NULL or not is_ipv6(authority.p + 1, p - authority.p - 1):
            return False
        p += 1
    else:
        while p < end and (KINDS[p[0]] & NAME or (p[0] == c'%' and end - p > 2 and hex_value(p[1]) >= 0 and hex_value(p[2]) >= 0)):
            p += 3 if p[0] == c'%' else 1
        if p == authority.p:
            return False
    if p < end and p[0] == c':':
        p += 1
        while p < end and c'0' <= p[0] <= c'9' and port <= 65535:
            port = port * 10 + p[0] - c'0'
            p += 1
    return p == end and port <= 65535


cdef bint is_ipv6(const uchar *p, Py_ssize_t n) noexcept nogil:
    """Whether it is an address as inet_pton(3) knows it: without a zone, which is nobody's but the client's."""
    cdef char[LONGEST_ADDRESS + 1] text
    cdef in6_addr address
    if n > LONGEST_ADDRESS:
        return False
    memcpy(text, p, n)
    text[n] = 0
    return inet_pton(AF_INET6, text, &address) == 1  # there is no NUL in a head that would end it early


cdef Method method_of(const uchar *p, Py_ssize_t n) noexcept nogil:
    if n == 4 and memcmp(p, b"POST", 4) == 0:
        return POST
    if n == 3 and memcmp(p, b"GET", 3) == 0:
        return GET
    if n == 4 and memcmp(p, b"HEAD", 4) == 0:
        return HEAD
    if n == 7 and memcmp(p, b"OPTIONS", 7) == 0:
        return OPTIONS
    return OTHER


cdef void request_field(RequestHead *head, const uchar *name_at, Py_ssize_t name_length, const uchar *p,
                        const uchar *end, int *hosts, int *codings) noexcept nogil:
    """Take in one header field whose value stands between ``p`` and ``end``."""
    cdef const uchar *at = p
    cdef Span name, value
    cdef int option
    while at < end and KINDS[at[0]] & VALUE:
        at += 1
    if unlikely(at < end):
        refuse(head, 400, "a control character in a header")
        return
    name.p, name.n = name_at, name_length
    value = trim(p, end)
    # Length and first letter rule out nearly all names before a comparison.
    if name_length == 4 and lower(name_at[0]) == c'h' and same(name, b"host", 4):
        hosts[0] += 1
        if value.n and not names_host(value):  # an empty one is for targets without a host
            refuse(head, 400, "a Host header that names no host")
    elif name_length == 6:
        if same(name, b"expect", 6):
            if same(value, b"100-continue", 12):
                head.expects_continue = head.minor >= 1
            else:
                head.expects_other = True
        elif same(name, b"prefer", 6):
            read_preferences(value, &head.wait)
        elif same(name, b"origin", 6):
            head.origin = value
    elif name_length == 10 and lower(name_at[0]) == c'c' and same(name, b"connection", 10):
        option = connection_option(value)
        head.keep_alive |= option > 0
        head.closes |= option < 0
    elif name_length == 12 and lower(name_at[0]) == c'c' and same(name, b"content-type", 12):
        head.content_type = value
    elif name_length == 13 and lower(name_at[0]) == c'a' and same(name, b"authorization", 13):
        if head.authorization.p != NULL:
            refuse(head, 400, "more than one Authorization header")
        head.authorization = value
    elif name_length == 14 and lower(name_at[0]) == c'c' and same(name, b"content-length", 14):
        read_length(head, value)
    elif name_length == 15 and lower(name_at[0]) == c'i' and same(name, b"idempotency-key", 15):
        head.key = value
        head.keys += 1
    elif name_length == 16 and lower(name_at[0]) == c'c' and same(name, b"content-encoding", 16):
        head.encoded |= value.n > 0 and not same(value, b"identity", 8)
    elif name_length == 17 and lower(name_at[0]) == c't' and same(name, b"transfer-encoding", 17):
        read_codings(head, value, codings)


cdef int connection_option(Span value) noexcept nogil:
    """Return -1 for ``close``, which outdoes the other, 1 for ``keep-alive``, 0 for neither."""
    cdef const uchar *at = value.p
    cdef const uchar *end = value.p + value.n
    cdef Span option
    cdef int found = 0
    while at < end:
        option = element(&at, end, c',')
        if same(option, b"close", 5):
            return -1
        if same(option, b"keep-alive", 10):
            found = 1
    return found


cdef void read_preferences(Span value, int64_t *wait) noexcept nogil:
    """Find ``wait=<seconds>`` (RFC 7240). The first one counts, one that is no number does not, nor do parameters."""
    cdef const uchar *at = value.p
    cdef const uchar *end = value.p + value.n
    cdef const uchar *part
    cdef const uchar *equals
    cdef Span preference
    while at < end and wait[0] < 0:
        preference = element(&at, end, c',')
        part = preference.p
        preference = element(&part, preference.p + preference.n, c';')
        equals = <const uchar *>memchr(preference.p, c'=', preference.n)
        if equals != NULL and same(trim(preference.p, equals), b"wait", 4):
            wait[0] = digits(unquoted(trim(equals + 1, preference.p + preference.n)))


cdef Span unquoted(Span value) noexcept nogil:
    """Return what is within double quotes, or the value as it is."""
    if value.n >= 2 and value.p[0] == c'"' and value.p[value.n - 1] == c'"':
        value.p += 1
        value.n -= 2
    return value


cdef int64_t digits(Span value) noexcept nogil:
    """Return the decimal number, -1 if it is none, the largest there is when it is larger."""
    cdef int64_t number = 0
    cdef Py_ssize_t i
    if value.n == 0:
        return -1
    for i in range(value.n):
        if not c'0' <= value.p[i] <= c'9':
            return -1
        number = min(number, <int64_t>1 << 59) * 10 + (value.p[i] - c'0')
    return number


cdef void read_length(RequestHead *head, Span value) noexcept nogil:
    if head.content_length >= 0:
        refuse(head, 400, "more than one Content-Length")
    head.content_length = digits(value)
    if head.content_length < 0:
        refuse(head, 400, "Content-Length is not a number")


cdef void read_codings(RequestHead *head, Span value, int *codings) noexcept nogil:
    """Only ``chunked``, once, is understood; an unknown coding is answered 501, a misplaced chunked 400 (RFC 9112, 6.1)."""
    cdef const uchar *at = value.p
    cdef const uchar *end = value.p + value.n
    cdef bint foreign = False
    if value.n == 0 or value.p[value.n - 1] == c',':
        refuse(head, 400, "an empty transfer coding")
    while at < end:
        codings[0] += 1
        if head.chunked:
            refuse(head, 400, "chunked is not the last transfer coding")
        if same(element(&at, end, c','), b"chunked", 7):
            head.chunked = True
        else:
            foreign = True
    if foreign:
        refuse(head, 501 if head.chunked else 400, "the only transfer coding understood is chunked")


# ---- replies

cdef bint parse_reply_head(const uchar *p, Py_ssize_t n, ReplyHead *head) noexcept nogil:
    """Fill ``head`` from a whole head; False if it is not HTTP/1.x."""
    cdef const uchar *end = p + n
    cdef const uchar *line_end = <const uchar *>memchr(p, c'\n', n)
    cdef const uchar *colon
    cdef const uchar *value_end
    head.content_length, head.retry_after = -1, -1
    head.chunked = head.dated = False
    if line_end - p < 12 or memcmp(p, b"HTTP/1.", 7) != 0 or p[8] != c' ' or not c'0' <= p[7] <= c'9':
        return False
    if not (c'1' <= p[9] <= c'9' and c'0' <= p[10] <= c'9' and c'0' <= p[11] <= c'9') or c'0' <= p[12] <= c'9':
        return False
    head.status = (p[9] - c'0') * 100 + (p[10] - c'0') * 10 + p[11] - c'0'
    head.keep_alive = p[7] != c'0'
    p = line_end + 1
    while p < end:
        line_end = <const uchar *>memchr(p, c'\n', end - p)
        value_end = line_end - 1 if line_end > p and line_end[-1] == c'\r' else line_end
        if value_end == p:
            break
        colon = <const uchar *>memchr(p, c':', value_end - p)
        if colon == NULL:
            return False
        if not reply_field(head, p, colon, value_end):
            return False
        p = line_end + 1
    if head.chunked:
        head.content_length = -1
    return True


cdef bint reply_field(ReplyHead *head, const uchar *name_at, const uchar *colon, const uchar *end) noexcept nogil:
    cdef Span name, value
    cdef int64_t length
    cdef int option
    name.p, name.n = name_at, colon - name_at
    if name.n == 14 and same(name, b"content-length", 14):
        length = digits(trim(colon + 1, end))
        if length < 0 or (head.content_length >= 0 and head.content_length != length):
            return False
        head.content_length = length
    elif name.n == 10 and same(name, b"connection", 10):
        option = connection_option(trim(colon + 1, end))
        if option:
            head.keep_alive = option > 0
    elif name.n == 17 and same(name, b"transfer-encoding", 17):
        value = trim(colon + 1, end)
        head.chunked = value.n >= 7
        if head.chunked:  # whatever else was applied, chunked comes last and delimits the body
            value.p += value.n - 7
            value.n = 7
            head.chunked = same(value, b"chunked", 7)
    elif name.n == 11 and same(name, b"retry-after", 11):
        value = trim(colon + 1, end)
        head.retry_after = digits(value)
        head.dated = head.retry_after < 0
        head.retry_date = value
    return True


# ---- chunked bodies

cdef enum:
    SIZE = 0                 # digits of a chunk's size
    SIZE_SPACE               # between them and an extension
    EXTENSION                # what may stand behind them
    SIZE_FEED                # the LF of that line
    DATA
    DATA_RETURN              # the CR LF behind the data
    DATA_FEED
    TRAILER                  # start of a trailer line
    TRAILER_NAME
    TRAILER_LINE
    TRAILER_FEED
    LAST_FEED                # the LF of the empty line
    CHUNKS_OVER


cdef void chunked_start(Chunked *c) noexcept nogil:
    c.state, c.left, c.digits, c.line = SIZE, 0, 0, 0
    c.room = INT64_MAX  # which a size of 15 digits is far below


cdef inline int hex_value(uchar c) noexcept nogil:
    if c'0' <= c <= c'9':
        return c - c'0'
    c |= 32
    return c - c'a' + 10 if c'a' <= c <= c'f' else -1


cdef int chunked_next(Chunked *c, const uchar **at, const uchar *end, Span *piece, int64_t line_limit) noexcept nogil:
    """Go on at ``at``, moving it; return at the first event (CHUNK_...). Extensions and trailers are read and dropped."""
    return next_event(c, at, end, piece, line_limit, False)


cdef int chunked_next_strict(Chunked *c, const uchar **at, const uchar *end, Span *piece, int64_t line_limit) noexcept nogil:
    """The same for requests: parsers differ about white space behind a chunk's size, so it is broken."""
    return next_event(c, at, end, piece, line_limit, True)


cdef inline int next_event(Chunked *c, const uchar **at, const uchar *end, Span *piece, int64_t line_limit,
                           bint strict) noexcept nogil:
    cdef const uchar *p = at[0]
    cdef int event = CHUNK_MORE
    while p < end and event == CHUNK_MORE:
        if c.state == DATA:
            piece.p, piece.n = p, min(c.left, end - p)
            p += piece.n
            c.left -= piece.n
            if c.left == 0:
                c.state = DATA_RETURN
            event = CHUNK_DATA
        else:
            event = chunked_byte(c, p[0], line_limit, strict)
            p += 1
    at[0] = p
    return event


cdef int chunked_byte(Chunked *c, uchar byte, int64_t line_limit, bint strict) noexcept nogil:
    """Step over one byte of the framing."""
    cdef int value
    if c.state == SIZE_SPACE or c.state == EXTENSION or c.state >= TRAILER:
        c.line += 1
        if c.line > line_limit:
            return CHUNK_TRAILERS_TOO_LONG
    if c.state == SIZE or c.state == SIZE_SPACE:
        value = hex_value(byte) if c.state == SIZE else -1
        if value >= 0:
            c.digits += 1
            if c.digits > 15:
                return CHUNK_BROKEN
            c.left = c.left * 16 + value
            return CHUNK_TOO_LARGE if c.left > c.room else CHUNK_MORE
        if byte == c'\r' and c.digits:
            c.state = SIZE_FEED
        elif byte == c';' and c.digits:
            c.state = EXTENSION
        elif (byte == c' ' or byte == c'\t') and c.digits and not strict:
            c.state = SIZE_SPACE
        else:
            return CHUNK_BROKEN
    elif c.state == EXTENSION or c.state == TRAILER_LINE:
        if byte == c'\r':
            c.state = SIZE_FEED if c.state == EXTENSION else TRAILER_FEED
        elif not KINDS[byte] & VALUE:
            return CHUNK_BROKEN
    elif c.state == SIZE_FEED:
        if byte != c'\n':
            return CHUNK_BROKEN
        c.state = DATA if c.left else TRAILER
        c.room -= c.left
        c.digits = c.line = 0
    elif c.state == DATA_RETURN:
        if byte != c'\r':
            return CHUNK_BROKEN
        c.state = DATA_FEED
    elif c.state == DATA_FEED:
        if byte != c'\n':
            return CHUNK_BROKEN
        c.state = SIZE
    elif c.state == TRAILER or c.state == TRAILER_NAME:
        if KINDS[byte] & TOKEN:
            c.state = TRAILER_NAME
        elif byte == c'\r' and c.state == TRAILER:
            c.state = LAST_FEED
        elif byte == c':' and c.state == TRAILER_NAME:
            c.state = TRAILER_LINE
        else:
            return CHUNK_BROKEN
    elif c.state == TRAILER_FEED:
        if byte != c'\n':
            return CHUNK_BROKEN
        c.state = TRAILER
    elif c.state == LAST_FEED:
        if byte != c'\n':
            return CHUNK_BROKEN
        c.state = CHUNKS_OVER
        return CHUNK_END
    return CHUNK_MORE
