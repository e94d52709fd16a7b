"""What all processes know of the analyzers: a row of words each in shared memory, with the changes several may make.

The words are named in ``fastdist.shm.block.AnalyzerWord``; those used here are repeated as constants, checked by a test.
"""


cdef enum:
    EPOCH = 3                # in the head of the block

    STATE = 0
    SINCE = 1
    ONLINE_SINCE = 2
    PAUSED_UNTIL = 3
    DELIVERY_FAILURES = 4
    REFUSALS = 5             # behind it: what a delivery ends lies side by side
    CHECK_FAILURES = 6
    CHECK_SUCCESSES = 7
    WEIGHT = 10
    IN_USE = 11
    SLOT_DRAINING = 12
    ERROR_AT = 13
    PROBATION_WAIT = 15
    NEXT_TRIAL = 16
    TRIAL_UNTIL = 17
    ERROR = 24
    ROW_WORDS = 64
    ERROR_BYTES = (ROW_WORDS - ERROR) * 8

    ONLINE = 0
    OFFLINE = 1

cdef int64_t FIRST_PROBATION = 1000000000       # after the first trial that fails; it doubles with each
cdef int64_t MAX_PROBATION = 30000000000


@cython.final
cdef class AnalyzerStates:
    """The rows in ``buffer``, and the epoch in ``head`` that tells workers to look at them again."""

    cdef object buffer, head_buffer
    cdef int64_t *rows
    cdef int64_t *head
    cdef readonly Py_ssize_t slots

    def __cinit__(self, buffer, head):
        self.buffer, self.head_buffer = memoryview(buffer), memoryview(head)
        self.rows = words_of(buffer)
        self.head = words_of(head)
        self.slots = self.buffer.nbytes // (8 * ROW_WORDS)

    cdef int64_t *row(self, Py_ssize_t slot) except NULL:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        return self.rows + slot * ROW_WORDS

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
        return load(row + IN_USE) == 1 and load(row + STATE) == ONLINE and load(row + SLOT_DRAINING) == 0

    def go_offline(self, Py_ssize_t slot, bint by_deliveries=False):
        """Turn online into offline; True for the one caller that did. ``by_deliveries``: it comes back on probation."""
        cdef int64_t *row = self.row(slot)
        if load(row + STATE) != ONLINE:
            return False
        if by_deliveries:
            store(row + TRIAL_UNTIL, 0)
            store(row + NEXT_TRIAL, 0)
            store(row + PROBATION_WAIT, FIRST_PROBATION)  # first: no check may bring it back in between
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
        store(row + PROBATION_WAIT, 0)
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

    def delivery_refused(self, Py_ssize_t slot):
        """Count a packet that was refused; return how many have been in a row without a 2xx, over all workers."""
        return fetch_add(self.row(slot) + REFUSALS, 1) + 1

    def refusals(self, Py_ssize_t slot):
        """Return how many packets it has refused in a row without a 2xx, over all workers."""
        return load(self.row(slot) + REFUSALS)

    # ---- probation: one that deliveries took offline is tried with one packet at a time, over all workers

    def needs_trial(self, Py_ssize_t slot):
        """Whether it is offline until it takes a packet: good checks alone do not bring it back."""
        cdef int64_t *row = self.row(slot)
        return load(row + STATE) == OFFLINE and load(row + PROBATION_WAIT) > 0

    def is_on_probation(self, Py_ssize_t slot, int64_t rise):
        """Whether it has passed ``rise`` checks in a row since deliveries took it offline, and has to take a packet."""
        return self.needs_trial(slot) and load(self.row(slot) + CHECK_SUCCESSES) >= rise

    def has_failed_trials(self, Py_ssize_t slot):
        """Whether a trial has failed since deliveries took it offline."""
        return load(self.row(slot) + PROBATION_WAIT) > FIRST_PROBATION

    def may_try(self, Py_ssize_t slot, int64_t rise, int64_t now_ns):
        """Whether a trial is due and not begun."""
        cdef int64_t *row = self.row(slot)
        return (self.is_on_probation(slot, rise) and load(row + IN_USE) == 1 and load(row + SLOT_DRAINING) == 0
                and load(row + NEXT_TRIAL) <= now_ns and load(row + TRIAL_UNTIL) <= now_ns)

    def begin_trial(self, Py_ssize_t slot, int64_t rise, int64_t now_ns, int64_t until_ns):
        """Take the one trial there may be, until ``until_ns`` (monotonic) unless it is held on; True if this process got it.

        It has an end so that the trial of a worker that was killed, or hangs, is not waited for.
        """
        cdef int64_t *until = self.row(slot) + TRIAL_UNTIL
        cdef int64_t seen = load(until)
        return self.may_try(slot, rise, now_ns) and seen <= now_ns and compare_and_swap(until, seen, until_ns)

    def hold_trial(self, Py_ssize_t slot, int64_t until_ns):
        """Go on with a trial."""
        store(self.row(slot) + TRIAL_UNTIL, until_ns)

    def end_trial(self, Py_ssize_t slot):
        """End a trial that has shown nothing: another may begin."""
        store(self.row(slot) + TRIAL_UNTIL, 0)

    def postpone_trial(self, Py_ssize_t slot, int64_t now_ns):
        """End a trial; the next one has to wait as if it had failed."""
        cdef int64_t *row = self.row(slot)
        store(row + NEXT_TRIAL, now_ns + load(row + PROBATION_WAIT))
        store(row + TRIAL_UNTIL, 0)

    def fail_trial(self, Py_ssize_t slot, int64_t now_ns):
        """End a trial that has failed; the wait for the next one doubles each time."""
        cdef int64_t *row = self.row(slot)
        cdef int64_t wait = load(row + PROBATION_WAIT)
        self.postpone_trial(slot, now_ns)
        if wait == FIRST_PROBATION:
            store(row + SINCE, wall_ns())  # until now it may have been all right again
        if wait:
            store(row + PROBATION_WAIT, min(2 * wait, MAX_PROBATION))

    def pass_trial(self, Py_ssize_t slot, int64_t rise):
        """End its probation: it took the packet. Online, unless its checks have failed meanwhile: then they decide."""
        cdef int64_t *row = self.row(slot)
        store(row + TRIAL_UNTIL, 0)
        store(row + PROBATION_WAIT, 0)
        if load(row + CHECK_SUCCESSES) >= rise:
            self.go_online(slot)

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
        memset(self.row(slot), 0, 8 * ROW_WORDS)
        store(self.row(slot) + SINCE, wall_ns())


cdef int64_t *words_of(buffer) except NULL:
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    cdef int64_t *words = <int64_t *>view.buf
    PyBuffer_Release(&view)  # the memoryview the caller keeps holds the memory
    return words
