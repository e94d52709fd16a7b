"""Ingest: what emitters send, from bytes to a packet in the ring and a response.

``IngestBase`` is one connection, ``Intake`` (intake.pxi) what all of a worker share. A request goes head -> body ->
response; ``POST /logs`` is dealt with here, what agents send (``route``) in batches.pxi, all else, and everything that is wrong,
in ``fastdist.worker.ingest`` (``handle``, ``refuse``). The responses of one read leave in one write. Where one has to wait
(for a sync, a delivery, another process), it and all behind it become ``PendingResponse`` objects in a list, and leave in
order as they get ready.

A short request may have a long response, or a costly one, and one read holds thousands. So what was read is held back, and
no more is read from the connection:

- while its responses are not taken off;
- when it has had its slice of this event-loop iteration (``slice_ns``), until its next;
- when its next packet is a large one, of which an event-loop iteration takes one;
- while its body is converted, one slice an iteration, and while the batch that has become of it waits for room in the ring;
- when its next response is one that Python makes (anything but a 202) and such responses have had their share of this
  iteration (``costly_ns``): they cost up to a hundred times what a packet does, and packets come first.
"""

cdef enum:
    API_BODY = 1 << 20       # the most a request other than POST /logs may carry
    MAX_BLANK_LINES = 100   # before a request
    SMALL_BODY = 64 << 10    # bytes that have come of one for which there is a reserve of memory:
    RESERVE = 8              # what fraction of that for all
    LARGE_BODY = 128 << 10   # bytes of one that takes a millisecond or more to scan, and so is scanned in its turn
    NS_A_BYTE = 976562       # the least rate of a body and of what is written: 1 KiB/s
    NS_A_BYTE_FAST = 15259   # the rate at which a body is never cut off: 64 KiB/s
    MAX_RESPONSES = 512      # waiting on one connection, before it is read no further
    MAX_WAITING = 256 << 10  # bytes of them
    MAX_WAIT = 86400     # seconds of Prefer: wait

cdef enum Held:              # what was read and has to wait for its turn, in `partial`
    NOT_HELD = 0
    HELD_PACKET              # requests: the connection has had its slice, or the next is a large one
    HELD_RESPONSE            # a request whose response Python makes
    HELD_WORK                # a body that is being converted
    HELD_ROOM                # a batch for which there is no room

cdef dict HEAD_FAULTS = {    # (status, counter, detail, header lines)
    ENCODED: (415, "unsupported_media_type", "Content-Encoding must be gzip, deflate, zstd or snappy",
              b"Accept-Encoding: gzip, deflate, zstd, snappy\r\n"),
    NO_JSON: (415, "unsupported_media_type", "Content-Type must be application/json", b"Accept: application/json\r\n"),
    BAD_KEY: (400, "invalid", "Idempotency-Key must be one value of 1 to 64 visible ASCII characters other than \" , ; \\, "
              "bare or in double quotes"),
    UNEXPECTED: (417, "invalid", "the only expectation understood is 100-continue"),
}

cdef int64_t LINGER = 5000000000  # ns an emitter is read on after a last response, so that no reset destroys that; and that
                                  # responses have to be there once it has sent its end
cdef int64_t OVERDUE = 300000000000  # ns that a response may be late which waits for the disk or the supervisor


