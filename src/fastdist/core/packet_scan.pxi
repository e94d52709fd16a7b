"""Whether a body is a log packet, found out in one pass over its bytes.

Theory of operation. ``packet.check`` says what a log packet is: it decodes the body and looks at what came out. Nearly
every body is a good one, though, and of a good one the service needs two figures only, so the scanner reads the bytes
where they lie and builds nothing. It answers "yes, with these facts" or "no". What keeps a body from being JSON at all
the same functions say, in words of our own and with the place (``malformed``). What keeps JSON from being a packet
``packet.check`` says, which decodes small bodies whole, and of large ones only the place where the scanner stopped.
Hence the rules:

1. Sound: a yes implies that ``packet.check`` accepts the same bytes with the same facts. Therefore the whole body is
   checked against RFC 8259, the parts that are not used as well: the escapes, the numbers, the UTF-8.
2. Complete: a no implies that ``packet.check`` refuses, for a large body is not checked otherwise. What hardly occurs in
   good packets (escapes in keys, in the emitterId, in what strict looks at) may be slow, but not by more than its length.
3. No byte outside the body is read (it may end where a mapping ends), nothing is allocated, nothing calls itself.

The functions hand a cursor along: each takes the place where its piece begins and returns the place behind it, or NULL
for "no". ``end`` is the place of the packet's own closing brace, which is looked up first, or (``malformed``) of the NUL
behind the bytes of every bytes object. That byte may be read but not passed. It goes on no space, number, escape or
character beyond ASCII, so what reads these byte by byte stops there by itself; only what passes a closing brace, and
what reads several bytes at once, must compare with it.

``scan_packet`` and ``scan_message`` know the schema and read the members of their objects one by one, in any order; a
set of bits notes what has been seen, which catches what is missing and what comes twice. Values that the schema does
not describe go through ``scan_value``, with the kinds of the open containers as bits of a word in place of a call
stack. Most of the bytes are strings: ``plain_end`` (scan.h) passes over their plain text 16 bytes at a time and stops
at what deserves a look.
"""

cdef struct PacketFacts:
    uint32_t messages      # how many log messages the packet holds
    uint64_t emitter_hash  # hash_bytes over the UTF-8 of its emitterId
    # If it is not one:
    const unsigned char *reached  # the member or message that is at fault
    bint in_messages       # it is a message, and so many came before: `messages`
    unsigned int seen      # members of the packet that came before

ctypedef const unsigned char *cursor

cdef extern from "<ctype.h>" nogil:
    bint isxdigit(int c)

cdef extern from "<string.h>" nogil:
    void *memrchr(const void *p, int c, size_t n)

cdef extern from "scan.h" nogil:
    cursor plain_end "fd_plain_end"(cursor p, cursor end)
    const int BLOCK "FD_BLOCK"
    struct Stop "fd_stop":
        cursor at
        const char *why
    Stop stopped "fd_stopped"  # by the last `no`
    cursor no "fd_no"(cursor at, const char *why)

cdef enum:
    MIN_PACKET = 45  # bytes: {"emitterId":"a","messages":[{"message":""}]}
    WORD = 64  # bits
    MAX_DEPTH = 128  # containers within each other, the packet itself included: not more than two words have bits
    IN_PACKET = MAX_DEPTH - 1  # as many are left for a member of the packet
    IN_MESSAGE = MAX_DEPTH - 3  # and of a message, which is in an array
    MAX_EMITTER = 256  # characters, that is code points
    MAX_NAME = 12  # bytes, of what the schema or strict knows by name, and a few more
    MAX_RUN = 8  # digits in a row that are kept of a date-time with escapes: no part of one but its fraction has more
    MAX_DATE_TIME = 64
    UTF8 = 4  # bytes, of a character at most
    RUN = 192  # bytes of which some are counted in a byte

# The members that the schema knows, as bits of the set of those seen. Any other is 0: it may come as often as it likes.
cdef enum:
    UNKNOWN = 0
    EMITTER_ID = 1
    MESSAGES = 2
    METADATA = 4
    MESSAGE = 8
    TIMESTAMP = 16
    LEVEL = 32
    SOURCE = 64

