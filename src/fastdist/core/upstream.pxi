"""Connections to analyzers: they send from the waiting list of their pool (pool.pxi), and read replies.

A reply counts as soon as its head is read; a 2xx, once its request is written whole as well, any other, once the
beginning of its body is there, which dead letters keep. Failures are told to the pool's owner as lists of handles, and it
decides where they go next; after any failure on a connection it is closed.
"""

# Statuses besides 3xx and 5xx that say nothing of the packet: of the time ...
LATER = frozenset({408, 425, 429})
# ... or of the endpoint: a wrong path, an expired credential. Another analyzer may well take the packet.
OF_THE_ENDPOINT = frozenset({401, 403, 404, 405, 407, 410, 421, 426, 451})
PHRASES = {int(status): status.phrase for status in HTTPStatus}
LOCATION = re.compile(rb"[^?#]{0,200}")  # what is shown of one: a query may hold what is secret

cdef int64_t STALE_NS = 1000000000
cdef int64_t RESPONSE_NS = 1000000000  # that the body of a reply is awaited before its request goes elsewhere

cdef enum:
    MAX_REPLY_HEAD = 65536
    USUAL_ROOM = 1024            # bytes
    LOOKS = 16                   # at a connection's progress, in the time it may make none
    MAX_INTERIM = 32            # 1xx before a reply: each is progress, so that they could go on for ever
    MAX_RESPONSE = 512          # bytes of the body of a reply that is no 2xx: what is kept of it


