# What all emitters' connections of a worker share, and one of them.
from libc.stdint cimport int64_t, uint64_t, uint32_t
from fastdist._core.counters cimport Counters
from fastdist._core.http cimport Chunked, RequestHead, Span, uchar
from fastdist._core.limiter cimport RateLimiter
from fastdist._core.ring cimport PacketRing
from fastdist._core.stream cimport Receiver

cdef class Intake:
    cdef readonly PacketRing ring
    cdef readonly Counters counters
    cdef readonly RateLimiter limiter
    cdef readonly set connections
    cdef public bint draining          # every answer is the last on its connection
    cdef public bint closed            # nothing is accepted any more
    cdef public bint full              # the last push found no room
    cdef public bint broken_storage
    cdef public bint open_to_all       # no token is asked for
    cdef public bint shares_origins    # CORS is on
    cdef bint answers_after_sync
    cdef int64_t counted               # position of the ring: what was pushed before it is counted as accepted
    cdef readonly list unsynced        # connections with answers that wait for a sync
    cdef int validation
    cdef int64_t max_body, max_header
    cdef int64_t header_timeout, body_timeout, keepalive_timeout
    cdef readonly Py_ssize_t max_connections
    cdef public int64_t most_bodies    # bytes of bodies on their way, of all connections
    cdef readonly int64_t bodies       # as many as there are
    cdef int64_t slow_from             # monotonic ns: before it no body is slow enough to be ended for others
    cdef object check                  # packet.check
    cdef object on_accepted
    cdef object on_sync_wanted
    cdef uint64_t noise
    cdef char *out                     # the answers of one read
    cdef Py_ssize_t out_length, out_size
    cdef int64_t dated_second
    cdef int64_t wall                  # ns: when the packet at hand was accepted
    cdef bytes date
    # what is held back, and what a turn of the loop may take of it: see the module's text
    cdef object waiting                # connections that have had their slice
    cdef object costly                 # those whose next answer Python makes
    cdef bint turn_awaited             # `go_on` will be called
    cdef IngestBase having_turn        # it may have a costly answer made
    cdef public object later           # call_soon
    cdef public int64_t slice_ns, packets_ns, loop_ns, costly_ns
    cdef int64_t loop_left, costly_left  # of this turn
    cdef public int64_t longest_ns     # of `go_on`, until somebody sets it back

    cdef int put(self, const char *text, Py_ssize_t n) except -1
    cdef bytes date_of(self, int64_t wall)
    cdef void make_id(self, int64_t wall, unsigned char *packet_id) noexcept nogil
    cdef bytes take_out(self)
    cdef count_until(self, int64_t position)
    cdef int reserve(self, Py_ssize_t n) except -1
    cdef int go_round(self, queue, int64_t until, bint costly) except -1
    cdef int await_turn(self) except -1
    cdef bint make_room(self, IngestBase coming, int64_t room) except -1

cdef class Answer:
    cdef bytes data
    cdef bint ready
    cdef bint close, head_only, old_client  # what the request asks of its answer; see Intake.compose
    cdef bytes extra
    cdef int64_t position              # of the ring, that a sync has to reach first; 0: none
    cdef int64_t read_ns               # when its request was read, monotonic; 0: it is not, or no longer, to be counted
    cdef IngestBase connection

    cdef take(self, bytes data)

