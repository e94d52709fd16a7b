from libc.stdint cimport int64_t, uint64_t

cdef class RateLimiter:
    cdef object buffer
    cdef int64_t *everyone       # theoretical arrival time of all requests together
    cdef int64_t *clients        # pairs: a client's hash, its theoretical arrival time
    cdef uint64_t client_slots
    cdef readonly bint active
    cdef int64_t interval, tolerance, client_interval, client_tolerance
    cdef void forgive(self) noexcept nogil
    cdef int64_t admit(self, uint64_t client, int64_t now) noexcept nogil
    cdef int64_t take(self, int64_t *arrival, int64_t interval, int64_t tolerance, int64_t now) noexcept nogil
    cdef int64_t *find(self, uint64_t client, int64_t now) noexcept nogil
