"""Forwarding: the waiting list of an analyzer, and connections that send from it and read replies.

``PoolBase`` and ``ReplyBase`` hold what happens for every packet; ``fastdist.forward`` mixes in connecting, pruning and
what to do about failures (``delivered(sequences)`` tells it of packets it watches). A packet is a handle of the ring on
all of this way: lists are chained through the ring's entries, and no object is made.

A reply counts as soon as its head is read; a 2xx, once its request is written whole as well. Failures are told to the
pool as lists of handles (``failed``), and the pool's owner decides where they go next; after any failure on a connection
it is closed.
"""

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

# Statuses besides 3xx and 5xx that say nothing of the packet: of the time ...
LATER = frozenset({408, 425, 429})
# ... or of the endpoint: a wrong path, an expired credential. Another analyzer may well take the packet.
OF_THE_ENDPOINT = frozenset({401, 403, 404, 405, 407, 410, 421, 426, 451})
PHRASES = {int(status): status.phrase for status in HTTPStatus}
LOCATION = re.compile(rb"[^?#]{0,200}")  # what is shown of one: a query may hold what is secret

cdef int64_t STALE_NS = 1000000000

cdef enum:
    LARGEST_REPLY_HEAD = 65536
    FIELD_ROOM = 160             # the headers of a request that differ, without its ids
    USUAL_ROOM = 1024            # bytes
    LOOKS = 16                   # at a connection's progress, in the time it may make none
    MOST_INTERIM = 32            # 1xx before a reply: each is progress, so that they could go on for ever

cdef enum:
    REPLY_HEAD = 0
    REPLY_LENGTH
    REPLY_CHUNKS
    REPLY_TO_CLOSE
    REPLY_OVER                         # the last reply was read; what follows is nobody's