cdef class IngestBase(Connection):
    """One emitter's connection, mixed into an ``asyncio.Protocol`` that has what ``EmitterCalls`` in the stub describes."""

    cdef readonly Intake intake
    cdef uint64_t client               # hash of the client's address
    cdef public bytes forwarded        # X-Forwarded-For of the last request, from a trusted proxy; None: from no such
    cdef Held held
    cdef bint output_paused            # by the transport
    cdef bint queued                   # in `intake.waiting` or `intake.costly`
    cdef bint awaits_sync              # in `intake.unsafe`
    cdef int parts                     # of its responses in `intake.outbox`
    cdef int64_t costly_since          # when a costly response was begun; 0: none is being made
    # the request being read: see begin_request
    cdef Reading after                 # what follows it: IDLE, DISCARDING or ENDED
    cdef bint answered, head_only, old_client
    cdef bint admitted                 # by the rate limits
    cdef bint invites                  # the body was asked for by a 100 Continue that waits behind other responses
    cdef readonly bint is_log
    cdef int64_t body_left
    cdef ChunkedBody chunks
    cdef int64_t wait_seconds          # Prefer: wait; -1: none
    cdef char[ID_TEXT] key
    cdef int key_length
    cdef bytes extra                   # header lines its response gets besides the usual
    cdef readonly tuple request        # (method, target, headers) of one that is not POST /logs, or encoded
    cdef readonly object route         # of an agent's request, as `route_of` has it
    cdef readonly bint brings          # records of an agent's
    cdef bint converts                 # its body is converted or decoded
    cdef object conversion             # a generator that does so; None: not begun, or done
    cdef object outcome                # of it: a batch, or the decoded body
    cdef int64_t begun_ns              # when its body was whole
    cdef int64_t batch_size            # bytes of records; -1: not counted yet
    cdef int64_t room_due              # until when a batch may wait for room; 0: it does not
    cdef int64_t charged               # bytes that count as a body besides `body`
    # buffers
    cdef RequestHead head              # of the last packet: a template
    cdef UnfinishedHead unfinished     # the head that is being read
    cdef Buffer partial                # of a head, or what is held back
    cdef Py_ssize_t scanned            # of the head, by find_head_end
    cdef int blank_lines               # passed over since the last head
    cdef Buffer body                   # as far as it has come
    cdef bytes whole                   # what it lies in if it is to be converted, and its length is known: spares a copy
    cdef bint borrows                  # it does
    # times, monotonic ns
    cdef int64_t moved_ns              # last byte read
    cdef int64_t head_ns               # first byte of the present head
    cdef int64_t body_due              # when the present body is too slow, unless more comes
    cdef int64_t body_slow             # when it may be ended for others that need its memory, unless more comes
    cdef int64_t unread_ns             # since when the transport does not read; 0: it does
    cdef int64_t output_due            # when the emitter reads its responses too slowly, unless more leaves; 0: none waits
    cdef int64_t acked                 # bytes that its system had acknowledged when that was looked at last
    cdef int64_t response_due          # until when it said it would wait for a response
    cdef int64_t ended_ns              # when it has ended or reset the connection; 0: it has not
    cdef readonly list responses       # in the order of their requests, while any of them has to wait
    cdef int64_t responses_size        # bytes of them, as far as they are known

    def __cinit__(self, Intake intake, *args, **kwargs):
        self.life, self.intake = EMITTER_LIFE, intake
        self.moved_ns = mono_ns()

    def __dealloc__(self):
        release(&self.partial)
        if not self.borrows:
            release(&self.body)

    def set_client(self, str address):
        """Tell who is at the other end (for the rate limits)."""
        cdef bytes name = address.encode()
        self.client = hash_bytes(PyBytes_AS_STRING(name), len(name))

    # ---- states (connection_life.pxi)

    cdef int begin_request(self, int64_t now) except -1:
        """Be ready for a head: nothing is known of the request."""
        self.set_reading(HEAD)
        self.head_ns = now
        self.scanned = 0
        self.after = IDLE
        self.is_log = self.answered = self.head_only = self.old_client = self.admitted = self.invites = False
        self.brings = self.converts = False
        self.key_length, self.wait_seconds = 0, -1
        self.extra = self.request = self.route = None
        return 0

    cdef int stop_reading(self, Reading state) except -1:
        """Read no further request; ``state``: DISCARDING or ENDED. The connection is closed when all responses are written."""
        if self.reading < state:
            self.set_reading(state)
        self.held = NOT_HELD
        release(&self.partial)
        self.drop_body()
        return 0

    def ended(self):
        """The emitter has sent its end: what it still waits for has to come soon, and nothing more is read."""
        if not self.ended_ns:
            self.moved_ns = self.ended_ns = mono_ns()
        self.stop_reading(ENDED)
        if self.writing == AT_ONCE:
            self.set_writing(WRITTEN)

    def let_go(self):
        """Free what was kept of a request: the connection is gone."""
        self.stop_reading(ENDED)
        if self.writing != LOST:
            self.set_writing(LOST)
        if self.chunks is not None:
            self.chunks.close()

    cdef int break_off(self, error) except -1:
        self.reading, self.writing = ENDED, LOST  # where nothing more comes of what is under way
        if self.transport is not None:
            self.transport.abort()
        self.went_wrong(error)
        return 0

    # ---- reading

    cdef int receive(self, const uchar *p, Py_ssize_t n) except -1:
        """Take in what the emitter sent; write what can be answered at once."""
        if self.reading >= DISCARDING:
            return 0
        self.moved_ns = mono_ns()
        if unlikely(self.stream is None and self.intake.loop_left <= 0 and not self.held):
            self.held = HELD_PACKET  # the loop calls for each connection that has something: nothing else counts the time
        if likely(self.partial.end == 0 and not self.held):
            return self.read_from(p, n, NULL)
        keep(&self.partial, p, n)
        if not self.held:
            return self.read_kept()
        self.balance_input()
        return 0

    cdef int read_kept(self) except -1:
        """Read from what was kept; the buffer is this call's meanwhile."""
        cdef Buffer buffer = self.partial
        self.partial.data = NULL
        release(&self.partial)
        return self.read_from(buffer.data + buffer.start, kept_in(&buffer), &buffer)

    cdef int read_from(self, const uchar *p, Py_ssize_t n, Buffer *buffer) except -1:
        """Read requests; ``buffer``: what they are in if it is ours, which is released, or kept on with the rest."""
        cdef const uchar *start = p
        cdef const uchar *end = p + n
        cdef uint64_t before = self.intake.ring.next_sequence
        self.held = NOT_HELD
        try:
            p = self.read(p, end, self.moved_ns)
            if self.reading >= DISCARDING or p == end:
                pass
            elif buffer != NULL and (self.held or p == start):  # it may be much, and stays where it is
                buffer.start += p - start
                self.partial = buffer[0]
                buffer = NULL
            else:
                keep(&self.partial, p, end - p)
        finally:
            if buffer != NULL:
                release(buffer)
            self.flush()
        if self.stream is None:
            self.intake.loop_left -= mono_ns() - self.moved_ns
        if unlikely(self.held):
            self.balance_input()
        if self.intake.ring.next_sequence != before:
            self.intake.on_accepted()
        if unlikely(self.stream is None):  # no Poller will call it
            self.intake.events_over()
        return 0

    cdef const uchar *read(self, const uchar *p, const uchar *end, int64_t now) except? NULL:
        """Read requests until there is no whole one, or the rest has to be held back; return how far that is."""
        cdef const uchar *start = p
        cdef const uchar *head
        while self.reading < DISCARDING and (p < end or self.reading == WHOLE):
            if self.reading <= HEAD:
                if self.reading == IDLE:
                    if unlikely(self.intake.out.end > MAX_OUT):
                        self.flush_to_responses()
                    if unlikely(self.is_full() or (p > start and mono_ns() - now > self.intake.slice_ns)):
                        self.held = HELD_PACKET
                        break
                    self.begin_request(now)
                head = p
                p = self.read_head(p, end)
                if p == head:
                    break
            elif self.reading == BODY:
                p = self.read_body(p, end)
            elif self.reading == CHUNKS:
                p = self.read_chunks(p, end)
            else:
                self.answer_whole(self.body.data, self.body.end)
            if unlikely(self.costly_since):
                self.intake.costly_left -= mono_ns() - self.costly_since
                self.costly_since = 0
            if unlikely(self.held):
                break
        return p

    cdef bint is_full(self) except -1:
        """Whether the emitter does not read its responses, or too many of them wait."""
        return (self.output_paused or self.parts > MAX_RESPONSES or self.responses_size > MAX_WAITING
                or (self.responses is not None and len(self.responses) > MAX_RESPONSES))

    cdef bint may_answer(self) except -1:
        """Whether a response that Python makes may be made now. If not, the request is held back: nothing may have changed."""
        cdef Intake intake = self.intake
        if self.costly_since:  # it is being made
            return True
        if intake.having_turn is self:
            intake.having_turn = None  # for one response
        elif intake.costly_left <= 0 or intake.costly:
            self.held = HELD_RESPONSE
            return False
        self.costly_since = mono_ns()
        return True

    cdef int read_on(self) except -1:
        """Read what was held back, unless the reason for it is back, and what has come meanwhile.

        A connection that always has more stays in the queues like that, and never stands before those who had been silent.
        """
        if self.transport is None or self.transport.is_closing() or not self.held or self.is_full():
            return 0
        self.moved_ns = mono_ns()
        self.read_kept()
        if not self.held and self.stream is not None and not self.is_full():
            self.stream.read_on()
        if not self.held:
            self.balance_input()
        return 0

    def read_rest(self):
        """The emitter sends no more, and may not be written to for long (TLS): take the packets that are held back."""
        while self.held == HELD_PACKET and self.intake.loop_left > 0 and not self.is_full():
            self.intake.going_round = True
            self.read_on()
        self.intake.going_round = False

    cdef const uchar *read_head(self, const uchar *p, const uchar *end) except NULL:
        """Read the head at ``p``; return where it ends, or ``p`` when it is not whole yet or has to wait for its turn."""
        cdef RequestHead head = self.head
        cdef Filled filled
        cdef Py_ssize_t length
        if p[0] == c'\r' and end - p >= 2 and p[1] == c'\n':
            # An empty line before a request is to be passed over (RFC 9112, 2.2); without end they would be no request.
            self.unfinished = None
            if self.blank_lines < MAX_BLANK_LINES:
                self.blank_lines += 1
                self.set_reading(IDLE)
                return p + 2
            if not self.may_answer():
                return p
            self.fault(400, "malformed", f"more than {MAX_BLANK_LINES} empty lines where a request should begin")
            return end
        length = head.matches(p, min(end - p, self.intake.max_header), &filled) if head is not None else 0
        if length == 0 and self.intake.head is not None and head is not self.intake.head:
            head = self.intake.head
            length = head.matches(p, min(end - p, self.intake.max_header), &filled)
        if length == 0:
            length = find_head_end(p, min(end - p, self.intake.max_header), &self.scanned, True)
            if length <= 0:
                return self.read_unfinished(p, end - p, length == HEAD_BROKEN)
            head = RequestHead(p[:length])
            if not head.status and (head.encoded if head.is_log else True):
                self.ask_for_route(head)
            head.matches(p, length, &filled)
        self.unfinished = None
        self.judge_head(head, &filled)
        if unlikely(self.held):
            return p
        if head is not self.head and (head.is_log or head.brings) and head.status == 0 and length <= TEMPLATE_ROOM:
            self.head = head
            if head.is_log:
                self.intake.head = head
        self.blank_lines = 0
        if self.reading == HEAD:  # no body
            self.answer_whole(NULL, 0)
        elif self.reading < DISCARDING and head.expects_continue and p + length == end and not self.answered:
            self.emit(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.invites = self.has_waiting()
        return p + length

    cdef int ask_for_route(self, RequestHead head) except -1:
        cdef tuple found = self.route_of(head.method, head.target.decode("latin-1"), head.fields)
        if found is None:
            return 0
        if head.is_log:
            head.route = found[0]
            return 0
        return head.use(found[0], found[1])

    cdef const uchar *read_unfinished(self, const uchar *p, Py_ssize_t n, bint broken) except NULL:
        """See to a head whose end is not there: it may be broken or too large already. Return ``p``, or where reading ends."""
        cdef Py_ssize_t limit = self.intake.max_header
        if self.unfinished is None:
            self.unfinished = UnfinishedHead(False)
        fault = self.unfinished.feed(p[self.unfinished.seen:min(n, limit)])
        if broken and fault is None:
            fault = "a line ends in a bare LF"
        if fault is None and n <= limit:
            return p
        if not self.may_answer():
            self.unfinished = None  # it has to say so again
            return p
        self.head_only = self.unfinished.parser is not None and self.unfinished.method == b"HEAD"
        self.unfinished = None
        if fault is not None:
            self.malformed(400, fault)
        else:
            self.fault(431, "head_too_large", f"the request's head is larger than the {limit} bytes allowed")
        return p + n

    cdef int malformed(self, int status, str fault) except -1:
        """Answer what is wrong with HTTP; 501 and 505 are about what is HTTP, but not spoken here."""
        self.fault(status, "malformed", f"{'the request is not HTTP: ' if status == 400 else ''}{fault}")
        return 0

    cdef int judge_head(self, RequestHead head, Filled *filled) except -1:
        """Act on a head: decide what the request is, whether it may go on, and how its body is read."""
        # If it is answered already now: whether the body still comes is the emitter's choice, or it is too long to pass over.
        cdef bint bodiless = head.expects_continue or filled.content_length > self.intake.max_body
        cdef int64_t wait = 0
        cdef Refusal refusal
        self.is_log, self.brings = head.is_log, head.brings
        if unlikely(self.forwarded is not None):
            find_client(self, head, filled)
        if unlikely(not head.is_log or head.encoded):
            self.note_route(head, filled)
        self.head_only = not head.is_log and head.method == "HEAD"
        refusal = self.intake.judge(self, head, filled, &wait)
        if unlikely(refusal != FINE and not self.may_answer()):
            return 0
        if unlikely(refusal == BROKEN):
            self.malformed(head.status, head.fault)
            return 0
        self.old_client = head.old_client
        if not head.keep_alive:
            self.after = ENDED
        if unlikely((self.intake.draining and head.keep_alive) or (refusal != FINE and bodiless)):
            self.after = DISCARDING
        if unlikely(self.intake.has_cors) and head.origin:
            self.extra = self.origin_headers(head.origin)
        if unlikely(refusal != FINE):
            self.turn_down(refusal, filled, wait)
            if bodiless:
                self.stop_reading(DISCARDING)
            if self.reading >= DISCARDING:
                return 0
        self.body_due = self.moved_ns + self.intake.body_timeout
        if head.chunked:
            self.set_reading(CHUNKS)
            if self.chunks is None:
                self.chunks = ChunkedBody(False)
            self.chunks.begin(self.body_limit(), self.intake.max_header)
        elif filled.content_length > 0:
            self.set_reading(BODY)
            self.body_left = filled.content_length
        return 0

    cdef int note_route(self, RequestHead head, Filled *filled) except -1:
        """Note what Python is to know of the request."""
        cdef dict fields = head.fields
        if head.credentials and not head.is_log:  # the template may have others
            fields = dict(fields, authorization=filled.credentials.p[:filled.credentials.n].decode("latin-1"))
        self.request = (head.method, head.target.decode("latin-1"), fields)
        self.route = None if head.is_log else head.route
        self.converts = head.brings or head.route is not None and head.is_log
        return 0

    cdef int64_t body_limit(self) noexcept:
        return self.intake.max_body if self.is_log or self.brings else API_BODY

    cdef int turn_down(self, Refusal refusal, Filled *filled, int64_t wait) except -1:
        """Answer what ``Intake.judge`` has found wrong."""
        if refusal in HEAD_FAULTS:
            self.reject(self.refuse(*HEAD_FAULTS[refusal]))
        elif refusal == LIMITED:
            self.reject(self.limited(wait / 1e9))
        elif refusal == NO_TOKEN:
            self.reject(self.unauthorized(filled.credentials.p[:filled.credentials.n] if filled.credentials.n else None))
        elif refusal == NOT_STORED:
            self.reject(self.not_stored(False))
        elif self.is_log or self.brings:
            self.fault(413, "too_large",
                       f"the body is {filled.content_length} bytes, more than the {self.intake.max_body} allowed")
        else:
            self.fault(413, "", f"the body is larger than the {API_BODY} bytes allowed here")
        return 0

    # ---- bodies

    cdef const uchar *read_body(self, const uchar *p, const uchar *end) except NULL:
        cdef Py_ssize_t n = min(self.body_left, end - p)
        self.body_left -= n
        if self.answered:
            if self.body_left == 0:
                self.finish_request(NULL, 0)
        elif self.body_left == 0 and self.body.end == 0:
            if unlikely(not self.finish_request(p, n)):  # it stays where it is
                self.body_left = n
                return p
        elif self.has_room_for(n):
            if self.body.data == NULL:  # touched only as it fills
                if unlikely(self.converts):
                    self.whole, self.borrows = PyBytes_FromStringAndSize(NULL, n + self.body_left), True
                    self.body.data, self.body.size = <uchar *>PyBytes_AS_STRING(self.whole), n + self.body_left
                else:
                    make_room(&self.body, n + self.body_left)
            self.keep_body(p, n)
            if self.body_left == 0:
                self.answer_whole(self.body.data, self.body.end)
        if self.body_left:
            self.body_moved(n)
        return p + n

    cdef const uchar *read_chunks(self, const uchar *p, const uchar *end) except NULL:
        cdef Span piece
        cdef const uchar *start = p
        cdef int event = self.chunks.read(&p, end, &piece)
        if event == CHUNK_DATA:
            if not self.answered and self.has_room_for(piece.n):
                self.keep_body(piece.p, piece.n)
        elif event == CHUNK_END:
            self.answer_whole(self.body.data, self.body.end)
        elif event != CHUNK_MORE and not self.may_answer():
            return p
        elif event == CHUNK_TOO_LARGE:
            self.fault(413, "too_large" if self.is_log or self.brings else "",
                       f"the body is larger than the {self.body_limit()} bytes allowed")
        elif event == CHUNK_BROKEN:
            self.malformed(400, "its chunks are broken")
        elif event == CHUNK_TOO_LONG:
            self.fault(431, "head_too_large", "the trailers of the body are too large")
        self.body_moved(p - start)
        return p

    cdef void body_moved(self, Py_ssize_t n) noexcept:
        """Give the body time for ``n`` bytes that came: never more than it may fall behind."""
        self.invites = False
        self.body_due = min(self.body_due + n * NS_A_BYTE, self.moved_ns + self.intake.body_timeout)
        self.body_slow = min(self.body_slow + n * NS_A_BYTE_FAST, self.moved_ns + STALL)

    cdef bint has_room_for(self, Py_ssize_t n) except -1:
        """Whether so much more of a body may be kept. If not, say so: many that come slowly would take all memory."""
        cdef int64_t room = self.intake.max_bodies - n
        if self.body.end + n <= SMALL_BODY:
            room += self.intake.max_bodies // RESERVE
        if likely(self.intake.bodies <= room) or self.intake.make_room(self, room):
            return True
        self.after = DISCARDING
        self.reject(self.crowded_out())
        self.stop_reading(DISCARDING)
        return False

    cdef int keep_body(self, const uchar *p, Py_ssize_t n) except -1:
        if self.body.end == 0:
            self.body_slow = self.moved_ns + STALL
        keep(&self.body, p, n)
        self.intake.bodies += n
        return 0

    cdef void release_body(self) noexcept:
        self.intake.bodies -= self.body.end
        if unlikely(self.borrows):
            memset(&self.body, 0, sizeof(Buffer))
            self.whole, self.borrows = None, False
        else:
            release(&self.body)

    cdef int drop_body(self) noexcept:
        self.release_body()
        if unlikely(self.converts):
            self.conversion = self.outcome = None
            self.room_due = 0
            self.charge(0)
        return 0

    cdef void charge(self, int64_t size) noexcept:
        """Count so many bytes as a body on its way, instead of those that were counted so before."""
        self.intake.bodies += size - self.charged
        self.charged = size

    cdef int answer_whole(self, const uchar *p, Py_ssize_t n) except -1:
        """Finish a request whose body does not lie in what is read; be WHOLE while that has to wait for its turn."""
        if unlikely(not self.finish_request(p, n)) and self.reading != WHOLE:
            self.set_reading(WHOLE)
        return 0

    cdef bint finish_request(self, const uchar *p, Py_ssize_t n) except -1:
        """The request is whole: answer it, and be ready for the next. False, and nothing done, if that has to wait."""
        if not self.answered:
            if unlikely(self.converts):
                if not convert_body(self, p, n):
                    return False
            elif likely(self.is_log):
                if unlikely(not self.accept(p, n)):
                    return False
            elif self.may_answer():
                response = self.handle(*self.request, p[:n] if n else b"")
                if response is not None:
                    self.emit(response)
            else:
                return False
        self.drop_body()
        self.set_reading(self.after)
        return True

    # ---- packets

    cdef bint accept(self, const uchar *p, Py_ssize_t n) except -1:
        """Check a packet, put it into the ring, and answer; False, and nothing done, if its response has to wait for its turn."""
        cdef Intake intake = self.intake
        cdef int64_t *counters = intake.counters.words
        cdef uint32_t messages = 0
        cdef uint64_t emitter = 0
        cdef unsigned char[16] packet_id
        cdef int pushed
        if unlikely(intake.draining) and self.after == IDLE:  # it was under way when the draining began: the last here
            self.after = DISCARDING
        if unlikely(intake.closed or intake.broken_storage):
            if not self.may_answer():
                return False
            self.reject(self.not_stored(False))
            return True
        if unlikely(n > LARGE_BODY):
            if not intake.going_round and intake.having_turn is not self:
                self.held = HELD_PACKET
                return False
            intake.going_round = False  # for one of them
        if unlikely(not self.understand(p, n, &messages, &emitter)):
            return not self.held
        intake.wall = wall_ns()
        intake.make_id(intake.wall, packet_id)
        pushed = intake.ring.push_packet(p, n, <const uchar *>self.key, self.key_length, packet_id, messages, emitter,
                                         mono_ns() + intake.ring.clock_offset, WAITED if self.wait_seconds >= 0 else 0)
        if unlikely(pushed != PUSHED):
            if pushed == NOT_WRITTEN:
                self.flush_to_responses()
                intake.write_failed(intake.ring.file.failed)
            if not self.may_answer():
                return False
            if pushed == NOT_WRITTEN:
                self.reject(self.not_stored(False))
            elif pushed == TOO_BIG:
                self.reject(self.refuse(413, "too_large", f"a packet of {n} bytes is over half of what a worker's part of "
                                               f"the queue holds ({intake.ring.capacity} bytes)"))
            else:
                self.reject(self.not_stored(True))
            return True
        if intake.holds:  # what may yet be withdrawn is counted when it is safe
            if (self.responses is not None or self.wait_seconds >= 0 or self.is_special() or not intake.fresh.packets
                    or intake.ring.file.written >= intake.fresh.position):  # those before it are written, it may not be
                self.flush_to_responses()  # what is in the buffer is another part
            intake.fresh.position = intake.ring.tail
            intake.fresh.packets += 1
            intake.fresh.messages += messages
            intake.fresh.body_bytes += n
        else:
            counters[ACCEPTED] += 1
            counters[MESSAGES_ACCEPTED] += messages
            counters[BYTES_ACCEPTED] += n
        self.answer_accepted(packet_id, messages)
        if not intake.holds:  # else its response is written, and its time is up, when it is safe
            observe(intake.counters.ingest, mono_ns() - self.moved_ns, 1)
        return True

    cdef bint understand(self, const uchar *p, Py_ssize_t n, uint32_t *messages, uint64_t *emitter) except -1:
        """Validate the body; if it is no packet return False, and answer so, unless that has to wait for its turn."""
        cdef Intake intake = self.intake
        cdef PacketFacts facts
        if n and intake.validation == 0:
            return True
        if likely(n and scan_packet(p, n, intake.validation == 2, &facts)):
            messages[0], emitter[0] = facts.messages, facts.emitter_hash
            return True
        if not self.may_answer():
            return False
        if n == 0:
            self.reject(self.refuse(400, "malformed", "the body is empty"))
            return False
        try:
            messages[0], emitter[0] = intake.check(p[:n], strict=intake.validation == 2)
        except Exception as error:
            self.reject(self.invalid(error))
            return False
        return True

    cdef bint is_special(self) noexcept:
        """Whether a response has to be remembered with what its request asked of it, in case that it becomes another."""
        return self.extra is not None or self.old_client or (self.key_length and self.intake.keyed is not None)

    cdef int answer_accepted(self, unsigned char *packet_id, uint32_t messages) except -1:
        cdef Intake intake = self.intake
        cdef char[ID_TEXT] text
        cdef int length = self.key_length
        cdef bytes data = None
        cdef PendingResponse response
        if length:
            memcpy(text, self.key, length)
        else:
            write_uuid(packet_id, text)
            length = 36
        if likely(self.wait_seconds < 0):
            if self.responses is None and not (intake.holds and self.is_special()):
                write_accepted(intake, text, length, messages, self.extra, self.after == IDLE, self.old_client)
                intake.fresh.close = self.after != IDLE
                return 0
            self.flush_to_responses()
            write_accepted(intake, text, length, messages, self.extra, self.after == IDLE, self.old_client)
            if not intake.holds:
                return 0
            data = intake.take_out()
        response = self.hold_place()
        if intake.holds:
            response.position, response.read_ns = intake.ring.tail, self.moved_ns
            if self.key_length and intake.keyed is not None:
                intake.keyed[intake.ring.next_sequence - 1] = response
            self.await_sync()
            intake.outbox.add(&intake.fresh, NULL)
            memset(&intake.fresh, 0, sizeof(Part))
        if data is not None:
            response.take(data)
            return 0
        self.response_due = max(self.response_due, self.moved_ns + self.wait_seconds * 1000000000)
        self.await_delivery(response, intake.ring.next_sequence - 1, self.wait_seconds, text[:length].decode("latin-1"),
                            messages if intake.validation else None)
        return 0

    # ---- responses

    def respond(self, int status, str reason, bytes headers, bytes body, bint close=False):
        """Return the present request's response as bytes; see ``Intake.compose``."""
        if self.extra is not None:
            headers += self.extra
        return self.intake.compose(status, reason, headers, body, close=close or self.after != IDLE,
                                   head_only=self.head_only, old_client=self.old_client)

    cdef int fault(self, int status, str counter, str detail) except -1:
        """Answer with an error, if the request has no response yet, and read no further on this connection."""
        self.after = DISCARDING
        if not self.answered:
            self.reject(self.refuse(status, counter, detail))
        return self.stop_reading(DISCARDING)

    cdef int reject(self, bytes response) except -1:
        """Answer with an error; the body, if it still comes, is passed over."""
        self.answered = True
        return self.emit(response)

    cdef int emit(self, bytes data) except -1:
        """Write a response in its turn."""
        if self.intake.fresh.packets:
            self.flush_to_responses()  # it does not depend on packets, as those before it do
        if self.responses is None:
            return keep(&self.intake.out, PyBytes_AS_STRING(data), len(data))
        self.flush_to_responses()
        self.line_up(data)
        return 0

    def promise(self):
        """Return a ``PendingResponse`` that holds the present request's place until it is completed."""
        return self.hold_place()

    cdef PendingResponse hold_place(self):
        cdef PendingResponse response
        self.flush_to_responses()
        response = self.line_up(None)
        response.extra = self.extra
        response.close, response.head_only, response.old_client = self.after != IDLE, self.head_only, self.old_client
        return response

    cdef PendingResponse line_up(self, bytes data):
        """Return a new ``PendingResponse`` behind those that wait; ``data``: None while it is not known."""
        cdef PendingResponse response = PendingResponse.__new__(PendingResponse)
        response.connection = self
        if data is not None:
            response.take(data)
            response.ready = True
        if self.responses is None:
            self.responses = []
            if self.parts == 0:
                self.set_writing(WAITING)
        self.responses.append(response)
        return response

    cdef int flush_to_responses(self) except -1:
        """What is in the common buffer came first: write it, or let it wait its turn."""
        cdef Intake intake = self.intake
        cdef Py_ssize_t n = intake.out.end
        if n == 0:
            return 0
        if self.responses is not None:
            self.line_up(intake.take_out())
        elif intake.fresh.packets or self.parts:
            self.put_by(n)
        else:
            intake.out.end = 0
            self.transmit(<char *>intake.out.data, n)
        return 0

    cdef int put_by(self, Py_ssize_t n) except -1:
        """Let what is in the common buffer wait until its packets, and those before it, are safe."""
        cdef Intake intake = self.intake
        cdef Part *fresh = &intake.fresh
        fresh.connection, fresh.read_ns = <PyObject *>self, self.moved_ns
        if not fresh.packets:
            fresh.position = intake.ring.tail
        fresh.size = n
        intake.out.end = 0
        if self.parts == 0:
            self.set_writing(WAITING)
        self.parts += 1
        self.responses_size += n
        intake.outbox.add(fresh, intake.out.data)
        memset(fresh, 0, sizeof(Part))
        return 0

    cdef int leave(self, const char *data, Py_ssize_t n) except -1:
        """Its packets are safe: write a part of the responses."""
        self.parts -= 1
        self.responses_size -= n
        if self.writing == WAITING:
            self.transmit(data, n)
        if self.parts == 0:
            self.release_ready()
        return 0

    cdef int flush(self) except -1:
        """Write the responses of this read; close if the last was among them; stop reading while too many wait."""
        self.flush_to_responses()
        if self.writing == WAITING:
            self.release_ready()
        elif self.writing == AT_ONCE and self.reading >= DISCARDING:
            self.finish()
        return 0

    cdef int finish(self) except -1:
        """Everything is written; what may take a while from now on is that it is read."""
        self.moved_ns = mono_ns()
        self.set_writing(WRITTEN)
        self.shut(self.reading == DISCARDING)
        return 0

    cdef await_sync(self):
        if not self.awaits_sync:
            self.awaits_sync = True
            self.intake.unsafe.append(self)

    cdef bint release(self, int64_t position) except -1:
        """Let go of the responses whose packets are safe up to ``position``; say whether those were all."""
        cdef PendingResponse response
        cdef int64_t now = mono_ns()
        cdef bint all_of_them = True
        for response in self.responses or ():
            if response.position > position:
                all_of_them = all_of_them and response.ready
                continue
            if response.read_ns:
                observe(self.intake.counters.ingest, now - response.read_ns, 1)
                response.read_ns = 0
            if response.position and response.data is not None:
                response.ready = True
        self.release_ready()
        return all_of_them

    cdef int release_ready(self) except -1:
        """Write the responses that are next in turn and ready."""
        cdef PendingResponse response
        cdef list ready = []
        cdef bytes data
        if self.parts:
            if self.unread_ns or self.is_full():
                self.balance_input()
            return 0
        if self.responses is None and self.writing != WAITING:
            return 0
        for response in self.responses or ():
            if not response.ready:
                break
            ready.append(response.data)
            self.responses_size -= len(response.data)
        if ready:
            if len(ready) == len(self.responses):
                self.responses = None
            else:
                del self.responses[:len(ready)]
            if self.writing == WAITING:
                data = ready[0] if len(ready) == 1 else b"".join(ready)
                self.transmit(PyBytes_AS_STRING(data), len(data))
        if self.writing == LOST:
            return 0
        if self.responses is None and self.reading >= DISCARDING:
            self.finish()
        elif self.responses is None:
            self.set_writing(AT_ONCE)
            if self.reading == IDLE:
                self.moved_ns = mono_ns()  # from here on it is idle
            if self.invites:  # only now is the emitter told to send it
                self.invites, self.body_due = False, mono_ns() + self.intake.body_timeout
        if self.unread_ns or self.output_paused or self.responses is not None or self.held:
            self.balance_input()
        return 0

    cdef int balance_input(self) except -1:
        """Read no further while something is held back, the emitter does not read its responses, or too many of them wait."""
        cdef bint full = self.is_full()
        cdef bint pause = full or self.held
        if self.transport is None or self.transport.is_closing():
            return 0
        if self.held and not full and not self.queued:
            self.queued = True
            (self.intake.costly if self.held == HELD_RESPONSE else self.intake.working if self.held == HELD_WORK
             else self.intake.wanting if self.held == HELD_ROOM else self.intake.waiting).append(self)
            self.intake.await_turn()
        if pause and not self.unread_ns:
            self.unread_ns = mono_ns()
            self.transport.pause_reading()
        elif self.unread_ns and not pause:
            self.moved_ns = mono_ns()
            self.forgive(self.moved_ns - self.unread_ns)
            self.unread_ns = 0
            self.transport.resume_reading()
        return 0

    def pause_writing(self):
        """The emitter does not read its responses."""
        self.output_paused = True
        self.output_moves(mono_ns())
        self.balance_input()

    def resume_writing(self):
        """The emitter reads its responses again."""
        self.output_paused, self.output_due, self.moved_ns = False, 0, mono_ns()
        self.balance_input()

    def has_waiting(self):
        """Whether there are responses that have yet to be written."""
        return self.responses is not None or self.parts > 0

    def idle(self):
        """Whether nothing is under way: no part of a request, no response."""
        return self.reading == IDLE and self.writing == AT_ONCE and not self.held

    def lingered(self, int64_t now):
        """Return for how many ns all has been written here and only the emitter's end is awaited; 0 if that is not so."""
        done = self.writing == WRITTEN and self.transport.get_write_buffer_size() == 0
        return now - self.moved_ns if done else 0

    def expired(self, int64_t now):
        """Return what has taken too long: "" nothing, "idle", "head", "body", "responses" (to be read), "wait" or "end".

        No state of a connection is without a bound: where nothing is due here, it is waiting for its turn, or what is
        before it in this order is bounded.
        """
        cdef Intake intake = self.intake
        if not self.output_moves(now):
            return "responses"
        if self.writing == WAITING and self.waited_enough(now):
            return "wait"
        if self.reading >= DISCARDING:
            return "end" if self.writing == WRITTEN and not self.output_due and now - self.moved_ns > LINGER else ""
        if self.unread_ns:
            return ""
        if self.reading == HEAD:
            return "head" if now - self.head_ns > intake.header_timeout else ""
        if self.reading != IDLE:
            return "body" if now > self.body_due and not self.invites else ""
        if self.writing == WAITING or self.output_due:
            return ""
        return "idle" if now - self.moved_ns > intake.keepalive_timeout else ""

    def has_unread(self):
        """Whether something has come that is not read yet, as far as that is known (with TLS it is not)."""
        return self.stream is not None and self.stream.has_unread()

    cdef bint waited_enough(self, int64_t now) except -1:
        """Whether no client can be waiting for the next response, or what it depends on does not come."""
        if not self.ended_ns and self.unread_ns and peer_ended(self.descriptor()):  # it is not read, so its end was not seen
            self.ended_ns = now
        if self.ended_ns:
            return now - self.ended_ns > LINGER
        return self.is_stuck(now)

    def is_stuck(self, int64_t now):
        """Whether responses have waited too long since anything was read here, or since the emitter has sent its end.

        What it had sent before that may be much, and is read on while its responses leave.
        """
        if self.ended_ns:
            return now - max(self.moved_ns, self.ended_ns) > LINGER
        return now - max(self.moved_ns, self.response_due) > OVERDUE

    cdef bint output_moves(self, int64_t now) except -1:
        """Whether what was written leaves as it should: at the least rate, and never ``body_timeout`` behind that."""
        cdef int64_t acked
        if not self.output_paused and self.unwritten(now) == 0:
            if self.output_due and (self.reading >= DISCARDING or self.reading == IDLE):
                self.moved_ns = now  # from here on it has time to be read, or is idle
            self.output_due = 0
            return True
        acked = bytes_acked(self.descriptor())
        if self.output_due:
            self.output_due += (acked - self.acked) * NS_A_BYTE
        if not 0 < self.output_due < now + self.intake.body_timeout:
            self.output_due = now + self.intake.body_timeout
        self.acked = acked
        return now <= self.output_due

    cdef int64_t unwritten(self, int64_t now) except -1:
        """Return how many bytes the kernel did not take yet, or, where the connection might be closed, has not got rid of."""
        cdef int64_t count
        if self.stream is not None:
            count = self.stream.unwritten()
        else:
            count = self.transport.get_write_buffer_size()
        if count == 0 and self.responses is None and (
                self.reading >= DISCARDING or now - self.moved_ns > self.intake.keepalive_timeout):
            count = bytes_unacked(self.descriptor())
        return count

    def excuse(self, int64_t now, int64_t late):
        """For ``late`` ns until ``now`` this process could not read: that does not count as the emitter's time."""
        self.moved_ns = min(now, self.moved_ns + late)
        self.forgive(late)
        self.response_due += late
        if self.unread_ns:
            self.unread_ns += late
        if self.output_due:
            self.output_due += late
        if self.ended_ns:
            self.ended_ns = min(now, self.ended_ns + late)

    cdef void forgive(self, int64_t late) noexcept:
        """For ``late`` ns nothing was read: that is no time the emitter had for what it sends."""
        self.head_ns += late
        self.body_due += late
        self.body_slow += late

    def time_out(self, str detail):
        """Answer 408 and close."""
        self.fault(408, "timeout", detail)
        self.flush()

    def close_with(self, bytes response, bint lingering):
        """Write a response to nothing in particular, and close; ``lingering``: read on for a while, so that it is not lost."""
        self.emit(response)
        self.stop_reading(DISCARDING if lingering else ENDED)
        self.flush()
