"""The grammar of HTTP/1.1 (RFC 9112): ingest.pxi reads requests by it, and upstream.pxi replies.

httptools (llhttp) alone knows the grammar. A head is cut out where its empty line is, and shown to it whole; what it has
accepted becomes a RequestHead or a ReplyHead. That then serves as a template: heads on a connection differ in few places,
so the next is nearly always the same but for the values of some fields, its holes, which decide nothing or are handed
out (``Filled``). To compare is a hundred times cheaper than to parse, and makes no object.
"""

cdef struct Span:
    const uchar *p
    Py_ssize_t n

cdef enum:
    TEMPLATE_ROOM = 2048     # bytes of a head that is kept: there may be very many connections
    MAX_HOLES = 24           # further fields have to be the same;
    MAX_HANDED_OUT = 4       # so many are kept for what is handed out, the first field of each kind
    MAX_DIGITS = 18          # of a length that a template takes

cdef enum HoleKind:
    ANYTHING = 0             # decides nothing: trace ids, User-Agent, Date ...
    FORWARDED                # of X-Forwarded-For, if there is one of it
    LENGTH                   # digits of Content-Length
    KEY                      # of Idempotency-Key
    CREDENTIALS              # of Authorization

cdef struct Hole:
    # Where in the template's text there may be something else.
    int start
    int end
    HoleKind kind

cdef struct Filled:
    # What stands in the holes of a head that was read.
    int64_t content_length   # -1: none
    Span key
    Span credentials
    Span forwarded           # p is NULL: see RequestHead.forwarded

