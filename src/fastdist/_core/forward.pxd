# One analyzer as a worker sees it: what waits for it, and the connections that carry it.
from libc.stdint cimport int64_t, uint32_t
from fastdist._core.counters cimport Counters
from fastdist._core.http cimport Chunked, ReplyHead, uchar
from fastdist._core.ring cimport PacketRing
from fastdist._core.stream cimport Receiver

cdef enum:
    # Flags of an entry.
    ALONE = 1                # send this packet as single, its batch was refused
    WATCHED = 2              # the pool's owner wants to hear of its delivery

cdef enum Pumped:
    NOTHING_TO_DO = 0
    LINGERING                # what waits is not yet worth a request
    AT_LIMIT                 # all connections are busy, or being opened

cdef struct Group:
    # One request in flight: a chain of handles through Entry.next.
    uint32_t first
    uint32_t packets
    int64_t bytes            # of bodies
    int64_t sent_ns
    int64_t end              # how many bytes the connection had been given with it
    bint batch

cdef class PoolBase:
    cdef readonly PacketRing ring
    cdef readonly Counters counters
    cdef readonly int slot
    cdef int64_t *mine
    cdef int64_t *histogram      # of the time to a reply
    cdef int64_t *failures       # in a row; the next word: refusals
    cdef bytes head              # of a request, up to the headers that differ
    cdef bint batching
    cdef uint32_t batch_packets
    cdef int64_t batch_bytes, linger_ns
    cdef int64_t sent_ns         # monotonic: the last sending
    cdef readonly int pipeline, connection_limit
    cdef readonly list idle      # connections with room for a request, the last used last
    cdef readonly int open_connections
    cdef public int opening
    cdef public bint paused
    cdef bint touched
    cdef bint backlogged         # in the dispatcher's list of those that something waits for
    cdef public bint slow        # clearly slower than the others: what waits here goes elsewhere sooner
    cdef public bint wanted      # packets that waited for others go here as soon as there is room
    cdef uint32_t first, last
    cdef readonly int64_t waiting, waiting_bytes
    cdef readonly int64_t requests_in_flight, packets_in_flight
    cdef readonly double usual_latency   # ns, of requests: a moving average
    cdef int64_t heard_ns                # monotonic: of the last reply, or when the first of those in flight was sent

    cdef void join(self, uint32_t handle, int64_t now) noexcept nogil
    cdef void join_front(self, uint32_t handle, int64_t now) noexcept nogil
    cdef uint32_t leave(self) noexcept nogil
    cdef bint due(self, int64_t now) noexcept nogil
    cdef int64_t due_in(self, int64_t now) noexcept nogil
    cdef Pumped pump_at(self, int64_t now) except *
    cdef Group form(self, int64_t now) noexcept nogil
    cdef uint32_t leave_behind(self, uint32_t prior) noexcept nogil
    cdef uint32_t before_oldest(self) noexcept nogil
    cdef inline uint32_t behind(self, uint32_t prior) noexcept nogil:
        return self.ring.entries[prior].next if prior else self.first
    cdef inline int64_t since(self, uint32_t handle) noexcept nogil:
        return self.ring.entries[handle].since_ns
    cdef bint is_held_up(self, int64_t now) noexcept
    cdef int64_t spare(self) noexcept nogil
    cdef int64_t room_for(self, Group *group) noexcept
    cdef char *write_request(self, Group *group, char *out, int64_t now) noexcept
    cdef char *write_bodies(self, Group *group, char *out) noexcept nogil
    cdef void leaves(self, Group *group, int64_t now) noexcept nogil
    cdef int settle(self, Group *group, int64_t now) except -1
    cdef list dissolve(self, Group *group)
    cdef void landed(self, Group *group) noexcept nogil
    cdef list handles(self, uint32_t handle)

cdef class ReplyBase(Receiver):
    cdef readonly PoolBase pool
    cdef int state
    cdef Group *groups           # a circle of `pipeline` requests in flight
    cdef int first_group, group_count
    cdef Group early             # answered with a 2xx before it was written whole; no packets: there is none
    cdef int64_t given           # bytes to be written since the connection was opened
    cdef int64_t body_left
    cdef Chunked chunked
    cdef bint keep_alive         # as the last reply says
    cdef int interim             # how many 1xx have come before the reply that is awaited
    cdef bint listed             # in pool.idle
    cdef bint leaving            # takes no more requests, and closes behind the last reply
    cdef bint closing
    cdef uchar *partial          # of a head
    cdef Py_ssize_t partial_length, partial_size, scanned
    cdef readonly int64_t replies
    cdef readonly int64_t used_ns        # monotonic: last sending or reply
    cdef int64_t waiting_since
    cdef int64_t moved, moved_ns         # bytes both ways, and when they were last seen to have become more
    cdef int64_t looked_ns

    cdef int send_waiting(self, int64_t now) except -1
    cdef int take_in(self, const uchar *p, Py_ssize_t n) except -1
    cdef int read_replies(self, const uchar *p, Py_ssize_t n, int64_t now) except -1
    cdef const uchar *read_head(self, const uchar *p, const uchar *end, int64_t now) except? NULL
    cdef int keep_partial(self, const uchar *p, Py_ssize_t n) except -1
    cdef int unsuccessful(self, Group *group, ReplyHead *head, bytes text) except -1
    cdef int reply_over(self, int64_t now) except -1
    cdef int last_reply(self) except -1
    cdef list take_unanswered(self)
    cdef bint is_written(self, Group *group) except -1
    cdef int settle_early(self, int64_t now) except -1
    cdef int go_on(self, int64_t now) except -1
    cdef int ended(self, error) except -1
    cdef int64_t bytes_moved(self) except -1
    cdef bint has_room(self) noexcept
