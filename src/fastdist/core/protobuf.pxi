"""Protobuf to JSON: log records as OpenTelemetry and Loki send them, written as messages of packets.

Why not the library's classes: they make a Python object of each member that is looked at, which takes eight times as
long as parsing does, and 4x is all that a record may cost. Only what holds many records is read here, frame by frame, and
what it holds is written as JSON where it is read. The classes are the model that tests compare this with.

The rules:

1. No length and no number is believed: every read is compared with the end of what holds it. Broken: ValueError.
2. Unknown fields are passed over. Text that is not UTF-8 has U+FFFD where it is not.
3. Nothing is nested deeper than a packet may be.
4. A call makes as many records as it is asked for, and says where to go on.
5. A record that is larger than a packet may be, or of very many values, is an OverflowError as soon as that is seen.
"""

cdef extern from "Python.h":
    char *PyOS_double_to_string(double value, char format, int precision, int flags, int *type) except NULL
    int Py_DTSF_ADD_DOT_0
    Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    MAX_NESTED = 60   # arrays and maps within each other, in a value
    MAX_ANY_VALUES = 200000  # in a record: each takes time, and a record is written at once
    MAX_CHUNK = 1 << 20  # bytes of messages that are written at once, and one message
    VARINT = 0        # wire types
    FIXED64 = 1
    BYTES = 2
    FIXED32 = 5

cdef const char *HEX = b"0123456789abcdef"
cdef const char *BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
cdef const char *CUT = b"a field reaches beyond what it lies in"
cdef const char *WIRE_TYPE = b"a field is of a wire type that does not exist"
cdef const char *NESTED = b"a value is nested too deep"

cdef struct Field:
    uint64_t number
    int kind              # wire type
    uint64_t value        # of VARINT, FIXED64 and FIXED32
    cursor p              # of BYTES
    cursor end


cdef int broken(const char *why) except -1:
    raise ValueError(why.decode("ascii"))


cdef inline cursor read_varint(cursor p, cursor end, uint64_t *value) noexcept nogil:
    """Return where it ends; NULL if it does not."""
    cdef int shift = 0
    value[0] = 0
    while p < end and shift < 64:
        value[0] |= <uint64_t>(p[0] & 0x7F) << shift
        if p[0] < 0x80:
            return p + 1
        p += 1
        shift += 7
    return NULL


cdef cursor read_field(cursor p, cursor end, Field *field) except NULL:
    """Read the field that begins at ``p``, before ``end``; return where it ends."""
    cdef uint64_t tag
    cdef uint32_t word
    p = read_varint(p, end, &tag)
    if p == NULL:
        broken(CUT)
    field.number, field.kind = tag >> 3, tag & 7
    if field.kind == VARINT:
        p = read_varint(p, end, &field.value)
        if p == NULL:
            broken(CUT)
        return p
    if field.kind == BYTES:
        p = read_varint(p, end, &tag)
        if p == NULL or tag > <uint64_t>(end - p):
            broken(CUT)
        field.p, field.end = p, p + tag
        return field.end
    if field.kind == FIXED64:
        if end - p < 8:
            broken(CUT)
        memcpy(&field.value, p, 8)  # both byte orders of this and of the wire are little-endian
        return p + 8
    if field.kind == FIXED32:
        if end - p < 4:
            broken(CUT)
        memcpy(&word, p, 4)
        field.value = word
        return p + 4
    broken(WIRE_TYPE)


# ------------------------------------------------------------------------------------------------------ writing JSON

cdef Py_ssize_t max_out = PY_SSIZE_T_MAX  # bytes that a buffer may grow to
cdef int values_left


cdef inline int room_for(Buffer *out, Py_ssize_t n) except -1:
    return grow(out, n) if unlikely(out.end + n > out.size) else 0


cdef int grow(Buffer *out, Py_ssize_t n) except -1:
    if out.end + n > max_out:
        raise OverflowError
    return make_room(out, n)


