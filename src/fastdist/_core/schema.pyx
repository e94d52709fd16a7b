"""Whether a body is a log packet, found out in one pass over its bytes.

Theory of operation. ``packet.check`` says what a log packet is: it decodes the body and looks at what came out. Nearly
every body is a good one, though, and of a good one the service needs two figures only, so the scanner reads the bytes
where they lie and builds nothing. It answers "yes, with these facts" or "not certain"; whoever asked hands the latter to
``packet.check``, which knows for sure and can tell what is wrong. Hence the rules:

1. Sound: a yes implies that ``packet.check`` accepts the same bytes with the same facts. Therefore the whole body is
   checked against RFC 8259, the parts nobody looks at as well: the escapes, the numbers, the UTF-8.
2. Not certain is always allowed, but costs a hundred times as much. So it is for what hardly occurs in accepted packets:
   an escape in a key that the schema could know (it may spell a known one) or in the emitterId, and deep nesting.
3. No byte outside the body is read (it may end where a mapping ends), nothing is allocated, nothing calls itself.

The functions hand a cursor along: each takes the place where its piece begins and returns the place behind it, or NULL
for "not certain". ``end`` is the place of the packet's own closing brace, which is looked up first. That byte may be read
but not passed. It is neither a space nor a digit nor the middle of a character, so what loops over these stops by itself;
only what passes a closing brace, and what jumps over several bytes, must compare with ``end``.

``scan_packet`` and ``scan_message`` know the schema and read the members of their objects one by one, in any order; a set
of bits notes what has been seen, which catches both what is missing and what came twice. Values that the schema does not
describe go through ``scan_value``, with the kinds of the open containers as bits of a word in place of a call stack. The
time goes into strings: ``plain_end`` (json.h) passes over their plain text 16 bytes at a time and stops at what deserves
a look.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from fastdist._core.bits cimport hash_bytes, likely, unlikely

ctypedef const unsigned char *cursor

cdef extern from "json.h" nogil:
    cursor plain_end "fd_plain_end"(cursor p, cursor end)

cdef enum:
    SHORTEST = 45  # bytes: {"emitterId":"a","messages":[{"message":""}]}
    MAX_DEPTH = 64  # as many as a word has bits; packet.check accepts twice that, which no emitter in its senses needs
    MAX_EMITTER = 256  # characters, that is code points

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


# ---------------------------------------------------------------------------------------------- JSON, piece by piece

cdef inline bint is_space(unsigned char c) noexcept nogil:
    return c <= c' ' and (c == c' ' or c == c'\n' or c == c'\r' or c == c'\t')


cdef inline cursor skip_space(cursor p) noexcept nogil:
    while is_space(p[0]):
        p += 1
    return p


cdef inline cursor skip_digits(cursor p) noexcept nogil:
    while c'0' <= p[0] <= c'9':
        p += 1
    return p


cdef inline unsigned int hex_digit(unsigned char c) noexcept nogil:
    """Its value; what is no digit makes any number it is part of greater than 0xFFFF."""
    if c'0' <= c <= c'9':
        return c - c'0'
    c |= 0x20
    return c - c'a' + 10 if c'a' <= c <= c'f' else 0x10000


cdef inline unsigned int code_unit(cursor p, cursor end) noexcept nogil:
    """The UTF-16 code unit of the \\uXXXX at p; greater than 0xFFFF if there is none."""
    if end - p < 6 or p[0] != c'\\' or p[1] != c'u':
        return 0x10000
    return hex_digit(p[2]) << 12 | hex_digit(p[3]) << 8 | hex_digit(p[4]) << 4 | hex_digit(p[5])


cdef cursor scan_escape(cursor p, cursor end) noexcept nogil:
    """One escape, or the two that make a character beyond U+FFFF; p is at the backslash."""
    cdef unsigned int unit
    if p[1] != c'u':
        return p + 2 if memchr(b'"\\/bfnrt', p[1], 8) != NULL else NULL
    unit = code_unit(p, end)
    if unit < 0xD800 or 0xDFFF < unit <= 0xFFFF:
        return p + 6
    # The grammar lets half of a pair stand alone, but it is no character, and half of the world's parsers refuse it.
    if unit <= 0xDBFF and 0xDC00 <= code_unit(p + 6, end) <= 0xDFFF:
        return p + 12
    return NULL


cdef inline bint is_tail(unsigned char c) noexcept nogil:
    return c & 0xC0 == 0x80


cdef cursor scan_utf8(cursor p) noexcept nogil:
    """The characters beyond ASCII from p to the next one that is not (Unicode, table 3-7: well-formed sequences)."""
    cdef unsigned char lead = p[0]
    while lead >= 0x80:
        if 0xC2 <= lead <= 0xDF:
            if not is_tail(p[1]):
                return NULL
            p += 2
        elif 0xE0 <= lead <= 0xEF:
            if not is_tail(p[1]) or not is_tail(p[2]):
                return NULL
            if (lead == 0xE0 and p[1] < 0xA0) or (lead == 0xED and p[1] > 0x9F):  # too long a form; a surrogate
                return NULL
            p += 3
        elif 0xF0 <= lead <= 0xF4:
            if not is_tail(p[1]) or not is_tail(p[2]) or not is_tail(p[3]):
                return NULL
            if (lead == 0xF0 and p[1] < 0x90) or (lead == 0xF4 and p[1] > 0x8F):  # too long a form; above U+10FFFF
                return NULL
            p += 4
        else:
            return NULL
        lead = p[0]
    return p


cdef cursor scan_rest(cursor p, cursor end) noexcept nogil:
    """The rest of a string from a place where plain text ended."""
    while p != end:
        if p[0] == c'"':
            return p + 1
        if p[0] == c'\\':
            p = scan_escape(p, end)
        elif p[0] >= 0x80:
            p = scan_utf8(p)
        else:
            return NULL
        if p == NULL:
            return NULL
        p = plain_end(p, end)
    return NULL


cdef inline cursor scan_string(cursor p, cursor end) noexcept nogil:
    """From behind the opening quote to behind the closing one."""
    p = plain_end(p, end)
    return p + 1 if likely(p[0] == c'"') else scan_rest(p, end)


cdef cursor scan_number(cursor p) noexcept nogil:
    cdef cursor digits
    if p[0] == c'-':
        p += 1
    digits = p
    p = skip_digits(p)
    if p == digits or (digits[0] == c'0' and p - digits > 1):
        return NULL
    if p[0] == c'.':
        digits = p + 1
        p = skip_digits(digits)
        if p == digits:
            return NULL
    if p[0] == c'e' or p[0] == c'E':
        p += 2 if p[1] == c'+' or p[1] == c'-' else 1
        digits = p
        p = skip_digits(digits)
        if p == digits:
            return NULL
    return p


cdef inline cursor scan_word(cursor p, cursor end, const char *word, Py_ssize_t length) noexcept nogil:
    return p + length if end - p >= length and memcmp(p, word, length) == 0 else NULL


cdef inline cursor scan_colon(cursor p) noexcept nogil:
    """From behind a key to the first byte of its value."""
    p = skip_space(p)
    return skip_space(p + 1) if p[0] == c':' else NULL


cdef inline cursor scan_name(cursor p, cursor end) noexcept nogil:
    """From the first byte of a key to the first byte of its value."""
    if p[0] != c'"':
        return NULL
    p = scan_string(p + 1, end)
    return scan_colon(p) if p != NULL else NULL


cdef cursor scan_value(cursor p, cursor end) noexcept nogil:
    """A value of any kind; p is at its first byte."""
    cdef uint64_t objects = 0  # one bit for each open container, the innermost lowest: whether it is an object
    cdef unsigned char c
    cdef int depth = 0
    while True:
        c = p[0]
        if c == c'"':
            p = scan_string(p + 1, end)
        elif c == c'{' or c == c'[':
            p = skip_space(p + 1)
            if p[0] != c + 2:  # ASCII has the closing bracket two places behind the opening one
                if depth == MAX_DEPTH:
                    return NULL
                depth += 1
                objects = objects << 1 | (c == c'{')
                if c == c'{':
                    p = scan_name(p, end)
                    if p == NULL:
                        return NULL
                continue
            p = p + 1 if p != end else NULL
        elif c == c't':
            p = scan_word(p, end, b"true", 4)
        elif c == c'f':
            p = scan_word(p, end, b"false", 5)
        elif c == c'n':
            p = scan_word(p, end, b"null", 4)
        else:
            p = scan_number(p)
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
                return NULL
            p += 1
            depth -= 1
            objects >>= 1
        p = skip_space(p + 1)
        if objects & 1:
            p = scan_name(p, end)
            if p == NULL:
                return NULL


# ------------------------------------------------------------------------------------------ what strict asks in addition

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
    cdef cursor digits
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
        digits = p + 1
        p = skip_digits(digits)
        if p == digits:
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
    cdef Py_ssize_t n = end - p
    if n > 8:
        return False
    memcpy(&lower, p, n)
    lower |= 0x2020202020202020u  # of all bytes only the two cases of a letter come out as that letter
    if n == 4:
        return memcmp(&lower, b"info", 4) == 0 or memcmp(&lower, b"warn", 4) == 0
    if n == 5:
        return (
            memcmp(&lower, b"error", 5) == 0
            or memcmp(&lower, b"debug", 5) == 0
            or memcmp(&lower, b"trace", 5) == 0
            or memcmp(&lower, b"fatal", 5) == 0
        )
    return (n == 7 and memcmp(&lower, b"warning", 7) == 0) or (n == 8 and memcmp(&lower, b"critical", 8) == 0)


# -------------------------------------------------------------------------------------------------------- the schema

cdef inline cursor scan_key(cursor p, cursor end, Py_ssize_t *length) noexcept nogil:
    """As scan_name, and the key's length in bytes: 0 if it is none that the schema could know."""
    cdef cursor stop
    if unlikely(p[0] != c'"'):
        return NULL
    stop = plain_end(p + 1, end)
    if likely(stop[0] == c'"'):
        length[0] = stop - p - 1
        return scan_colon(stop + 1)
    if stop[0] == c'\\':  # maybe a known key in disguise
        return NULL
    length[0] = 0
    p = scan_rest(stop, end)
    return scan_colon(p) if p != NULL else NULL