cdef object HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|(?:[-._~!$&'()*+;=0-9A-Za-z]|%[0-9A-Fa-f]{2})+)(?::0*([0-9]{0,5}))?")
cdef object ABSOLUTE = re.compile(rb"(?i)https?://([^/?]*)(.*)")
cdef object METHOD = re.compile(rb"([-!#$%&'*+.^_`|~0-9A-Za-z]+)( ?)")
cdef object PREFERENCE = re.compile(rb'(?:[^",]|"(?:[^"\\]|\\.)*"?)+')  # an element of a list; a comma in quotes is part of it
cdef object WAIT = re.compile(rb'(?i)wait[ \t]*=[ \t]*("?)([0-9]+)\1[ \t]*(?:;.*)?')

cdef str NO_METHOD = "it does not begin with a method and a space"

# Fields that decide about framing or rights, or that are read: what a template has of them stands for them.
cdef frozenset DECISIVE = frozenset((
    b"connection", b"proxy-connection", b"upgrade", b"transfer-encoding", b"host", b"content-type", b"content-encoding",
    b"expect", b"prefer", b"origin", b"retry-after", b"location",
))
cdef dict HANDED_OUT = {b"content-length": LENGTH, b"idempotency-key": KEY, b"authorization": CREDENTIALS,
                        b"x-forwarded-for": FORWARDED}

cdef unsigned char[256] IN_VALUES  # field content: HTAB, SP, visible ASCII, obs-text

cdef void prepare_values() noexcept:
    cdef int c
    for c in range(256):
        IN_VALUES[c] = c == 9 or (c >= 32 and c != 127)

prepare_values()


cdef enum:
    HEAD_UNFINISHED = 0
    HEAD_BROKEN = -1


cdef Py_ssize_t find_head_end(const uchar *p, Py_ssize_t n, Py_ssize_t *scanned, bint strict) noexcept nogil:
    """Return how long the head at ``p`` is, HEAD_UNFINISHED while its empty line is not there, or HEAD_BROKEN: a line ends in
    a bare LF, which only counts where it is not ``strict``.

    ``scanned`` is 0 for a new head and belongs to this function between calls: the start of the line it is in.
    """
    cdef const uchar *line = p + scanned[0]
    cdef const uchar *end = p + n
    cdef const uchar *feed
    while line < end:
        feed = <const uchar *>memchr(line, c'\n', end - line)
        if feed == NULL:
            break
        if strict and (feed == line or feed[-1] != c'\r'):
            return HEAD_BROKEN
        if line > p and (feed == line or (feed == line + 1 and line[0] == c'\r')):
            return feed + 1 - p
        line = feed + 1
    scanned[0] = line - p
    return HEAD_UNFINISHED


cdef Span trim(const uchar *p, const uchar *end) noexcept nogil:
    """Return what is between ``p`` and ``end`` without the optional white space around it."""
    cdef Span span
    while p < end and (p[0] == c' ' or p[0] == c'\t'):
        p += 1
    while end > p and (end[-1] == c' ' or end[-1] == c'\t'):
        end -= 1
    span.p, span.n = p, end - p
    return span


cdef Span unquoted_key(Span value) noexcept nogil:
    """Return an Idempotency-Key without the double quotes it may be in; empty if it cannot be an id."""
    cdef Py_ssize_t i
    if value.n >= 2 and value.p[0] == c'"' and value.p[value.n - 1] == c'"':
        value.p += 1
        value.n -= 2
    if value.n > ID_TEXT:
        value.n = 0
    for i in range(value.n):
        if not 33 <= value.p[i] <= 126 or value.p[i] in (c'"', c',', c';', c'\\'):
            value.n = 0
            break
    return value


cdef bytes shown(bytes method, bytes rest):
    """Return a request as httptools is shown it: with a method that it knows. Others are no broken HTTP, but answered 405."""
    return (b"CONNECT" if method == b"CONNECT" else b"POST") + rest


cdef int status_for(parser):
    """Return what to answer a request with in which ``parser`` has found a fault."""
    return 400 if parser.get_http_version() in ("0.0", "0.9", "1.0", "1.1") else 505


cdef bint names_host(bytes authority):
    """Whether it is ``host [":" port]`` (RFC 9110, 7.2): a name, which is not empty, an IPv4 or a bracketed IPv6 address."""
    match = HOST.fullmatch(authority)
    if match is None or int(match[2] or 0) > 65535:
        return False
    if match[1]:
        try:
            socket.inet_pton(socket.AF_INET6, match[1].decode())
        except OSError:
            return False
    return True


cdef class Head:
    """A head as httptools has read it, and the template for those that differ from it in their holes only."""

    cdef readonly bytes text
    cdef readonly str fault          # what is wrong with it; None: nothing
    cdef readonly bint keep_alive, chunked
    cdef int64_t content_length      # -1: none
    cdef object parser               # while it reads
    cdef bint closes                 # Connection: close, whatever else it says
    cdef bytes codings
    cdef Py_ssize_t line             # start of the line of the next field
    cdef Hole[MAX_HOLES] holes
    cdef int hole_count

    cdef str read(self, parser, bytes text):
        """Have httptools read ``text``; return what it objects to."""
        cdef str objection = None
        self.content_length = -1
        self.line = self.text.index(b"\n") + 1
        self.parser = parser
        try:
            parser.feed_data(text)
        except HttpParserUpgrade:
            pass  # to a protocol that is not spoken here: it stays HTTP/1.1
        except HttpParserError as error:
            objection = str(error)
        self.parser = None
        return objection

    def on_header(self, bytes name, bytes value):
        """Called by httptools for each field."""
        lower = name.lower()
        self.find_hole(name, HANDED_OUT.get(lower, ANYTHING), lower in DECISIVE)
        self.take(lower, value.strip(b" \t"))

    def on_headers_complete(self):
        """Called when the head is whole, by httptools, which forgets its flags when the message is over."""
        self.keep_alive = self.parser.should_keep_alive() and not self.closes

    cdef int find_hole(self, bytes name, HoleKind kind, bint decisive) except -1:
        """Find the field's line; note where its value stands, unless a template has to have the same."""
        cdef Hole *hole
        cdef const uchar *text = <const uchar *>PyBytes_AS_STRING(self.text)
        cdef Py_ssize_t start = self.line + len(name) + 1
        cdef Py_ssize_t end = self.text.index(b"\n", start)
        self.line = end + 1
        if self.text[start - 1 - len(name):start] != name + b":":  # as behind an empty line before a reply
            self.line, self.hole_count = 0, 0
            return 0
        if decisive or (self.has_hole(kind) if kind else self.hole_count >= MAX_HOLES - MAX_HANDED_OUT):
            return 0
        if text[end - 1] == c'\r':
            end -= 1
        if kind == LENGTH:
            while not c'0' <= text[start] <= c'9':
                start += 1
            while not c'0' <= text[end - 1] <= c'9':
                end -= 1
            if end - start > MAX_DIGITS:
                return 0
        hole = &self.holes[self.hole_count]
        hole.start, hole.end, hole.kind = <int>start, <int>end, kind
        self.hole_count += 1
        return 0

    cdef bint has_hole(self, HoleKind kind) noexcept nogil:
        """Whether there is a hole of this kind: one that is handed out has room for the first."""
        cdef int i
        for i in range(self.hole_count):
            if self.holes[i].kind == kind:
                return True
        return False

    cdef int take(self, bytes name, bytes value) except -1:
        """Take in a field; ``name`` is in lower case."""
        if name == b"content-length":
            self.content_length = min(int(value.lstrip(b"0") or 0), INT64_MAX)
        elif name == b"connection":
            self.closes |= b"close" in [option.strip(b" \t") for option in value.lower().split(b",")]
        elif name == b"transfer-encoding":
            self.codings = value.lower() if self.codings is None else self.codings + b"," + value.lower()
        return 0

    cdef Py_ssize_t matches(self, const uchar *p, Py_ssize_t n, Filled *filled) noexcept:
        """Return the length of the head at ``p`` if it is this one but for what is in the holes, else 0."""
        cdef const uchar *text = <const uchar *>PyBytes_AS_STRING(self.text)
        cdef const uchar *at = p
        cdef const uchar *end = p + n
        cdef const uchar *start
        cdef Py_ssize_t literal, size, done = 0
        cdef Hole *hole
        cdef int i
        filled.content_length = self.content_length
        filled.key.p = filled.credentials.p = filled.forwarded.p = NULL
        filled.key.n = filled.credentials.n = filled.forwarded.n = 0
        for i in range(self.hole_count):
            hole = &self.holes[i]
            literal, size = hole.start - done, hole.end - hole.start
            if end - at <= literal or memcmp(at, text + done, literal) != 0:
                return 0
            at += literal
            start = at
            if hole.kind == LENGTH:
                filled.content_length = 0
                while at < end and c'0' <= at[0] <= c'9':
                    if at - start == MAX_DIGITS:
                        return 0
                    filled.content_length = filled.content_length * 10 + at[0] - c'0'
                    at += 1
                if at == start:
                    return 0
            else:
                # Mostly it is the same. How long that takes to see must not reveal credentials that another client has sent.
                if hole.kind <= FORWARDED and end - at > size and memcmp(at, text + hole.start, size) == 0:
                    at += size
                while at < end and IN_VALUES[at[0]]:
                    at += 1
                if hole.kind == KEY:
                    filled.key = trim(start, at)
                elif hole.kind == CREDENTIALS:
                    filled.credentials = trim(start, at)
                elif hole.kind == FORWARDED:
                    filled.forwarded = trim(start, at)
            done = hole.end
        literal = PyBytes_GET_SIZE(self.text) - done
        if end - at < literal or memcmp(at, text + done, literal) != 0:
            return 0
        return at + literal - p

    def filled_by(self, const uchar[::1] data not None):
        """Return (length, Content-Length or -1, key, credentials) of the head that ``data`` begins with, if that is this
        one but for what is in the holes, else None."""
        cdef Filled filled
        cdef Py_ssize_t length = self.matches(&data[0], len(data), &filled) if len(data) else 0
        if not length:
            return None
        return length, filled.content_length, filled.key.p[:filled.key.n], filled.credentials.p[:filled.credentials.n]


@cython.final
cdef class RequestHead(Head):
    """A request's head: ``text`` up to its empty line. What httptools lets pass and RFC 9110 or 9112 does not is a fault too."""

    cdef readonly int status         # 0: well-formed; else what to answer with
    cdef readonly str method
    cdef readonly bytes target       # origin-form (an absolute-form is cut down to it), or "*"
    cdef readonly bint is_log        # POST /logs
    cdef readonly bint old_client    # HTTP/1.0
    cdef readonly bint expects_continue, expects_other
    cdef readonly bint json          # or no type at all
    cdef readonly bint encoded       # a Content-Encoding other than identity
    cdef readonly int64_t wait       # of Prefer, seconds; -1: none
    cdef readonly int keys           # how many Idempotency-Key fields there are
    cdef readonly bytes origin       # None: none
    cdef readonly dict fields        # values by lower-case name, repeated ones joined by commas; None: is_log, not encoded
    cdef readonly object route       # what it is for, as `route_of` has said; None: no agent's request
    cdef readonly bint brings        # records, in an agent's format
    cdef int hosts, credentials, forwards  # how many fields
    cdef bytes forwarded             # X-Forwarded-For, repeated ones joined; None: none

    def __init__(self, bytes text not None):
        self.text, self.target, self.fields, self.json, self.wait = text, b"", {}, True, -1
        method = METHOD.match(text)
        parser = HttpRequestParser(self)
        if method and method[2]:
            self.method = method[1].decode("latin-1")
            objection = self.read(parser, shown(method[1], text[method.end(1):]))
        else:
            self.method, objection = "", NO_METHOD
        self.judge(parser.get_http_version())
        if objection is not None:  # which is found also when no more of the head is there
            self.status, self.fault = status_for(parser), objection
        if self.status:
            self.hole_count = 0
        if self.forwards > 1:  # what is in one of them is not all
            self.keep_holes(~(1 << FORWARDED))
        # Joined only now, as there may be very many of one name.
        self.fields = (None if self.is_log and not self.encoded else
                       {name: ", ".join(values) for name, values in self.fields.items()})

    cdef int use(self, object route, bint brings) except -1:
        """Take in what it is for. An agent's request is read by all of its fields: a template has them all but two."""
        self.route, self.brings = route, brings
        self.keep_holes(1 << LENGTH | 1 << CREDENTIALS)
        return 0

    cdef void keep_holes(self, int kinds) noexcept:
        """Have a template be the same but for holes of these kinds, a bit each."""
        cdef int i, kept = 0
        for i in range(self.hole_count):
            if kinds >> self.holes[i].kind & 1:
                self.holes[kept] = self.holes[i]
                kept += 1
        self.hole_count = kept

    def on_url(self, bytes url):
        """Called by httptools with the target."""
        self.target += url

    cdef int take(self, bytes name, bytes value) except -1:
        self.fields.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        if name == b"host":
            self.hosts += 1
            if value and not names_host(value):  # an empty one is for targets without a host
                self.refuse(400, "a Host header that names no host")
        elif name == b"content-type":
            self.json = not value or value.partition(b";")[0].rstrip().lower() == b"application/json"
        elif name == b"content-encoding":
            self.encoded |= value.lower() not in (b"identity", b"")
        elif name == b"expect":
            if value.lower() == b"100-continue":
                self.expects_continue = True
            else:
                self.expects_other = True
        elif name == b"prefer":
            self.take_preferences(value)
        elif name == b"origin":
            self.origin = value
        elif name == b"idempotency-key":
            self.keys += 1
        elif name == b"authorization":
            self.credentials += 1
        elif name == b"x-forwarded-for":
            self.forwards += 1
            self.forwarded = value if self.forwarded is None else self.forwarded + b"," + value
        else:
            Head.take(self, name, value)
        return 0

    cdef int take_preferences(self, bytes value) except -1:
        """Find ``wait=<seconds>`` (RFC 7240). The first one counts, one that is no number does not, nor do parameters."""
        for preference in PREFERENCE.findall(value):
            match = WAIT.fullmatch(preference.strip(b" \t"))
            if match and self.wait < 0:
                self.wait = int(match[2]) if len(match[2]) <= MAX_DIGITS else INT64_MAX
        return 0

    cdef int refuse(self, int status, str fault) except -1:
        if self.status == 0:
            self.status, self.fault = status, fault
        return 0

    cdef int judge(self, str version) except -1:
        """Look for what httptools lets pass."""
        line = b"%b %b HTTP/%b\r\n" % (self.method.encode("latin-1"), self.target, version.encode())
        self.old_client = version == "1.0"
        self.chunked = self.codings is not None
        if not self.text.startswith(line):
            self.refuse(400, "the request line is not a method, a target and a version with a space between them")
        if version not in ("1.0", "1.1"):
            self.refuse(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        self.judge_target()
        if self.hosts > 1 or (self.hosts == 0 and not self.old_client):
            self.refuse(400, "more than one Host header" if self.hosts else "no Host header")
        if self.credentials > 1:
            self.refuse(400, "more than one Authorization header")
        if self.chunked and self.old_client:
            self.refuse(400, "Transfer-Encoding in HTTP/1.0")
        if self.chunked and self.codings != b"chunked":
            self.refuse(501, "the only transfer coding understood is chunked")
        self.expects_continue = self.expects_continue and not self.old_client
        self.is_log = self.method == "POST" and self.target.partition(b"?")[0] == b"/logs"
        return 0

    cdef int judge_target(self) except -1:
        """Cut an absolute-form target (RFC 9112, 3.2.2) down to its path; let a path, ``*`` for OPTIONS and host:port for
        CONNECT stand."""
        cdef bint valid = True
        options = self.method == "OPTIONS"
        absolute = ABSOLUTE.fullmatch(self.target)
        if b"#" in self.target:
            self.refuse(400, "the target has a fragment (#)")
        elif self.method == "CONNECT":  # answered 405, as any method unknown here
            valid = names_host(self.target)
        elif absolute is not None:
            valid = names_host(absolute[1])  # nor is there a user in it (RFC 9110, 4.2.4)
            # No path: the root, or for OPTIONS the server as a whole (its query has no meaning).
            self.target = absolute[2] if absolute[2].startswith(b"/") else b"*" if options else b"/"
        else:
            valid = self.target.startswith(b"/") or (options and self.target == b"*")
        if not valid:
            self.refuse(400, "the target is neither a path, a URL with a host nor *")
        return 0


@cython.final
cdef class ReplyHead(Head):
    """A reply's head: ``text`` up to its empty line."""

    cdef readonly int status
    cdef readonly bytes retry_after, location  # None: none

    def __init__(self, bytes text not None):
        self.text = text
        parser = reply_parser(self, True)
        self.fault = self.read(parser, text)
        self.status = parser.get_status_code()
        if self.fault is None and (parser.get_http_version() not in ("1.0", "1.1") or self.status < 100 or self.status == 101):
            self.fault = "not a reply in HTTP/1.0 or HTTP/1.1"
        # Whatever else was applied, chunked comes last and delimits the body.
        self.chunked = self.codings is not None and self.codings.rpartition(b",")[2].strip(b" \t") == b"chunked"

    cdef int take(self, bytes name, bytes value) except -1:
        if name == b"retry-after":
            self.retry_after = value
        elif name == b"location":
            self.location = value
        else:
            Head.take(self, name, value)
        return 0


cdef reply_parser(protocol, bint of_heads):
    """Return a parser that reads replies as RFC 9112 lets a recipient: a bare LF ends a line of a head, but not of chunks."""
    parser = HttpResponseParser(protocol)
    parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=of_heads, lenient_chunked_length=True,
                                    lenient_spaces_after_chunk_size=True)
    return parser


@cython.final
cdef class UnfinishedHead:
    """What has come of a head whose end is not there: a client of another protocol gets its error at once."""

    cdef object parser               # None: a request's method is not whole
    cdef bytes method                # how it begins
    cdef Py_ssize_t seen             # bytes
    cdef bint judged                 # it will be refused, but has to be whole for that

    def __cinit__(self, bint reply):
        self.parser = reply_parser(None, True) if reply else None
        self.method = b""

    cdef str feed(self, bytes data):
        """Take in what has come since the last call; return what is wrong with it (400), None if it can become a head."""
        cdef bint first = self.seen == 0
        self.seen += len(data)
        if self.judged or not data:
            return None
        if self.parser is None:
            method = METHOD.match(data)
            if method is None and first:
                if data != b"\r":
                    return NO_METHOD
                self.seen = 0  # it may be the start of an empty line: look again when more has come
                return None
            if method is not None and len(self.method) < 8:
                self.method += method[1][:8]
            rest = data[method.end(1) if method else 0:]
            if not rest:
                return None
            if not rest.startswith(b" ") or not self.method:
                return NO_METHOD
            self.parser, data = HttpRequestParser(None), shown(self.method, rest)
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade:  # CONNECT, and for httptools its head is whole
            self.judged = True
        except HttpParserError as error:
            if status_for(self.parser) == 400:
                return str(error)
            self.judged = True
        return None