cdef inline int put_bytes(Buffer *out, const void *p, Py_ssize_t n) except -1:
    room_for(out, n)
    memcpy(out.data + out.end, p, n)
    out.end += n
    return 0


cdef inline int put(Buffer *out, const char *text) except -1:
    """Write a literal, whose length the compiler knows."""
    return put_bytes(out, text, strlen(text))


cdef int put_unicode(Buffer *out, cursor p, cursor end) except -1:
    """Write text as a JSON string, quotes included. There are BLOCK bytes before its end, if only a bytes object's head."""
    cdef cursor plain = plain_end(p, end)
    cdef cursor after
    cdef uchar *escape
    if p == end:
        return put(out, b'""')
    room_for(out, end - p + 2)
    out.data[out.end] = c'"'
    if likely(plain == end):
        memcpy(out.data + out.end + 1, p, end - p)
        out.end += end - p + 2
        out.data[out.end - 1] = c'"'
        return 0
    out.end += 1
    while True:
        plain = plain_end(p, end)
        put_bytes(out, p, plain - p)
        p = plain
        if p == end:
            break
        if p[0] >= 0x80:
            after = utf8_end(p, end)
            if after == p:
                put_bytes(out, b"\xef\xbf\xbd", 3)
                p += 1
            else:
                put_bytes(out, p, after - p)
                p = after
            continue
        room_for(out, 6)
        escape = out.data + out.end
        escape[0] = c'\\'
        escape[1] = short_escape(p[0])
        if escape[1]:
            out.end += 2
        else:
            memcpy(escape + 1, b"u00", 3)
            escape[4], escape[5] = HEX[p[0] >> 4], HEX[p[0] & 15]
            out.end += 6
        p += 1
    return put_bytes(out, b'"', 1)


cdef uchar short_escape(uchar c) noexcept nogil:
    if c == c'"' or c == c'\\':
        return c
    if c == c'\n':
        return c'n'
    if c == c'\t':
        return c't'
    if c == c'\r':
        return c'r'
    if c == c'\b':
        return c'b'
    return c'f' if c == c'\f' else 0


cdef cursor utf8_end(cursor p, cursor end) noexcept nogil:
    """Return where the characters beyond ASCII end that begin at ``p``; ``p`` itself if the first is broken."""
    cdef uchar lead
    cdef int n
    while p < end and p[0] >= 0x80:
        lead = p[0]
        n = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        if lead < 0xC2 or lead > 0xF4 or end - p < n or not is_tail(p[1]) or n > 2 and not is_tail(p[2]):
            return p
        if n > 3 and not is_tail(p[3]):
            return p
        if lead == 0xE0 and p[1] < 0xA0 or lead == 0xED and p[1] > 0x9F:
            return p
        if lead == 0xF0 and p[1] < 0x90 or lead == 0xF4 and p[1] > 0x8F:
            return p
        p += n
    return p


cdef int put_unsigned(Buffer *out, uint64_t number) except -1:
    cdef char[20] digits
    cdef int n = 20
    while True:
        n -= 1
        digits[n] = <char>(c'0' + number % 10)
        number //= 10
        if number == 0:
            return put_bytes(out, digits + n, 20 - n)


cdef int put_integer(Buffer *out, int64_t number) except -1:
    if number < 0:
        put_bytes(out, b"-", 1)
        return put_unsigned(out, -<uint64_t>number)
    return put_unsigned(out, number)


cdef int put_double(Buffer *out, double number) except -1:
    """Write a number so that it is read as the same one; what JSON has no number for as a string."""
    cdef char *text
    if number != number:
        return put(out, b'"NaN"')
    if number - number != 0:
        return put(out, b'"Infinity"' if number > 0 else b'"-Infinity"')
    text = PyOS_double_to_string(number, c'r', 0, Py_DTSF_ADD_DOT_0, NULL)
    try:
        return put(out, text)
    finally:
        PyMem_Free(text)