cdef class IngestBase(Receiver):
    cdef readonly Intake intake
    cdef uint64_t client               # hash of the peer's address
    cdef int state
    cdef bint closing                  # no further request is read
    cdef bint input_paused, output_paused
    cdef bint held                     # `partial` has requests that are not begun yet
    cdef bint costly                   # for the next answer is costly, and has to wait for its turn
    cdef bint queued                   # in `intake.waiting` or `intake.costly`
    cdef int64_t costly_since          # when a costly answer was begun; 0: none is being made
    # the request being read
    cdef bint answered, head_only, old_client
    cdef bint admitted                 # by the rate limits
    cdef readonly bint is_log
    cdef readonly bint keep_alive
    cdef int64_t body_left
    cdef Chunked chunks
    cdef int64_t wait_seconds          # Prefer: wait; -1: none
    cdef char[64] key
    cdef int key_length
    cdef bytes extra                   # header lines its answer gets besides the usual
    cdef tuple request                 # (method, target, head) of one that is not POST /logs
    # buffers
    cdef uchar *partial                # of a head, or what is held back
    cdef Py_ssize_t partial_start, partial_length, partial_size, scanned
    cdef int blank_lines               # passed over since the last head
    cdef uchar *body
    cdef Py_ssize_t body_length, body_size
    # times, monotonic ns
    cdef int64_t moved_ns              # last byte read
    cdef int64_t head_ns               # first byte of the present head; 0: none yet
    cdef int64_t body_due              # when the present body is too slow, unless more comes
    cdef int64_t body_slow             # when it may be ended for others that need its memory, unless more comes
    cdef bint invites                  # the body was asked for by a 100 Continue that waits behind other answers
    cdef int64_t unread_ns             # since when nothing is read (input_paused)
    cdef int64_t output_due            # when the emitter reads its answers too slowly, unless more leaves; 0: none waits
    cdef int64_t acked                 # bytes that its system had acknowledged when that was looked at last
    cdef int64_t answer_due            # until when it said it would wait for an answer
    cdef int64_t ended_ns              # when it has ended or reset the connection; 0: it has not
    cdef bint awaits_sync              # in intake.unsynced
    cdef readonly list answers         # in the order of their requests, while any of them has to wait
    cdef int64_t answers_size          # bytes of them, as far as they are known

    cdef int read_kept(self) except -1
    cdef int read_from(self, const uchar *p, Py_ssize_t n, uchar *kept) except -1
    cdef const uchar *read(self, const uchar *p, const uchar *end, int64_t now) except? NULL
    cdef int read_on(self) except -1
    cdef bint may_answer(self) except -1
    cdef bint has_enough(self) except -1
    cdef bint is_full(self) except -1
    cdef const uchar *read_head(self, const uchar *p, const uchar *end, int64_t now) except NULL
    cdef const uchar *read_body(self, const uchar *p, const uchar *end) except NULL
    cdef const uchar *read_chunks(self, const uchar *p, const uchar *end) except NULL
    cdef int begin(self, RequestHead *head, const uchar *p, Py_ssize_t n) except -1
    cdef int judge(self, RequestHead *head, int64_t *wait) except -1
    cdef int turn_down(self, int refusal, RequestHead *head, int64_t wait) except -1
    cdef bint take_key(self, Span value) noexcept
    cdef int body_whole(self, const uchar *p, Py_ssize_t n) except -1
    cdef bint accept(self, const uchar *p, Py_ssize_t n) except -1
    cdef bint understand(self, const uchar *p, Py_ssize_t n, uint32_t *messages, uint64_t *emitter) except -1
    cdef int answer_accepted(self, unsigned char *packet_id, uint32_t messages) except -1
    cdef bint has_room_for(self, Py_ssize_t n) except -1
    cdef int keep_body(self, const uchar *p, Py_ssize_t n) except -1
    cdef void body_moved(self, Py_ssize_t n) noexcept
    cdef int keep_partial(self, const uchar *p, Py_ssize_t n) except -1
    cdef int drop_body(self) noexcept
    cdef int write_out(self) except -1
    cdef int flush(self) except -1
    cdef finish(self)
    cdef drop_partial(self)
    cdef flush_to_answers(self)
    cdef await_sync(self)
    cdef bint waited_enough(self, int64_t now) except -1
    cdef int64_t unwritten(self, int64_t now) except -1
    cdef bint output_moves(self, int64_t now) except -1
    cdef void forgive(self, int64_t late) noexcept
