"""TCP connections without TLS: a transport as asyncio knows it, but from the socket to the protocol in C.

``Poller`` has an epoll set of its own, which is one descriptor in the loop's: an event-loop iteration asks it for some
connections at a time, and deals with no more once ``run_ns`` are over, so that however many have something to read, and
whatever that brings with it (a large body that is whole), timers and all else have their turn. What is left is still ready
then, and the kernel goes round: the connections it has told of come last (epoll_wait(2)), so those that there was no time
for are kept in mind. ``Stream`` is one connection; it behaves as the loop's own transports do (writes at once what the kernel
takes; ``pause_writing`` above 64 KiB that it does not, ``resume_writing`` at 16; ``connection_lost``
comes from the loop, never from within a call). ``Receiver`` is what a protocol derives from to be read into without an
object for each read, and to write without one; under any other transport (TLS) it is fed with bytes.
"""


cdef extern from "<sys/epoll.h>" nogil:
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    uint32_t EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int timeout)

cdef extern from "<sys/ioctl.h>" nogil:
    unsigned long FIONREAD, TIOCOUTQ
    int ioctl(int fd, unsigned long request, void *value)

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, SOL_SOCKET, SO_ERROR
    ctypedef unsigned int socklen_t
    ssize_t recv(int fd, void *room, size_t n, int flags)
    ssize_t c_send "send"(int fd, const void *data, size_t n, int flags)
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *length)

cdef enum:
    EVENTS = 8               # asked for at a time
    ROOM = 65536             # bytes of one read: also what a connection that is held back may keep
    HIGH_WATER = 65536       # bytes not written, above which the protocol is to pause
    LOW_WATER = 16384        # at which it may go on
    IPPROTO_TCP = 6          # of what follows <linux/tcp.h>, which is not always there, tells no more
    TCP_INFO = 11
    BYTES_ACKED = 15         # which word of eight bytes in struct tcp_info
    BYTES_RECEIVED = 16
    INFO_WORDS = 17
    TCP_CLOSE = 7            # what its first byte may be: no connection any more; after these two the other side sends nothing
    TCP_CLOSE_WAIT = 8
    TCP_LAST_ACK = 9


cdef bint look_at(int fd, int64_t *info) noexcept nogil:
    """Get ``INFO_WORDS`` of the socket's struct tcp_info; say whether there is one."""
    cdef socklen_t length = INFO_WORDS * sizeof(int64_t)
    return fd >= 0 and getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &length) == 0 and length == INFO_WORDS * sizeof(int64_t)

cdef int64_t RUN_NS = 3000000


cdef int64_t bytes_moved(int fd) noexcept nogil:
    """Return how many bytes the other side's system has acknowledged and sent so far, read or not; 0 if that is not known."""
    cdef int64_t[INFO_WORDS] info
    return info[BYTES_ACKED] + info[BYTES_RECEIVED] if look_at(fd, info) else 0


cdef int64_t bytes_acked(int fd) noexcept nogil:
    """Return how many bytes the other side's system has acknowledged so far; 0 if that is not known."""
    cdef int64_t[INFO_WORDS] info
    return info[BYTES_ACKED] if look_at(fd, info) else 0


cdef int bytes_unacked(int fd) noexcept nogil:
    """Return how many bytes that were written the other side's system has not acknowledged; 0 if that is not known."""
    cdef int count = 0
    return count if fd >= 0 and ioctl(fd, TIOCOUTQ, &count) == 0 else 0


cdef bint peer_ended(int fd) noexcept nogil:
    """Whether the other side has ended or reset the connection, which is else seen only by reading."""
    cdef int64_t[INFO_WORDS] info
    return look_at(fd, info) and TCP_CLOSE <= (<uchar *>info)[0] <= TCP_LAST_ACK