cdef int put_hex(Buffer *out, cursor p, cursor end) except -1:
    cdef uchar *text
    room_for(out, 2 * (end - p) + 2)
    put_bytes(out, b'"', 1)
    text = out.data + out.end
    out.end += 2 * (end - p)
    while p < end:
        text[0], text[1] = HEX[p[0] >> 4], HEX[p[0] & 15]
        p += 1
        text += 2
    return put_bytes(out, b'"', 1)


cdef int put_base64(Buffer *out, cursor p, cursor end) except -1:
    cdef uchar *text
    cdef uint32_t word
    cdef int n
    room_for(out, (end - p) // 3 * 4 + 6)
    put_bytes(out, b'"', 1)
    while p < end:
        n = <int>min(<Py_ssize_t>3, end - p)
        word = <uint32_t>p[0] << 16 | (<uint32_t>p[1] << 8 if n > 1 else 0) | (p[2] if n > 2 else 0)
        text = out.data + out.end
        text[0], text[1] = BASE64[word >> 18], BASE64[word >> 12 & 63]
        text[2] = BASE64[word >> 6 & 63] if n > 1 else c'='
        text[3] = BASE64[word & 63] if n > 2 else c'='
        out.end += 4
        p += n
    return put_bytes(out, b'"', 1)


cdef int put_time(Buffer *out, uint64_t second, int nanosecond) except -1:
    room_for(out, MAX_RFC3339)
    out.end = <uchar *>append_date_time(<char *>out.data + out.end, second, nanosecond) - out.data
    return 0


# ----------------------------------------------------------------------------------------------------- OpenTelemetry

cdef int put_any(Buffer *out, cursor p, cursor end, int nested) except -1:
    """Write an AnyValue; nothing in it is null. Of several kinds the last counts."""
    global values_left
    cdef Field field, value
    cdef double number
    value.number = 0
    values_left -= 1
    if values_left < 0:
        raise OverflowError
    while p < end:
        p = read_field(p, end, &field)
        if 1 <= field.number <= 7 and field.kind == ANY_KINDS[field.number]:
            value = field
    if value.number == 1:
        return put_unicode(out, value.p, value.end)
    if value.number == 2:
        return put(out, b"true" if value.value else b"false")
    if value.number == 3:
        return put_integer(out, <int64_t>value.value)
    if value.number == 4:
        memcpy(&number, &value.value, 8)
        return put_double(out, number)
    if value.number == 5:
        return put_array(out, value.p, value.end, nested + 1)
    if value.number == 6:
        return put_attributes(out, value.p, value.end, 1, nested + 1)
    if value.number == 7:
        return put_base64(out, value.p, value.end)
    return put(out, b"null")


cdef int[8] ANY_KINDS
ANY_KINDS[:] = [-1, BYTES, VARINT, VARINT, FIXED64, BYTES, BYTES, BYTES]


cdef int put_array(Buffer *out, cursor p, cursor end, int nested) except -1:
    """Write an ArrayValue."""
    cdef Field field
    cdef bint first = True
    if nested > MAX_NESTED:
        broken(NESTED)
    put_bytes(out, b"[", 1)
    while p < end:
        p = read_field(p, end, &field)
        if field.number == 1 and field.kind == BYTES:
            if not first:
                put_bytes(out, b",", 1)
            first = False
            put_any(out, field.p, field.end, nested)
    return put_bytes(out, b"]", 1)


cdef int put_attributes(Buffer *out, cursor p, cursor end, uint64_t number, int nested) except -1:
    """Write the KeyValues that are the fields ``number`` of a message, as an object."""
    cdef Field field
    cdef bint first = True
    if nested > MAX_NESTED:
        broken(NESTED)
    put_bytes(out, b"{", 1)
    while p < end:
        p = read_field(p, end, &field)
        if field.number == number and field.kind == BYTES:
            if not first:
                put_bytes(out, b",", 1)
            first = False
            put_member(out, field.p, field.end, nested)
    return put_bytes(out, b"}", 1)


cdef int put_member(Buffer *out, cursor p, cursor end, int nested) except -1:
    """Write a KeyValue."""
    cdef Field field
    cdef cursor key = NULL
    cdef cursor key_end = NULL
    cdef cursor value = NULL
    cdef cursor value_end = NULL
    while p < end:
        p = read_field(p, end, &field)
        if field.kind == BYTES and field.number == 1:
            key, key_end = field.p, field.end
        elif field.kind == BYTES and field.number == 2:
            value, value_end = field.p, field.end
    put_unicode(out, key, key_end)
    put_bytes(out, b":", 1)
    return put_any(out, value, value_end, nested)


cdef struct LogRecord:
    uint64_t time, observed, severity, flags, dropped
    bint has_attributes
    Field severity_text, body, trace, span, event


cdef int read_log_record(cursor p, cursor end, LogRecord *log) except -1:
    cdef Field field
    memset(log, 0, sizeof(LogRecord))
    while p < end:
        p = read_field(p, end, &field)
        if field.kind == BYTES:
            if field.number == 3:
                log.severity_text = field
            elif field.number == 5:
                log.body = field
            elif field.number == 6:
                log.has_attributes = True
            elif field.number == 9:
                log.trace = field
            elif field.number == 10:
                log.span = field
            elif field.number == 12:
                log.event = field
        elif field.kind == FIXED64:
            if field.number == 1:
                log.time = field.value
            elif field.number == 11:
                log.observed = field.value
        elif field.kind == VARINT:
            if field.number == 2:
                log.severity = field.value
            elif field.number == 7:
                log.dropped = field.value & 0xFFFFFFFF
        elif field.kind == FIXED32 and field.number == 8:
            log.flags = field.value
    return 0


cdef const char *level_of(LogRecord *log, dict levels) except NULL:
    """Return the level of a record: by its number, else by its text."""
    if 1 <= log.severity <= 24:
        return OTLP_LEVELS[(log.severity - 1) // 4]
    if log.severity_text.p == log.severity_text.end:
        return b"info"
    return known_level(&log.severity_text, levels, b"info")


cdef const char *known_level(Field *text, dict levels, const char *otherwise) except NULL:
    """Return the level that a name means; ``levels``: bytes by lower-case bytes."""
    cdef PyObject *level = find_level_name(text.p, text.end, levels)
    return otherwise if level == NULL else PyBytes_AS_STRING(<bytes>level)


cdef PyObject *find_level_name(cursor p, cursor end, dict levels) except? NULL:
    """Return the level that a name means, in any case; NULL for an unknown one."""
    cdef PyObject *level
    cdef bytes name
    if not 0 < end - p <= MAX_LEVEL_NAME:
        return NULL
    name = PyBytes_FromStringAndSize(<const char *>p, end - p)
    level = PyDict_GetItem(levels, name)
    return level if level != NULL else PyDict_GetItem(levels, name.lower())


cdef enum:
    MAX_LEVEL_NAME = 16

cdef const char *OTLP_LEVELS[6]
OTLP_LEVELS[0], OTLP_LEVELS[1], OTLP_LEVELS[2] = b"trace", b"debug", b"info"
OTLP_LEVELS[3], OTLP_LEVELS[4], OTLP_LEVELS[5] = b"warn", b"error", b"fatal"


@cython.final
cdef class RecordParts:
    """What all records of a scope or a stream have in common, as JSON.

    ``received``: the time for those without one. ``source``: a JSON string, or empty. ``metadata``: members without
    braces, or empty. ``level``: for records without one. ``levels``: names of levels, see known_level. ``names``: of
    ``metadata``, as bytes: other members must not be called so. ``limit``: bytes of a message.
    """

    cdef bytes received, source, metadata, level
    cdef dict levels
    cdef set names
    cdef Py_ssize_t limit

    def __init__(self, bytes received not None, dict levels not None, Py_ssize_t limit, bytes source not None=b"",
                 bytes metadata not None=b"", bytes level not None=b"info", set names not None=set()):
        self.received, self.levels, self.source, self.metadata = received, levels, source, metadata
        self.level, self.names, self.limit = level, names, limit


cdef int put_log_record(Buffer *out, Buffer *scratch, cursor p, cursor end, RecordParts parts) except -1:
    """Write a LogRecord as a message."""
    global values_left
    cdef LogRecord log
    cdef uint64_t time
    values_left = MAX_ANY_VALUES
    read_log_record(p, end, &log)
    put(out, b'{"timestamp":"')
    time = log.time or log.observed
    if time:
        put_time(out, time // 1000000000, <int>(time % 1000000000))
    else:
        put_bytes(out, PyBytes_AS_STRING(parts.received), PyBytes_GET_SIZE(parts.received))
    put(out, b'","level":"')
    put(out, level_of(&log, parts.levels))
    put(out, b'","message":')
    put_text(out, scratch, &log)
    put_source(out, parts)
    put(out, b',"metadata":{')
    if log.has_attributes:
        put(out, b'"attributes":')
        put_attributes(out, p, end, 6, 0)
        put_bytes(out, b",", 1)
    if scratch.end:  # of put_text
        put(out, b'"body":')
        put_bytes(out, scratch.data + BLOCK, scratch.end - BLOCK)
        put_bytes(out, b",", 1)
    if log.time and log.observed:
        put(out, b'"observedTimeUnixNano":"')
        put_unsigned(out, log.observed)
        put(out, b'",')
    if log.severity:
        put(out, b'"severityNumber":')
        put_integer(out, <int32_t>log.severity)
        put_bytes(out, b",", 1)
    put_named(out, b'"severityText":', &log.severity_text)
    put_named(out, b'"eventName":', &log.event)
    if log.trace.p != log.trace.end:
        put(out, b'"traceId":')
        put_hex(out, log.trace.p, log.trace.end)
        put_bytes(out, b",", 1)
    if log.span.p != log.span.end:
        put(out, b'"spanId":')
        put_hex(out, log.span.p, log.span.end)
        put_bytes(out, b",", 1)
    if log.flags:
        put(out, b'"flags":')
        put_unsigned(out, log.flags)
        put_bytes(out, b",", 1)
    if log.dropped:
        put(out, b'"droppedAttributesCount":')
        put_unsigned(out, log.dropped)
        put_bytes(out, b",", 1)
    return put_end(out, parts)


cdef int put_text(Buffer *out, Buffer *scratch, LogRecord *log) except -1:
    """Write the text of a record; a body that is no string is put into ``scratch`` as well."""
    cdef Field field, last
    cdef cursor p = log.body.p
    last.number = 0
    scratch.end = 0
    while p < log.body.end:
        p = read_field(p, log.body.end, &field)
        if 1 <= field.number <= 7 and field.kind == ANY_KINDS[field.number]:
            last = field
    if last.number == 0:
        return put_unicode(out, log.event.p, log.event.end)
    if last.number == 1:
        return put_unicode(out, last.p, last.end)
    room_for(scratch, BLOCK)  # which put_unicode asks for
    memset(scratch.data, c' ', BLOCK)
    scratch.end = BLOCK
    put_any(scratch, log.body.p, log.body.end, 0)
    if scratch.data[BLOCK] == c'"':  # base64, or NaN
        return put_bytes(out, scratch.data + BLOCK, scratch.end - BLOCK)
    return put_unicode(out, scratch.data + BLOCK, scratch.data + scratch.end)


cdef int put_named(Buffer *out, const char *name, Field *text) except -1:
    """Write a member with a text and a comma; nothing if it is empty."""
    if text.p == text.end:
        return 0
    put(out, name)
    put_unicode(out, text.p, text.end)
    return put_bytes(out, b",", 1)


cdef int put_source(Buffer *out, RecordParts parts) except -1:
    if PyBytes_GET_SIZE(parts.source):
        put(out, b',"source":')
        put_bytes(out, PyBytes_AS_STRING(parts.source), PyBytes_GET_SIZE(parts.source))
    return 0


cdef int put_end(Buffer *out, RecordParts parts) except -1:
    """Write the common metadata, and end the message."""
    put_bytes(out, PyBytes_AS_STRING(parts.metadata), PyBytes_GET_SIZE(parts.metadata))
    if out.data[out.end - 1] == c',':
        out.end -= 1
    return put_bytes(out, b"}},", 3)


# --------------------------------------------------------------------------------------------------------------- Loki

cdef int NO_RANK = 3
cdef const char *NO_LEVEL = b""

cdef int put_entry(Buffer *out, cursor p, cursor end, RecordParts parts) except -1:
    """Write an EntryAdapter as a message."""
    cdef Field field, line, time
    cdef cursor start = p
    cdef int64_t second = 0
    cdef int nanosecond = 0
    cdef const char *level = PyBytes_AS_STRING(parts.level)
    cdef int rank = NO_RANK
    cdef bint timed = False
    memset(&line, 0, sizeof(Field))
    while p < end:
        p = read_field(p, end, &field)
        if field.kind != BYTES:
            continue
        if field.number == 1:
            timed = read_timestamp(field.p, field.end, &second, &nanosecond)
        elif field.number == 2:
            line = field
        elif field.number == 3:
            level = pair_level(field.p, field.end, parts.levels, level, &rank)
    put(out, b'{"timestamp":"')
    if timed:
        put_time(out, second, nanosecond)
    else:
        put_bytes(out, PyBytes_AS_STRING(parts.received), PyBytes_GET_SIZE(parts.received))
    put(out, b'","level":"')
    put(out, level)
    put(out, b'","message":')
    put_unicode(out, line.p, line.end)
    put_source(out, parts)
    put(out, b',"metadata":{')
    p = start
    while p < end:
        p = read_field(p, end, &field)
        if field.kind == BYTES and field.number == 3:
            put_pair(out, field.p, field.end, parts.names)
    return put_end(out, parts)


cdef bint read_timestamp(cursor p, cursor end, int64_t *second, int *nanosecond) except -1:
    """Read a Timestamp; return whether it is one that RFC 3339 can write, and not the zero that means none."""
    cdef Field field
    while p < end:
        p = read_field(p, end, &field)
        if field.kind == VARINT and field.number == 1:
            second[0] = <int64_t>field.value
        elif field.kind == VARINT and field.number == 2:
            nanosecond[0] = <int32_t>field.value
    if second[0] == 0 and nanosecond[0] == 0:
        return False
    return FIRST_SECOND <= second[0] <= LAST_SECOND and 0 <= nanosecond[0] < 1000000000


cdef int read_pair(cursor p, cursor end, Field *name, Field *value) except -1:
    cdef Field field
    memset(name, 0, sizeof(Field))
    memset(value, 0, sizeof(Field))
    while p < end:
        p = read_field(p, end, &field)
        if field.kind == BYTES and field.number == 1:
            name[0] = field
        elif field.kind == BYTES and field.number == 2:
            value[0] = field
    return 0


cdef const char *pair_level(cursor p, cursor end, dict levels, const char *otherwise, int *rank) except NULL:
    """Return the level that a pair of structured metadata gives, if it is about that and no name of a lower ``rank`` was."""
    cdef Field name, value
    cdef const char *level
    cdef int found
    read_pair(p, end, &name, &value)
    found = (0 if is_text(&name, b"level", 5) else 1 if is_text(&name, b"detected_level", 14) else
             2 if is_text(&name, b"severity", 8) else NO_RANK)
    if found == NO_RANK or found > rank[0]:
        return otherwise
    level = known_level(&value, levels, NO_LEVEL)
    if level == NO_LEVEL:
        return otherwise
    rank[0] = found
    return level


cdef bint is_text(Field *field, const char *text, Py_ssize_t length) noexcept nogil:
    return field.end - field.p == length and memcmp(field.p, text, length) == 0


cdef int put_pair(Buffer *out, cursor p, cursor end, set names) except -1:
    """Write a pair of structured metadata; one that is named as a label gets the ending that Loki gives it."""
    cdef Field name, value
    read_pair(p, end, &name, &value)
    put_unicode(out, name.p, name.end)
    if names and PyBytes_FromStringAndSize(<const char *>name.p, name.end - name.p) in names:
        out.end -= 1
        put(out, b'_extracted"')
    put_bytes(out, b":", 1)
    put_unicode(out, value.p, value.end)
    return put_bytes(out, b",", 1)


# ------------------------------------------------------------------------------------------------------- for Python

cdef int check_bounds(bytes body, Py_ssize_t at, Py_ssize_t end) except -1:
    if not 0 <= at <= end <= PyBytes_GET_SIZE(body):
        raise IndexError
    return 0


def find_field(bytes body not None, Py_ssize_t at, Py_ssize_t end, uint64_t number):
    """Return ``(begin, end, next)`` of the next field of that number that holds bytes; None if there is no other."""
    cdef Field field
    cdef cursor start = <cursor>PyBytes_AS_STRING(body)
    cdef cursor p = start + at
    check_bounds(body, at, end)
    while p < start + end:
        p = read_field(p, start + end, &field)
        if field.number == number and field.kind == BYTES:
            return field.p - start, field.end - start, p - start
    return None


def otlp_attributes(bytes body not None, Py_ssize_t at, Py_ssize_t end, uint64_t number, Py_ssize_t limit):
    """Return the attributes of a message, which are its fields of that number, as a JSON object of ``limit`` bytes."""
    global max_out, values_left
    cdef Buffer out
    cdef cursor start = <cursor>PyBytes_AS_STRING(body)
    check_bounds(body, at, end)
    memset(&out, 0, sizeof(Buffer))
    max_out, values_left = limit, MAX_ANY_VALUES
    try:
        put_attributes(&out, start + at, start + end, number, 0)
        return PyBytes_FromStringAndSize(<char *>out.data, out.end)
    finally:
        max_out = PY_SSIZE_T_MAX
        release(&out)


def otlp_records(bytes body not None, Py_ssize_t at, Py_ssize_t end, RecordParts parts not None, int limit):
    """Write the next log records of a ScopeLogs: ``(messages, how many, next)``; messages with commas between them."""
    return put_records(body, at, end, parts, limit, True)


def loki_entries(bytes body not None, Py_ssize_t at, Py_ssize_t end, RecordParts parts not None, int limit):
    """Write the next entries of a StreamAdapter: ``(messages, how many, next)``; messages with commas between them."""
    return put_records(body, at, end, parts, limit, False)


cdef Buffer spare  # what messages were written to last: its pages are there already
memset(&spare, 0, sizeof(Buffer))


cdef tuple put_records(bytes body, Py_ssize_t at, Py_ssize_t end, RecordParts parts, int limit, bint otlp):
    global spare, max_out
    cdef Buffer out, scratch
    cdef Field field
    cdef int count = 0
    cdef cursor start = <cursor>PyBytes_AS_STRING(body)
    cdef cursor p = start + at
    cdef cursor until = start + min(end, at + PIECE_BYTES)
    check_bounds(body, at, end)
    out = spare
    memset(&spare, 0, sizeof(Buffer))
    memset(&scratch, 0, sizeof(Buffer))
    max_out = MAX_CHUNK + parts.limit
    try:
        while p < until and count < limit and out.end < MAX_CHUNK:
            p = read_field(p, start + end, &field)
            if field.number != 2 or field.kind != BYTES:
                continue
            if otlp:
                put_log_record(&out, &scratch, field.p, field.end, parts)
            else:
                put_entry(&out, field.p, field.end, parts)
            count += 1
        return PyBytes_FromStringAndSize(<char *>out.data, max(out.end - 1, 0)), count, p - start
    finally:
        max_out = PY_SSIZE_T_MAX
        release(&scratch)
        out.end = 0
        if out.size <= 2 * MAX_CHUNK:
            release(&spare)
            spare = out
        else:
            release(&out)
