"""What all emitters' connections of a worker share, and responses that have to wait.

``Intake.go_on`` goes round among the connections that are held back (see ingest.pxi), once in every event-loop iteration:
a piece of a large batch, packets, then a slice of one conversion, then costly responses. So no iteration takes longer the
more connections there are, and no connection waits for all that another has sent.
"""

HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"  # in English: no process sets a locale

cdef enum:
    MIN_FOR_BODIES = 256 << 20  # bytes of bodies on their way that a worker has room for in any case
    MAX_ENDED = 16          # bodies that are ended to make room for a read
    MAX_OUT = 64 << 10      # bytes of responses that are put together before they are written

cdef int64_t STALL = 1000000000   # ns that a body may send nothing before it is slow

# ns of one event-loop iteration. Together, and with what Poller takes, far below the 20 ms that a connection may wait.
cdef int64_t SLICE = 150000     # for the packets of one connection
cdef int64_t PACKETS = 2000000  # for all that are held back
cdef int64_t LOOP = 2000000     # for those that the loop reads from, not Poller (TLS)
cdef int64_t COSTLY = 500000    # for responses that Python makes

cdef int64_t BATCH_PIECE = 512 << 10  # bytes of a batch that are pushed in one iteration
cdef int64_t ROOM_WAIT = 2000000000  # ns that a batch waits for room in the ring

cdef enum Refusal:           # of a request, by its head
    FINE = 0
    BROKEN
    LIMITED
    NO_TOKEN
    NOT_STORED
    ENCODED
    NO_JSON
    BAD_KEY
    TOO_LONG
    UNEXPECTED

VALIDATIONS = {"none": 0, "schema": 1, "strict": 2}

cdef bytes NOSNIFF = b"X-Content-Type-Options: nosniff\r\n"
cdef bytes NO_STORE = b"Cache-Control: no-store\r\n"
cdef bytes NO_PAGE = b"Content-Security-Policy: default-src 'none'; frame-ancestors 'none'\r\n"
cdef bytes SAFETY = NOSNIFF + NO_STORE

cdef bytes ACCEPTED_HEAD = b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\n" + SAFETY + b"Date: "
cdef bytes ACCEPTED_BODY = b'{"status":"accepted","packetId":"'


def call_soon(callback):
    """Call it in the event loop's next iteration."""
    asyncio.get_running_loop().call_soon(callback)