cdef class Receiver:
    """What a protocol derives from whose bytes come from a ``Stream``, or from any other transport.

    It takes them in ``receive`` (in C) or ``data_received`` (in Python); each is there in terms of the other.
    """

    cdef public object transport
    cdef Stream stream           # the transport, where that is one: spares a call by name

    cdef int receive(self, const uchar *p, Py_ssize_t n) except -1:
        """Take in what came; the bytes are there for as long as the call lasts."""
        self.data_received(p[:n])
        return 0

    cdef int transmit(self, const char *p, Py_ssize_t n) except -1:
        """Write bytes, which are copied where they cannot leave at once."""
        if likely(self.stream is not None):
            return self.stream.send(p, n)
        self.transport.write(PyBytes_FromStringAndSize(p, n))
        return 0

    cdef int transmit_pieces(self, Pieces *pieces) except -1:
        """Write pieces in a row; changes them."""
        cdef int i
        if likely(self.stream is not None):
            return self.stream.send_pieces(pieces)
        self.transport.write(b"".join([
            PyBytes_FromStringAndSize(<char *>pieces.parts[i].iov_base, pieces.parts[i].iov_len)
            for i in range(pieces.count)
        ]))
        return 0

    cdef int flushed(self) except -1:
        """The kernel has taken more of what a ``Stream`` could not write at once."""
        return 0

    cdef int send_failed(self, int code) except -1:
        """The kernel took nothing of what a ``Stream`` was to write, nor will it take more: it ends, or is read on."""
        return self.stream.fail(code)

    def data_received(self, bytes data):
        """Take in what came."""
        self.receive(<const uchar *>PyBytes_AS_STRING(data), len(data))

    cdef int descriptor(self) except -2:
        """Return the socket's descriptor; -1 if it is not known."""
        if self.stream is not None:
            return self.stream.fd
        socket = self.transport.get_extra_info("socket")
        return -1 if socket is None else socket.fileno()


cdef class AfterEvents:
    """What is done for all connections together once some of them have been read."""

    cdef int events_over(self) except -1:
        return 0


@cython.final
cdef class Poller:
    """The streams of one event loop (uvloop's, or any with ``add_reader``), until ``close``."""

    cdef readonly object loop
    cdef readonly set streams    # all that are not lost yet
    cdef int epoll
    cdef list left               # (stream, events) told of in an iteration that had no time for them
    cdef uchar *room             # what one read brings
    cdef public AfterEvents after    # None: nothing is to be done
    cdef public int64_t run_ns       # after which `run_once` ends, whatever is ready
    cdef public int64_t peak_ns      # of `run_once`, until it is set back

    def __cinit__(self, loop):
        self.epoll = -1
        self.loop, self.streams = loop, set()
        self.run_ns = RUN_NS
        self.room = <uchar *>malloc(ROOM)
        if self.room == NULL:
            raise MemoryError
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            raise OSError(errno, os.strerror(errno))
        loop.add_reader(self.epoll, self.run_once)

    def __dealloc__(self):
        if self.epoll >= 0:
            close(self.epoll)
        free(self.room)

    def close(self):
        """End all streams at once, and look at none any more."""
        for stream in tuple(self.streams):
            stream.abort()
        self.loop.remove_reader(self.epoll)

    def run_once(self):
        """Deal with what has happened on the streams, for ``run_ns``; return whether that was all."""
        cdef epoll_event[EVENTS] events
        cdef int64_t taken = 0, began = mono_ns()
        cdef int i, count = EVENTS
        cdef list told
        if unlikely(self.left is not None):
            told, self.left = self.left, None
            for i in range(len(told)):
                self.deal(<Stream>told[i][0], told[i][1])
                taken = mono_ns() - began
                if taken >= self.run_ns and i + 1 < len(told):
                    self.left = told[i + 1:]
                    break
            self.events_over()
        while count == EVENTS and taken < self.run_ns:
            count = epoll_wait(self.epoll, events, EVENTS, 0)
            for i in range(count):
                # It is among `streams` at least until this event-loop iteration is over: see Stream.end.
                self.deal(<Stream>events[i].data.ptr, events[i].events)
                taken = mono_ns() - began
                if unlikely(taken >= self.run_ns and i + 1 < count):
                    # Asked again, the kernel would name them behind all others: they might never have their turn.
                    self.left = []
                    for i in range(i + 1, count):
                        self.left.append((<Stream>events[i].data.ptr, events[i].events))
                    break
            self.events_over()
        self.peak_ns = max(self.peak_ns, taken)
        return count < EVENTS and self.left is None

    cdef int events_over(self) except -1:
        if self.after is not None:
            self.after.events_over()
        return 0

    cdef int deal(self, Stream stream, uint32_t events) except -1:
        try:
            stream.happened(events)
        except Exception as error:
            stream.report(error)
        return 0

    cdef int watch(self, Stream stream, uint32_t events) except -1:
        cdef epoll_event event
        cdef int operation = EPOLL_CTL_MOD if stream.watched else EPOLL_CTL_ADD
        event.events = events
        event.data.ptr = <void *>stream
        if epoll_ctl(self.epoll, operation, stream.fd, &event) != 0:
            raise OSError(errno, os.strerror(errno))
        stream.watched = events
        return 0