# What is said of a body that is not JSON, or not as it is accepted here.
cdef const char *NO_UTF8 = b"not UTF-8"
cdef const char *TOO_DEEP = b"nested more than 128 levels deep"
cdef const char *BYTE_ORDER_MARK = b"not JSON: a byte order mark"
cdef const char *NO_VALUE = b"not JSON: expected a value"
cdef const char *NOT_FINITE = b"not JSON, which knows no NaN and no Infinity,"
cdef const char *NO_NAME = b"not JSON: expected a name in double quotes"
cdef const char *NO_COLON = b"not JSON: expected a colon"
cdef const char *NO_DIGIT = b"not JSON: expected a digit"
cdef const char *NO_END_OF_OBJECT = b"not JSON: expected a comma or a closing brace"
cdef const char *NO_END_OF_ARRAY = b"not JSON: expected a comma or a closing bracket"
cdef const char *NO_END_OF_STRING = b"not JSON: unterminated string, which begins"
cdef const char *NO_END_OF_BODY = b"not JSON: expected the end of the body"
cdef const char *NO_ESCAPE = b"not JSON: invalid escape sequence"
cdef const char *HALF_A_PAIR = b"not JSON: half a surrogate pair, which is no character,"
cdef const char *CONTROL_CHARACTER = b"not JSON: unescaped control character in a string"

cdef const char *LEVELS = b"info    warn    error   debug   trace   fatal   warning critical"


# ---------------------------------------------------------------------------------------------- JSON, piece by piece

cdef inline bint is_space(unsigned char c) noexcept nogil:
    return c <= c' ' and (c == c' ' or c == c'\n' or c == c'\r' or c == c'\t')


cdef inline cursor skip_space(cursor p) noexcept nogil:
    while is_space(p[0]):
        p += 1
    return p


cdef inline cursor scan_digits(cursor p) noexcept nogil:
    """One digit at least."""
    if not c'0' <= p[0] <= c'9':
        return no(p, NOT_FINITE if p[0] == c'I' else NO_DIGIT)
    while c'0' <= p[0] <= c'9':
        p += 1
    return p


cdef inline bint is_hex(cursor p) noexcept nogil:
    return isxdigit(p[0]) and isxdigit(p[1]) and isxdigit(p[2]) and isxdigit(p[3])


cdef bint halves = False  # of surrogate pairs are let pass


cdef cursor scan_escapes(cursor p) noexcept nogil:
    """The escapes from p on to whatever else follows; at least one."""
    while p[0] == c'\\':
        if p[1] in (c'"', c'\\', c'/', c'b', c'f', c'n', c'r', c't'):
            p += 2
        elif p[1] != c'u' or not is_hex(p + 2):
            return no(p, NO_ESCAPE)
        elif p[2] | 0x20 != c'd' or p[3] < c'8' or halves:
            p += 6
        # Half of a surrogate pair, \uD800 to \uDFFF. The grammar lets one stand alone, but it is no character and many
        # parsers refuse it: here the second half must follow the first.
        elif p[3] | 0x20 >= c'c' or p[6] != c'\\' or p[7] != c'u' or not is_hex(p + 8):
            return no(p, HALF_A_PAIR)
        elif p[8] | 0x20 != c'd' or p[9] | 0x20 < c'c':
            return no(p, HALF_A_PAIR)
        else:
            p += 12
    return p


cdef inline bint is_tail(unsigned char c) noexcept nogil:
    return c & 0xC0 == 0x80


cdef cursor scan_utf8(cursor p) noexcept nogil:
    """The characters beyond ASCII from p to the next one that is not (Unicode, table 3-7: well-formed sequences)."""
    cdef unsigned char lead = p[0]
    while lead >= 0x80:
        if 0xC2 <= lead <= 0xDF:
            if not is_tail(p[1]):
                return no(p, NO_UTF8)
            p += 2
        elif 0xE0 <= lead <= 0xEF:
            if not is_tail(p[1]) or not is_tail(p[2]):
                return no(p, NO_UTF8)
            if (lead == 0xE0 and p[1] < 0xA0) or (lead == 0xED and p[1] > 0x9F):  # too long a form; a surrogate
                return no(p, NO_UTF8)
            p += 3
        elif 0xF0 <= lead <= 0xF4:
            if not is_tail(p[1]) or not is_tail(p[2]) or not is_tail(p[3]):
                return no(p, NO_UTF8)
            if (lead == 0xF0 and p[1] < 0x90) or (lead == 0xF4 and p[1] > 0x8F):  # too long a form; above U+10FFFF
                return no(p, NO_UTF8)
            p += 4
        else:
            return no(p, NO_UTF8)
        lead = p[0]
    return p