cdef class ReplyBase(Connection):
    """A connection to an analyzer: sends requests, reads replies.

    Outcomes reach the pool's owner (``PoolOwner`` in the stub). Whatever goes wrong there or here, an error of the program, the
    packets go again.
    """

    cdef readonly PoolBase pool
    cdef Group *groups           # a circle of `depth` requests in flight
    cdef int depth               # what `pool.pipeline` was when it was opened: a reload may change that
    cdef int first_group, group_count
    cdef Group early             # answered with a 2xx before it was written whole; without packets: no such reply
    cdef int64_t given           # bytes to be written since the connection was opened
    cdef Group denied            # answered with another status, and the body is awaited; without packets: no such reply
    cdef ReplyHead denied_head   # of that reply
    cdef bytes response          # what was read of its body, up to MAX_RESPONSE
    cdef int64_t denied_ns       # when its head was read
    cdef int64_t body_left
    cdef ChunkedBody chunks
    cdef bytes usual_chunks      # of the last body that came whole
    cdef bint keep_alive         # as the last reply says
    cdef int interim             # how many 1xx have come before the reply that is awaited
    cdef int send_error          # errno: a request could not be sent
    cdef bint listed             # in pool.idle
    cdef ReplyHead head          # the last one: a template
    cdef UnfinishedHead unfinished  # the head that is being read
    cdef Buffer partial          # of it
    cdef Py_ssize_t scanned      # of it, by find_head_end
    cdef readonly int64_t replies
    cdef readonly int64_t used_ns        # monotonic: last attempt or reply
    cdef int64_t waiting_since
    cdef int64_t moved, moved_ns         # bytes both ways, and when they were last seen to have become more
    cdef int64_t looked_ns
    cdef int64_t begun_ns        # when the first byte of the present reply was read; 0: none has come

    def __cinit__(self, PoolBase pool, *args, **kwargs):
        self.life, self.pool = ANALYZER_LIFE, pool
        self.depth = pool.pipeline
        self.groups = <Group *>calloc(self.depth, sizeof(Group))
        if self.groups == NULL:
            raise MemoryError
        self.used_ns = mono_ns()
        self.usual_chunks = self.response = b""

    def __dealloc__(self):
        free(self.groups)
        release(&self.partial)

    # ---- states (connection_life.pxi)

    cdef int send_as(self, Sending state) except -1:
        """Enter a state of writing; what takes no request is not to be among those that do."""
        self.set_writing(state)
        if state != OPEN:
            self.withdraw()
        return 0

    cdef int break_off(self, error) except -1:
        self.pool.owner.went_wrong(error)
        self.close_after("an error in fastdist, in the states of a connection", False)
        return 0

    cdef bint has_room(self) noexcept:
        return self.writing == OPEN and self.group_count + (self.reading != REPLY_HEAD) < self.depth

    def in_flight(self):
        """Return how many requests wait here for their reply, or for being written whole."""
        return self.group_count + (self.early.packets > 0) + (self.denied.packets > 0)

    def is_early(self):
        """Whether a request was answered with a 2xx and is not written whole yet."""
        return self.early.packets > 0

    def offer(self):
        """Put the connection at the disposal of its pool (if it has room and is not already)."""
        if self.has_room() and not self.listed:
            self.listed = True
            self.pool.idle.append(self)

    def withdraw(self):
        """Take the connection out of its pool's idle list."""
        if self.listed:
            self.listed = False
            if self.pool.idle[len(self.pool.idle) - 1] is self:  # nearly always: the last used is used first
                self.pool.idle.pop()
            else:
                self.pool.idle.remove(self)

    def overdue(self, int64_t now, int64_t timeout):
        """Whether a reply, the rest of one or the end of a request is awaited, and nothing was taken or sent for longer
        than ``timeout`` ns.

        What the analyzer's system has acknowledged counts, since a large request may take long; and what it has sent and
        was not read yet, since this process may be late.
        """
        cdef int64_t moved, silent = now - max(self.waiting_since, self.moved_ns)
        if self.early.packets and self.stream is None:
            self.settle_early(now)  # nothing else says how far it is written
        if self.denied.packets and now - self.denied_ns > RESPONSE_NS:
            self.settle_denied()
        if self.writing == CLOSED or (self.in_flight() == 0 and self.reading == REPLY_HEAD):
            return False
        if silent <= timeout and now - max(self.waiting_since, self.looked_ns) < timeout // LOOKS:
            return False
        self.looked_ns = now
        moved = self.bytes_moved()
        if moved == self.moved:
            return silent > timeout
        self.moved, self.moved_ns = moved, now
        return False

    def is_endless(self, int64_t now, int64_t limit):
        """Whether a reply began more than ``limit`` ns ago and has not ended, whatever progress it makes."""
        return self.begun_ns != 0 and now - self.begun_ns > limit and not self.early.packets

    def close_endless(self, str error):
        """Close the connection: its reply does not end. If its head is there, it was a reply, and that is no failure."""
        self.close_after(error if self.reading == REPLY_HEAD else "", True)

    cdef int64_t bytes_moved(self) except -1:
        return bytes_moved(self.descriptor())

    def excuse(self, int64_t now, int64_t late):
        """Count ``late`` ns before ``now`` not as time that the analyzer had: no check ran."""
        self.moved_ns = min(now, max(self.waiting_since, self.moved_ns) + late)
        if self.begun_ns:
            self.begun_ns = min(now, self.begun_ns + late)

    def retire(self):
        """Send no more requests, and close the connection when no reply is awaited: no request is cut off."""
        self.leave()
        if self.in_flight() == 0 and self.reading == REPLY_HEAD:
            self.close_after("", False)

    cdef int leave(self) except -1:
        if self.writing < LEAVING:
            self.send_as(LEAVING)
        return 0

    cdef int send_waiting(self, int64_t now) except -1:
        """Send as many requests as there is room for and are due, in one write."""
        cdef PoolBase pool = self.pool
        cdef Group *group
        cdef int made = 0, i
        cdef int64_t room = 0
        cdef Pieces pieces
        cdef char *start
        if self.group_count == 0 and self.reading == REPLY_HEAD:
            self.waiting_since = now
        while pool.waiting and self.has_room() and pool.due(now):
            group = &self.groups[(self.first_group + self.group_count) % self.depth]
            if not pool.form(group, now):
                break
            pool.leaves(group, now)
            pool.sent_ns = now
            room += pool.room_for(group)
            self.group_count += 1
            made += 1
        if made == 0:
            return 0
        start = <char *>malloc(room)
        try:
            if start == NULL:
                raise MemoryError
            begin_pieces(&pieces, start)
            for i in range(self.group_count - made, self.group_count):
                group = &self.groups[(self.first_group + i) % self.depth]
                pool.write_request(group, &pieces, now)
                group.end = self.given + size_of_pieces(&pieces)
            self.given += size_of_pieces(&pieces)
            if not self.has_room():
                self.withdraw()
            self.used_ns = now
            end_pieces(&pieces)
            self.transmit_pieces(&pieces)
            if unlikely(self.send_error):
                self.take_back(made)
        except Exception as error:  # how much of it is written is unknown: nothing may follow it
            pool.owner.went_wrong(error)
            self.close_after("an error in fastdist, when it sent a request", False)
        finally:
            free(start)
        return made

    cdef int send_failed(self, int code) except -1:
        self.send_error = code
        return 0

    cdef int take_back(self, int made) except -1:
        """The last requests could not be sent. Replies to those before may have come and be unread: they count."""
        cdef list requests = []
        self.leave()
        if made == self.group_count and self.reading == REPLY_HEAD:  # what may be there is no reply to these
            return self.stream.fail(self.send_error)
        for _ in range(made):
            self.group_count -= 1
            requests.append(self.pool.dissolve(&self.groups[(self.first_group + self.group_count) % self.depth]))
        for handles in requests:
            self.pool.hand_over(self.pool.owner.not_sent, handles)
        return 0

    # ---- replies

    cdef int receive(self, const uchar *p, Py_ssize_t n) except -1:
        """Take in what the analyzer sent."""
        try:
            self.take_in(p, n)
        except Exception as error:
            self.pool.owner.went_wrong(error)
            self.close_after("an error in fastdist, when it dealt with a reply", False)
        return 0

    cdef int take_in(self, const uchar *p, Py_ssize_t n) except -1:
        cdef int64_t now = mono_ns()
        cdef Buffer buffer
        if self.writing == CLOSED:
            return 0
        self.used_ns = now
        if self.begun_ns == 0:
            self.begun_ns = now
        if likely(self.partial.end == 0):
            self.read_replies(p, n, now)
            return self.go_on(now)
        keep(&self.partial, p, n)
        buffer = self.partial
        self.partial.data = NULL
        release(&self.partial)
        try:
            self.read_replies(buffer.data, buffer.end, now)
        finally:
            release(&buffer)
        return self.go_on(now)

    cdef int go_on(self, int64_t now) except -1:
        """Send and claim more, if there is room for it now."""
        if self.writing == CLOSED:
            return 0
        if self.has_room():
            if self.pool.waiting and not self.pool.paused:
                self.send_waiting(now)
                if self.pool.waiting and self.has_room():
                    self.pool.owner.wake(self.pool)  # else its time may pass without a check
            self.offer()
        if self.pool.ring.has_unclaimed() or self.pool.wanted or self.pool.ring.file.noted_count:  # marks to be written
            self.pool.owner.schedule()
        return 0

    cdef int read_replies(self, const uchar *p, Py_ssize_t n, int64_t now) except -1:
        cdef const uchar *end = p + n
        while p < end and self.writing != CLOSED:
            if self.reading == REPLY_HEAD:
                p = self.read_head(p, end, now)
            elif self.reading == REPLY_LENGTH:
                p = self.read_body(p, end, now)
            elif self.reading == REPLY_CHUNKED:
                p = self.begin_chunks(p, end, now)
            elif self.reading == REPLY_CHUNKS:
                p = self.read_chunks(p, end, now)
            else:
                p = self.read_to_close(p, end)
            if unlikely(self.denied.packets and len(self.response) == MAX_RESPONSE):
                self.settle_denied()
        return 0

    cdef int keep_response(self, const uchar *p, Py_ssize_t n) except -1:
        """Keep the beginning of the body of a reply that is no 2xx."""
        if unlikely(self.denied.packets):
            self.response += p[:min(n, MAX_RESPONSE - len(self.response))]
        return 0

    @cython.final
    cdef inline const uchar *read_body(self, const uchar *p, const uchar *end, int64_t now) except NULL:
        cdef Py_ssize_t n = min(self.body_left, end - p)
        self.keep_response(p, n)
        self.body_left -= n
        if self.body_left == 0:
            self.reply_over(now)
        return p + n

    cdef const uchar *read_to_close(self, const uchar *p, const uchar *end) except NULL:
        """Read what comes until the connection's end; OVER: what no request asked for."""
        self.keep_response(p, end - p)
        return end

    cdef const uchar *begin_chunks(self, const uchar *p, const uchar *end, int64_t now) except NULL:
        """Read a chunked body. An analyzer nearly always says the same: what was read before needs no reading."""
        cdef const uchar *start = p
        cdef Py_ssize_t n = len(self.usual_chunks)
        if n and self.denied.packets == 0 and n <= end - p and memcmp(p, PyBytes_AS_STRING(self.usual_chunks), n) == 0:
            self.reply_over(now)
            return p + n
        self.set_reading(REPLY_CHUNKS)
        self.chunks.begin(INT64_MAX, MAX_REPLY_HEAD)
        p = self.read_chunks(p, end, now)
        if self.reading != REPLY_CHUNKS and p - start <= USUAL_ROOM:  # it came whole
            self.usual_chunks = start[:p - start]
        return p

    cdef const uchar *read_chunks(self, const uchar *p, const uchar *end, int64_t now) except NULL:
        cdef Span piece
        cdef int event = CHUNK_MORE
        while p < end and event < CHUNK_END:
            event = self.chunks.read(&p, end, &piece)
            if event == CHUNK_DATA:
                self.keep_response(piece.p, piece.n)
        if event == CHUNK_END:
            self.reply_over(now)
        elif event > CHUNK_END:
            self.close_after("a reply whose chunks are broken", False)
        return p

    cdef const uchar *read_head(self, const uchar *p, const uchar *end, int64_t now) except? NULL:
        """Read the head at ``p``, act on it, and return where it ends (``end`` when it is not whole yet)."""
        cdef ReplyHead head = self.head
        cdef Group group
        cdef Filled filled
        cdef Py_ssize_t length
        if unlikely(self.early.packets):
            self.settle_early(now)
            if self.writing == CLOSED:
                return end
        if self.group_count == 0 or self.early.packets:  # nothing is sent yet of what is behind a request not written whole
            self.pool.unasked(p[:min(end - p, 100)])
            self.close_after("a second reply before its request was written" if self.early.packets else "", True)
            return end
        length = head.matches(p, end - p, &filled) if head is not None else 0
        if length == 0:
            length = find_head_end(p, end - p, &self.scanned, False)
            if length == HEAD_UNFINISHED:
                return self.read_unfinished(p, end)
            head = ReplyHead(p[:length])
            head.matches(p, length, &filled)
        self.scanned = 0
        self.unfinished = None
        if unlikely(length > MAX_REPLY_HEAD or head.fault is not None):
            self.close_after("a reply that is not HTTP", True)
            return end
        if head.status < 200:
            self.interim += 1
            self.begun_ns = 0
            if self.interim > MAX_INTERIM:
                self.close_after("too many interim replies (1xx)", True)
            return p + length
        self.interim = 0
        group = self.groups[self.first_group]
        self.first_group = (self.first_group + 1) % self.depth
        self.group_count -= 1
        self.replies += 1
        self.keep_alive = head.keep_alive
        if head.status == 204 or head.status == 304:
            self.set_reading(REPLY_LENGTH)
            self.body_left = 0
        elif head.chunked:
            self.set_reading(REPLY_CHUNKED)
            if self.chunks is None:
                self.chunks = ChunkedBody(True)
        elif filled.content_length >= 0:
            self.set_reading(REPLY_LENGTH)
            self.body_left = filled.content_length
        else:
            self.set_reading(REPLY_TO_CLOSE)
            self.keep_alive = False
        if not self.keep_alive:
            self.leave()
        if unlikely(head.status >= 300):
            self.denied, self.denied_head, self.denied_ns = group, head, now
            if self.reading == REPLY_LENGTH and self.body_left == 0:
                self.settle_denied()
        elif likely(self.is_written(&group)):
            self.pool.settle(&group, now)
        else:
            self.early = group
            if self.writing == OPEN:
                self.send_as(EARLY)
        if length <= TEMPLATE_ROOM:
            self.head = head
        if not self.keep_alive:
            self.last_reply()
        if self.reading == REPLY_LENGTH and self.body_left == 0:
            self.reply_over(now)
        return p + length

    cdef const uchar *read_unfinished(self, const uchar *p, const uchar *end) except? NULL:
        """Keep a head whose end is not there, if it can still become one; return ``end``."""
        cdef Py_ssize_t n = end - p
        if self.unfinished is None:
            self.unfinished = UnfinishedHead(True)
        if n > MAX_REPLY_HEAD or self.unfinished.feed(p[self.unfinished.seen:n]) is not None:
            self.close_after("a reply that is not HTTP", True)
        else:
            keep(&self.partial, p, n)
        return end

    cdef int settle_denied(self) except -1:
        """Tell of a reply that is no 2xx: whether it speaks of the packet or of the analyzer."""
        cdef PoolBase pool = self.pool
        cdef Group group = self.denied
        cdef ReplyHead head = self.denied_head
        cdef bytes response = self.response
        cdef list handles = pool.dissolve(&group)
        self.denied.packets, self.denied_head, self.response = 0, None, b""
        owner, status = pool.owner, head.status
        if (status == 429 or status == 503) and head.retry_after is not None:
            value = head.retry_after.decode("latin-1")
            told = pool.hand_over(owner.paused_for, handles, status, value, response=response)
        elif status >= 500 or status in LATER or status < 400 or status in OF_THE_ENDPOINT:
            error = f"HTTP {status}" if status >= 500 or status in LATER else in_words(status, head.location)
            told = pool.hand_over(owner.failed, handles, error, counted=True, status=status, response=response)
        else:
            told = pool.hand_over(owner.refused, handles, status, batch=bool(group.batch), response=response)
        if not told:
            self.close_after("", False)
        return 0

    cdef int reply_over(self, int64_t now) except -1:
        """A reply was read to its end: the connection is free for the next, unless the analyzer closes it."""
        if unlikely(self.denied.packets):
            self.settle_denied()
        self.set_reading(REPLY_HEAD if self.keep_alive else REPLY_OVER)
        return self.between_replies(now)

    cdef int between_replies(self, int64_t now) except -1:
        """No reply is being read: wait for the next, or close behind the last, once its request is written whole."""
        self.waiting_since, self.begun_ns = now, 0
        if self.writing == LEAVING and self.in_flight() == 0:
            self.close_after("", False)
        return 0

    cdef int last_reply(self) except -1:
        """No reply follows the one that has come: the requests behind it will not be looked at."""
        self.keep_alive = False
        self.leave()
        for handles in reversed(self.take_unanswered()):
            self.pool.hand_over(self.pool.owner.not_sent, handles)
        return 0

    cdef list take_unanswered(self):
        """Take out the requests that wait for their reply; return the handles of each."""
        cdef list requests = []
        while self.group_count:
            requests.append(self.pool.dissolve(&self.groups[self.first_group]))
            self.first_group = (self.first_group + 1) % self.depth
            self.group_count -= 1
        return requests

    # ---- replies that came before their request was written whole

    cdef bint is_written(self, Group *group) except -1:
        if likely(self.stream is not None):
            return not self.stream.over and self.given - self.stream.unwritten() >= group.end
        # One that is about to be closed may have thrown away what it had.
        return not self.transport.is_closing() and self.given - self.transport.get_write_buffer_size() >= group.end

    cdef int flushed(self) except -1:
        """More is written."""
        return self.settle_early(mono_ns()) if self.early.packets else 0

    cdef int settle_early(self, int64_t now) except -1:
        """Settle the request that was answered early, if it is written whole by now, and go on."""
        cdef Group group = self.early
        if not self.is_written(&group):
            return 0
        self.early.packets = 0
        if self.writing == EARLY:
            self.send_as(OPEN)
        self.pool.settle(&group, now)
        if self.reading == REPLY_HEAD or self.reading == REPLY_OVER:
            self.between_replies(now)
        return self.go_on(now)

    def close_after(self, str error, bint counted):
        """Close the connection. With an ``error`` the first request in flight failed; those behind it were not looked at.

        If that has its reply, but not the beginning of the body, the reply says what becomes of it.
        """
        cdef list requests
        if self.writing == CLOSED:
            return
        self.send_as(CLOSED)
        if self.chunks is not None:
            self.chunks.close()
        requests = self.take_unanswered()
        if self.early.packets:
            requests.insert(0, self.pool.dissolve(&self.early))
            self.early.packets = 0
        failed = requests.pop(0) if error and requests and not self.denied.packets else None
        try:
            if error or self.transport.get_write_buffer_size():  # what is still to be written will be sent elsewhere
                self.transport.abort()
            else:
                self.transport.close()
        finally:
            for handles in reversed(requests):
                self.pool.hand_over(self.pool.owner.not_sent, handles)
            if self.denied.packets:
                self.settle_denied()
            if failed is not None:  # it goes last, to the front
                self.pool.hand_over(self.pool.owner.failed, failed, error, counted=counted)

    def eof_received(self):
        """The analyzer closes its side: so do we, but not before a request that it has answered is written whole."""
        if self.early.packets:
            if self.reading != REPLY_OVER:
                self.set_reading(REPLY_OVER)
            self.last_reply()
        else:
            self.ended(None)
        return False

    def connection_lost(self, error):
        """End the connection's life: what was in flight goes elsewhere, or again if it was never looked at."""
        self.ended(error)
        self.pool.connection_count(-1)
        self.pool.lost(self)

    cdef int ended(self, error) except -1:
        """No reply comes any more: say what that means for the requests in flight."""
        cdef Group group = self.early
        if self.writing == CLOSED:
            return 0
        if error is None and self.send_error:  # which took the socket's error with it
            error = OSError(self.send_error, os.strerror(self.send_error))
        # Closed between two requests while ours was on its way, or behind the reply to one that was delivered: a
        # stale connection, not a failed analyzer. That shows at once; later it had begun to work on the request.
        silent = self.partial.end == 0 and not self.interim and mono_ns() - self.waiting_since < STALE_NS
        if group.packets and error is None and not isinstance(self.transport, Stream):
            # A transport of the loop ends so when all is written; a stream would have told of that.
            self.early.packets = 0
            self.pool.settle(&group, mono_ns())
            self.close_after("", False)
        elif group.packets:
            self.close_after("connection closed before the request was written" if error is None
                             else f"connection lost: {error}", True)
        elif self.group_count == 0 or self.reading != REPLY_HEAD or (self.replies > 0 and silent):
            self.close_after("", False)
        else:
            self.close_after("connection closed before the reply" if error is None else f"connection lost: {error}", True)
        return 0


cdef str in_words(int status, bytes location):
    """Return what a status about the endpoint says, for the operator to mend the configuration."""
    cdef str words = f"HTTP {status}"
    if status in PHRASES:
        words += f" {PHRASES[status]}"
    if location is not None and status < 400:
        target = LOCATION.match(location)[0].decode("latin-1")
        words += f", Location: {''.join(char if char.isprintable() else '?' for char in target)}"
    return words
