"""JSON cut into values without decoding them, from texts one after the other or from lists in an object; date-times.

What agents send as JSON is decoded by a library, value by value, so that no step takes long and a fault has a number.
Where a value ends the scanner of packet_scan.pxi knows, which also bounds its depth and sees to it that it is JSON.
"""

cdef extern from "<string.h>" nogil:
    size_t strspn(const char *text, const char *accepted)

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(str text)

cdef enum:
    SECONDS_A_DAY = 86400
    ERA_DAYS = 146097         # of 400 years
    MAX_RFC3339 = 31          # characters of a date-time, at least
    PIECE_BYTES = 64 << 10    # of values that are cut at once
    NEAR = 32                 # bytes of space that are looked at one by one
    MAX_PATH = 5              # names that lead to records
    MAX_LISTS = 3             # among them
    OF_OTHERS = -1

cdef int64_t FIRST_SECOND = -62167219200  # 0000-01-01T00:00:00Z
cdef int64_t LAST_SECOND = 253402300799   # 9999-12-31T23:59:59Z


cdef char *append_two(char *out, int number) noexcept nogil:
    out[0], out[1] = <char>(c'0' + number // 10), <char>(c'0' + number % 10)
    return out + 2


cdef char *append_date_time(char *out, int64_t second, int nanosecond) noexcept nogil:
    """Write a time since 1970 as RFC 3339, with 0, 3, 6 or 9 digits of a fraction; return where it ends."""
    # Days are counted from March 1 of the year -400: the leap day is the last of a year then.
    cdef int64_t days = (second - FIRST_SECOND) // SECONDS_A_DAY + ERA_DAYS - 60
    cdef int moment = <int>((second - FIRST_SECOND) % SECONDS_A_DAY)
    cdef int64_t era = days // ERA_DAYS
    cdef int day, year, month, digits = 9
    day = <int>(days % ERA_DAYS)
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5 - 1
    month += 3 if month < 10 else -9
    year += <int>(era - 1) * 400 + (month <= 2)
    out = append_two(append_two(out, year // 100), year % 100)
    out[0] = c'-'
    out = append_two(out + 1, month)
    out[0] = c'-'
    out = append_two(out + 1, day)
    out[0] = c'T'
    out = append_two(out + 1, moment // 3600)
    out[0] = c':'
    out = append_two(out + 1, moment // 60 % 60)
    out[0] = c':'
    out = append_two(out + 1, moment % 60)
    if nanosecond:
        while nanosecond % 1000 == 0:
            nanosecond //= 1000
            digits -= 3
        out[0] = c'.'
        out += digits
        for _ in range(digits):
            out[0] = <char>(c'0' + nanosecond % 10)
            nanosecond //= 10
            out -= 1
        out += digits + 1
    out[0] = c'Z'
    return out + 1


def date_time(int64_t second, int nanosecond):
    """Return a time since 1970 as RFC 3339 has it, in UTC; None for one that it cannot write."""
    cdef char[MAX_RFC3339] text
    if not FIRST_SECOND <= second <= LAST_SECOND or not 0 <= nanosecond < 1000000000:
        return None
    return (text[:append_date_time(text, second, nanosecond) - text]).decode("ascii")


def is_rfc3339(str text not None):
    """Whether a text is a date-time of RFC 3339, section 5.6."""
    cdef Py_ssize_t length
    cdef const char *utf8
    if not PyUnicode_IS_COMPACT_ASCII(text):
        return False
    utf8 = PyUnicode_AsUTF8AndSize(text, &length)
    return is_date_time(<cursor>utf8, <cursor>utf8 + length)


@cython.final
cdef class JsonValues:
    """The values of a body: JSON texts one after the other, with or without space between them, arrays taken apart.

    ``room``: how many containers there may be within each other in a value.
    """

    cdef bytes body
    cdef cursor start, at, end, given_end    # of the body with spaces behind it, and as it was given
    cdef bint in_array, behind    # behind a value: a comma or the end of the array is next
    cdef int room

    def __cinit__(self, bytes body not None, int room):
        self.body = body if len(body) >= BLOCK else body.ljust(BLOCK)  # which plain_end asks for
        self.start = <cursor>PyBytes_AS_STRING(self.body)
        self.end = self.start + len(self.body)
        self.given_end = self.start + len(body)
        self.at = skip_space(self.start + 3 if body.startswith(b"\xef\xbb\xbf") else self.start)
        self.room = room

    def take(self, int limit):
        """Return the next values, ``limit`` at most, as they stand there; none: the body is over.

        If one is not JSON: those before it, and in the next call a ValueError with ``(what, line, column, byte)``. Half a
        surrogate pair is let pass.
        """
        cdef list values = []
        cdef cursor p
        cdef cursor until = self.at + PIECE_BYTES
        while self.at < until and len(values) < limit:
            p = self.begin()
            if p != NULL:
                if p == self.end and not self.in_array:
                    break
                p = scan_leniently(p, self.end, self.room)
            if p == NULL:
                if values:
                    break
                raise ValueError(*place_of_fault(self.start, self.given_end))
            values.append(PyBytes_FromStringAndSize(<const char *>self.at, p - self.at))
            self.at, self.behind = skip_space(p), True
        return values

    cdef cursor begin(self) noexcept nogil:
        """Go to the beginning of the next value; NULL if it is not there."""
        if self.behind and self.in_array:
            if self.at[0] == c',':
                self.at = skip_space(self.at + 1)
                self.behind = False
                return self.at
            if self.at[0] != c']':
                return no(self.at, NO_END_OF_ARRAY)
            self.in_array = False
            self.at = skip_space(self.at + 1)
        self.behind = False
        while not self.in_array and self.at[0] == c'[':
            self.at = skip_space(self.at + 1)
            if self.at[0] == c']':
                self.at = skip_space(self.at + 1)
            else:
                self.in_array = True
        return self.at


cdef inline cursor skip_spaces(cursor p) noexcept nogil:
    """As skip_space, but quick where there are very many."""
    return p if likely(p[0] > c' ') else skip_long_space(p)


cdef cursor skip_long_space(cursor p) noexcept nogil:
    cdef cursor near = p + NEAR
    while p < near and is_space(p[0]):
        p += 1
    return p + strspn(<const char *>p, b" \n\r\t") if p == near else p  # several bytes at once, on most machines


cdef struct Note:              # of an object in a list, as offsets into the body
    Py_ssize_t common          # of what its records have in common; 0: of nothing
    Py_ssize_t records         # of the list of its records; 0: of none; OF_OTHERS: other objects have them


@cython.final
cdef class JsonRecords:
    """The records of a body that is an object with a list of objects, which have lists of objects too, down to the records'.

    ``names``: that of the first list; then, of the objects in each list, that of an object which says what their records
    have in common, and that of their own list. ``nulls``: null may stand for a list or an object that is not there.
    ``room``: as JsonValues.

    Members come in any order, and of those with one name the last counts. So all of the body is checked before the first
    record is taken; on the way it is noted where records are, and what they have in common. Objects that have neither leave
    no note: all notes together take little more memory than the body. Both take as many steps as the caller likes.
    """

    cdef bytes body
    cdef cursor start, at, end
    cdef int room
    cdef bint nulls, checked
    cdef tuple names, wrong    # wrong: the first value that is not what it should be, if there is one
    cdef const char *name[MAX_PATH]
    cdef Py_ssize_t[MAX_PATH] length
    cdef uint64_t objects, outer  # the containers around `at`, as in scan_value
    cdef int depth
    cdef cursor key            # of the value there, if it is a member
    cdef int known             # how many of them, from outside, the names lead through: an object, its list, an item of it, ...
    cdef int max_known         # around a record
    cdef Note *notes
    cdef Py_ssize_t count, size
    cdef Py_ssize_t[MAX_LISTS] own  # the numbers of the notes of open objects; -1: the outermost has no note
    cdef Py_ssize_t next       # note
    cdef cursor record         # that is taken next; NULL: the first one of the next note
    cdef tuple above, common

    def __cinit__(self, bytes body not None, int room, tuple names not None, bint nulls):
        cdef int i
        if len(names) % 2 == 0 or len(names) > MAX_PATH:
            raise ValueError("there are names of lists, and between them of what records have in common")
        self.body, self.room, self.names, self.nulls = body, room, names, nulls
        self.max_known = len(names) + 1
        for i in range(len(names)):
            self.name[i], self.length[i] = PyBytes_AS_STRING(<bytes>names[i]), len(names[i])
        self.start = <cursor>PyBytes_AS_STRING(body)
        self.end = self.start + len(body)
        self.at = skip_spaces(self.start)
        self.own[0] = -1
        self.above = self.common = ()

    def __dealloc__(self):
        free(self.notes)

    @property
    def noted(self):
        """Bytes that the notes take."""
        return self.size * sizeof(Note)

    def check(self, Py_ssize_t limit):
        """Check the next bytes of the body, about as many; say whether it goes on.

        What is not JSON is a ValueError with ``(what, line, column, byte)``. If all of it is JSON, but something else is
        where a list or an object should be, that is a TypeError with the same, in the end.
        """
        global halves
        cdef cursor p = self.at
        cdef cursor until = p + min(limit, self.end - p)
        while not self.checked:
            if self.depth == self.known < self.max_known:
                self.meet(p)
            halves = True
            p = self.scan_on(p, until)
            halves = False
            if p != NULL and self.depth == 0:
                p = skip_spaces(p)
                self.checked = p == self.end
                if not self.checked:
                    p = no(p, NO_END_OF_BODY)
            if p == NULL:
                raise ValueError(*place_of_fault(self.start, self.end))
            while self.known > self.depth:
                self.leave()
            if p >= until:
                break
        self.at = p
        if self.checked and self.wrong is not None:
            raise TypeError(*self.wrong)
        return not self.checked

    cdef cursor scan_on(self, cursor p, cursor until) noexcept nogil:
        """As scan_value, but with pauses: at the first byte of a value that is not before ``until``, or is to be noted.

        It is a loop of its own because packets, which scan_value checks, would pay 4 % for the pauses.
        """
        cdef uint64_t objects = self.objects
        cdef uint64_t outer = self.outer
        cdef int depth = self.depth
        cdef int watched = min(self.known, self.max_known - 1)
        cdef unsigned char c
        cdef bint opened
        while True:
            c = p[0]
            opened = c == c'{' or c == c'['
            if opened:
                if depth == self.room:
                    return no(p, TOO_DEEP)
                p = skip_spaces(p + 1)
                opened = p[0] != c + 2
                if opened:
                    if unlikely(depth == WORD):
                        outer = objects
                    depth += 1
                    objects = objects << 1 | (c == c'{')
                else:
                    p += 1
            else:
                p = scan_string(p + 1, self.end) if c == c'"' else scan_word_or_number(p, self.end)
                if p == NULL:
                    return NULL
            while not opened and depth:
                p = skip_spaces(p)
                if p[0] == c',':
                    p = skip_spaces(p + 1)
                    break
                if p[0] != (c'}' if objects & 1 else c']'):
                    return no(p, NO_END_OF_OBJECT if objects & 1 else NO_END_OF_ARRAY)
                p += 1
                depth -= 1
                objects >>= 1
                if unlikely(depth == WORD):
                    objects = outer
            if objects & 1:
                self.key = p
                p = scan_string(p + 1, self.end) if p[0] == c'"' else no(p, NO_NAME)
                if p != NULL:
                    p = skip_spaces(p)
                    p = skip_spaces(p + 1) if p[0] == c':' else no(p, NO_COLON)
                if p == NULL:
                    return NULL
            if depth <= watched or p >= until:
                self.objects, self.outer, self.depth = objects, outer, depth
                return p

    cdef int meet(self, cursor p) except -1:
        """Note what the value at ``p`` is, which begins in the innermost container that the names lead to."""
        cdef int list_name = self.known - 1
        cdef Note *note
        if self.known % 2 == 0:
            if self.is_one(p, c'{', False, self.known - 2, "an item of {} is no object"):
                self.known += 1
                if self.known > 1:
                    self.add_note()
            return 0
        note = &self.notes[self.own[self.known // 2]] if self.known > 1 else NULL
        if self.is_named(list_name):
            self.count = self.own[self.known // 2] + 1  # without those of an earlier list
            if list_name == len(self.names) - 1:
                note.records = 0
            if self.is_one(p, c'[', self.nulls, list_name, "{} is no array"):
                self.known += 1
                if self.known == self.max_known:
                    note.records = p - self.start
        elif note != NULL and self.is_named(list_name - 1):
            note.common = p - self.start if self.is_one(p, c'{', self.nulls, list_name - 1, "{} is no object") else 0
        return 0

    cdef bint is_one(self, cursor p, unsigned char bracket, bint null, int name, str otherwise) except -1:
        """Whether a container of this kind that is not empty begins at ``p``; anything else is wrong, unless it may be null."""
        if p[0] == bracket:
            return skip_spaces(p + 1)[0] != bracket + 2
        if self.wrong is None and not (null and p[0] == c'n'):
            what = otherwise.format(self.names[name].decode()) if name >= 0 else "it is no object"
            self.wrong = what, *place_of(self.start, p)
        return False

    cdef bint is_named(self, int name) noexcept nogil:
        """Whether the member at hand has this name, which may be written with escapes."""
        cdef cursor p = self.key + 1
        cdef Py_ssize_t i
        cdef uint32_t c
        for i in range(self.length[name]):
            c = p[0]
            if c != c'\\':
                p += 1
            elif p[1] == c'u':
                c = four_hex(p + 2)
                p += 6
            else:
                c = plain_escape(p[1])
                p += 2
            if c != <unsigned char>self.name[name][i]:
                return False
        return p[0] == c'"'

    cdef int add_note(self) except -1:
        """Note an object that begins."""
        cdef Py_ssize_t size = self.size + self.size // 2 + 64
        cdef Note *notes = self.notes
        if self.count == self.size:
            notes = <Note *>realloc(notes, size * sizeof(Note))
            if notes == NULL:
                raise MemoryError
            self.notes, self.size = notes, size
        notes[self.count].common, notes[self.count].records = 0, 0 if self.known == self.max_known - 1 else OF_OTHERS
        self.own[self.known // 2] = self.count
        self.count += 1
        return 0

    cdef void leave(self) noexcept nogil:
        """The innermost container that the names lead to is closed."""
        cdef Note *last = &self.notes[self.count - 1]
        if self.known % 2 and self.known > 1 and self.own[self.known // 2] == self.count - 1:
            self.count -= last.common == 0 and last.records <= 0
        self.known -= 1

    def take(self, int limit):
        """Return what the next records have in common, a text for each of the objects they are in, and ``limit`` of them.

        A text is empty where nothing is said. It is the same tuple for records in the same objects; there may be none. None:
        it was all. Only when ``check`` has come to the end.
        """
        cdef list records = []
        cdef Note *note
        cdef cursor until, after, p = self.record
        if not self.checked or self.wrong is not None:
            raise ValueError("the body is not checked, or wrong")
        while p == NULL:
            if self.next == self.count:
                return None
            note = &self.notes[self.next]
            self.next += 1
            common = self.text_at(note.common)
            if note.records == OF_OTHERS:
                self.above, self.common = (common,), (common, b"")
            else:
                self.common = (*self.above, common)
                if note.records:
                    p = skip_spaces(self.start + note.records + 1)
            if p == NULL and common:
                return self.common, records
        until = p + PIECE_BYTES
        while p < until and len(records) < limit:
            after = scan_leniently(p, self.end, self.room)
            records.append(PyBytes_FromStringAndSize(<const char *>p, after - p))
            p = skip_spaces(after)
            if p[0] != c',':
                p = NULL
                break
            p = skip_spaces(p + 1)
        self.record = p
        return self.common, records

    cdef bytes text_at(self, Py_ssize_t offset):
        cdef cursor p = self.start + offset
        return PyBytes_FromStringAndSize(<const char *>p, scan_leniently(p, self.end, self.room) - p) if offset else b""


cdef cursor scan_leniently(cursor p, cursor end, int room) noexcept nogil:
    """As scan_value, but with halves of surrogate pairs."""
    global halves
    cdef cursor after = scan_value(p, end, room)
    if unlikely(after == NULL and stopped.why == HALF_A_PAIR):
        halves = True
        after = scan_value(p, end, room)
        halves = False
    return after


def json_fault(bytes text not None, int room):
    """Return what keeps a text from being one JSON value, ``(what, line, column, byte)``; None if nothing does.

    As JsonValues it lets half a surrogate pair pass.
    """
    cdef cursor start = <cursor>PyBytes_AS_STRING(text)
    cdef cursor end = start + PyBytes_GET_SIZE(text)
    cdef cursor p = scan_leniently(skip_spaces(start), end, room)
    if p != NULL:
        p = skip_spaces(p)
        if p == end:
            return None
        no(p, NO_END_OF_BODY)
    return place_of_fault(start, end)


def count_commas(bytes text not None):
    """How many commas there are; the values of a JSON text are not many more."""
    cdef cursor start = <cursor>PyBytes_AS_STRING(text)
    return count_of(start, start + PyBytes_GET_SIZE(text), 0xFF, c',')


cdef tuple place_of_fault(cursor start, cursor end):
    """Return ``(what, line, column, byte)`` of what the scanner has stopped at."""
    return stopped.why.decode("ascii"), *place_of(start, min(stopped.at, end))