cdef cursor scan_rest(cursor p, cursor end) noexcept nogil:
    """The rest of a string from a place where plain text ended."""
    while p != end:
        if p[0] == c'"':
            return p + 1
        if p[0] == c'\\':
            p = scan_escapes(p)
        elif p[0] >= 0x80:
            p = scan_utf8(p)
        else:
            return no(p, CONTROL_CHARACTER)
        if p == NULL:
            return NULL
        p = plain_end(p, end)
    return no(p, NO_END_OF_STRING)


cdef inline cursor scan_string(cursor p, cursor end) noexcept nogil:
    """From behind the opening quote to behind the closing one."""
    p = plain_end(p, end)
    return p + 1 if likely(p[0] == c'"') else scan_rest(p, end)


cdef cursor scan_number(cursor p) noexcept nogil:
    if p[0] == c'-':
        p += 1
    elif not c'0' <= p[0] <= c'9':
        return no(p, NOT_FINITE if p[0] == c'N' or p[0] == c'I' else NO_VALUE)
    p = p + 1 if p[0] == c'0' else scan_digits(p)
    if p != NULL and p[0] == c'.':
        p = scan_digits(p + 1)
    if p != NULL and (p[0] == c'e' or p[0] == c'E'):
        p = scan_digits(p + 2 if p[1] == c'+' or p[1] == c'-' else p + 1)
    return p


cdef inline bint is_word(cursor p, cursor end, const char *word, Py_ssize_t length) noexcept nogil:
    return end - p >= length and memcmp(p, word, length) == 0


cdef inline cursor scan_word_or_number(cursor p, cursor end) noexcept nogil:
    if p[0] == c't':
        return p + 4 if is_word(p, end, b"true", 4) else no(p, NO_VALUE)
    if p[0] == c'f':
        return p + 5 if is_word(p, end, b"false", 5) else no(p, NO_VALUE)
    if p[0] == c'n':
        return p + 4 if is_word(p, end, b"null", 4) else no(p, NO_VALUE)
    return scan_number(p)


cdef inline cursor scan_colon(cursor p) noexcept nogil:
    """From behind a key to the first byte of its value."""
    p = skip_space(p)
    return skip_space(p + 1) if p[0] == c':' else no(p, NO_COLON)


cdef inline cursor scan_name(cursor p, cursor end) noexcept nogil:
    """From the first byte of a key to the first byte of its value."""
    if p[0] != c'"':
        return no(p, NO_NAME)
    p = scan_string(p + 1, end)
    return scan_colon(p) if p != NULL else NULL


cdef cursor scan_value(cursor p, cursor end, int room) noexcept nogil:
    """A value of any kind with at most so many containers within each other; p is at its first byte."""
    cdef uint64_t objects = 0  # one bit for each open container, the innermost lowest: whether it is an object
    cdef uint64_t outer = 0  # those of the first 64, while there are more
    cdef unsigned char c
    cdef int depth = 0
    while True:
        c = p[0]
        if c == c'"':
            p = scan_string(p + 1, end)
        elif c == c'{' or c == c'[':
            if depth == room:
                return no(p, TOO_DEEP)
            p = skip_space(p + 1)
            if p[0] != c + 2:  # ASCII has the closing bracket two places behind the opening one
                if unlikely(depth == WORD):
                    outer = objects
                depth += 1
                objects = objects << 1 | (c == c'{')
                if c == c'{':
                    p = scan_name(p, end)
                    if p == NULL:
                        return NULL
                continue
            p = p + 1 if p != end else NULL
        else:
            p = scan_word_or_number(p, end)
        if p == NULL:
            return NULL
        # A value has ended: close the containers that end with it, up to one that goes on.
        while True:
            if depth == 0:
                return p
            p = skip_space(p)
            if p[0] == c',':
                break
            if p[0] != (c'}' if objects & 1 else c']') or p == end:
                return no(p, NO_END_OF_OBJECT if objects & 1 else NO_END_OF_ARRAY)
            p += 1
            depth -= 1
            objects >>= 1
            if unlikely(depth == WORD):
                objects = outer
        p = skip_space(p + 1)
        if objects & 1:
            p = scan_name(p, end)
            if p == NULL:
                return NULL


