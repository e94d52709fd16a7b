# The words of one worker's row in the shared block, and the histogram both sides agree on.
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    # Of a worker: one word each.
    ACCEPTED = 0
    MESSAGES_ACCEPTED
    BYTES_ACCEPTED
    MALFORMED
    INVALID
    TOO_LARGE
    HEAD_TOO_LARGE
    UNSUPPORTED
    UNAUTHORIZED
    RATE_LIMITED
    QUEUE_FULL
    DRAINING
    STORAGE
    TIMED_OUT
    RETRIED
    SPILLED
    REFUSED
    EXHAUSTED
    OVERSIZED
    SHUTDOWN
    RECOVERED
    CORRUPT
    UNDONE
    IN_FLIGHT
    QUEUE_BYTES
    QUEUE_CAPACITY
    OLDEST_NS
    SEQUENCE_BASE
    ADOPTED
    ADOPTING
    WITHDRAWN
    SETTLING
    EMITTERS
    COUNTERS = 40  # how many words a worker's counters take

cdef enum:
    # Of an analyzer, as one worker sees it.
    DELIVERED = 0
    MESSAGES_DELIVERED
    BYTES_DELIVERED
    FAILED
    RETRIES
    REQUESTS_IN_FLIGHT
    PACKETS_IN_FLIGHT
    CONNECTIONS
    ANALYZER_COUNTERS = 8

cdef enum:
    # A histogram: 8 buckets an octave from 256 ns on, then the count, the sum and the largest value (in nanoseconds).
    BUCKETS = 240
    HISTOGRAM_COUNT = 240
    HISTOGRAM_SUM
    HISTOGRAM_MAX
    HISTOGRAM_WORDS = 248
    ROW_HISTOGRAMS = 3       # of a worker as a whole, before those of analyzers

cdef void observe(int64_t *histogram, int64_t ns, int64_t times) noexcept nogil

cdef class Counters:
    cdef object buffer
    cdef int64_t *words             # of the worker
    cdef int64_t *ingest            # histogram: request read to answer ready
    cdef int64_t *queue_wait        # histogram: accepted to first sending
    cdef int64_t *loop_lag          # histogram: how long the event loop kept others waiting
    cdef int64_t *analyzers         # ANALYZER_COUNTERS words a slot
    cdef int64_t *delivery          # a histogram a slot
    cdef readonly Py_ssize_t slots
    cdef inline int64_t *of(self, Py_ssize_t slot) noexcept nogil:
        return self.analyzers + slot * ANALYZER_COUNTERS
    cdef inline int64_t *delivery_of(self, Py_ssize_t slot) noexcept nogil:
        return self.delivery + slot * HISTOGRAM_WORDS
    cdef Py_ssize_t checked(self, Py_ssize_t slot) except -1