@cython.final
cdef class Stream:
    """The connected socket ``connection`` (which it closes), read for ``protocol`` from now on. ``peer``: its address."""

    cdef readonly Poller poller
    cdef readonly Receiver protocol
    cdef readonly object peer
    cdef int fd
    cdef uint32_t watched        # epoll's events
    cdef bint reading_paused, end_read
    cdef bint output_paused      # the protocol was told so
    cdef bint end_wanted         # shut down our side when all is written
    cdef bint closing, over
    cdef Buffer output           # what the kernel did not take yet

    cdef inline Py_ssize_t unwritten(self) noexcept nogil:
        return kept_in(&self.output)

    def __cinit__(self, Poller poller, connection, peer, Receiver protocol):
        self.fd = -1
        self.poller, self.protocol, self.peer = poller, protocol, peer
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.fd = connection.detach()
        poller.watch(self, EPOLLIN | EPOLLERR)
        poller.streams.add(self)
        protocol.stream = self
        try:
            protocol.connection_made(self)
        except Exception as error:
            self.report(error)

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)
        release(&self.output)

    # ---- what happens on the socket

    cdef int happened(self, uint32_t events) except -1:
        if self.over:
            return 0
        # Reading first: replies that came before a reset are still there, and to write would only tell of the reset.
        if likely(self.watched & EPOLLIN):
            self.read_some()
        elif events & (EPOLLERR | EPOLLHUP):  # told whether asked for or not
            self.fail(self.pending_error())
        if events & EPOLLOUT and not events & EPOLLHUP and self.output.end and not self.over:
            self.write_some()
        return 0

    cdef int read_some(self) except -1:
        cdef ssize_t n = recv(self.fd, self.poller.room, ROOM, MSG_DONTWAIT)
        if likely(n > 0):
            self.protocol.receive(self.poller.room, n)
        elif n == 0:
            self.end_read = True
            self.rewatch()
            if not self.protocol.eof_received():
                self.close()
        elif errno != EAGAIN and errno != EINTR:
            self.fail(errno)
        return 0

    cdef int read_on(self) except -1:
        """Read although reading is paused, if something is there."""
        return 0 if self.end_read or self.closing else self.read_some()

    cdef int write_some(self) except -1:
        cdef ssize_t n = c_send(self.fd, self.output.data + self.output.start, self.unwritten(), MSG_DONTWAIT | MSG_NOSIGNAL)
        if n < 0:
            return 0 if errno == EAGAIN or errno == EINTR else self.fail(errno)
        self.output.start += n
        if self.unwritten() == 0:
            release(&self.output)
            self.rewatch()
        if self.output_paused and self.unwritten() <= LOW_WATER:
            self.output_paused = False
            self.protocol.resume_writing()
        self.protocol.flushed()
        if self.output.end == 0 and not self.over:
            self.written()
        return 0

    cdef int written(self) except -1:
        """All is written: do what was to happen then."""
        if self.closing:
            self.end(None)
        elif self.end_wanted:
            shutdown(self.fd, SHUT_WR)
        return 0

    def pending_error(self):
        """Return the socket's error, 0 if it has none."""
        cdef int code = 0
        cdef socklen_t length = sizeof(int)
        getsockopt(self.fd, SOL_SOCKET, SO_ERROR, &code, &length)
        return code

    def report(self, error):
        """An error of the program: tell of it, and let the connection go."""
        self.poller.loop.call_exception_handler({
            "message": "a connection is closed for an error in its protocol", "exception": error, "transport": self,
            "protocol": self.protocol})
        self.abort()

    cdef int fail(self, int code) except -1:
        return self.end(OSError(code, os.strerror(code)) if code else None)

    cdef int end(self, error) except -1:
        """Look at the socket no more; the protocol is told, and the socket closed, when this event-loop iteration is over."""
        cdef epoll_event event
        if not self.over:
            self.over = self.closing = True
            epoll_ctl(self.poller.epoll, EPOLL_CTL_DEL, self.fd, &event)
            release(&self.output)
            self.poller.loop.call_soon(self.lose, error)
        return 0

    def lose(self, error):
        """Tell the protocol that the connection is no more."""
        protocol, self.protocol = self.protocol, None
        protocol.stream = None
        self.poller.streams.discard(self)
        close(self.fd)
        self.fd = -1
        protocol.connection_lost(error)

    # ---- what a protocol asks for

    cdef int rewatch(self) except -1:
        cdef uint32_t events = EPOLLERR  # which is always told, and says here that it is in the set
        if self.over:
            return 0
        if not (self.reading_paused or self.end_read or self.closing):
            events |= EPOLLIN
        if self.output.end:
            events |= EPOLLOUT
        if events != self.watched:
            self.poller.watch(self, events)
        return 0

    cdef int send(self, const char *p, Py_ssize_t n) except -1:
        cdef ssize_t taken = 0
        if unlikely(self.over or self.end_wanted or self.closing):
            return 0
        if likely(self.output.end == 0):
            taken = c_send(self.fd, p, n, MSG_DONTWAIT | MSG_NOSIGNAL)
            if likely(taken == n):
                return 0
            if taken < 0:
                if errno != EAGAIN and errno != EINTR:
                    return self.protocol.send_failed(errno)
                taken = 0
        keep(&self.output, p + taken, n - taken)
        return self.has_kept()

    cdef int send_pieces(self, Pieces *pieces) except -1:
        cdef msghdr message
        cdef ssize_t taken = 0
        cdef iovec *part
        cdef int i
        if pieces.count == 1:
            return self.send(<char *>pieces.parts[0].iov_base, pieces.parts[0].iov_len)
        if unlikely(self.over or self.end_wanted or self.closing):
            return 0
        if likely(self.output.end == 0):
            memset(&message, 0, sizeof(msghdr))
            message.msg_iov, message.msg_iovlen = pieces.parts, pieces.count
            taken = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if likely(taken == pieces.size):
                return 0
            if taken < 0:
                if errno != EAGAIN and errno != EINTR:
                    return self.protocol.send_failed(errno)
                taken = 0
        make_room(&self.output, pieces.size - taken)
        for i in range(pieces.count):
            part = &pieces.parts[i]
            if taken < <ssize_t>part.iov_len:
                keep(&self.output, <char *>part.iov_base + taken, part.iov_len - taken)
                taken = 0
            else:
                taken -= part.iov_len
        return self.has_kept()

    cdef int has_kept(self) except -1:
        """Some of it the kernel did not take."""
        self.rewatch()
        if not self.output_paused and self.unwritten() > HIGH_WATER:
            self.output_paused = True
            self.protocol.pause_writing()
        return 0

    def write(self, bytes data):
        """Write; what the kernel does not take at once is kept, and ``pause_writing`` called when that is much."""
        self.send(PyBytes_AS_STRING(data), len(data))

    def can_write_eof(self):
        """Whether ``write_eof`` may be called."""
        return True

    def write_eof(self):
        """Shut down this side when all is written; the other may go on sending."""
        if self.end_wanted or self.over:
            return
        self.end_wanted = True
        if self.output.end == 0:
            self.written()

    def pause_reading(self):
        """Read nothing until ``resume_reading``."""
        self.reading_paused = True
        self.rewatch()

    def resume_reading(self):
        """Read again."""
        self.reading_paused = False
        self.rewatch()

    def is_reading(self):
        """Whether what comes is read."""
        return not (self.reading_paused or self.closing)

    def has_unread(self):
        """Whether something has come that is not read yet."""
        cdef int size = 0
        return ioctl(self.fd, FIONREAD, &size) == 0 and size > 0

    def peer_has_ended(self):
        """Whether the other side has ended or reset the connection, whether that was read or not."""
        return peer_ended(self.fd)

    def close(self):
        """Read no more, and close when all is written."""
        if self.closing:
            return
        self.closing = True
        if self.output.end == 0:
            self.end(None)
        else:
            self.rewatch()

    def abort(self):
        """Close at once, whatever is not written yet."""
        self.end(None)

    def is_closing(self):
        """Whether the connection is closed, or about to be."""
        return self.closing

    def get_write_buffer_size(self):
        """Return how many bytes the kernel has not taken yet."""
        return self.unwritten()

    def fileno(self):
        """Return the socket's descriptor; -1 if it is closed."""
        return self.fd

    def get_extra_info(self, str name, default=None):
        """Return the peer's address for ``peername``; nothing else is known."""
        return self.peer if name == "peername" else default