cdef class PoolBase:
    """What waits for one analyzer, and its connections.

    ``head``: the request line and the headers all requests share, each ended by CR LF. ``connections`` at most are
    open, with ``pipeline`` requests in flight on each. With ``batching`` a request carries up to ``batch_packets``
    packets and ``batch_bytes`` bytes of them (one packet at least), and waits for more for ``linger`` seconds while
    another is in flight.
    """

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

    cdef inline uint32_t behind(self, uint32_t prior) noexcept nogil:
        return self.ring.entries[prior].next if prior else self.first

    cdef inline int64_t since(self, uint32_t handle) noexcept nogil:
        return self.ring.entries[handle].since_ns

    def __cinit__(self, PacketRing ring, Counters counters, AnalyzerStates states, int slot, *args, **kwargs):
        self.ring, self.counters, self.slot = ring, counters, slot
        self.mine = counters.of(counters.checked(slot))
        self.histogram = counters.delivery_of(slot)
        self.failures = states.failures_of(slot)
        self.idle = []

    def configure(self, bytes head, int connections, int pipeline, bint batching, uint32_t batch_packets,
                  int64_t batch_bytes, double linger):
        """Set how requests are made."""
        self.head = head
        self.connection_limit, self.pipeline = connections, pipeline
        self.batching, self.batch_packets, self.batch_bytes = batching, batch_packets, batch_bytes
        self.linger_ns = <int64_t>(linger * 1e9)

    # ---- the waiting list

    cdef void join(self, uint32_t handle, int64_t now) noexcept nogil:
        cdef Entry *entry = &self.ring.entries[handle]
        entry.since_ns = now
        entry.next = 0
        if self.waiting:
            self.ring.entries[self.last].next = handle
        else:
            self.first = handle
        self.last = handle
        self.waiting += 1
        self.waiting_bytes += self.ring.record_of(handle).body_length

    cdef void join_front(self, uint32_t handle, int64_t now) noexcept nogil:
        cdef Entry *entry = &self.ring.entries[handle]
        entry.since_ns = now
        entry.next = self.first if self.waiting else 0
        self.first = handle
        if not self.waiting:
            self.last = handle
        self.waiting += 1
        self.waiting_bytes += self.ring.record_of(handle).body_length

    cdef uint32_t leave(self) noexcept nogil:
        """Take the first out of the list (which must not be empty)."""
        cdef uint32_t handle = self.first
        self.first = self.ring.entries[handle].next
        self.waiting -= 1
        self.waiting_bytes -= self.ring.record_of(handle).body_length
        return handle

    cdef uint32_t leave_behind(self, uint32_t prior) noexcept nogil:
        """Take out the packet behind ``prior`` in the list, with 0 the first; there must be one."""
        cdef uint32_t handle
        if prior == 0:
            return self.leave()
        handle = self.ring.entries[prior].next
        self.ring.entries[prior].next = self.ring.entries[handle].next
        if self.last == handle:
            self.last = prior
        self.waiting -= 1
        self.waiting_bytes -= self.ring.record_of(handle).body_length
        return handle

    cdef uint32_t before_oldest(self) noexcept nogil:
        """Return what stands before the packet that waits longest, 0 if that is the first.

        What was sent before stands in front, the newest first; behind it all are in the order in which they came.
        """
        cdef uint32_t prior = 0, at = self.first, following
        while at:
            following = self.ring.entries[at].next
            if following == 0 or self.since(following) >= self.since(at):
                break
            prior, at = at, following
        return prior

    def append(self, uint32_t handle):
        """Let a claimed packet wait here, behind the others."""
        self.join(handle, mono_ns())

    def prepend(self, uint32_t handle, bint alone=False):
        """Let a claimed packet wait here, before the others; ``alone``: it is not to share a request."""
        if alone:
            self.ring.entries[handle].flags |= ALONE
        self.join_front(handle, mono_ns())

    def watch(self, uint32_t handle):
        """Have ``delivered`` called with the packet's sequence once an analyzer has taken it."""
        self.ring.entries[handle].flags |= WATCHED

    def release_waiting(self):
        """Give all that waits here back to the ring, in order; return how many."""
        cdef int64_t count = self.waiting
        if count:
            self.ring.give_all_back(self.first, self.last, count)
            self.first = 0
            self.waiting = self.waiting_bytes = 0
        return count

    def take_request(self):
        """Take what the next request would carry out of the list; return its handles."""
        if not self.waiting:
            return []
        cdef Group group = self.form(mono_ns())
        return self.handles(group.first)

    def waiting_since(self):
        """Return since when (monotonic ns) the first has waited here, 0 if none does."""
        return self.first_since() if self.waiting else 0

    cdef list handles(self, uint32_t handle):
        handles = []
        while handle:
            handles.append(handle)
            handle = self.ring.entries[handle].next
        return handles

    # ---- sending

    def pump(self):
        """Send what may be sent now; open connections for the rest."""
        return self.pump_at(mono_ns())

    cdef Pumped pump_at(self, int64_t now) except *:
        while self.waiting and not self.paused:
            if not self.due(now):
                return LINGERING
            if not self.idle:
                if self.open_connections + self.opening < self.connection_limit:
                    self.open_more()
                return AT_LIMIT
            (<ReplyBase>self.idle[len(self.idle) - 1]).send_waiting(now)
        return NOTHING_TO_DO

    cdef bint due(self, int64_t now) noexcept nogil:
        """Whether a request should leave now, rather than wait to carry more.

        An analyzer counts as busy while a request is in flight, and for ``linger`` after each: a fast one would otherwise
        get the first packets of every turn of the loop at once, and a backlog in crumbs.
        """
        cdef Entry *entry = &self.ring.entries[self.first]
        return (not self.batching or self.waiting >= self.batch_packets or self.waiting_bytes >= self.batch_bytes
                or (self.requests_in_flight == 0 and now - self.sent_ns >= self.linger_ns)
                or now - entry.since_ns >= self.linger_ns or entry.flags & ALONE)

    cdef int64_t due_in(self, int64_t now) noexcept nogil:
        """Return for how many ns the first that waits may still wait."""
        return max(0, self.ring.entries[self.first].since_ns + self.linger_ns - now) if self.waiting else 0

    cdef Group form(self, int64_t now) noexcept nogil:
        """Take a request's packets out of the list, which must not be empty."""
        cdef Group group
        cdef uint32_t last, handle = self.leave()
        group.first, group.packets, group.sent_ns = handle, 1, now
        group.bytes = self.ring.record_of(handle).body_length
        group.batch = self.batching and not self.ring.entries[handle].flags & ALONE
        last = handle
        while group.batch and self.waiting and group.packets < self.batch_packets:
            handle = self.first
            if (group.bytes + self.ring.record_of(handle).body_length > self.batch_bytes
                    or self.ring.entries[handle].flags & ALONE):
                break
            self.leave()
            group.bytes += self.ring.record_of(handle).body_length
            group.packets += 1
            self.ring.entries[last].next = handle
            last = handle
        self.ring.entries[last].next = 0
        return group

    cdef int64_t room_for(self, Group *group) noexcept:
        """Return an upper bound of the request's size."""
        return len(self.head) + FIELD_ROOM + group.bytes + group.packets * (ID_TEXT + 2)

    cdef char *write_request(self, Group *group, char *out, int64_t now) noexcept:
        """Write the request, note the sending in its records, and return where it ends."""
        cdef uint32_t handle = group.first
        cdef uint32_t attempts = 0
        cdef Record *record
        out = append(out, PyBytes_AS_STRING(self.head), len(self.head))
        if group.batch:
            out = append(out, b"X-Packet-Count: ", 16)
            out = append_number(out, group.packets)
            out = append(out, b"\r\nX-Packet-Ids: ", 16)
        else:
            out = append(out, b"X-Packet-Id: ", 13)
        while handle:
            record = self.ring.record_of(handle)
            if record.attempts == 0:
                observe(self.counters.queue_wait, now + self.ring.clock_offset - record.accepted_ns, 1)
            record.attempts += 1
            attempts = max(attempts, record.attempts)
            out += write_id(record, out)
            handle = self.ring.entries[handle].next
            if handle:
                out[0] = c','
                out += 1
        out = append(out, b"\r\nX-Attempt: ", 13)
        out = append_number(out, attempts)
        out = append(out, b"\r\nContent-Length: ", 18)
        out = append_number(out, group.bytes + (group.packets + 1 if group.batch else 0))
        out = append(out, b"\r\n\r\n", 4)
        return self.write_bodies(group, out)

    cdef char *write_bodies(self, Group *group, char *out) noexcept nogil:
        cdef uint32_t handle = group.first
        cdef Record *record
        cdef char separator = c'['
        while handle:
            record = self.ring.record_of(handle)
            if group.batch:
                out[0] = separator
                out += 1
                separator = c','
            out = append(out, <const char *>record_body(record), record.body_length)
            handle = self.ring.entries[handle].next
        if group.batch:
            out[0] = c']'
            out += 1
        return out

    cdef void leaves(self, Group *group, int64_t now) noexcept nogil:
        if self.requests_in_flight == 0:
            self.heard_ns = now
        self.requests_in_flight += 1
        self.packets_in_flight += group.packets
        self.mine[REQUESTS_IN_FLIGHT] += 1
        self.mine[PACKETS_IN_FLIGHT] += group.packets

    # ---- outcomes

    cdef int settle(self, Group *group, int64_t now) except -1:
        """The analyzer has taken the request: its packets are done."""
        cdef uint32_t next_handle, handle = group.first
        cdef int64_t messages = 0
        cdef Record *record
        cdef list watched = None
        self.counters.words[SETTLING] = self.slot + 1
        while handle:
            next_handle = self.ring.entries[handle].next
            record = self.ring.record_of(handle)
            messages += record.messages
            if unlikely(record.flags & WAITED or self.ring.entries[handle].flags & WATCHED):
                watched = watched or []
                watched.append(record.sequence)
            self.ring.finish(handle)
            handle = next_handle
        self.mine[DELIVERED] += group.packets
        self.mine[MESSAGES_DELIVERED] += messages
        self.mine[BYTES_DELIVERED] += group.bytes
        observe(self.histogram, now - group.sent_ns, group.packets)
        self.usual_latency += (now - group.sent_ns - self.usual_latency) / (64 if self.usual_latency else 1)
        self.heard_ns = now
        if unlikely((self.failures[0] | self.failures[1]) != 0):
            store(self.failures, 0)
            store(self.failures + 1, 0)  # refusals
        self.landed(group)
        if unlikely(watched is not None):
            self.delivered(watched)
        return 0

    def hand_over(self, tell, list handles, *args):
        """Have ``tell(handles, *args)`` decide where packets go next; return False if it threw something.

        It takes a packet out of the list when it has a place for it. Whatever it throws, the rest is picked anew.
        """
        cdef uint32_t handle
        try:
            tell(handles, *args)
        except Exception as error:
            for handle in handles:
                self.ring.give_back(handle)
            self.went_wrong(error)
            return False
        return True

    cdef list dissolve(self, Group *group):
        """The request failed: return its handles."""
        self.landed(group)
        return self.handles(group.first)

    cdef void landed(self, Group *group) noexcept nogil:
        self.requests_in_flight -= 1
        self.packets_in_flight -= group.packets
        self.mine[REQUESTS_IN_FLIGHT] -= 1
        self.mine[PACKETS_IN_FLIGHT] -= group.packets

    def connection_count(self, int change):
        """Count a connection that opened (1) or closed (-1)."""
        self.open_connections += change
        self.mine[CONNECTIONS] += change

    # ---- taking over what waits for others

    cdef bint is_held_up(self, int64_t now) noexcept:
        """Whether what waits here cannot be sent, rather than waits for its batch to fill."""
        return len(self.idle) == 0 and self.due(now)

    cdef int64_t spare(self) noexcept nogil:
        cdef int64_t requests = <int64_t>self.connection_limit * self.pipeline - self.requests_in_flight
        if self.batching and self.waiting_bytes >= requests * self.batch_bytes:
            return 0
        return max(0, requests * (self.batch_packets if self.batching else 1) - self.waiting)

    def room(self):
        """Return how many packets could be sent at once without one waiting behind another."""
        return self.spare()

    def latency(self, int64_t now):
        """Return how long a reply takes, in ns: as usual, or for as long as none has come if that is longer."""
        return max(self.usual_latency, now - self.heard_ns) if self.requests_in_flight else self.usual_latency