@cython.final
cdef class Intake(AfterEvents):
    """What the emitters' connections of one worker share: the ring they push to, limits, time-outs, the responses' buffer.

    ``server``: the section of the configuration. ``check(body, strict=...)`` returns (messages, emitter hash) or raises
    PacketError. ``on_accepted()`` is called when packets were pushed, ``on_sync_wanted()`` when a sync would let responses leave
    or free space in the ring, ``on_not_written(errno)`` when packets could not be written: it is to call ``not_stored``.
    ``responds_after_sync``: responses leave when their packets are synced. ``remembers_keys``: ``keyed`` is kept.
    """

    cdef readonly PacketRing ring
    cdef readonly Counters counters
    cdef readonly RateLimiter limiter
    cdef readonly set connections
    cdef public bint draining          # every response is the last on its connection
    cdef public bint closed            # nothing is accepted any more
    cdef public int broken_storage     # errno of what keeps packets from being stored; 0: nothing
    cdef public bint open_to_all       # no token is asked for
    cdef public bint has_cors          # there are origins that get responses
    cdef bint responds_after_sync
    cdef bint holds                    # responses wait until their packets are written at least
    cdef Outbox outbox
    cdef Part fresh                    # what the responses in `out` are about
    cdef readonly dict keyed           # sequence -> `PendingResponse`, of packets with a key; None: it is not kept
    cdef list unsafe                   # connections with a `PendingResponse` that waits for its packet to be written, or synced
    cdef int validation
    cdef int64_t max_body, max_header
    cdef int64_t header_timeout, body_timeout, keepalive_timeout
    cdef readonly Py_ssize_t max_connections
    cdef public int64_t max_bodies     # bytes of bodies on their way, of all connections
    cdef readonly int64_t bodies       # as many as there are
    cdef public int64_t room_wait_ns   # see ROOM_WAIT
    cdef int64_t slow_from             # monotonic ns: before it no body is slow enough to be ended for others
    cdef object check                  # packet.check
    cdef object on_accepted
    cdef object on_sync_wanted
    cdef object on_not_written
    cdef uint64_t noise
    cdef Buffer out                    # the responses of one read
    cdef RequestHead head              # of the last packet, from any client: a template for new connections
    cdef int64_t dated_second
    cdef int64_t wall                  # ns: when the packet at hand was accepted
    cdef bytes date
    # what is held back, and what an event-loop iteration may take of it: see the module's text
    cdef object waiting                # connections that have had their slice
    cdef object working                # those with a conversion under way
    cdef object wanting                # those whose batch waits for room in the ring, in order
    cdef object costly                 # those whose next response Python makes
    cdef LargeBatch storing            # what is pushed in pieces, see batches.pxi; None: nothing
    cdef public int64_t piece_bytes    # see BATCH_PIECE
    cdef bint turn_awaited             # `go_on` will be called
    cdef IngestBase having_turn        # it may have a costly response made
    cdef bint going_round              # among those with packets: a large one may be taken
    cdef IngestBase first_for_room     # it may push, although others wait for room
    cdef public object later           # call_soon
    cdef public int64_t slice_ns, packets_ns, loop_ns, costly_ns
    cdef int64_t loop_left, costly_left  # of this iteration
    cdef public int64_t peak_ns        # of `go_on`, until it is set back

    def __cinit__(self, PacketRing ring, Counters counters, RateLimiter limiter, server, check, on_accepted,
                  on_sync_wanted=None, on_not_written=None, bint responds_after_sync=False, bint remembers_keys=False):
        self.ring, self.counters, self.limiter = ring, counters, limiter
        self.check, self.on_accepted, self.on_sync_wanted = check, on_accepted, on_sync_wanted
        self.responds_after_sync, self.on_not_written = responds_after_sync, on_not_written
        self.holds = responds_after_sync or not ring.file.direct
        self.keyed = {} if remembers_keys else None
        self.outbox = Outbox()
        self.validation = VALIDATIONS[server.validation]
        self.max_body, self.max_header = server.max_body, server.max_header
        self.header_timeout = <int64_t>(server.header_timeout * 1e9)
        self.body_timeout = <int64_t>(server.body_timeout * 1e9)
        self.keepalive_timeout = <int64_t>(server.keepalive_timeout * 1e9)
        self.max_connections = server.max_connections
        self.max_bodies = max(MIN_FOR_BODIES, 2 * self.max_body)
        self.connections, self.unsafe = set(), []
        self.waiting, self.working, self.wanting, self.costly = deque(), deque(), deque(), deque()
        self.slice_ns, self.packets_ns, self.loop_ns, self.costly_ns = SLICE, PACKETS, LOOP, COSTLY
        self.loop_left, self.costly_left = LOOP, COSTLY
        # What is published is answered by where it lies in the ring: a batch has to lie there in one piece.
        self.room_wait_ns, self.piece_bytes = ROOM_WAIT, FOREVER if remembers_keys else BATCH_PIECE
        self.later = call_soon
        self.open_to_all = True
        self.noise = int.from_bytes(os.urandom(8), "little")
        make_room(&self.out, MAX_OUT)
        self.date = b""

    def __dealloc__(self):
        release(&self.out)

    cdef bytes take_out(self):
        data = PyBytes_FromStringAndSize(<char *>self.out.data, self.out.end)
        self.out.end = 0
        return data

    cdef void make_id(self, int64_t wall, unsigned char *packet_id) noexcept nogil:
        self.noise += GOLDEN
        make_uuid7(wall, mix(self.noise), packet_id)

    cdef bytes date_of(self, int64_t wall):
        """Return a second as HTTP writes it."""
        cdef int64_t second = wall // 1000000000
        if second != self.dated_second:
            self.dated_second = second
            self.date = time.strftime(HTTP_DATE, time.gmtime(second)).encode()
        return self.date

    def http_date(self):
        """Return the present second as HTTP writes it."""
        return self.date_of(wall_ns())

    cdef Refusal judge(self, IngestBase connection, RequestHead head, Filled *filled, int64_t *wait) except? BROKEN:
        """Decide from its head alone whether a request may go on: limits, then the token, then the rest. ``wait``: of LIMITED."""
        cdef Span key
        if head.status:
            return BROKEN
        if unlikely(not head.is_log and not head.brings):
            return TOO_LONG if filled.content_length > API_BODY else UNEXPECTED if head.expects_other else FINE
        connection.wait_seconds = min(head.wait, MAX_WAIT)
        if unlikely(self.limiter.active) and not connection.admitted:
            wait[0] = self.limiter.admit(connection.client, connection.moved_ns)
            if wait[0]:
                return LIMITED
            connection.admitted = True  # once, also if the response has to wait
        if unlikely(not self.open_to_all):
            if not (filled.credentials.n and connection.is_authorized(filled.credentials.p[:filled.credentials.n])):
                return NO_TOKEN
        if unlikely(self.closed or self.broken_storage):
            return NOT_STORED
        if unlikely(head.brings):  # its type and encoding are looked at with its body
            return TOO_LONG if filled.content_length > self.max_body else UNEXPECTED if head.expects_other else FINE
        if head.encoded and head.route is None:
            return ENCODED
        if not head.json:
            return NO_JSON
        if head.keys:
            key = unquoted_key(filled.key)
            if head.keys > 1 or not key.n:
                return BAD_KEY
            memcpy(connection.key, key.p, key.n)
            connection.key_length = <int>key.n
        if filled.content_length > self.max_body:
            return TOO_LONG
        return UNEXPECTED if head.expects_other else FINE

    def compose(self, int status, str reason, bytes headers, bytes body, *, bint close, bint head_only=False,
                bint old_client=False):
        """Return a whole response. ``headers``: lines each ended by CR LF, Content-Type among them.

        204 and 304 have no body, and no length of one.
        """
        parts = [b"HTTP/1.1 %d %s\r\n" % (status, reason.encode()), headers, NOSNIFF,
                 NO_STORE if b"Cache-Control:" not in headers else b"",
                 NO_PAGE if b"Content-Security-Policy:" not in headers else b"", b"Date: ", self.http_date(), b"\r\n"]
        cdef bint bodiless = status == 204 or status == 304 or status < 200
        if not bodiless:
            parts.append(b"Content-Length: %d\r\n" % len(body))
        if close:
            parts.append(b"Connection: close\r\n")
        elif old_client:
            parts.append(b"Connection: keep-alive\r\n")
        parts.append(b"\r\n")
        if not head_only and not bodiless:
            parts.append(body)
        return b"".join(parts)

    def go_on(self):
        """Read on from the connections that are held back, for as long as they may take of this event-loop iteration."""
        cdef int64_t began = mono_ns()
        cdef LargeBatch storing = self.storing  # which it may cease to be
        self.turn_awaited = False
        self.loop_left, self.costly_left = self.loop_ns, self.costly_ns
        try:
            if storing is not None and self.broken_storage:
                self.give_up_storing()
            elif storing is not None:
                storing.push_piece()
            if self.closed:
                self.go_round(self.wanting, began + self.packets_ns, False)
            self.go_round(self.waiting, began + self.packets_ns, False)
            self.go_round(self.working, 0, False)
            self.go_round(self.costly, mono_ns() + self.costly_ns, True)
        finally:
            self.loop_left = self.loop_ns  # what was held back has had its own time: all this is for new connections
            self.await_turn()
            self.events_over()
            self.peak_ns = max(self.peak_ns, mono_ns() - began)

    def give_up_storing(self):
        """Withdraw the large batch that is being stored, if there is one."""
        cdef LargeBatch storing = self.storing
        if storing is not None:
            storing.withdraw()
            self.counters.words[STORAGE] += 1

    @property
    def holds_back(self):
        """Whether there are connections with requests that wait for their turn."""
        return bool(self.storing is not None or self.waiting or self.working or self.costly or (self.closed and self.wanting))

    cdef int go_round(self, queue, int64_t until, bint costly) except -1:
        cdef IngestBase connection
        while queue:
            connection = queue.popleft()
            connection.queued = False
            self.having_turn, self.going_round = (connection if costly else None), not costly
            try:
                connection.read_on()
            except Exception:
                connection.transport.abort()
                raise
            finally:
                self.having_turn, self.going_round = None, False
            if mono_ns() >= until:
                break
        return 0

    def look_for_room(self):
        """Have batches that wait for room try again, in order, unless the first would not be done with; to be called often."""
        cdef IngestBase connection
        cdef int64_t until = mono_ns() + self.packets_ns
        cdef int found
        if not self.wanting:
            return
        try:
            while self.wanting and mono_ns() < until:
                connection = self.wanting[0]
                if connection.held == HELD_ROOM and not (
                        self.closed or self.broken_storage or mono_ns() >= connection.room_due):
                    found = self.ring.room_for(connection.batch_size, 0)
                    if found == RING_FULL:
                        break
                    if found == NOT_WRITTEN:  # what was pushed before it, for those in front, is gone
                        self.write_failed(self.ring.file.failed)
                self.first_for_room = connection
                self.go_round(self.wanting, 0, False)
        finally:
            self.first_for_room = None
            self.events_over()

    cdef int await_turn(self) except -1:
        if not self.turn_awaited and (self.storing is not None or self.waiting or self.working or self.costly):
            self.turn_awaited = True
            self.later(self.go_on)
        return 0

    # ---- responses that wait for the disk

    @property
    def held(self):
        """How many reads' responses wait, and connections with a ``PendingResponse`` that does."""
        return self.outbox.end - self.outbox.first + len(self.unsafe)

    cdef int64_t safe(self) noexcept:
        """Return the position up to which packets are as safe as they have to be for their responses to leave."""
        return self.ring.synced if self.responds_after_sync else self.ring.file.written

    cdef int events_over(self) except -1:
        """Write what was accepted, and let the responses leave."""
        cdef int failed
        if not self.holds:
            return 0
        failed = self.ring.write()
        if unlikely(failed):
            self.write_failed(failed)
        if self.responds_after_sync and self.outbox.first < self.outbox.end or self.ring.wants_sync:
            if self.on_sync_wanted is not None:
                self.on_sync_wanted()
        self.let_leave()
        return 0

    cdef int write_failed(self, int code) except -1:
        """Packets could not be written, and are gone. They were not acknowledged."""
        if self.on_not_written is None:
            raise OSError(code, os.strerror(code))
        self.on_not_written(code)
        return 0

    cdef int let_leave(self) except -1:
        """Have all responses leave whose packets are safe."""
        cdef Part part
        cdef IngestBase connection
        cdef int64_t position = self.safe(), now = mono_ns()
        cdef int64_t *counters = self.counters.words
        if unlikely(len(self.unsafe)):
            connections, self.unsafe = deque(self.unsafe), []
            try:
                while connections:
                    connection = connections.popleft()
                    connection.awaits_sync = False
                    if not connection.release(position):
                        connection.await_sync()  # it has responses whose packets become safe later
            finally:
                self.unsafe += connections
        while self.outbox.has_until(position):
            part = self.outbox.take()
            counters[ACCEPTED] += part.packets
            counters[MESSAGES_ACCEPTED] += part.messages
            counters[BYTES_ACCEPTED] += part.body_bytes
            if unlikely(part.request):
                self.counters.count_request(part.request, part.messages)
            try:
                if part.connection != NULL:
                    if part.packets:
                        observe(self.counters.ingest, now - part.read_ns, part.packets)
                    (<IngestBase>part.connection).leave(self.outbox.data(), part.size)
            finally:
                self.outbox.taken(&part)
        return 0

    def synced(self):
        """More packets are on stable storage: their responses may leave."""
        self.let_leave()

    def response_of(self, int64_t position):
        """Return between which positions the packets are of the response that tells of the one that ends at ``position``."""
        cdef Py_ssize_t at
        cdef int64_t begin = self.safe()
        for at in range(self.outbox.first, self.outbox.end):
            if self.outbox.parts[at].position >= position:
                return begin, self.outbox.parts[at].position
            begin = self.outbox.parts[at].position
        return begin, position

    def not_stored(self, int64_t position, int status, str reason, bytes headers, bytes body, *, int64_t end=FOREVER):
        """What was pushed behind ``position``, up to ``end``, was withdrawn: clients that wait for it get this response instead.

        At once, unless responses that come before it on their connection have to wait on. Return how many packets that were;
        a batch, which has its own response for that, counts as one.
        """
        cdef IngestBase connection
        cdef PendingResponse waiting
        cdef Part part, kept
        cdef Outbox before = self.outbox, leaving = Outbox(), to
        cdef int64_t packets = 0
        cdef bytes response
        cdef set behind = set()  # connections with responses that wait on
        cdef LargeBatch storing = self.storing  # which it ceases to be
        if storing is not None and end == FOREVER:
            storing.withdraw()
            packets += 1
        for connection in self.unsafe:
            for waiting in connection.responses or ():
                if position < waiting.position <= end and not waiting.ready:
                    waiting.take(waiting.compose(status, reason, headers, body) if waiting.otherwise is None
                                 else waiting.otherwise(waiting))
                    waiting.ready = True
                    waiting.read_ns = 0
        self.outbox = Outbox()
        while before.first < before.end:
            part = kept = before.take()
            response = before.data()[:part.size]
            to = self.outbox
            if position < part.position <= end:
                if part.connection == NULL or <object>part.connection not in behind:
                    to = leaving
                packets += 1 if part.batch else part.packets
                if part.packets and part.connection != NULL:
                    response = self.compose(status, reason, headers, body, close=False) * (part.packets - 1)
                    response += self.compose(status, reason, headers, body, close=part.close)
                    (<IngestBase>part.connection).responses_size += len(response) - part.size
                kept.position, kept.size = position, len(response)
                kept.packets = kept.messages = kept.body_bytes = kept.request = 0
            if to is not leaving and part.connection != NULL:
                behind.add(<object>part.connection)
            to.add(&kept, PyBytes_AS_STRING(response))
            before.taken(&part)
        while leaving.has_until(FOREVER):
            part = leaving.take()
            try:
                if part.connection != NULL:
                    (<IngestBase>part.connection).leave(leaving.data(), part.size)
            finally:
                leaving.taken(&part)
        self.let_leave()
        return packets

    cdef bint make_room(self, IngestBase coming, int64_t room) except -1:
        """End slow bodies until no more than ``room`` bytes are kept; say whether that was possible.

        First goes what has kept most memory for longest without moving: bytes times time. One that moves as it should is
        never cut off, else many that are under way would end each other, and none would arrive.
        """
        cdef IngestBase connection, slowest
        cdef int64_t now = coming.moved_ns, next_slow
        cdef double waste, most
        for _ in range(MAX_ENDED):
            if self.bodies <= room:
                return True
            if now < self.slow_from:
                return False
            slowest, most, next_slow = None, 0, now + STALL
            for connection in self.connections:
                if connection.body.end and connection.reading != WHOLE and connection is not coming:
                    waste = <double>(now - connection.body_slow) * connection.body.end
                    if waste > most:
                        slowest, most = connection, waste
                    elif waste <= 0:
                        next_slow = min(next_slow, connection.body_slow)
            if slowest is None:
                self.slow_from = next_slow
                return False
            coming.flush_to_responses()  # the buffer is common
            slowest.time_out("the request's body came slowly, and others needed its memory")
        return self.bodies <= room