# ------------------------------------------------------------------------------------------- what strict asks for

cdef inline unsigned int two_digits(cursor p) noexcept nogil:
    """Their value, or one beyond any range that is asked for."""
    cdef unsigned int tens = <unsigned int>p[0] - c'0'
    cdef unsigned int ones = <unsigned int>p[1] - c'0'
    return tens * 10 + ones if tens <= 9 and ones <= 9 else 100


cdef inline unsigned int days_in(unsigned int century, unsigned int year, unsigned int month) noexcept nogil:
    if month == 2:
        return 29 if year % 4 == 0 and (year != 0 or century % 4 == 0) else 28
    return 30 if month == 4 or month == 6 or month == 9 or month == 11 else 31


cdef bint is_date_time(cursor p, cursor end) noexcept nogil:
    """RFC 3339, section 5.6; see packet.check for the fine print."""
    cdef unsigned int century, year, month, hour, minute, second
    cdef int moment, offset
    if end - p < 20:
        return False
    century, year, month = two_digits(p), two_digits(p + 2), two_digits(p + 5)
    if century > 99 or year > 99 or p[4] != c'-' or not 1 <= month <= 12 or p[7] != c'-':
        return False
    if not 1 <= two_digits(p + 8) <= days_in(century, year, month) or (p[10] != c'T' and p[10] != c't'):
        return False
    hour, minute, second = two_digits(p + 11), two_digits(p + 14), two_digits(p + 17)
    if hour > 23 or p[13] != c':' or minute > 59 or p[16] != c':' or second > 60:
        return False
    p += 19
    if p[0] == c'.':
        p = scan_digits(p + 1)
        if p == NULL:
            return False
    moment = hour * 60 + minute
    if end - p == 6 and (p[0] == c'+' or p[0] == c'-') and p[3] == c':':
        hour, minute = two_digits(p + 1), two_digits(p + 4)
        if hour > 23 or minute > 59:
            return False
        offset = hour * 60 + minute
        moment += offset if p[0] == c'-' else -offset
    elif end - p != 1 or (p[0] != c'Z' and p[0] != c'z'):
        return False
    return second < 60 or (moment + 1) % 1440 == 0  # a leap second is the last one of a day in UTC


cdef bint is_level(cursor p, cursor end) noexcept nogil:
    cdef uint64_t lower = 0
    cdef int i
    if not 4 <= end - p <= 8 or (end - 1)[0] == c' ':
        return False
    memcpy(&lower, p, end - p)
    # Of all bytes only the two cases of a character come out as it, and what is beyond the end comes out as spaces.
    lower |= 0x2020202020202020u
    for i in range(0, 64, 8):
        if memcmp(&lower, LEVELS + i, 8) == 0:
            return True
    return False


# ------------------------------------------------------------------------------------------------- what escapes say

cdef inline uint32_t four_hex(cursor p) noexcept nogil:
    cdef uint32_t value = 0
    cdef int i
    for i in range(4):
        value = value << 4 | (p[i] - c'0' if p[i] <= c'9' else (p[i] | 0x20) - c'a' + 10)
    return value


cdef unsigned char plain_escape(unsigned char c) noexcept nogil:
    if c == c'b':
        return c'\b'
    if c == c'f':
        return c'\f'
    if c == c'n':
        return c'\n'
    if c == c'r':
        return c'\r'
    return c'\t' if c == c't' else c


