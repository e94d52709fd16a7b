# A TCP connection without TLS, and what reads from it.
from libc.stdint cimport int64_t, uint32_t
from fastdist._core.http cimport uchar

cdef int64_t bytes_moved(int fd) noexcept nogil
cdef int64_t bytes_acked(int fd) noexcept nogil
cdef int bytes_unacked(int fd) noexcept nogil
cdef bint peer_ended(int fd) noexcept nogil

cdef class Receiver:
    cdef public object transport
    cdef Stream stream           # the transport, where that is one: spares a call by name

    cdef int receive(self, const uchar *p, Py_ssize_t n) except -1
    cdef int transmit(self, const char *p, Py_ssize_t n) except -1
    cdef int flushed(self) except -1
    cdef int descriptor(self) except -2

cdef class Poller:
    cdef readonly object loop
    cdef readonly set streams    # all that are not lost yet
    cdef int epoll
    cdef uchar *room             # what one read brings
    cdef public int64_t turn_ns      # after which a turn ends, whoever is ready
    cdef public int64_t longest_ns   # of a turn, until somebody sets it back

    cdef int watch(self, Stream stream, uint32_t events) except -1

cdef class Stream:
    cdef readonly Poller poller
    cdef readonly Receiver protocol
    cdef readonly object peer
    cdef int fd
    cdef uint32_t watched        # epoll's events
    cdef bint reading_paused, end_read
    cdef bint output_paused      # the protocol was told so
    cdef bint end_wanted         # shut down our side when all is written
    cdef bint closing, over
    cdef char *output            # what the kernel did not take yet
    cdef Py_ssize_t output_start, output_end, output_size

    cdef inline Py_ssize_t unwritten(self) noexcept nogil:
        return self.output_end - self.output_start
    cdef int happened(self, uint32_t events) except -1
    cdef int read_some(self) except -1
    cdef int read_on(self) except -1
    cdef int write_some(self) except -1
    cdef int send(self, const char *p, Py_ssize_t n) except -1
    cdef int keep(self, const char *p, Py_ssize_t n) except -1
    cdef int written(self) except -1
    cdef int rewatch(self) except -1
    cdef int fail(self, int code) except -1
    cdef int end(self, error) except -1
