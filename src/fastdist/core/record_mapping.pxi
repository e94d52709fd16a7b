"""Records that are JSON objects, written as messages without decoding them: members are copied as they stand.

The mapping itself is ``fastdist.protocols.records``; its names of members come from there. What is here does the same for
records of the usual kind, and leaves all others to it: a text that is no string, a time that has to be taken apart,
escapes where a value is looked at, halves of surrogate pairs. Tests compare the two.
"""

cdef enum:
    MAX_MEMBERS = 64
    MAX_NAMES = 40
    # Names are in groups, those of each in the order in which they are looked for.
    TEXT_NAMES = 0
    TIME_NAMES
    LEVEL_NAMES
    SOURCE_NAMES
    EMITTER_NAMES
    GROUPS

cdef struct Value:
    cursor p                  # NULL: there is no such member
    cursor end
    int member                # -1: it is nested in one

cdef struct Member:
    cursor key                # behind its quote
    cursor key_end
    cursor value
    cursor end
    bint taken                # it is not for the metadata


@cython.final
cdef class RecordMapper:
    """Writes records as messages.

    ``names``: five tuples of names, as bytes: of texts, times, levels, sources, emitters. ``levels``: by their names.
    ``received``: the time for records without one. ``source``: a JSON string for those without, or empty.
    ``fixed_emitter``: no record says who its emitter is.
    """

    cdef tuple names
    cdef dict levels
    cdef bytes received, source
    cdef bint fixed_emitter
    cdef const char *name[MAX_NAMES]
    cdef Py_ssize_t[MAX_NAMES] length
    cdef int[6] first          # of each group, and behind the last
    # the record at hand
    cdef Member[MAX_MEMBERS] members
    cdef int count
    cdef Value[MAX_NAMES] of_name
    cdef bint odd             # it is left to Python
    cdef Value text, source_here, emitter, level_here, time
    cdef const char *level
    cdef int64_t second
    cdef int nanosecond       # -1: the time is written as it stands
    # messages of one emitter
    cdef Buffer out
    cdef int run
    cdef Value run_emitter

    def __cinit__(self, tuple names not None, dict levels not None, bytes received not None, bytes source not None,
                  bint fixed_emitter):
        cdef int group, n = 0
        self.names, self.levels, self.received, self.source = names, levels, received, source
        self.fixed_emitter = fixed_emitter
        for group in range(GROUPS):
            self.first[group] = n
            for name in names[group]:
                if n == MAX_NAMES:
                    raise ValueError("too many names")
                self.name[n], self.length[n] = PyBytes_AS_STRING(<bytes>name), len(name)
                n += 1
        self.first[GROUPS] = n

    def __dealloc__(self):
        release(&self.out)

    def take(self, JsonValues values not None, int limit):
        """Map the next values, ``limit`` at most: a list of ``(emitter, messages, how many)``, in their order.

        The emitter is None if the records do not say; the messages have commas between them. A value that is left to the
        caller is there as its bytes. No values: the body is over. Raises as JsonValues.take.
        """
        cdef list found = []
        cdef cursor p, after
        cdef cursor until = values.at + PIECE_BYTES
        cdef int count = 0
        self.begin_run()
        while values.at < until and count < limit:
            p = values.begin()
            if p != NULL:
                if p == values.end and not values.in_array:
                    break
                after = self.read(p, values.end, values.room)
                if after != NULL:
                    if self.run and not same(&self.emitter, &self.run_emitter):
                        self.end_run(found)
                    self.write(b"")
                else:
                    p = after = scan_leniently(p, values.end, values.room)
                    if after != NULL:
                        self.end_run(found)
                        found.append(PyBytes_FromStringAndSize(<const char *>values.at, after - values.at))
            if p == NULL:
                if count:
                    break
                raise ValueError(*place_of_fault(values.start, values.given_end))
            values.at, values.behind = skip_space(after), True
            count += 1
        self.end_run(found)
        return found

    def one(self, bytes record not None, bytes metadata not None, int room):
        """Map a record: ``(emitter, message)``; None if it is left to the caller. ``metadata``: members to be added."""
        cdef cursor p = skip_space(<cursor>PyBytes_AS_STRING(record))
        cdef cursor end = <cursor>PyBytes_AS_STRING(record) + PyBytes_GET_SIZE(record)
        cdef cursor after = self.read(p, end, room)
        if after == NULL or skip_space(after) != end:
            return None
        self.begin_run()
        self.write(metadata)
        return text_of(&self.emitter), PyBytes_FromStringAndSize(<char *>self.out.data, self.out.end - 1)

    cdef int begin_run(self) except -1:
        self.out.start = self.out.end = 0
        self.run = 0
        return 0

    cdef int end_run(self, list found) except -1:
        if self.run:
            messages = PyBytes_FromStringAndSize(<char *>self.out.data, self.out.end - 1)
            found.append((text_of(&self.run_emitter), messages, self.run))
        return self.begin_run()

    # ---- reading

    cdef cursor read(self, cursor p, cursor end, int room) except? NULL:
        """Read a record and decide what becomes of its members; NULL if it is left to Python, or not JSON."""
        if p[0] != c'{':
            return NULL
        self.count, self.odd = 0, False
        p = self.read_members(p, end, room - 1)
        if p == NULL:
            return NULL
        self.look_up()
        self.find_text()
        self.find_time()
        self.find_level()
        self.source_here = self.first_text(SOURCE_NAMES, False)
        memset(&self.emitter, 0, sizeof(Value))
        if not self.fixed_emitter:
            self.emitter = self.first_text(EMITTER_NAMES, True)
            if self.emitter.end - self.emitter.p > MAX_EMITTER or has_escape(&self.emitter):
                return NULL
        return NULL if self.odd else p

    cdef cursor read_members(self, cursor p, cursor end, int room) noexcept nogil:
        cdef Member *member
        p = skip_space(p + 1)
        if p[0] == c'}':
            return p + 1
        while self.count < MAX_MEMBERS:
            member = &self.members[self.count]
            if p[0] != c'"':
                return NULL
            member.key = p + 1
            p = scan_string(p + 1, end)
            if p == NULL:
                return NULL
            member.key_end = p - 1
            if memchr(member.key, c'\\', p - member.key) != NULL:
                return NULL
            p = scan_colon(p)
            if p == NULL:
                return NULL
            member.value = p
            p = scan_value(p, end, room)
            if p == NULL:
                return NULL
            member.end, member.taken = p, False
            self.count += 1
            p = skip_space(p)
            if p[0] == c'}' and p != end:
                return p + 1
            if p[0] != c',':
                return NULL
            p = skip_space(p + 1)
        return NULL

    cdef void look_up(self) noexcept nogil:
        """Find the members with names that are looked for: as they are, else nested, if they have dots."""
        cdef int i, n
        cdef Value *value
        for n in range(self.first[GROUPS]):
            value = &self.of_name[n]
            value.p, value.end, value.member = NULL, NULL, -1
            for i in range(self.count):
                if is_named(&self.members[i], self.name[n], self.length[n]):
                    if value.p != NULL:
                        self.odd = True  # twice
                    value.p, value.end, value.member = self.members[i].value, self.members[i].end, i
            if value.p == NULL and memchr(self.name[n], c'.', self.length[n]) != NULL:
                self.look_inside(n)

    cdef void look_inside(self, int n) noexcept nogil:
        cdef const char *part = self.name[n]
        cdef const char *end = part + self.length[n]
        cdef const char *dot = <const char *>memchr(part, c'.', end - part)
        cdef Value value
        cdef int i
        memset(&value, 0, sizeof(Value))
        for i in range(self.count):
            if is_named(&self.members[i], part, dot - part):
                value.p, value.end = self.members[i].value, self.members[i].end
        while value.p != NULL and dot != NULL:
            part = dot + 1
            dot = <const char *>memchr(part, c'.', end - part)
            value = self.inner(&value, part, (end if dot == NULL else dot) - part)
        value.member = -1
        self.of_name[n] = value

    cdef Value inner(self, Value *outer, const char *name, Py_ssize_t length) noexcept nogil:
        """Return a member of a value that is an object, the last one of that name."""
        cdef Value found
        cdef Member member
        cdef cursor p = skip_space(outer.p + 1)
        memset(&found, 0, sizeof(Value))
        if outer.p[0] != c'{':
            return found
        while p[0] == c'"':
            member.key = p + 1
            p = scan_string(p + 1, outer.end)
            member.key_end = p - 1
            self.odd |= memchr(member.key, c'\\', p - member.key) != NULL
            member.value = p = scan_colon(p)
            p = scan_value(p, outer.end, MAX_DEPTH)
            if is_named(&member, name, length):
                found.p, found.end = member.value, p
            p = skip_space(p)
            if p[0] == c',':
                p = skip_space(p + 1)
        return found

    # ---- deciding

    cdef void find_text(self) noexcept nogil:
        cdef int n
        cdef Value *value
        for n in range(self.first[TEXT_NAMES], self.first[TIME_NAMES]):
            value = &self.of_name[n]
            if value.p == NULL or value.p[0] == c'n':
                continue
            if value.p[0] == c'"':
                self.text = value[0]
                self.members[value.member].taken = True
                return
            if value.p[0] != c'{' or memcmp(self.name[n], b"log", 4) != 0:
                break
        self.odd = True

    cdef void find_time(self) noexcept nogil:
        cdef int n
        cdef Value *value
        memset(&self.time, 0, sizeof(Value))
        for n in range(self.first[TIME_NAMES], self.first[LEVEL_NAMES]):
            value = &self.of_name[n]
            if value.p == NULL or value.p[0] == c'n':
                continue
            self.time = value[0]
            if value.p[0] == c'"':
                self.nanosecond = -1
                self.odd |= not is_date_time(value.p + 1, value.end - 1)
                self.members[value.member].taken = True
            else:
                self.odd |= not self.read_number(value)
            return

    cdef bint read_number(self, Value *value) noexcept nogil:
        """Read a time that is a number; return whether that is one of the usual ones."""
        cdef cursor p = value.p
        cdef int64_t number = 0
        cdef int64_t scale = 1
        cdef int fraction = 0, unit = 100000000
        while p < value.end and c'0' <= p[0] <= c'9':
            if p - value.p == 18:
                return value.end - p == 1 and self.read_nanoseconds(value)
            number = number * 10 + (p[0] - c'0')
            p += 1
        if p == value.p:
            return False
        if p == value.end:
            if number >= 100000000000000000LL:
                scale = 1000000000
            elif number >= 100000000000000LL:
                scale = 1000000
            elif number >= 100000000000LL:
                scale = 1000
            self.second, self.nanosecond = number // scale, <int>(number % scale * (1000000000 // scale))
            return self.second <= LAST_SECOND
        if p[0] != c'.' or number > 0xFFFFFFFFLL or value.end - p > 7:  # a double is exact to the microsecond so far
            return False
        p += 1
        while p < value.end:
            if not c'0' <= p[0] <= c'9':
                return False
            fraction += (p[0] - c'0') * unit
            unit //= 10
            p += 1
        self.second, self.nanosecond = number, fraction
        return True

    cdef bint read_nanoseconds(self, Value *value) noexcept nogil:
        """Read 19 digits."""
        cdef uint64_t number = 0
        cdef int i
        for i in range(19):
            if not c'0' <= value.p[i] <= c'9':
                return False
            number = number * 10 + (value.p[i] - c'0')
        self.second, self.nanosecond = number // 1000000000, <int>(number % 1000000000)
        return True

    cdef int find_level(self) except -1:
        cdef int n
        cdef Value *value
        cdef cursor p, end
        cdef PyObject *level
        self.level = b"info"
        for n in range(self.first[LEVEL_NAMES], self.first[SOURCE_NAMES]):
            value = &self.of_name[n]
            if value.p == NULL:
                continue
            p, end = value.p, value.end
            if p[0] == c'"':
                p, end = p + 1, end - 1
                self.odd |= has_escape(value)
            elif not c'0' <= p[0] <= c'9':
                self.odd |= p[0] == c'-'
                continue
            elif memchr(p, c'.', end - p) != NULL or memchr(p, c'e', end - p) != NULL or memchr(p, c'E', end - p) != NULL:
                self.odd = True
            level = find_level_name(p, end, self.levels)
            if level != NULL:
                self.level = PyBytes_AS_STRING(<bytes>level)
                if value.member >= 0 and value.p[0] == c'"' and is_word(p, end, self.level, PyBytes_GET_SIZE(<bytes>level)):
                    if end - p == PyBytes_GET_SIZE(<bytes>level):
                        self.members[value.member].taken = True
                return 0
        return 0

    cdef Value first_text(self, int group, bint objects) noexcept nogil:
        """Return the first text of a group that is not empty; ``objects``: or the name of an object."""
        cdef int n
        cdef Value value
        for n in range(self.first[group], self.first[group + 1]):
            value = self.of_name[n]
            if value.p != NULL and objects and value.p[0] == c'{':
                value = self.inner(&value, b"name", 4)
                value.member = -1
            if value.p != NULL and value.p[0] == c'"' and value.end - value.p > 2:
                if value.member >= 0:
                    self.members[value.member].taken = True
                return value
        memset(&value, 0, sizeof(Value))
        return value

    # ---- writing

    cdef int write(self, bytes metadata) except -1:
        """Write the message, and a comma."""
        cdef Buffer *out = &self.out
        cdef Member *member
        cdef int i
        cdef bint begun = False
        if not self.run:
            self.run_emitter = self.emitter
        self.run += 1
        room_for(out, 256)
        if self.time.p != NULL and self.nanosecond < 0:
            put(out, b'{"timestamp":')
            put_bytes(out, self.time.p, self.time.end - self.time.p)
            put(out, b',"level":"')
        else:
            put(out, b'{"timestamp":"')
            if self.time.p != NULL:
                put_time(out, self.second, self.nanosecond)
            else:
                put_bytes(out, PyBytes_AS_STRING(self.received), PyBytes_GET_SIZE(self.received))
            put(out, b'","level":"')
        put(out, self.level)
        put(out, b'","message":')
        put_bytes(out, self.text.p, self.text.end - self.text.p)
        if self.source_here.p != NULL:
            put(out, b',"source":')
            put_bytes(out, self.source_here.p, self.source_here.end - self.source_here.p)
        elif PyBytes_GET_SIZE(self.source):
            put(out, b',"source":')
            put_bytes(out, PyBytes_AS_STRING(self.source), PyBytes_GET_SIZE(self.source))
        for i in range(self.count):
            member = &self.members[i]
            if not member.taken:
                put(out, b',"' if begun else b',"metadata":{"')
                begun = True
                put_bytes(out, member.key, member.key_end - member.key)
                put_bytes(out, b'":', 2)
                put_bytes(out, member.value, member.end - member.value)
        if PyBytes_GET_SIZE(metadata):
            put(out, b',' if begun else b',"metadata":{')
            begun = True
            put_bytes(out, PyBytes_AS_STRING(metadata), PyBytes_GET_SIZE(metadata))
        return put_bytes(out, b"}},", 3) if begun else put_bytes(out, b"},", 2)


cdef inline bint is_named(Member *member, const char *name, Py_ssize_t length) noexcept nogil:
    return member.key_end - member.key == length and member.key[0] == name[0] and memcmp(member.key, name, length) == 0


cdef inline bint has_escape(Value *value) noexcept nogil:
    return value.p != NULL and memchr(value.p, c'\\', value.end - value.p) != NULL


cdef bint same(Value *one, Value *other) noexcept nogil:
    cdef Py_ssize_t length = one.end - one.p
    return length == other.end - other.p and (length == 0 or memcmp(one.p, other.p, length) == 0)


cdef object text_of(Value *value):
    """Return what a string without escapes says; None if there is no value."""
    if value.p == NULL:
        return None
    return PyUnicode_DecodeUTF8(<const char *>value.p + 1, value.end - value.p - 2, NULL)