cdef Py_ssize_t unescape(cursor p, cursor end, unsigned char *out, Py_ssize_t room) noexcept nogil:
    """Write what a string says that was found to be well-formed, and a quote; return its length, -1 if it is over ``room``.

    ``out`` has place for a character and the quote more than ``room``. Of many digits in a row some are left out.
    """
    cdef uint32_t c
    cdef Py_ssize_t n = 0
    cdef int run = 0
    while p < end:
        if n > room:
            return -1
        c = p[0]
        if c != c'\\':
            p += 1
        elif p[1] != c'u':
            c = plain_escape(p[1])
            p += 2
        else:
            c = four_hex(p + 2)
            p += 6
            if 0xD800 <= c <= 0xDBFF:
                c = 0x10000 + ((c - 0xD800) << 10) + four_hex(p + 2) - 0xDC00
                p += 6
            if c >= 0x10000:
                out[n] = 0xF0 | c >> 18
                out[n + 1] = 0x80 | (c >> 12 & 0x3F)
                n += 2
            elif c >= 0x800:
                out[n] = 0xE0 | c >> 12
                n += 1
            if c >= 0x800:
                out[n] = 0x80 | (c >> 6 & 0x3F)
                n += 1
            elif c >= 0x80:
                out[n] = 0xC0 | c >> 6
                n += 1
            if c >= 0x80:
                c = 0x80 | (c & 0x3F)
        run = run + 1 if c'0' <= c <= c'9' else 0
        if run <= MAX_RUN or room != MAX_DATE_TIME:
            out[n] = <unsigned char>c
            n += 1
    out[n] = c'"'
    return n if n <= room else -1


cdef bint says_date_time(cursor p, cursor end) noexcept nogil:
    """Whether it is one that is written with escapes."""
    cdef unsigned char[MAX_DATE_TIME + UTF8 + 1] plain
    cdef Py_ssize_t length
    if memchr(p, c'\\', end - p) == NULL:
        return False
    length = unescape(p, end, plain, MAX_DATE_TIME)
    return length >= 0 and is_date_time(plain, plain + length)


cdef bint says_level(cursor p, cursor end) noexcept nogil:
    """Whether it is one that is written with escapes."""
    cdef unsigned char[MAX_NAME + UTF8 + 1] plain
    cdef Py_ssize_t length
    if memchr(p, c'\\', end - p) == NULL:
        return False
    length = unescape(p, end, plain, MAX_NAME)
    return length >= 0 and memchr(plain, 0, length) == NULL and is_level(plain, plain + length)  # no text has a NUL as it is


# -------------------------------------------------------------------------------------------------------- the schema

cdef cursor scan_unknown(cursor p, cursor end, bint of_message, unsigned int *member) noexcept nogil:
    """As scan_name, for a key that does not read as a known one, but may be one in disguise."""
    cdef unsigned char[MAX_NAME + UTF8 + 2] plain
    cdef cursor text = p + 1
    cdef Py_ssize_t length
    member[0] = UNKNOWN
    if p[0] != c'"' or likely(plain_end(text, end)[0] != c'\\'):
        return scan_name(p, end)
    p = scan_string(text, end)
    if p == NULL:
        return NULL
    plain[0] = c'"'
    length = unescape(text, p - 1, plain + 1, MAX_NAME)
    if length >= 0:
        member[0] = known_member(plain, plain + length + 2, of_message)
    return scan_colon(p)


cdef unsigned int known_member(cursor p, cursor end, bint of_message) noexcept nogil:
    """The member that a key without escapes names, quotes included."""
    cdef Py_ssize_t length = end - p
    if length == 10 and memcmp(p, b'"metadata"', 10) == 0:
        return METADATA
    if not of_message:
        if length == 11 and memcmp(p, b'"emitterId"', 11) == 0:
            return EMITTER_ID
        return MESSAGES if length == 10 and memcmp(p, b'"messages"', 10) == 0 else UNKNOWN
    if length == 9 and memcmp(p, b'"message"', 9) == 0:
        return MESSAGE
    if length == 11 and memcmp(p, b'"timestamp"', 11) == 0:
        return TIMESTAMP
    if length == 7 and memcmp(p, b'"level"', 7) == 0:
        return LEVEL
    return SOURCE if length == 8 and memcmp(p, b'"source"', 8) == 0 else UNKNOWN


# Comparing with each known key, instead of measuring the key at hand first, lets the processor run ahead: it predicts
# the outcomes from the last packets, and where the key ends follows from them.

cdef inline cursor message_member(cursor p, cursor end, unsigned int *member) noexcept nogil:
    """From the first byte of a key to the first byte of its value."""
    if is_word(p, end, b'"message"', 9):
        member[0] = MESSAGE
        return scan_colon(p + 9)
    if is_word(p, end, b'"timestamp"', 11):
        member[0] = TIMESTAMP
        return scan_colon(p + 11)
    if is_word(p, end, b'"level"', 7):
        member[0] = LEVEL
        return scan_colon(p + 7)
    if is_word(p, end, b'"source"', 8):
        member[0] = SOURCE
        return scan_colon(p + 8)
    if is_word(p, end, b'"metadata"', 10):
        member[0] = METADATA
        return scan_colon(p + 10)
    return scan_unknown(p, end, True, member)