cdef inline unsigned int message_member(cursor key, Py_ssize_t length) noexcept nogil:
    if length == 7:
        return MESSAGE if memcmp(key, b"message", 7) == 0 else UNKNOWN
    if length == 9:
        return TIMESTAMP if memcmp(key, b"timestamp", 9) == 0 else UNKNOWN
    if length == 5:
        return LEVEL if memcmp(key, b"level", 5) == 0 else UNKNOWN
    if length == 6:
        return SOURCE if memcmp(key, b"source", 6) == 0 else UNKNOWN
    if length == 8:
        return METADATA if memcmp(key, b"metadata", 8) == 0 else UNKNOWN
    return UNKNOWN


cdef cursor scan_message(cursor p, cursor end, bint strict) noexcept nogil:
    """One log message; p is at its first byte."""
    cdef unsigned int member, seen = 0
    cdef unsigned int required = MESSAGE | TIMESTAMP | LEVEL if strict else MESSAGE
    cdef Py_ssize_t length = 0
    cdef cursor text
    if p[0] != c'{':
        return NULL
    while True:
        text = skip_space(p + 1)  # behind the brace or a comma
        p = scan_key(text, end, &length)
        if p == NULL:
            return NULL
        member = message_member(text + 1, length)
        if seen & member:
            return NULL
        seen |= member
        if member == UNKNOWN or (member == METADATA and p[0] == c'{'):
            p = scan_value(p, end)
        elif member == METADATA or p[0] != c'"':
            return NULL
        else:
            text = p + 1
            p = scan_string(text, end)
            if strict and p != NULL:
                if member == TIMESTAMP and not is_date_time(text, p - 1):
                    return NULL
                if member == LEVEL and not is_level(text, p - 1):
                    return NULL
        if p == NULL:
            return NULL
        p = skip_space(p)
        if p[0] != c',':
            return p + 1 if p[0] == c'}' and p != end and seen & required == required else NULL