cdef int write_accepted(Intake intake, const char *packet_id, int id_length, uint32_t messages, bytes extra,
                        bint keep_alive, bint old_client) except -1:
    """Put ``202 {"status":"accepted",...}`` into the common buffer."""
    cdef char[32] count
    cdef Py_ssize_t count_length = 0
    cdef bytes date = intake.date_of(intake.wall)
    cdef char *out
    make_room(&intake.out, 512 + (len(extra) if extra is not None else 0))
    out = <char *>intake.out.data + intake.out.end
    if intake.validation:
        count_length = append_number(count, messages) - count
    out = append(out, PyBytes_AS_STRING(ACCEPTED_HEAD), len(ACCEPTED_HEAD))
    out = append(out, PyBytes_AS_STRING(date), len(date))
    if extra is not None:
        out = append(out, b"\r\n", 2)
        out = append(out, PyBytes_AS_STRING(extra), len(extra) - 2)
    out = append(out, b"\r\nContent-Length: ", 18)
    out = append_number(out, 33 + id_length + 1 + (12 + count_length if count_length else 0) + 1)
    if not keep_alive:
        out = append(out, b"\r\nConnection: close", 19)
    elif old_client:
        out = append(out, b"\r\nConnection: keep-alive", 24)
    out = append(out, b"\r\n\r\n", 4)
    out = append(out, PyBytes_AS_STRING(ACCEPTED_BODY), 33)
    out = append(out, packet_id, id_length)
    if count_length:
        out = append(out, b'","messages":', 13)
        out = append(out, count, count_length)
        out = append(out, b"}", 1)
    else:
        out = append(out, b'"}', 2)
    intake.out.end = <uchar *>out - intake.out.data
    return 0


