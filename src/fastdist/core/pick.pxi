"""Which analyzer gets a packet: the alias method (Walker 1977, Vose 1991) and weighted rendezvous hashing.

Both tables are immutable: a change of weights or analyzers builds a new one and swaps the reference.
``AliasTable`` maps a 64-bit fraction u of the unit interval to a slot, and the share of the interval that maps to a slot
is that slot's weight. What feeds it decides the character of the split: the additive recurrence u += GOLDEN spreads any
run of packets evenly (the golden ratio is the number hardest to approximate by fractions, so no window of the sequence
bunches up), independent random words give independent draws.

``Rendezvous`` gives every (key, slot) pair a fixed score and takes the best: when a slot leaves, only the keys it had
move. With score -ln(uniform) / weight the wins are in proportion to the weights (an exponential race).
"""


cdef uint64_t GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / phi, to the nearest odd number
GOLDEN_RATIO_STEP = GOLDEN

cdef extern from *:
    """
    static inline uint64_t fd_column(uint64_t u, uint64_t n, uint64_t *rest) {
        unsigned __int128 product = (unsigned __int128)u * n;
        *rest = (uint64_t)product;
        return (uint64_t)(product >> 64);
    }
    """
    uint64_t column "fd_column"(uint64_t u, uint64_t n, uint64_t *rest) noexcept nogil

cdef enum:
    CACHE = 4096  # emitters whose choice is remembered; a power of two


@cython.final
cdef class AliasTable:
    """Slots in proportion to weights, in constant time a pick.

    ``slots`` and ``weights`` are sequences of equal length (at least one; weights > 0, any scale). Raises ValueError.
    """

    cdef readonly Py_ssize_t size
    cdef uint64_t *threshold      # of a column: below it the column's own slot, else its alias
    cdef int32_t *own
    cdef int32_t *alias

    def __cinit__(self, slots, weights):
        cdef Py_ssize_t i, n = len(slots)
        if n == 0 or n != len(weights):
            raise ValueError("as many weights as slots, and at least one")
        total = sum(weights)
        if not all(weight > 0 for weight in weights) or not 0 < total < float("inf"):
            raise ValueError("weights must be positive and their sum finite")
        self.size = n
        self.threshold = <uint64_t *>malloc(n * sizeof(uint64_t))
        self.own = <int32_t *>malloc(n * sizeof(int32_t))
        self.alias = <int32_t *>malloc(n * sizeof(int32_t))
        if not self.threshold or not self.own or not self.alias:
            raise MemoryError
        for i in range(n):
            self.own[i] = self.alias[i] = slots[i]
            self.threshold[i] = <uint64_t>-1
        self._fill([weight / total * n for weight in weights])

    def _fill(self, list scaled):
        """Vose: each column that is less than full is topped up by one that is more than full."""
        cdef Py_ssize_t less, more
        small = [i for i, share in enumerate(scaled) if share < 1.0]
        large = [i for i, share in enumerate(scaled) if share >= 1.0]
        while small and large:
            less = small.pop()
            more = large[len(large) - 1]
            self.threshold[less] = <uint64_t>(<double>scaled[less] * 18446744073709551616.0)
            self.alias[less] = self.own[more]
            scaled[more] = (scaled[more] + scaled[less]) - 1.0
            if scaled[more] < 1.0:
                small.append(large.pop())
        # What is left over in either list is full but for rounding.

    def __dealloc__(self):
        free(self.threshold)
        free(self.own)
        free(self.alias)

    cdef int32_t at(self, uint64_t u) noexcept nogil:
        cdef uint64_t rest
        cdef uint64_t i = column(u, <uint64_t>self.size, &rest)
        return self.own[i] if rest < self.threshold[i] else self.alias[i]

    def pick(self, uint64_t u):
        """Return the slot at the fraction ``u / 2**64`` of the unit interval."""
        return self.at(u)

    def shares(self):
        """Return {slot: its exact share of the unit interval}."""
        cdef Py_ssize_t i
        shares = {}
        for i in range(self.size):
            own = self.threshold[i] / 2.0**64 / self.size
            shares[self.own[i]] = shares.get(self.own[i], 0.0) + own
            shares[self.alias[i]] = shares.get(self.alias[i], 0.0) + 1.0 / self.size - own
        return shares


cdef inline bint marked(const uint64_t *marks, int32_t slot) noexcept nogil:
    return marks != NULL and marks[slot >> 6] >> (slot & 63) & 1


@cython.final
cdef class Rendezvous:
    """Slots by key: ``names`` (the analyzers' ids, which decide who wins what), their ``slots`` and ``weights`` (> 0)."""

    cdef readonly Py_ssize_t size
    cdef int32_t *slots
    cdef uint64_t *keys
    cdef double *weights
    cdef uint64_t *cached_key
    cdef int32_t *cached_slot

    def __cinit__(self, names, slots, weights):
        cdef Py_ssize_t i, n = len(slots)
        cdef bytes name
        if n == 0 or n != len(weights) or n != len(names):
            raise ValueError("as many names and weights as slots, and at least one")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError("weights must be positive and finite")
        self.size = n
        self.slots = <int32_t *>malloc(n * sizeof(int32_t))
        self.keys = <uint64_t *>malloc(n * sizeof(uint64_t))
        self.weights = <double *>malloc(n * sizeof(double))
        self.cached_key = <uint64_t *>calloc(CACHE, sizeof(uint64_t))
        self.cached_slot = <int32_t *>calloc(CACHE, sizeof(int32_t))
        if not (self.slots and self.keys and self.weights and self.cached_key and self.cached_slot):
            raise MemoryError
        for i in range(n):
            name = names[i].encode()
            self.slots[i] = slots[i]
            self.keys[i] = hash_bytes(<const char *>name, len(name))
            self.weights[i] = weights[i]
        for i in range(CACHE):
            self.cached_slot[i] = -1

    def __dealloc__(self):
        free(self.slots)
        free(self.keys)
        free(self.weights)
        free(self.cached_key)
        free(self.cached_slot)

    cdef int32_t best(self, uint64_t key) noexcept nogil:
        return self.best_besides(key, NULL, 0)

    cdef int32_t best_besides(self, uint64_t key, const uint64_t *marks, uint64_t digest) noexcept nogil:
        """Return the slot ``key`` belongs to when those marked (a bit each) are not there, -1 if none is left.

        ``digest``: a hash of the marks, 0 for none.
        """
        cdef Py_ssize_t line = <Py_ssize_t>(mix(key ^ digest) & (CACHE - 1))
        cdef int32_t slot = self.cached_slot[line]
        if slot >= 0 and self.cached_key[line] == key ^ digest and not marked(marks, slot):
            return slot
        slot = self.race(key, marks)
        self.cached_key[line] = key ^ digest
        self.cached_slot[line] = slot
        return slot

    cdef int32_t race(self, uint64_t key, const uint64_t *marks) noexcept nogil:
        cdef Py_ssize_t i
        cdef int32_t winner = -1
        cdef double score, lowest = 0
        for i in range(self.size):
            if marked(marks, self.slots[i]):
                continue
            # 53 bits of hash, moved off 0 and 1, make the uniform number.
            score = -log((<double>(mix(fold(key ^ self.keys[i], GOLDEN)) >> 11) + 0.5) / 9007199254740992.0)
            score /= self.weights[i]
            if winner < 0 or score < lowest:
                winner, lowest = self.slots[i], score
        return winner

    def pick(self, uint64_t key):
        """Return the slot that ``key`` (an emitter's hash) belongs to."""
        return self.best(key)