cdef cursor scan_messages(cursor p, cursor end, bint strict, uint32_t *count) noexcept nogil:
    """The array of log messages; p is at its first byte."""
    count[0] = 0
    if p[0] != c'[':
        return NULL
    while True:
        p = scan_message(skip_space(p + 1), end, strict)  # behind the bracket or a comma
        if p == NULL:
            return NULL
        count[0] += 1
        p = skip_space(p)
        if p[0] != c',':
            return p + 1 if p[0] == c']' else NULL


cdef cursor scan_emitter(cursor p, cursor end, uint64_t *hash) noexcept nogil:
    """The emitterId; p is at its first byte."""
    cdef cursor text = p + 1
    cdef Py_ssize_t i, length, characters = 0
    if p[0] != c'"':
        return NULL
    p = scan_string(text, end)
    if p == NULL:
        return NULL
    length = p - 1 - text
    if not 1 <= length <= 4 * MAX_EMITTER or memchr(text, c'\\', length) != NULL:
        return NULL
    if length > MAX_EMITTER:
        for i in range(length):
            characters += not is_tail(text[i])
        if characters > MAX_EMITTER:
            return NULL
    hash[0] = hash_bytes(text, length)
    return p


cdef inline unsigned int packet_member(cursor key, Py_ssize_t length) noexcept nogil:
    if length == 9:
        return EMITTER_ID if memcmp(key, b"emitterId", 9) == 0 else UNKNOWN
    if length == 8:
        return MESSAGES if memcmp(key, b"messages", 8) == 0 else METADATA if memcmp(key, b"metadata", 8) == 0 else UNKNOWN
    return UNKNOWN


