"""What all processes know of the analyzers: a row of words each in shared memory, with the changes several may make.

The words are named in ``fastdist.shared.AnalyzerWord``; those used here are repeated as constants, checked by a test.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from fastdist._core.bits cimport compare_and_swap, fetch_add, load, mono_ns, store, wall_ns

cdef enum:
    EPOCH = 3                # in the head of the block

    STATE = 0
    SINCE = 1
    ONLINE_SINCE = 2
    PAUSED_UNTIL = 3
    DELIVERY_FAILURES = 4
    CHECK_FAILURES = 5
    CHECK_SUCCESSES = 6
    LAST_CHECK = 7
    LAST_STATUS = 8
    WEIGHT = 9
    IN_USE = 10
    DRAINING = 11
    ERROR_AT = 12
    ERROR = 16
    WORDS = 64
    ERROR_BYTES = (WORDS - ERROR) * 8

    ONLINE = 0
    OFFLINE = 1


cdef class AnalyzerStates:
    """The rows in ``buffer``, and the epoch in ``head`` that tells workers to look at them again."""

    def __cinit__(self, buffer, head):
        self.buffer, self.head_buffer = memoryview(buffer), memoryview(head)
        self.rows = words_of(buffer)
        self.head = words_of(head)
        self.slots = self.buffer.nbytes // (8 * WORDS)

    cdef int64_t *row(self, Py_ssize_t slot) except NULL:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        return self.rows + slot * WORDS

    cdef int64_t *failures_of(self, Py_ssize_t slot) except NULL:
        return self.row(slot) + DELIVERY_FAILURES

    cdef int64_t *epoch_word(self) noexcept:
        return self.head + EPOCH

    @property
    def epoch(self):
        """Grows with every change that concerns picking."""
        return load(self.head + EPOCH)

    def touch(self):
        """Tell the workers that something that concerns picking has changed."""
        fetch_add(self.head + EPOCH, 1)

    def get(self, Py_ssize_t slot, int word):
        """Return a word of a row."""
        return load(self.row(slot) + word)

    def set(self, Py_ssize_t slot, int word, int64_t value):
        """Set a word of a row."""
        store(self.row(slot) + word, value)

    def weight(self, Py_ssize_t slot):
        """Return the weight in force."""
        cdef double value
        memcpy(&value, self.row(slot) + WEIGHT, 8)
        return value

    def set_weight(self, Py_ssize_t slot, double value):
        """Put a weight in force (``touch`` makes the workers see it)."""
        memcpy(self.row(slot) + WEIGHT, &value, 8)

    def is_online(self, Py_ssize_t slot):
        """Whether the analyzer answers, as far as is known."""
        return load(self.row(slot) + STATE) == ONLINE

    def is_pickable(self, Py_ssize_t slot):
        """Whether new packets may go there: configured, online, not draining."""
        cdef int64_t *row = self.row(slot)
        return load(row + IN_USE) == 1 and load(row + STATE) == ONLINE and load(row + DRAINING) == 0

    def go_offline(self, Py_ssize_t slot):
        """Turn online into offline; True for the one caller that did."""
        cdef int64_t *row = self.row(slot)
        if not compare_and_swap(row + STATE, ONLINE, OFFLINE):
            return False
        store(row + SINCE, wall_ns())
        store(row + CHECK_SUCCESSES, 0)
        self.touch()
        return True

    def go_online(self, Py_ssize_t slot):
        """Turn offline into online; True if it was offline."""
        cdef int64_t *row = self.row(slot)
        if load(row + STATE) != OFFLINE:
            return False
        store(row + DELIVERY_FAILURES, 0)
        store(row + CHECK_FAILURES, 0)
        store(row + PAUSED_UNTIL, 0)
        store(row + ONLINE_SINCE, mono_ns())
        if not compare_and_swap(row + STATE, OFFLINE, ONLINE):
            return False
        store(row + SINCE, wall_ns())
        self.touch()
        return True

    def delivery_failed(self, Py_ssize_t slot, str error):
        """Count a failed delivery and keep its reason; return how many have failed in a row, over all workers."""
        self.set_error(slot, error)
        return fetch_add(self.row(slot) + DELIVERY_FAILURES, 1) + 1

    def delivery_succeeded(self, Py_ssize_t slot):
        """End a row of failed deliveries."""
        store(self.row(slot) + DELIVERY_FAILURES, 0)

    def pause(self, Py_ssize_t slot, int64_t until_ns):
        """Send nothing there until ``until_ns`` (monotonic); never shortens a pause."""
        cdef int64_t *end = self.row(slot) + PAUSED_UNTIL
        cdef int64_t seen = load(end)
        while seen < until_ns:
            if compare_and_swap(end, seen, until_ns):
                self.touch()
                return
            seen = load(end)

    def error(self, Py_ssize_t slot):
        """Return the last error as text, empty if there was none."""
        cdef char *text = <char *>(self.row(slot) + ERROR)
        return text[:ERROR_BYTES].split(b"\0")[0].decode("utf-8", "replace")

    def set_error(self, Py_ssize_t slot, str error):
        """Keep an error's text (cut to what fits)."""
        cdef int64_t *row = self.row(slot)
        cdef bytes text = error.encode("utf-8", "replace")[:ERROR_BYTES - 1]
        memset(row + ERROR, 0, ERROR_BYTES)
        memcpy(row + ERROR, <char *>text, len(text))
        store(row + ERROR_AT, wall_ns())

    def clear(self, Py_ssize_t slot):
        """Make the row that of a new analyzer: online until proven otherwise."""
        memset(self.row(slot), 0, 8 * WORDS)
        store(self.row(slot) + SINCE, wall_ns())


cdef int64_t *words_of(buffer) except NULL:
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    cdef int64_t *words = <int64_t *>view.buf
    PyBuffer_Release(&view)  # the memoryview the caller keeps holds the memory
    return words