cdef cursor scan_message(cursor p, cursor end, bint strict) noexcept nogil:
    """One log message; p is at its first byte."""
    cdef unsigned int member, seen = 0
    cdef unsigned int required = MESSAGE | TIMESTAMP | LEVEL if strict else MESSAGE
    cdef cursor text
    if p[0] != c'{':
        return NULL
    while True:
        p = message_member(skip_space(p + 1), end, &member)  # behind the brace or a comma
        if p == NULL or seen & member:
            return NULL
        seen |= member
        if member == UNKNOWN or (member == METADATA and p[0] == c'{'):
            p = scan_value(p, end, IN_MESSAGE)
        elif member == METADATA or p[0] != c'"':
            return NULL
        else:
            text = p + 1
            p = scan_string(text, end)
            if strict and p != NULL:
                if member == TIMESTAMP and not (is_date_time(text, p - 1) or says_date_time(text, p - 1)):
                    return NULL
                if member == LEVEL and not (is_level(text, p - 1) or says_level(text, p - 1)):
                    return NULL
        if p == NULL:
            return NULL
        p = skip_space(p)
        if p[0] != c',':
            return p + 1 if p[0] == c'}' and p != end and seen & required == required else NULL


cdef cursor scan_messages(cursor p, cursor end, bint strict, PacketFacts *facts) noexcept nogil:
    """The array of log messages; p is at its first byte."""
    facts.messages = 0
    if p[0] != c'[':
        return NULL
    facts.in_messages = True
    while True:
        p = skip_space(p + 1)  # behind the bracket or a comma
        facts.reached = p
        p = scan_message(p, end, strict)
        if p == NULL:
            return NULL
        facts.messages += 1
        p = skip_space(p)
        if p[0] != c',':
            facts.reached = p
            return p + 1 if p[0] == c']' else NULL


cdef cursor scan_emitter(cursor p, cursor end, uint64_t *hash) noexcept nogil:
    """The emitterId; p is at its first byte."""
    cdef unsigned char[UTF8 * MAX_EMITTER + UTF8 + 1] plain
    cdef cursor text = p + 1
    cdef Py_ssize_t i, length, characters = 0
    if p[0] != c'"':
        return NULL
    p = scan_string(text, end)
    if p == NULL:
        return NULL
    length = p - 1 - text
    if unlikely(memchr(text, c'\\', length) != NULL):
        length = unescape(text, p - 1, plain, UTF8 * MAX_EMITTER)
        text = plain
    if not 1 <= length <= UTF8 * MAX_EMITTER:
        return NULL
    if length > MAX_EMITTER:
        for i in range(length):
            characters += not is_tail(text[i])
        if characters > MAX_EMITTER:
            return NULL
    hash[0] = hash_bytes(text, length)
    return p


cdef inline cursor packet_member(cursor p, cursor end, unsigned int *member) noexcept nogil:
    """From the first byte of a key to the first byte of its value."""
    if is_word(p, end, b'"emitterId"', 11):
        member[0] = EMITTER_ID
        return scan_colon(p + 11)
    if is_word(p, end, b'"messages"', 10):
        member[0] = MESSAGES
        return scan_colon(p + 10)
    if is_word(p, end, b'"metadata"', 10):
        member[0] = METADATA
        return scan_colon(p + 10)
    return scan_unknown(p, end, False, member)


cdef bint scan_packet(const unsigned char *p, size_t n, bint strict, PacketFacts *facts) noexcept nogil:
    cdef cursor end = p + n
    cdef unsigned int member, seen = 0
    facts.reached, facts.in_messages, facts.messages, facts.seen = p, False, 0, 0
    if n < MIN_PACKET:
        return False
    end -= 1
    while is_space(end[0]) and end - p >= MIN_PACKET:
        end -= 1
    if end[0] != c'}':
        return False
    p = skip_space(p)
    if p[0] != c'{':
        return False
    while True:
        p = skip_space(p + 1)  # behind the brace or a comma
        facts.reached, facts.in_messages, facts.seen = p, False, seen
        p = packet_member(p, end, &member)
        if p == NULL or seen & member:
            return False
        seen |= member
        if member == MESSAGES:
            p = scan_messages(p, end, strict, facts)
        elif member == EMITTER_ID:
            p = scan_emitter(p, end, &facts.emitter_hash)
        elif member == METADATA and p[0] != c'{':
            return False
        else:
            p = scan_value(p, end, IN_PACKET)
        if p == NULL:
            return False
        p = skip_space(p)
        if p[0] != c',':
            facts.reached, facts.in_messages, facts.seen = p, False, seen
            return p == end and seen & EMITTER_ID != 0 and seen & MESSAGES != 0