@cython.final
cdef class PendingResponse:
    """A response that has its place in the order of its connection, and may have to wait."""

    cdef bytes data
    cdef bint ready
    cdef bint close, head_only, old_client  # what the request asks of its response; see Intake.compose
    cdef bytes extra
    cdef int64_t position              # of the ring, that a sync has to reach first; 0: none
    cdef int64_t read_ns               # when its request was read, monotonic; 0: it is not, or no longer, to be counted
    cdef object otherwise              # called with this if its packets are withdrawn: returns what it is then; None: as others
    cdef IngestBase connection

    def complete(self, bytes data):
        """The response is known now."""
        if not self.ready:
            self.take(data)
            self.ready = True
            self.connection.release_ready()

    def complete_after_sync(self, bytes data):
        """The response is known, and true once its packet is synced."""
        if self.position <= self.connection.intake.safe():
            self.complete(data)
        elif not self.ready:
            self.take(data)

    cdef take(self, bytes data):
        self.connection.responses_size += len(data) - (len(self.data) if self.data is not None else 0)
        self.data = data

    def compose(self, int status, str reason, bytes headers, bytes body):
        """Return the response's bytes; see ``Intake.compose``."""
        if self.extra is not None:
            headers += self.extra
        return self.connection.intake.compose(status, reason, headers, body, close=self.close,
                                              head_only=self.head_only, old_client=self.old_client)