cdef class ReplyBase(Receiver):
    """A connection to an analyzer: sends requests, reads replies. ``pool`` is told of everything that goes wrong.

    Outcomes reach the pool as ``refused(handles, status, batch)``, ``failed(handles, error, counted, status)``,
    ``paused_for(handles, status, value)`` and ``not_sent(handles)`` (certain not to have been looked at, or a
    connection that was closed while idle: go again at once). Whatever goes wrong there or here, an error of the program
    (``went_wrong(error)``), the packets go again.
    """

    cdef readonly PoolBase pool
    cdef int state
    cdef Group *groups           # a circle of `pipeline` requests in flight
    cdef int first_group, group_count
    cdef Group early             # answered with a 2xx before it was written whole; no packets: there is none
    cdef int64_t given           # bytes to be written since the connection was opened
    cdef int64_t body_left
    cdef ChunkedBody chunks
    cdef bint in_chunks          # some of the body was read
    cdef bytes usual_chunks      # of the last body that came whole
    cdef bint keep_alive         # as the last reply says
    cdef int interim             # how many 1xx have come before the reply that is awaited
    cdef bint listed             # in pool.idle
    cdef bint leaving            # takes no more requests, and closes behind the last reply
    cdef bint closing
    cdef ReplyHead head          # the last one: a template
    cdef UnfinishedHead unfinished  # the head that is being read
    cdef Buffer partial          # of it
    cdef Py_ssize_t scanned      # of it, by find_head_end
    cdef readonly int64_t replies
    cdef readonly int64_t used_ns        # monotonic: last sending or reply
    cdef int64_t waiting_since
    cdef int64_t moved, moved_ns         # bytes both ways, and when they were last seen to have become more
    cdef int64_t looked_ns
    cdef int64_t begun_ns        # when the first byte of the present reply was read; 0: none has come

    def __cinit__(self, PoolBase pool, *args, **kwargs):
        self.pool = pool
        self.groups = <Group *>calloc(pool.pipeline, sizeof(Group))
        if self.groups == NULL:
            raise MemoryError
        self.used_ns = mono_ns()
        self.usual_chunks = b""

    def __dealloc__(self):
        free(self.groups)
        release(&self.partial)

    cdef bint has_room(self) noexcept:
        return (not self.leaving and self.early.packets == 0 and (self.state == REPLY_HEAD or self.keep_alive)
                and self.group_count + (self.state != REPLY_HEAD) < self.pool.pipeline)

    def in_flight(self):
        """Return how many requests wait here for their reply, or for being written whole."""
        return self.group_count + (self.early.packets > 0)

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
        nobody has read yet, since it may be us who are late.
        """
        cdef int64_t moved, silent = now - max(self.waiting_since, self.moved_ns)
        if self.early.packets and self.stream is None:
            self.settle_early(now)  # nobody else tells how far it is written
        if self.closing or (self.in_flight() == 0 and self.state == REPLY_HEAD):
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
        """Close the connection: its reply does not end. If its head is there, it was one, and nobody has failed."""
        self.close_after(error if self.state == REPLY_HEAD else "", True)

    cdef int64_t bytes_moved(self) except -1:
        return bytes_moved(self.descriptor())

    def excuse(self, int64_t now, int64_t late):
        """Count ``late`` ns before ``now`` not as time that the analyzer had: nobody looked."""
        self.moved_ns = min(now, max(self.waiting_since, self.moved_ns) + late)
        if self.begun_ns:
            self.begun_ns = min(now, self.begun_ns + late)

    def retire(self):
        """Send no more requests, and close the connection when no reply is awaited: no request is cut off."""
        self.leaving = True
        self.withdraw()
        if self.in_flight() == 0 and self.state == REPLY_HEAD:
            self.close_after("", False)

    cdef int send_waiting(self, int64_t now) except -1:
        """Send as many requests as there is room for and are due, in one write."""
        cdef PoolBase pool = self.pool
        cdef Group *group
        cdef int made = 0, i
        cdef int64_t room = 0
        cdef char *start
        cdef char *out
        if self.group_count == 0 and self.state == REPLY_HEAD:
            self.waiting_since = now
        while pool.waiting and self.has_room() and pool.due(now):
            group = &self.groups[(self.first_group + self.group_count) % pool.pipeline]
            group[0] = pool.form(now)
            pool.leaves(group, now)
            pool.sent_ns = now
            room += pool.room_for(group)
            self.group_count += 1
            made += 1
        if made == 0:
            return 0
        start = out = <char *>malloc(room)
        try:
            if start == NULL:
                raise MemoryError
            for i in range(self.group_count - made, self.group_count):
                group = &self.groups[(self.first_group + i) % pool.pipeline]
                out = pool.write_request(group, out, now)
                group.end = self.given + (out - start)
            self.given += out - start
            if not self.has_room():
                self.withdraw()
            self.used_ns = now
            self.transmit(start, out - start)
        except Exception as error:  # nobody knows how much of it is written: nothing may follow it
            pool.went_wrong(error)
            self.close_after("an error in fastdist, when it sent a request", False)
        finally:
            free(start)
        return made

    # ---- replies

    cdef int receive(self, const uchar *p, Py_ssize_t n) except -1:
        """Take in what the analyzer sent."""
        try:
            self.take_in(p, n)
        except Exception as error:
            self.pool.went_wrong(error)
            self.close_after("an error in fastdist, when it dealt with a reply", False)
        return 0

    cdef int take_in(self, const uchar *p, Py_ssize_t n) except -1:
        cdef int64_t now = mono_ns()
        cdef Buffer buffer
        if self.closing:
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
        if self.closing:
            return 0
        if self.has_room():
            if self.pool.waiting and not self.pool.paused:
                self.send_waiting(now)
                if self.pool.waiting and self.has_room():
                    self.pool.lingering()  # nobody else may look before its time is over
            self.offer()
        if self.pool.ring.has_unclaimed() or self.pool.wanted:
            self.pool.claim_more()
        return 0

    cdef int read_replies(self, const uchar *p, Py_ssize_t n, int64_t now) except -1:
        cdef const uchar *end = p + n
        while p < end and not self.closing:
            if self.state == REPLY_HEAD:
                p = self.read_head(p, end, now)
            elif self.state == REPLY_LENGTH:
                n = min(self.body_left, end - p)
                p += n
                self.body_left -= n
                if self.body_left == 0:
                    self.reply_over(now)
            elif self.state == REPLY_CHUNKS:
                p = self.read_chunks(p, end, now)
            else:
                p = end
        return 0

    cdef const uchar *read_chunks(self, const uchar *p, const uchar *end, int64_t now) except NULL:
        """Read on in a chunked body. An analyzer nearly always says the same: what was read before needs no reading."""
        cdef const uchar *start = NULL if self.in_chunks else p
        cdef Py_ssize_t n = len(self.usual_chunks)
        cdef Span piece
        cdef int event = CHUNK_MORE
        if start != NULL:
            if n and n <= end - p and memcmp(p, PyBytes_AS_STRING(self.usual_chunks), n) == 0:
                self.reply_over(now)
                return p + n
            self.in_chunks = True
            self.chunks.begin(INT64_MAX, LARGEST_REPLY_HEAD)
        while p < end and event < CHUNK_END:
            event = self.chunks.read(&p, end, &piece)
        if event == CHUNK_END:
            if start != NULL and p - start <= USUAL_ROOM:
                self.usual_chunks = start[:p - start]
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
            if self.closing:
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
        if unlikely(length > LARGEST_REPLY_HEAD or head.fault is not None):
            self.close_after("a reply that is not HTTP", True)
            return end
        if head.status < 200:
            self.interim += 1
            self.begun_ns = 0
            if self.interim > MOST_INTERIM:
                self.close_after("too many interim replies (1xx)", True)
            return p + length
        self.interim = 0
        group = self.groups[self.first_group]
        self.first_group = (self.first_group + 1) % self.pool.pipeline
        self.group_count -= 1
        self.replies += 1
        self.keep_alive = head.keep_alive
        if head.status == 204 or head.status == 304:
            self.state = REPLY_LENGTH
            self.body_left = 0
        elif head.chunked:
            self.state = REPLY_CHUNKS
            if self.chunks is None:
                self.chunks = ChunkedBody(True)
            self.in_chunks = False
        elif filled.content_length >= 0:
            self.state = REPLY_LENGTH
            self.body_left = filled.content_length
        else:
            self.state = REPLY_TO_CLOSE
            self.keep_alive = False
        if not self.keep_alive:
            self.withdraw()
        if unlikely(head.status >= 300):
            self.unsuccessful(&group, head)
        elif likely(self.is_written(&group)):
            self.pool.settle(&group, now)
        else:
            self.early = group
        if length <= TEMPLATE_ROOM:
            self.head = head
        if not self.keep_alive:
            self.last_reply()
        if self.state == REPLY_LENGTH and self.body_left == 0:
            self.reply_over(now)
        return p + length

    cdef const uchar *read_unfinished(self, const uchar *p, const uchar *end) except? NULL:
        """Keep a head whose end is not there, if it can still become one; return ``end``."""
        cdef Py_ssize_t n = end - p
        if self.unfinished is None:
            self.unfinished = UnfinishedHead(True)
        if n > LARGEST_REPLY_HEAD or self.unfinished.feed(p[self.unfinished.seen:n]) is not None:
            self.close_after("a reply that is not HTTP", True)
        else:
            keep(&self.partial, p, n)
        return end

    cdef int unsuccessful(self, Group *group, ReplyHead head) except -1:
        """Tell of a reply that is no 2xx: whether it speaks of the packet or of the analyzer."""
        cdef list handles = self.pool.dissolve(group)
        status = head.status
        if (status == 429 or status == 503) and head.retry_after is not None:
            told = self.pool.hand_over(self.pool.paused_for, handles, status, head.retry_after.decode("latin-1"))
        elif status >= 500 or status in LATER:
            told = self.pool.hand_over(self.pool.failed, handles, f"HTTP {status}", True, status)
        elif status < 400 or status in OF_THE_ENDPOINT:
            told = self.pool.hand_over(self.pool.failed, handles, in_words(status, head.location), True, status)
        else:
            told = self.pool.hand_over(self.pool.refused, handles, status, bool(group.batch))
        if not told:
            self.close_after("", False)
        return 0

    cdef int reply_over(self, int64_t now) except -1:
        """A reply was read to its end: the connection is free for the next, unless the analyzer closes it."""
        self.state = REPLY_HEAD if self.keep_alive else REPLY_OVER
        self.waiting_since, self.begun_ns = now, 0
        if self.early.packets == 0 and (not self.keep_alive or (self.leaving and self.group_count == 0)):
            self.close_after("", False)
        return 0

    cdef int last_reply(self) except -1:
        """No reply follows the one that has come: the requests behind it will not be looked at."""
        self.keep_alive = False
        for handles in reversed(self.take_unanswered()):
            self.pool.hand_over(self.pool.not_sent, handles)
        return 0

    cdef list take_unanswered(self):
        """Take out the requests that wait for their reply; return the handles of each."""
        cdef list requests = []
        while self.group_count:
            requests.append(self.pool.dissolve(&self.groups[self.first_group]))
            self.first_group = (self.first_group + 1) % self.pool.pipeline
            self.group_count -= 1
        return requests

    # ---- replies that came before their request was written whole

    cdef bint is_written(self, Group *group) except -1:
        if likely(self.stream is not None):
            return not self.stream.over and self.given - self.stream.unwritten() >= group.end
        # One that is about to be closed may have thrown away what it had.
        return not self.transport.is_closing() and self.given - self.transport.get_write_buffer_size() >= group.end

    cdef int flushed(self) except -1:
        """Hear that more is written."""
        return self.settle_early(mono_ns()) if self.early.packets else 0

    cdef int settle_early(self, int64_t now) except -1:
        """Settle the request that was answered early, if it is written whole by now, and go on."""
        cdef Group group = self.early
        if not self.is_written(&group):
            return 0
        self.early.packets = 0
        self.pool.settle(&group, now)
        if self.state == REPLY_HEAD or self.state == REPLY_OVER:
            self.reply_over(now)
        return self.go_on(now)

    def close_after(self, str error, bint counted):
        """Close the connection. With an ``error`` the first request in flight failed; those behind it were not looked at."""
        cdef list requests
        if self.closing:
            return
        self.leaving = self.closing = True
        if self.chunks is not None:
            self.chunks.close()
        self.withdraw()
        requests = self.take_unanswered()
        if self.early.packets:
            requests.insert(0, self.pool.dissolve(&self.early))
            self.early.packets = 0
        failed = requests.pop(0) if error and requests else None
        try:
            if error or self.transport.get_write_buffer_size():  # what is still to be written will be sent elsewhere
                self.transport.abort()
            else:
                self.transport.close()
        finally:
            for handles in reversed(requests):
                self.pool.hand_over(self.pool.not_sent, handles)
            if failed is not None:  # it goes last, to the front
                self.pool.hand_over(self.pool.failed, failed, error, counted, None)

    def eof_received(self):
        """The analyzer closes its side: so do we, but not before a request that it has answered is written whole."""
        if self.early.packets:
            self.state = REPLY_OVER
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
        if self.closing:
            return 0
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
        elif self.group_count == 0 or self.state != REPLY_HEAD or (self.replies > 0 and silent):
            self.close_after("", False)
        else:
            self.close_after("connection closed before the reply" if error is None else f"connection lost: {error}", True)
        return 0


cdef str in_words(int status, bytes location):
    """Return what a status about the endpoint says, to who has to mend the configuration."""
    cdef str words = f"HTTP {status}"
    if status in PHRASES:
        words += f" {PHRASES[status]}"
    if location is not None and status < 400:
        target = LOCATION.match(location)[0].decode("latin-1")
        words += f", Location: {''.join(char if char.isprintable() else '?' for char in target)}"
    return words
