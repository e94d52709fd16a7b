"""Counters and histograms of one worker: plain words in shared memory with one writer, so that counting is an addition.

Any process may read them at any time; a reader sees each word whole, and sums over workers that may be a packet apart.
"""

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
    QUEUE_BYTES
    QUEUE_CAPACITY
    OLDEST_NS
    SEQUENCE_BASE
    MIGRATED
    MIGRATING
    WITHDRAWN
    SETTLING
    EMITTERS
    OLD_BYTES
    LOST_PACKETS
    DISCARDED
    # With the queue in a stream.
    UNCONFIRMED
    DUPLICATES
    STREAM_PACKETS
    STREAM_MESSAGES
    REDELIVERED
    RECONNECTS
    NO_RESPONDER
    REPUBLISHED
    REFUSED_ONCE
    REQUESTS = 48  # from here on: of agents' protocols, which are known by their numbers
    MAX_PROTOCOLS = 8
    PROTOCOL_WORDS = 20  # of each: records, then responses by status
    COUNTERS = 208  # how many words a worker's counters take

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
    # A histogram: 8 buckets an octave from 256 ns on, then the count, the sum (a double) and the largest, in ns.
    BUCKETS = 240
    HISTOGRAM_COUNT = 240
    HISTOGRAM_SUM
    HISTOGRAM_MAX
    HISTOGRAM_WORDS = 248
    ROW_HISTOGRAMS = 4       # of a worker as a whole, before those of analyzers

FIELDS = {
    "accepted": ACCEPTED,
    "messages_accepted": MESSAGES_ACCEPTED,
    "bytes_accepted": BYTES_ACCEPTED,
    "malformed": MALFORMED,
    "invalid": INVALID,
    "too_large": TOO_LARGE,
    "head_too_large": HEAD_TOO_LARGE,
    "unsupported_media_type": UNSUPPORTED,
    "unauthorized": UNAUTHORIZED,
    "rate_limited": RATE_LIMITED,
    "queue_full": QUEUE_FULL,
    "draining": DRAINING,
    "storage": STORAGE,
    "timeout": TIMED_OUT,
    "retried": RETRIED,
    "spilled": SPILLED,
    "refused": REFUSED,
    "exhausted": EXHAUSTED,
    "oversized": OVERSIZED,
    "shutdown": SHUTDOWN,
    "recovered": RECOVERED,
    "corrupt": CORRUPT,
    "undone": UNDONE,
    "queue_bytes": QUEUE_BYTES,
    "queue_capacity": QUEUE_CAPACITY,
    "oldest_ns": OLDEST_NS,
    "sequence_base": SEQUENCE_BASE,
    "migrated": MIGRATED,
    "migrating": MIGRATING,
    "withdrawn": WITHDRAWN,
    "settling": SETTLING,
    "emitters": EMITTERS,
    "old_bytes": OLD_BYTES,
    "lost": LOST_PACKETS,
    "unconfirmed": UNCONFIRMED,
    "duplicates": DUPLICATES,
    "stream_packets": STREAM_PACKETS,
    "stream_messages": STREAM_MESSAGES,
    "redelivered": REDELIVERED,
    "reconnects": RECONNECTS,
    "publish_no_responder": NO_RESPONDER,
    "publish_unconfirmed": REPUBLISHED,
    "publish_refused": REFUSED_ONCE,
    "discarded": DISCARDED,
}
# Of responses to agents, in the order of their words. There are no others.
STATUSES_COUNTED = (200, 201, 202, 204, 400, 401, 403, 404, 405, 408, 413, 415, 417, 429, 431, 500, 502, 503)
ANALYZER_FIELDS = {
    "delivered": DELIVERED,
    "messages_delivered": MESSAGES_DELIVERED,
    "bytes_delivered": BYTES_DELIVERED,
    "failed": FAILED,
    "retries": RETRIES,
    "requests_in_flight": REQUESTS_IN_FLIGHT,
    "packets_in_flight": PACKETS_IN_FLIGHT,
    "connections": CONNECTIONS,
}
COUNTER_WORDS = COUNTERS
FIRST_PROTOCOL_WORD = REQUESTS
WORDS_PER_PROTOCOL = PROTOCOL_WORDS
ANALYZER_WORDS = ANALYZER_COUNTERS
HISTOGRAM_BUCKETS = BUCKETS
WORDS_PER_HISTOGRAM = HISTOGRAM_WORDS
HISTOGRAMS_PER_ROW = ROW_HISTOGRAMS

