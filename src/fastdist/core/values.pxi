"""JSON texts one after the other, cut into values without decoding them; date-times.

What agents send as JSON is decoded by a library, value by value, so that no step takes long and a fault has a number.
Where a value ends the scanner of schema.pxi knows, which also bounds its depth and sees to it that it is JSON.
"""

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(str text)

cdef enum:
    SECONDS_A_DAY = 86400
    ERA_DAYS = 146097         # of 400 years
    MAX_RFC3339 = 31          # characters of a date-time, at least
    PIECE_BYTES = 64 << 10    # of values that are cut at once

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

    def take(self, int most):
        """Return the next values, ``most`` at most, as they stand there; none: the body is over.

        If one is not JSON: those before it, and in the next call a ValueError with ``(what, line, column, byte)``. Half a
        surrogate pair is let pass.
        """
        cdef list values = []
        cdef cursor p
        cdef cursor until = self.at + PIECE_BYTES
        while self.at < until and len(values) < most:
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
    cdef cursor p = scan_leniently(skip_space(start), end, room)
    if p != NULL:
        p = skip_space(p)
        if p == end:
            return None
        no(p, NO_END_OF_BODY)
    return place_of_fault(start, end)


cdef tuple place_of_fault(cursor start, cursor end):
    """Return ``(what, line, column, byte)`` of what the scanner has stopped at."""
    return stopped.why.decode("ascii"), *place_of(start, min(stopped.at, end))
