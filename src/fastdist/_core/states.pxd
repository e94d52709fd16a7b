from libc.stdint cimport int64_t

cdef class AnalyzerStates:
    cdef object buffer, head_buffer
    cdef int64_t *rows
    cdef int64_t *head
    cdef readonly Py_ssize_t slots
    cdef int64_t *row(self, Py_ssize_t slot) except NULL
    cdef int64_t *failures_of(self, Py_ssize_t slot) except NULL  # in a row: deliveries failed; then, refused
    cdef int64_t *epoch_word(self) noexcept
