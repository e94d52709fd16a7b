"""Rate limits that hold over all workers: GCRA (ITU-T I.371), one word of shared memory a limit, changed by compare-and-swap.

The word is the theoretical arrival time: when the next request would come if all came at the exact rate. A request that
is earlier than that by more than the burst allows is refused, and told how long to wait; any other moves the word on.
"""


cdef enum:
    LEADING_WORDS = 8        # the word of all clients has a cache line of its own
    PROBES = 8               # places a client's pair may be in

cdef double MAX_NS = 2.0**60  # ns, 36 years: no sum of times leaves its word


def limiter_words(client_slots):
    """Return how many 8-byte words a limiter with room for ``client_slots`` clients takes."""
    return LEADING_WORDS + 2 * client_slots


@cython.final
cdef class RateLimiter:
    """Limits in ``buffer`` (writable, zeroed, 8-byte aligned, ``8 * limiter_words(n)`` bytes, n a power of two).

    More clients at once than there is room for share the limit of the least busy one: the limit of all still holds.
    """

    cdef object buffer
    cdef int64_t *everyone       # theoretical arrival time of all requests together
    cdef int64_t *clients        # pairs: a client's hash, its theoretical arrival time
    cdef uint64_t client_slots
    cdef readonly bint active
    cdef int64_t interval, tolerance, client_interval, client_tolerance

    def __cinit__(self, buffer):
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        self.everyone = <int64_t *>view.buf
        self.client_slots = max(0, view.len // 8 - LEADING_WORDS) // 2
        PyBuffer_Release(&view)
        if self.client_slots < PROBES or self.client_slots & (self.client_slots - 1):
            raise ValueError("the number of client slots must be a power of two, at least 8")
        self.buffer = memoryview(buffer)
        self.clients = self.everyone + LEADING_WORDS

    def configure(self, double rate, double burst, double client_rate, double client_burst):
        """Set requests per second (0: no limit) and bursts (0: one second's worth) of all and of each client."""
        self.interval, self.tolerance = spacing(rate, burst)
        self.client_interval, self.client_tolerance = spacing(client_rate, client_burst)
        self.active = self.interval > 0 or self.client_interval > 0
        self.forgive()

    cdef void forgive(self) noexcept nogil:
        """Put no client further ahead than one that just passed: a limit that was tighter before no longer counts."""
        cdef int64_t now = mono_ns()
        cdef int64_t i
        bring_down(self.everyone, now + self.tolerance + self.interval)
        for i in range(self.client_slots):
            bring_down(self.clients + 2 * i + 1, now + self.client_tolerance + self.client_interval)

    cdef int64_t admit(self, uint64_t client, int64_t now) noexcept nogil:
        """Return 0 if a request may pass at ``now`` (monotonic ns), else in how many ns one may."""
        cdef int64_t *arrival = NULL
        cdef int64_t wait
        if self.client_interval:
            arrival = self.find(client, now)
            wait = self.take(arrival, self.client_interval, self.client_tolerance, now)
            if wait:
                return wait
        if self.interval:
            wait = self.take(self.everyone, self.interval, self.tolerance, now)
            if wait:
                if arrival != NULL:  # what did not pass does not count
                    fetch_add(arrival, -self.client_interval)
                return wait
        return 0

    cdef int64_t take(self, int64_t *arrival, int64_t interval, int64_t tolerance, int64_t now) noexcept nogil:
        cdef int64_t seen, due
        while True:
            seen = load(arrival)
            due = max(seen, now)
            if due - now > tolerance:
                return due - now - tolerance
            if compare_and_swap(arrival, seen, due + interval):
                return 0

    cdef int64_t *find(self, uint64_t client, int64_t now) noexcept nogil:
        """Return the client's word, taking over one whose client has been silent longest if it has none yet."""
        cdef uint64_t i, start = mix(client)
        cdef int64_t *pair
        cdef int64_t *best = NULL
        client |= 1  # 0 marks a free pair
        for i in range(PROBES):
            pair = self.clients + 2 * ((start + i) & (self.client_slots - 1))
            if load(pair) == <int64_t>client:
                return pair + 1
            if best == NULL or load(pair + 1) < load(best + 1):
                best = pair
        if load(best + 1) <= now:
            compare_and_swap(best, load(best), <int64_t>client)
        return best + 1

    def check(self, str client, now_ns=None):
        """Return 0.0 if a request of ``client`` may pass now, else in how many seconds one may."""
        cdef bytes name = client.encode()
        cdef int64_t now = mono_ns() if now_ns is None else now_ns
        return self.admit(hash_bytes(<const char *>name, len(name)), now) / 1e9


cdef void bring_down(int64_t *word, int64_t limit) noexcept nogil:
    cdef int64_t seen
    while True:
        seen = load(word)
        if seen <= limit or compare_and_swap(word, seen, limit):
            return


cdef (int64_t, int64_t) spacing(double rate, double burst) except *:
    """Return (ns between requests, ns a request may be early)."""
    if rate <= 0:
        return 0, 0
    cdef double interval = min(1e9 / rate, MAX_NS)
    cdef double allowed = burst if burst > 0 else max(rate, 1.0)
    return max(<int64_t>interval, 1), <int64_t>min(interval * (allowed - 1), MAX_NS) if allowed > 1 else 0