cdef extern from *:
    int __builtin_clzll(unsigned long long x) nogil


cdef void observe(int64_t *histogram, int64_t ns, int64_t times) noexcept nogil:
    """Count ``times`` values of ``ns`` nanoseconds."""
    cdef uint64_t units
    cdef int octave, bucket
    if ns < 0:
        ns = 0  # of a packet of an earlier run, since which the clock was set back
    units = <uint64_t>ns >> 8
    if units < 8:
        bucket = <int>units
    else:
        octave = 63 - __builtin_clzll(units)
        bucket = (octave - 2) * 8 + <int>((units >> (octave - 3)) & 7)
        if bucket >= BUCKETS:
            bucket = BUCKETS - 1
    histogram[bucket] += times
    histogram[HISTOGRAM_COUNT] += times
    (<double *>histogram)[HISTOGRAM_SUM] += <double>ns * times  # a day of a full queue is more than an integer holds
    if ns > histogram[HISTOGRAM_MAX]:
        histogram[HISTOGRAM_MAX] = ns


def bucket_bounds():
    """Return the exclusive upper bounds of the buckets, in nanoseconds."""
    cdef int bucket
    bounds = []
    for bucket in range(BUCKETS):
        if bucket < 8:
            bounds.append((<int64_t>bucket + 1) << 8)
        else:
            bounds.append((<int64_t>8 + bucket % 8 + 1) << (bucket // 8 - 1 + 8))
    return bounds


def add_histograms(histograms):
    """Return the sum of histograms, each given as its words: the buckets, the sum and the longest.

    Compiled, for a thousand analyzers on eight workers are two million words.
    """
    cdef int64_t[BUCKETS] total
    cdef int64_t longest = 0
    cdef double sum_ns = 0
    cdef const int64_t *words
    cdef Py_buffer view
    cdef int bucket
    memset(total, 0, sizeof(total))
    for histogram in histograms:
        PyObject_GetBuffer(histogram, &view, PyBUF_SIMPLE)
        try:
            if view.len < 8 * HISTOGRAM_WORDS or <size_t>view.buf % 8:
                raise ValueError(f"a histogram takes {8 * HISTOGRAM_WORDS} aligned bytes, got {view.len}")
            words = <const int64_t *>view.buf
            if words[HISTOGRAM_COUNT]:
                for bucket in range(BUCKETS):
                    total[bucket] += words[bucket]
                sum_ns += (<const double *>words)[HISTOGRAM_SUM]
                longest = max(longest, words[HISTOGRAM_MAX])
        finally:
            PyBuffer_Release(&view)
    return [total[bucket] for bucket in range(BUCKETS)], sum_ns, longest


def row_words(Py_ssize_t slots):
    """Return how many 8-byte words a row for ``slots`` analyzers takes (a whole number of cache lines)."""
    return COUNTERS + ROW_HISTOGRAMS * HISTOGRAM_WORDS + slots * (ANALYZER_COUNTERS + HISTOGRAM_WORDS)


@cython.final
cdef class Counters:
    """The counters of one worker: a view of ``buffer`` (writable, ``8 * row_words(slots)`` bytes, 8-byte aligned)."""

    cdef object buffer
    cdef int64_t *words             # of the worker
    cdef int64_t *ingest            # histogram: request read to response ready
    cdef int64_t *queue_wait        # histogram: accepted to first attempt
    cdef int64_t *loop_lag          # histogram: how long the event loop kept others waiting
    cdef int64_t *publish           # histogram: a message sent to the stream to its acknowledgement
    cdef int64_t *analyzers         # ANALYZER_COUNTERS words a slot
    cdef int64_t *delivery          # a histogram a slot
    cdef readonly Py_ssize_t slots

    cdef inline int64_t *of(self, Py_ssize_t slot) noexcept nogil:
        return self.analyzers + slot * ANALYZER_COUNTERS

    cdef inline int64_t *delivery_of(self, Py_ssize_t slot) noexcept nogil:
        return self.delivery + slot * HISTOGRAM_WORDS

    def __cinit__(self, buffer, Py_ssize_t slots):
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if view.len < 8 * row_words(slots) or <size_t>view.buf % 8:
                raise ValueError(f"a row for {slots} analyzers takes {8 * row_words(slots)} aligned bytes, got {view.len}")
            self.words = <int64_t *>view.buf
        finally:
            PyBuffer_Release(&view)
        self.buffer = memoryview(buffer)  # keeps the mapping from being closed under us
        self.slots = slots
        self.ingest = self.words + COUNTERS
        self.queue_wait = self.ingest + HISTOGRAM_WORDS
        self.loop_lag = self.queue_wait + HISTOGRAM_WORDS
        self.publish = self.loop_lag + HISTOGRAM_WORDS
        self.analyzers = self.ingest + ROW_HISTOGRAMS * HISTOGRAM_WORDS
        self.delivery = self.analyzers + slots * ANALYZER_COUNTERS

    def add(self, str field, int64_t n=1):
        """Add ``n`` to a worker counter of ``FIELDS``."""
        self.words[<int>FIELDS[field]] += n

    def get(self, str field):
        """Return a worker counter of ``FIELDS``."""
        return self.words[<int>FIELDS[field]]

    def set(self, str field, int64_t value):
        """Set a gauge of ``FIELDS``."""
        self.words[<int>FIELDS[field]] = value

    cdef int request_word(self, int protocol, int status) except -1:
        """Return the word that counts responses of this status to requests of this protocol."""
        if not 0 <= protocol < MAX_PROTOCOLS:
            raise IndexError(f"protocol {protocol} of {MAX_PROTOCOLS}")
        return REQUESTS + protocol * PROTOCOL_WORDS + 1 + <int>STATUSES_COUNTED.index(status)

    def add_request(self, int protocol, int status, int64_t records=0):
        """Count a request of an agents' protocol by the status of its response, one of ``STATUSES_COUNTED``."""
        self.count_request(self.request_word(protocol, status), records)

    cdef void count_request(self, int word, int64_t records) noexcept nogil:
        self.words[word] += 1
        self.words[word - (word - REQUESTS) % PROTOCOL_WORDS] += records

    def add_to(self, Py_ssize_t slot, str field, int64_t n=1):
        """Add ``n`` to a counter of ``ANALYZER_FIELDS`` of the analyzer in ``slot``."""
        self.of(self.checked(slot))[<int>ANALYZER_FIELDS[field]] += n

    def get_of(self, Py_ssize_t slot, str field):
        """Return a counter of ``ANALYZER_FIELDS`` of the analyzer in ``slot``."""
        return self.of(self.checked(slot))[<int>ANALYZER_FIELDS[field]]

    def set_of(self, Py_ssize_t slot, str field, int64_t value):
        """Set a gauge of ``ANALYZER_FIELDS`` of the analyzer in ``slot``."""
        self.of(self.checked(slot))[<int>ANALYZER_FIELDS[field]] = value

    def observe_ingest(self, int64_t ns):
        """Count an ingest latency."""
        observe(self.ingest, ns, 1)

    def observe_loop_lag(self, int64_t ns):
        """Count a delay of the event loop."""
        observe(self.loop_lag, ns, 1)

    def observe_publish(self, int64_t ns):
        """Count how long a stream took to store a message."""
        observe(self.publish, ns, 1)

    def observe_delivery(self, Py_ssize_t slot, int64_t ns):
        """Count a delivery latency of the analyzer in ``slot``."""
        observe(self.delivery_of(self.checked(slot)), ns, 1)

    cdef Py_ssize_t checked(self, Py_ssize_t slot) except -1:
        if likely(0 <= slot < self.slots):
            return slot
        raise IndexError(f"slot {slot} of {self.slots}")