# ------------------------------------------------------------------------------------------------------- for Python

def scan(const unsigned char[::1] body not None, bint strict=False):
    """``(messages, emitter_hash)`` of a log packet; else None."""
    cdef PacketFacts facts
    if not len(body) or not scan_packet(&body[0], len(body), strict, &facts):
        return None
    return facts.messages, facts.emitter_hash


def malformed(bytes body not None):
    """What keeps a body from being JSON as it is accepted here: ``(what, line, column, byte)``; None if nothing does.

    Lines and columns (of characters) count from 1, bytes from 0. Everything before that place is in order.
    """
    cdef bytes padded = body.ljust(BLOCK)  # which plain_end asks for; spaces behind it change nothing
    cdef cursor start = <cursor>PyBytes_AS_STRING(padded)
    cdef cursor end = start + len(padded)
    cdef cursor p
    cdef cursor opening = NULL
    if body.startswith(b"\xef\xbb\xbf"):
        p = no(start, BYTE_ORDER_MARK)
    else:
        p = scan_value(skip_space(start), end, MAX_DEPTH)
    if p != NULL:
        p = skip_space(p)
        if p == end:
            return None
        no(p, NO_END_OF_BODY)
    if stopped.why == NO_END_OF_STRING:  # where it begins is of use: up to there a quote that is in no string begins one
        p = start
        while p != NULL:
            opening = <cursor>memchr(p, c'"', end - p)
            p = scan_string(opening + 1, end)
        stopped.at = opening
    elif stopped.at[0] >= 0x80 and stopped.why != BYTE_ORDER_MARK:
        scan_utf8(stopped.at)  # which says so, if that is the reason
    return stopped.why.decode("ascii"), *place_of(start, min(stopped.at, start + len(body)))


cdef tuple place_of(cursor start, cursor at):
    """Return ``(line, column, byte)`` of a place in a body: lines and columns (of characters) count from 1, bytes from 0."""
    cdef cursor line = start
    cdef cursor line_end = <cursor>memrchr(start, c'\n', at - start)
    if line_end != NULL:
        line = line_end + 1
    return count_of(start, at, 0xFF, c'\n') + 1, at - line - count_of(line, at, 0xC0, 0x80) + 1, at - start


cdef Py_ssize_t count_of(cursor p, cursor end, uint8_t mask, uint8_t masked) noexcept nogil:
    """Return of how many bytes these bits are so. Written so that compilers look at many bytes at once."""
    cdef Py_ssize_t count = 0
    cdef uint8_t in_run
    cdef int i
    while end - p >= RUN:
        in_run = 0
        for i in range(RUN):
            in_run += p[i] & mask == masked
        count += in_run
        p += RUN
    while p < end:
        count += p[0] & mask == masked
        p += 1
    return count


def locate(bytes body not None, bint strict=False):
    """Of JSON that is no log packet: ``(byte, message, seen)``; None if it is one.

    What begins at ``byte`` is at fault: a message (its number; else None), a member of the packet, or the packet's end
    where a member is missing; 0: the body is no object. ``seen``: the known members that came before it.
    """
    cdef PacketFacts facts
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(body)
    if scan_packet(start, PyBytes_GET_SIZE(body), strict, &facts):
        return None
    seen = [name for bit, name in ((EMITTER_ID, "emitterId"), (MESSAGES, "messages"), (METADATA, "metadata"))
            if facts.seen & bit]
    return facts.reached - start, facts.messages if facts.in_messages else None, seen


def hash_text(bytes utf8 not None):
    """The 64-bit number that stands for the emitter with this emitterId, the same in every process and version."""
    return hash_bytes(<const unsigned char *>PyBytes_AS_STRING(utf8), PyBytes_GET_SIZE(utf8))
