# Choosing an analyzer: pure functions of immutable tables.
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef uint64_t GOLDEN

cdef class AliasTable:
    cdef readonly Py_ssize_t size
    cdef uint64_t *threshold      # of a column: below it the column's own slot, else its alias
    cdef int32_t *own
    cdef int32_t *alias
    cdef int32_t at(self, uint64_t u) noexcept nogil

cdef class Rendezvous:
    cdef readonly Py_ssize_t size
    cdef int32_t *slots
    cdef uint64_t *keys
    cdef double *weights
    cdef uint64_t *cached_key
    cdef int32_t *cached_slot
    cdef int32_t best(self, uint64_t key) noexcept nogil
    cdef int32_t best_besides(self, uint64_t key, const uint64_t *marks, uint64_t digest) noexcept nogil
    cdef int32_t race(self, uint64_t key, const uint64_t *marks) noexcept nogil