cdef bint scan_packet(const unsigned char *p, size_t n, bint strict, PacketFacts *facts) noexcept nogil:
    cdef cursor key, end = p + n
    cdef unsigned int member, seen = 0
    cdef Py_ssize_t length = 0
    while n > SHORTEST and is_space(end[-1]):
        end -= 1
        n -= 1
    if n < SHORTEST:
        return False
    end -= 1
    p = skip_space(p) if end[0] == c'}' else end
    if p[0] != c'{':
        return False
    while True:
        key = skip_space(p + 1)  # behind the brace or a comma
        p = scan_key(key, end, &length)
        if p == NULL:
            return False
        member = packet_member(key + 1, length)
        if seen & member:
            return False
        seen |= member
        if member == MESSAGES:
            p = scan_messages(p, end, strict, &facts.messages)
        elif member == EMITTER_ID:
            p = scan_emitter(p, end, &facts.emitter_hash)
        elif member == METADATA and p[0] != c'{':
            return False
        else:
            p = scan_value(p, end)
        if p == NULL:
            return False
        p = skip_space(p)
        if p[0] != c',':
            return p == end and seen & EMITTER_ID != 0 and seen & MESSAGES != 0


# ------------------------------------------------------------------------------------------------------- for Python

def scan(bytes body not None, bint strict=False):
    """``(messages, emitter_hash)`` if the body certainly is a log packet; None sends the caller to ``packet.check``."""
    cdef PacketFacts facts
    if not scan_packet(<const unsigned char *>PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body), strict, &facts):
        return None
    return facts.messages, facts.emitter_hash


def hash_text(bytes utf8 not None):
    """The hash that stands for an emitter: 64 bits, the same in every process and version; ``utf8`` is its emitterId."""
    return hash_bytes(<const unsigned char *>PyBytes_AS_STRING(utf8), PyBytes_GET_SIZE(utf8))
