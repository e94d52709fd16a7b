"""libFuzzer inside Python: it makes inputs, watches the compiled core's branches, and calls a target for each input.

What a target compares is Python (``targets.py``). What must see the very bytes, with nothing behind them, is here: an
input, and each piece of it, lies in memory of its own size, so that AddressSanitizer tells of every byte that is read
beyond it. Behind a ``bytes`` object there is always a zero.
"""

from libc.stddef cimport size_t
from libc.stdlib cimport abort

import sys
import traceback

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    extern int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*one)(const uint8_t *data, size_t size));
    """
    int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*one)(const uint8_t *data, size_t size) noexcept) except? -1

cdef int64_t LINE_LIMIT = 300  # of size lines and trailers: low, so that it is reached
cdef int64_t ROOM_LIMIT = 4096  # of a body

cdef object the_target = None


def fuzz(target, program, list arguments):
    """Have libFuzzer call ``target(Input)`` until its time is up; ``arguments`` are those of its command line.

    ``program`` is what it starts where it wants to run itself again. It ends the process itself where an input is found to be at fault, having kept it in a file.
    """
    global the_target
    cdef int argc = <int>len(arguments) + 1
    cdef char **argv = <char **>malloc((argc + 1) * sizeof(char *))
    if argv == NULL:
        raise MemoryError
    the_target = target
    words = [os.fsencode(word) for word in [program, *arguments]]
    for i, word in enumerate(words):
        argv[i] = PyBytes_AS_STRING(word)
    argv[argc] = NULL
    return LLVMFuzzerRunDriver(&argc, &argv, one_input)


cdef int one_input(const uint8_t *data, size_t size) noexcept:
    try:
        the_target(input_of(data, size))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        abort()  # which libFuzzer takes for a crash
    return 0


cdef Input input_of(const uint8_t *p, size_t n):
    cdef Input self = Input.__new__(Input)
    self.p, self.n = p, n
    self.data = PyBytes_FromStringAndSize(<const char *>p, n)
    return self


cdef uint8_t *copy_of(const uint8_t *p, Py_ssize_t n) except NULL:
    """Return the bytes in memory of just that size."""
    cdef uint8_t *copy = <uint8_t *>malloc(n if n else 1)
    if copy == NULL:
        raise MemoryError
    memcpy(copy, p, n)
    return copy


cdef class Input:
    """What libFuzzer came up with. ``data`` are the bytes; the methods look at the memory they came in."""

    cdef const uint8_t *p
    cdef Py_ssize_t n
    cdef readonly bytes data

    def scan(self, bint strict):
        """Return what ``scan_packet`` says: (messages, emitter hash), or None."""
        cdef PacketFacts facts
        if not scan_packet(self.p, self.n, strict, &facts):
            return None
        return facts.messages, facts.emitter_hash

    def check_request(self, int cut):
        """A request's head and chunks, read whole and in pieces; ``cut`` is where the head is in two."""
        cdef Py_ssize_t length = self.find_head(cut, True)
        cdef RequestHead head
        cdef Filled filled
        if length <= 0:
            return
        head = RequestHead(self.data[:length])
        wrong = self.beginning(cut, length, False)
        if wrong is not None:
            assert (head.status, head.fault) == (400, wrong), f"half of it is refused for {wrong}, the whole for {head.fault}"
        assert head.status in (0, 400, 501, 505)
        assert (head.status == 0) == (head.fault is None)
        if head.status == 0:
            assert head.target and head.wait >= -1
            assert head.matches(self.p, length, &filled) == length
            assert filled.content_length < 0 or not head.chunked
            self.holds(filled.key, length)
            self.holds(filled.credentials, length)
        self.check_chunks(length, False)

    def check_reply(self, int cut):
        """A reply's head and chunks, read whole and in pieces."""
        cdef Py_ssize_t length = self.find_head(cut, False)
        cdef ReplyHead head
        cdef Filled filled
        if length <= 0:
            return
        head = ReplyHead(self.data[:length])
        if self.beginning(cut, length, True) is not None:
            assert head.fault is not None
        if head.fault is None:
            assert 100 <= head.status <= 999
            assert head.matches(self.p, length, &filled) == length
        self.check_chunks(length, True)

    cdef holds(self, Span span, Py_ssize_t length):
        """Fail unless the text lies within the head."""
        if span.n:
            assert self.p <= span.p and span.p + span.n <= self.p + length

    cdef Py_ssize_t find_head(self, int cut, bint strict) except -2:
        """Return where the head ends; fail if that depends on how it arrives."""
        cdef Py_ssize_t scanned = 0, in_two = 0
        cdef Py_ssize_t whole = find_head_end(self.p, self.n, &scanned, strict)
        cdef uint8_t *piece = copy_of(self.p, cut)
        scanned = 0
        if cut:
            in_two = find_head_end(piece, cut, &scanned, strict)
        free(piece)
        if in_two == HEAD_UNFINISHED:
            in_two = find_head_end(self.p, self.n, &scanned, strict)
        assert HEAD_BROKEN <= whole <= self.n
        assert in_two == whole, f"head of {whole}, in two reads of {in_two}"
        return whole

    cdef str beginning(self, int cut, Py_ssize_t length, bint reply):
        """Return what is wrong with the head's first ``cut`` bytes, read in two pieces."""
        cdef UnfinishedHead head = UnfinishedHead(reply)
        cut = min(cut, <int>length - 1)
        wrong = head.feed(self.data[:cut // 2])
        return wrong if wrong is not None else head.feed(self.data[cut // 2:cut])

    cdef check_chunks(self, Py_ssize_t start, bint reply):
        """What follows the head, taken for chunks: byte by byte it must say the same as at once."""
        at_once = self.chunks(start, reply, self.n)
        assert self.chunks(start, reply, 1) == at_once
        assert self.chunks(start, reply, 7) == at_once

    cdef tuple chunks(self, Py_ssize_t start, bint reply, Py_ssize_t step):
        """Return how it ended, where (if at its end), and the body."""
        cdef ChunkedBody state = ChunkedBody(reply)
        cdef Span piece
        cdef uint8_t *copy
        cdef const uint8_t *at
        cdef Py_ssize_t n, position = start
        cdef int event = CHUNK_MORE
        body = []
        state.begin(ROOM_LIMIT, LINE_LIMIT)
        while position < self.n and event <= CHUNK_DATA:
            n = min(step, self.n - position)
            copy = copy_of(self.p + position, n)
            at = copy
            event = CHUNK_MORE
            while at < copy + n and event <= CHUNK_DATA:
                event = state.read(&at, copy + n, &piece)
                assert copy <= at <= copy + n
                if event == CHUNK_DATA:
                    assert piece.n > 0 and copy <= piece.p and piece.p + piece.n <= copy + n
                    body.append(PyBytes_FromStringAndSize(<const char *>piece.p, piece.n))
            position += at - copy
            free(copy)
        assert CHUNK_MORE <= event <= CHUNK_TOO_LARGE
        if event > CHUNK_END:
            return event, None, None
        return max(event, CHUNK_DATA), position, b"".join(body)
