"""libFuzzer inside Python: it makes inputs, watches the compiled core's branches, and calls a target for each input.

What a target compares is Python (``targets.py``). What must see the very bytes, with nothing behind them, is here: an
input, and each piece of it, lies in memory of its own size, so that AddressSanitizer tells of every byte that is read
beyond it. Behind a ``bytes`` object there is always a zero.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memcpy

from fastdist._core cimport (
    CHUNK_BROKEN, CHUNK_DATA, CHUNK_END, CHUNK_MORE, CHUNK_TRAILERS_TOO_LONG, HEAD_BROKEN, HEAD_INCOMPLETE, Chunked,
    ReplyHead, RequestHead, Span, chunked_next, chunked_next_strict, chunked_start, find_head_end, parse_reply_head,
    parse_request_head,
)
from fastdist._core cimport PacketFacts, scan_packet

import os
import sys
import traceback

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    extern int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*one)(const uint8_t *data, size_t size));
    """
    int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*one)(const uint8_t *data, size_t size) noexcept) except? -1

cdef int64_t LINE_LIMIT = 300  # of chunk extensions and trailers: low, so that it is reached

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
        if length <= 0:
            return
        parse_request_head(self.p, length, &head)
        if self.head_in_two(cut, True) == HEAD_BROKEN:
            assert head.status == 400, "broken when half of it was there, but not when it was whole"
        assert head.status in (0, 400, 501, 505)
        if head.status:
            assert head.fault != NULL
        else:
            assert head.content_length < 0 or not head.chunked
            assert head.wait >= -1
            assert head.method_text.n > 0 and head.target.n > 0 and head.path.n <= head.target.n
            self.holds(head.method_text, length)
            self.holds(head.content_type, length)
            self.holds(head.key, length)
            self.holds(head.authorization, length)
            self.holds(head.origin, length)
        self.check_chunks(length, True)

    def check_reply(self, int cut):
        """A reply's head and chunks, read whole and in pieces."""
        cdef Py_ssize_t length = self.find_head(cut, False)
        cdef ReplyHead head
        if length <= 0:
            return
        if parse_reply_head(self.p, length, &head):
            assert 100 <= head.status <= 999
            assert head.content_length >= -1 and head.retry_after >= -1
            if head.chunked:
                assert head.content_length == -1
            if head.dated:
                self.holds(head.retry_date, length)
        self.check_chunks(length, False)

    cdef holds(self, Span span, Py_ssize_t length):
        """Fail unless the text lies within the head."""
        if span.n:
            assert self.p <= span.p and span.p + span.n <= self.p + length

    cdef Py_ssize_t find_head(self, int cut, bint strict) except -2:
        """Return where the head ends; fail if that depends on how it arrives."""
        cdef Py_ssize_t scanned = 0
        cdef Py_ssize_t whole = find_head_end(self.p, self.n, &scanned, strict)
        cdef Py_ssize_t in_two = self.head_in_two(cut, strict)
        assert HEAD_BROKEN <= whole <= self.n
        assert strict or whole != HEAD_BROKEN
        if in_two != HEAD_BROKEN or whole <= 0:
            assert in_two == whole, f"head of {whole}, in two reads of {in_two}"
        return whole

    cdef Py_ssize_t head_in_two(self, int cut, bint strict) except -2:
        cdef Py_ssize_t scanned = 0, length = HEAD_INCOMPLETE
        cdef uint8_t *piece = copy_of(self.p, cut)
        if cut:
            length = find_head_end(piece, cut, &scanned, strict)
        free(piece)
        return find_head_end(self.p, self.n, &scanned, strict) if length == HEAD_INCOMPLETE else length

    cdef check_chunks(self, Py_ssize_t start, bint strict):
        """What follows the head, taken for chunks: byte by byte it must say the same as at once."""
        at_once = self.chunks(start, strict, self.n)
        assert self.chunks(start, strict, 1) == at_once
        assert self.chunks(start, strict, 7) == at_once

    cdef tuple chunks(self, Py_ssize_t start, bint strict, Py_ssize_t step):
        """Return how it ended, where, and the body."""
        cdef Chunked state
        cdef Span piece
        cdef uint8_t *copy
        cdef const uint8_t *at
        cdef Py_ssize_t n, position = start
        cdef int event = CHUNK_MORE
        body = []
        chunked_start(&state)
        while position < self.n and event in (CHUNK_MORE, CHUNK_DATA):
            n = min(step, self.n - position)
            copy = copy_of(self.p + position, n)
            at = copy
            event = CHUNK_MORE
            while at < copy + n and event in (CHUNK_MORE, CHUNK_DATA):
                if strict:
                    event = chunked_next_strict(&state, &at, copy + n, &piece, LINE_LIMIT)
                else:
                    event = chunked_next(&state, &at, copy + n, &piece, LINE_LIMIT)
                assert copy <= at <= copy + n
                if event == CHUNK_DATA:
                    assert piece.n > 0 and copy <= piece.p and piece.p + piece.n <= copy + n
                    body.append(PyBytes_FromStringAndSize(<const char *>piece.p, piece.n))
            position += at - copy
            free(copy)
        assert event in (CHUNK_MORE, CHUNK_DATA, CHUNK_END, CHUNK_BROKEN, CHUNK_TRAILERS_TOO_LONG)
        return (CHUNK_MORE if event == CHUNK_DATA else event), position, b"".join(body)
