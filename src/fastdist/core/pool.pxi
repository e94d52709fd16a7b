"""An analyzer's waiting list, and the requests that carry what waits.

A packet is a handle of the ring on all of this way: lists are chained through the ring's entries, and no object is made.
``fastdist.worker.upstream`` mixes in opening connections and pruning; what becomes of packets is up to the ``owner``, whose
calls ``PoolOwner`` in the stub describes.
"""

cdef enum:
    FIELD_ROOM = 160         # bytes of the headers of a request that differ, without its ids

cdef enum:
    # Flags of an entry.
    ALONE = 1                # send this packet as single, its batch was refused
    WATCHED = 2              # the pool's owner wants to be told of its delivery
    IN_ITS_OWN = 4           # send this packet in a request of its own, in a batch of one where there are batches

cdef enum Pumped:
    NOTHING_TO_DO = 0
    LINGERING                # what waits is not yet worth a request, or another connection
    AT_LIMIT                 # all connections are busy, or being opened
    UNFINISHED               # the time was over

cdef struct Group:
    # One request in flight: a chain of handles through Entry.next.
    uint32_t first
    uint32_t packets
    int64_t bytes            # of bodies
    int64_t sent_ns
    int64_t end              # how many bytes the connection had been given with it
    bint batch


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
    cdef public object owner     # decides what becomes of packets
    cdef int64_t *row            # the analyzer's counters
    cdef int64_t *histogram      # of the time to a reply
    cdef int64_t *failures       # in a row; the next word: refusals
    cdef bytes head              # of a request, up to the headers that differ
    cdef bint batching
    cdef uint32_t batch_packets
    cdef int64_t batch_bytes, linger_ns
    cdef int64_t sent_ns         # monotonic: of the last request
    cdef public int64_t growth_ns    # packets wait so long for the connections there are, before more are opened; 0: not at all
    cdef readonly int allowed    # how many connections there may be by now, within the limit
    cdef int64_t held_up_ns      # monotonic: since when packets wait for more than are allowed; 0: none does
    cdef readonly int pipeline, connection_limit
    cdef readonly list idle      # connections with room for a request, the last used last
    cdef readonly int open_connections
    cdef public int opening
    cdef public bint paused
    cdef bint touched
    cdef bint backlogged         # in the dispatcher's list of those that something waits for
    cdef public bint slow        # clearly slower than the others: what waits here goes elsewhere sooner
    cdef int64_t look_at_ns      # monotonic: when the dispatcher looks here though nothing happens; 0: it does not
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

    def __cinit__(self, PacketRing ring, Counters counters, AnalyzerStates states, int slot, owner, *args, **kwargs):
        self.ring, self.counters, self.slot, self.owner = ring, counters, slot, owner
        self.row = counters.of(counters.checked(slot))
        self.histogram = counters.delivery_of(slot)
        self.failures = states.failures_of(slot)
        self.sent_ns = -(INT64_MAX // 2)  # long ago, also on a machine that has just been started
        self.idle = []
        self.allowed = 1

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
        self.waiting_bytes += self.ring.entries[handle].length

    cdef void join_front(self, uint32_t handle, int64_t now) noexcept nogil:
        cdef Entry *entry = &self.ring.entries[handle]
        entry.since_ns = now
        entry.next = self.first if self.waiting else 0
        self.first = handle
        if not self.waiting:
            self.last = handle
        self.waiting += 1
        self.waiting_bytes += self.ring.entries[handle].length

    cdef uint32_t leave(self) noexcept nogil:
        """Take the first out of the list (which must not be empty)."""
        cdef uint32_t handle = self.first
        self.first = self.ring.entries[handle].next
        self.waiting -= 1
        self.waiting_bytes -= self.ring.entries[handle].length
        if self.waiting == 0:
            self.needs_no_more()
        return handle

    cdef inline void needs_no_more(self) noexcept nogil:
        """Nothing waits, so nothing is held up; without a connection one is to be opened first."""
        self.held_up_ns = 0
        if self.open_connections + self.opening == 0:
            self.allowed = 1

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
        self.waiting_bytes -= self.ring.entries[handle].length
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

    def prepend(self, uint32_t handle, bint alone=False, bint apart=False):
        """Let a claimed packet wait here, before the others; ``alone``: to be sent as single, whatever the mode.

        ``apart``: it is not to share the next request, in which it is as the mode says.
        """
        self.ring.entries[handle].flags |= (ALONE if alone else 0) | (IN_ITS_OWN if apart else 0)
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
            self.needs_no_more()
        return count

    def take_request(self):
        """Take what the next request would carry out of the list; return its handles."""
        if not self.waiting:
            return []
        cdef Group group
        return self.handles(group.first) if self.form(&group, mono_ns()) else []

    cdef list handles(self, uint32_t handle):
        handles = []
        while handle:
            handles.append(handle)
            handle = self.ring.entries[handle].next
        return handles

    # ---- sending

    def pump(self):
        """Send what may be sent now; open connections for the rest."""
        return self.pump_at(mono_ns(), FOREVER)

    cdef Pumped pump_at(self, int64_t now, int64_t end) except *:
        """Do so until ``end``, at which a request is finished: large ones take a millisecond each."""
        while self.waiting and not self.paused:
            if not self.due(now):
                self.held_up_ns = 0
                return LINGERING
            if not self.idle:
                return self.grow(now)
            (<ReplyBase>self.idle[len(self.idle) - 1]).send_waiting(now)
            if mono_ns() > end:
                return UNFINISHED
        return NOTHING_TO_DO

    cdef bint due(self, int64_t now) noexcept nogil:
        """Whether a request should leave now, rather than wait to carry more.

        An analyzer counts as busy while a request is in flight, and for ``linger`` after each: a fast one would otherwise
        get the first packets of every event-loop iteration at once, and a backlog in crumbs.
        """
        cdef Entry *entry = &self.ring.entries[self.first]
        return (not self.batching or self.waiting >= self.batch_packets or self.waiting_bytes >= self.batch_bytes
                or (self.requests_in_flight == 0 and now - self.sent_ns >= self.linger_ns)
                or now - entry.since_ns >= self.linger_ns or entry.flags & (ALONE | IN_ITS_OWN))

    cdef int64_t lingers_until(self, int64_t now) noexcept nogil:
        """Return until when the first that waits may wait on: for its batch to fill, or for a connection."""
        if self.due(now):
            return self.held_up_ns + self.growth_ns
        return self.since(self.first) + self.linger_ns

    cdef Pumped grow(self, int64_t now) except *:
        """Open connections for what waits: as many as are allowed, and twice as many after each ``growth_ns``."""
        cdef int there = self.open_connections + self.opening
        # Beside open ones: the first are on their way, however long that takes.
        if self.held_up_ns and self.open_connections and there >= self.allowed and now - self.held_up_ns >= self.growth_ns:
            self.allowed, self.held_up_ns = 2 * self.allowed, now
        if there < self.connection_limit and (there < self.allowed or self.growth_ns == 0):
            self.open_more()
            there = self.open_connections + self.opening
        if self.growth_ns == 0 or self.open_connections == 0 or there >= self.connection_limit or there < self.allowed:
            return AT_LIMIT  # what waits needs no more, or is looked at when there may be
        if self.held_up_ns == 0:
            self.held_up_ns = now
        return LINGERING

    cdef bint form(self, Group *group, int64_t now) except -1:
        """Take a request's packets out of the list, and say whether there were any."""
        cdef uint32_t last, handle, most
        if not self.has_intact():
            return False
        last = handle = self.leave()
        group.first, group.packets, group.sent_ns, group.end = handle, 1, now, 0
        group.bytes = self.ring.entries[handle].length
        group.batch = self.batching and not self.ring.entries[handle].flags & ALONE
        most = 1 if self.ring.entries[handle].flags & IN_ITS_OWN else self.batch_packets
        self.ring.entries[handle].flags &= ~<uint32_t>IN_ITS_OWN
        while group.batch and group.packets < most and self.has_intact():
            handle = self.first
            if (group.bytes + self.ring.entries[handle].length > self.batch_bytes
                    or self.ring.entries[handle].flags & (ALONE | IN_ITS_OWN)):
                break
            self.leave()
            group.bytes += self.ring.entries[handle].length
            group.packets += 1
            self.ring.entries[last].next = handle
            last = handle
        self.ring.entries[last].next = 0
        return True

    cdef inline bint has_intact(self) except -1:
        """Whether a packet waits and is as it was accepted; those that were damaged in the file are lost."""
        while self.waiting:
            if likely(self.ring.intact(self.first)):
                return True
            self.ring.lose(self.leave())
        return False

    cdef int64_t room_for(self, Group *group) noexcept:
        """Return an upper bound of the request's size."""
        return len(self.head) + FIELD_ROOM + group.bytes + group.packets * (ID_TEXT + 2)

    cdef void write_request(self, Group *group, Pieces *pieces, int64_t now) noexcept:
        """Write the request, and note the sending in its records."""
        cdef uint32_t handle = group.first
        cdef uint32_t attempts = 0, begun
        cdef Record *record
        cdef char *out = pieces.end
        out = append(out, PyBytes_AS_STRING(self.head), len(self.head))
        if group.batch:
            out = append(out, b"X-Packet-Count: ", 16)
            out = append_number(out, group.packets)
            out = append(out, b"\r\nX-Packet-Ids: ", 16)
        else:
            out = append(out, b"X-Packet-Id: ", 13)
        while handle:
            record = self.ring.record_of(handle)
            begun = self.ring.begin_attempt(handle)
            if begun == 1:
                observe(self.counters.queue_wait, now + self.ring.clock_offset - record.accepted_ns, 1)
            attempts = max(attempts, begun)
            out += write_id(record, out)
            handle = self.ring.entries[handle].next
            if handle:
                out[0] = c','
                out += 1
        out = append(out, b"\r\nX-Attempt: ", 13)
        out = append_number(out, attempts)
        out = append(out, b"\r\nContent-Length: ", 18)
        out = append_number(out, group.bytes + (group.packets + 1 if group.batch else 0))
        pieces.end = append(out, b"\r\n\r\n", 4)
        self.write_bodies(group, pieces)

    cdef void write_bodies(self, Group *group, Pieces *pieces) noexcept nogil:
        cdef uint32_t handle = group.first
        cdef char separator = c'['
        while handle:
            if group.batch:
                pieces.end[0] = separator
                pieces.end += 1
                separator = c','
            add_piece(pieces, record_body(self.ring.record_of(handle)), self.ring.entries[handle].length)
            handle = self.ring.entries[handle].next
        if group.batch:
            pieces.end[0] = c']'
            pieces.end += 1

    cdef void leaves(self, Group *group, int64_t now) noexcept nogil:
        if self.requests_in_flight == 0:
            self.heard_ns = now
        self.requests_in_flight += 1
        self.packets_in_flight += group.packets
        self.row[REQUESTS_IN_FLIGHT] += 1
        self.row[PACKETS_IN_FLIGHT] += group.packets

    # ---- outcomes

    cdef int settle(self, Group *group, int64_t now) except -1:
        """The analyzer has taken the request: its packets are done."""
        cdef uint32_t next_handle, handle = group.first
        cdef int64_t messages = 0
        cdef Entry *entry
        cdef list watched = None
        self.counters.words[SETTLING] = self.slot + 1
        while handle:
            entry = &self.ring.entries[handle]
            next_handle = entry.next
            messages += entry.messages
            if unlikely(entry.waited or entry.flags & WATCHED):
                watched = watched or []
                watched.append(entry.sequence)
            self.ring.finish(handle)
            handle = next_handle
        self.row[DELIVERED] += group.packets
        self.row[MESSAGES_DELIVERED] += messages
        self.row[BYTES_DELIVERED] += group.bytes
        observe(self.histogram, now - group.sent_ns, group.packets)
        self.usual_latency += (now - group.sent_ns - self.usual_latency) / (64 if self.usual_latency else 1)
        self.heard_ns = now
        if unlikely((self.failures[0] | self.failures[1]) != 0):
            store(self.failures, 0)
            store(self.failures + 1, 0)  # refusals
        self.landed(group)
        if unlikely(watched is not None):
            self.owner.delivered(self, watched)
        return 0

    def hand_over(self, tell, list handles, *args, **details):
        """Have ``tell(pool, handles, ...)``, of the owner, decide where packets go next; return False if it raised something.

        It takes a packet out of the list when it has a place for it. Whatever it raises, the rest is picked again.
        """
        cdef uint32_t handle
        try:
            tell(self, handles, *args, **details)
        except Exception as error:
            for handle in handles:
                self.ring.give_back(handle)
            self.owner.went_wrong(error)
            return False
        return True

    cdef list dissolve(self, Group *group):
        """The request failed: return its handles."""
        self.landed(group)
        return self.handles(group.first)

    cdef void landed(self, Group *group) noexcept nogil:
        self.requests_in_flight -= 1
        self.packets_in_flight -= group.packets
        self.row[REQUESTS_IN_FLIGHT] -= 1
        self.row[PACKETS_IN_FLIGHT] -= group.packets

    def connection_count(self, int change):
        """Count a connection that opened (1) or closed (-1)."""
        self.open_connections += change
        self.row[CONNECTIONS] += change
        if self.waiting == 0:
            self.needs_no_more()

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
