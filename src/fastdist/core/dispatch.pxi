"""Dispatching: every packet that was accepted is claimed from the ring, given to an analyzer, and sent from its list.

``DispatchBase`` holds what happens for every packet. ``fastdist.worker.dispatch`` decides, seldom, what the table looks like
(``refresh``), and what becomes of packets that could not be delivered.

No event-loop iteration is to be long, however many packets or connections something concerns: all that is done for each of
very many has an end after a while (``part_ns``), and the flush of the next iteration goes on with it.
"""


cdef enum:
    CLAIMS_A_FLUSH = 8192    # a long backlog is claimed in parts, so that responses are not held up
    DRAWS = 8                # candidates looked at for one that is not ahead of its share
    NEVER = 1 << 30          # seconds
    EQUALS = 4               # times spill_after: how long packets wait for an analyzer that is as quick as the others
    WAITING_LOOKS = 8                # pools that are looked at, or packets that spill, between two looks at the clock
    OPENINGS = 16            # connections that one flush begins to open, which is slow

cdef int64_t PART_NS = 1000000  # of each thing that a flush does in parts

cdef enum:
    EVEN = 0
    RANDOM
    STICKY

cdef enum:
    BY_PACKETS = 0
    BY_MESSAGES
    BY_BYTES

UNLIMITED = 1 << 62

STRATEGIES = {"even": EVEN, "random": RANDOM, "sticky": STICKY}
UNITS = {"packets": BY_PACKETS, "messages": BY_MESSAGES, "bytes": BY_BYTES}


@cython.final
cdef class Retrying:
    """What is remembered of a packet that has failed: where in this round, and how many ``rounds`` it has backed off.

    No Python object is in it, so that garbage collection passes it by: there may be very many.
    """

    cdef int32_t *slots
    cdef int32_t count, room
    cdef public int32_t rounds

    def __dealloc__(self):
        free(self.slots)

    def add(self, int32_t slot):
        """Note that it has failed there."""
        cdef int32_t *grown
        if self.has(slot):
            return
        if self.count == self.room:
            grown = <int32_t *>realloc(self.slots, 2 * (self.room + 1) * sizeof(int32_t))
            if grown == NULL:
                raise MemoryError
            self.slots, self.room = grown, 2 * (self.room + 1)
        self.slots[self.count] = slot
        self.count += 1

    def clear(self):
        """Begin a new round."""
        self.count = 0

    def tried(self):
        """Return the slots it has failed on in this round."""
        return tuple([self.slots[i] for i in range(self.count)])

    cdef bint has(self, int32_t slot) noexcept nogil:
        cdef int32_t i
        for i in range(self.count):
            if self.slots[i] == slot:
                return True
        return False

    cdef uint64_t mark(self, uint64_t *marks, bint on) noexcept nogil:
        """Set or take away the bits of its slots, and return a hash of them."""
        cdef int32_t i, slot
        cdef uint64_t digest = 0
        for i in range(self.count):
            slot = self.slots[i]
            digest ^= mix(slot + 1)
            if on:
                marks[slot >> 6] |= <uint64_t>1 << (slot & 63)
            else:
                marks[slot >> 6] &= ~(<uint64_t>1 << (slot & 63))
        return digest


cdef class DispatchBase:
    """The way from the ring to the pools of the analyzers, as ``config`` says.

    ``phase`` (64 bits) is where the sequence is: it starts at random, so that workers do not all begin with the same
    analyzer.
    """

    cdef readonly PacketRing ring
    cdef readonly list pools         # PoolBase or None, by slot
    cdef public object loop
    cdef AliasTable table
    cdef Rendezvous rendezvous
    cdef int strategy, unit
    cdef public uint64_t phase
    cdef double *given               # units each slot got since the table was set
    cdef double *share
    cdef double total
    cdef Py_ssize_t slots
    cdef const int64_t *epoch
    cdef AnalyzerStates states       # keeps `epoch` alive
    cdef bint unplaced               # packets have waited that long and no analyzer has room
    cdef public int64_t seen_epoch
    cdef list touched                # pools that got packets since the last flush
    cdef list lingering
    cdef bint scheduled
    cdef object linger_timer
    cdef int64_t lingers_until       # monotonic: the first of `lingering` has waited long enough; FOREVER without any
    cdef int64_t timer_due           # when the timer fires; FOREVER without one
    cdef int64_t spill_ns            # how long a packet waits for its analyzer before it may go to another; -1: for ever
    cdef bint steady                 # this process has time to spare
    cdef public int64_t claim_limit  # how many packets may be claimed and not done; more stay in the ring
    cdef list backlog                # pools that something waits for
    cdef int64_t next_aged           # monotonic: nothing in them has waited that long before
    cdef double *finish              # of the last packet spilled to each slot, in units / share (start-time fair queueing)
    cdef double spill_clock          # when the last one started
    cdef int32_t *roomy              # slots that have room, while packets spill
    cdef Py_ssize_t roomy_count
    cdef public bint trials_due      # the next packet may be for an analyzer on probation
    cdef public bint work_left       # something that is done in parts
    cdef public int64_t part_ns      # how long a part may take
    cdef int64_t part_end            # monotonic: of the part that sends and spills
    cdef public int openings         # connections that this flush may still begin to open
    cdef Rendezvous takers           # those that take packets now; None: not made yet
    cdef uint64_t *marks             # a bit for each slot: those not to be picked, all 0 in between
    cdef uint64_t chance             # where a sequence of random words is

    def __cinit__(self, loop, PacketRing ring, AnalyzerStates states, config, *args, **kwargs):
        self.loop, self.ring = loop, ring
        self.strategy, self.unit = STRATEGIES[config.distribution.strategy], UNITS[config.distribution.by]
        self.phase = int.from_bytes(os.urandom(8), "little")
        self.states = states
        self.epoch = states.epoch_word()
        self.seen_epoch = -1
        self.slots = states.slots
        self.pools = [None] * self.slots
        self.given = <double *>calloc(self.slots, sizeof(double))
        self.share = <double *>calloc(self.slots, sizeof(double))
        self.finish = <double *>calloc(self.slots, sizeof(double))
        self.roomy = <int32_t *>calloc(self.slots, sizeof(int32_t))
        self.marks = <uint64_t *>calloc(self.slots // 64 + 1, sizeof(uint64_t))
        if not (self.given and self.share and self.finish and self.roomy and self.marks):
            raise MemoryError
        self.part_ns = PART_NS
        self.chance = int.from_bytes(os.urandom(8), "little")
        self.touched, self.lingering, self.backlog = [], [], []
        self.lingers_until = self.timer_due = FOREVER
        self.claim_limit, self.steady = UNLIMITED, True
        spills = config.delivery.spill_after < NEVER and self.strategy != STICKY
        self.spill_ns = <int64_t>(config.delivery.spill_after * 1e9) if spills else -1

    def __dealloc__(self):
        free(self.given)
        free(self.share)
        free(self.finish)
        free(self.roomy)
        free(self.marks)

    def set_table(self, AliasTable table, Rendezvous rendezvous):
        """Pick from these from now on; with None for the one the strategy uses, hold everything in the ring."""
        cdef Py_ssize_t at
        self.table, self.rendezvous, self.takers = table, rendezvous, None
        self.total = 0
        memset(self.given, 0, self.slots * sizeof(double))
        memset(self.share, 0, self.slots * sizeof(double))
        memset(self.finish, 0, self.slots * sizeof(double))
        self.spill_clock = 0
        if table is not None:
            for slot, share in table.shares().items():
                at = slot
                self.share[at] = share

    cdef int32_t pick(self, Entry *entry) noexcept nogil:
        cdef double units
        cdef int32_t slot
        cdef int i
        if self.strategy == STICKY:
            return self.rendezvous.best(entry.emitter)
        if self.unit == BY_PACKETS:
            return self.table.at(self.advance())
        # Of the next few the table names, take the first that has had no more than its share of the units so far; if
        # each is ahead, the one of all that is furthest behind. Sizes may then come in any order: no analyzer ever has more
        # than one packet too much.
        units = self.units(entry)
        for i in range(DRAWS):
            slot = self.table.at(self.advance())
            if self.lead(slot) <= 0:
                break
        else:
            slot = self.furthest_behind()
        self.given[slot] += units
        self.total += units
        return slot

    cdef inline double units(self, Entry *entry) noexcept nogil:
        return 1 if self.unit == BY_PACKETS else entry.messages if self.unit == BY_MESSAGES else entry.length

    cdef int32_t furthest_behind(self) noexcept nogil:
        cdef int32_t slot, best = -1
        for slot in range(<int32_t>self.slots):
            if self.share[slot] > 0 and (best < 0 or self.lead(slot) < self.lead(best)):
                best = slot
        return best

    cdef inline double lead(self, int32_t slot) noexcept nogil:
        return self.given[slot] - self.share[slot] * self.total

    cdef inline uint64_t advance(self) noexcept nogil:
        self.phase += GOLDEN
        return mix(self.phase) if self.strategy == RANDOM else self.phase

    def schedule(self):
        """Have ``flush`` run when this event-loop iteration has read all there is to read."""
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self):
        """Give what was accepted to the analyzers, and send what may be sent."""
        cdef int64_t linger, now = mono_ns()
        self.scheduled = False
        if unlikely(load(self.epoch) != self.seen_epoch):
            self.seen_epoch = load(self.epoch)
            self.refresh()
        self.openings = OPENINGS
        if unlikely(self.trials_due):
            self.begin_trials()
        if unlikely(self.work_left):
            self.work_left = False
            self.work_off()
        if self.table is not None or self.rendezvous is not None:
            self.route(now)
        self.part_end = mono_ns() + self.part_ns
        self.pump_touched(now)
        if self.spill_ns >= 0 and now >= self.next_aged and self.backlog:
            self.spill(now)
            self.pump_touched(now)
        if self.lingers_until < self.timer_due:
            if self.linger_timer is not None:
                self.linger_timer.cancel()
            # In whole milliseconds, upwards: the loop takes less than half of one for none, and would come back at once
            # until the time is over.
            linger = max(0, self.lingers_until - now)
            self.linger_timer = self.loop.call_later((linger + 999999) // 1000000 / 1e3, self.linger_over)
            self.timer_due = self.lingers_until
        self.ring.file.write_marks()  # of the attempts that were begun

    cdef int pump_touched(self, int64_t now) except -1:
        """Have the pools that got packets send them."""
        cdef PoolBase pool
        cdef list pools
        cdef Py_ssize_t at
        cdef Pumped pumped
        pools, self.touched = self.touched, []
        for at in range(len(pools)):
            if unlikely(at % WAITING_LOOKS == WAITING_LOOKS - 1) and mono_ns() > self.part_end:
                self.touched = pools[at:] + self.touched
                self.schedule()
                break
            pool = <PoolBase>pools[at]
            pool.touched = False
            try:
                pumped = pool.pump_at(now, self.part_end)
            except Exception as error:
                self.went_wrong(error)
                continue
            if pumped == LINGERING:
                if pool.look_at_ns == 0:
                    self.lingering.append(pool)
                pool.look_at_ns = pool.lingers_until(now)
                self.lingers_until = min(self.lingers_until, pool.look_at_ns)
            if pool.waiting and not pool.backlogged:
                pool.backlogged = True
                self.backlog.append(pool)
                self.next_aged = min(self.next_aged, self.comes_of_age(pool))
            if pumped == UNFINISHED:
                pool.touched = True
                self.touched = pools[at + 1:] + [pool] + self.touched
                self.schedule()
                break
        return 0

    cdef int route(self, int64_t now) except -1:
        """Claim what is in the ring and let it wait for the analyzer it was picked for."""
        cdef uint32_t handle
        cdef PoolBase pool
        cdef int claims
        for claims in range(CLAIMS_A_FLUSH):
            if self.ring.claimed >= self.claim_limit:
                return 0
            handle = self.ring.claim_next()
            if handle == 0:
                return 0
            pool = <PoolBase>self.pools[self.pick(&self.ring.entries[handle])]
            pool.join(handle, now)
            if not pool.touched:
                pool.touched = True
                self.touched.append(pool)
        self.schedule()
        return 0

    # ---- spilling

    cdef int spill(self, int64_t now) except -1:
        """Have packets that waited ``spill_after`` for their analyzer go to others that have room, by weight.

        What finds no room now goes as soon as a reply makes some: those that could take it are told (``wanted``).
        """
        cdef PoolBase pool, target
        cdef list backlog = []
        cdef bint unplaced = False, over = False
        cdef uint32_t prior, handle
        cdef int spilled = 0
        self.find_room()
        self.next_aged = INT64_MAX
        for pool in self.backlog:
            prior = pool.before_oldest()
            # Not the one packet that an analyzer outside the table is tried with: that is to show how it fares there.
            handle = pool.behind(prior) if self.share[pool.slot] > 0 and pool.is_held_up(now) else 0
            while handle and pool.since(handle) <= now - self.patience(pool):
                spilled += 1
                over = over or (spilled % WAITING_LOOKS == 0 and mono_ns() > self.part_end)
                if over:
                    break
                target = self.relief(pool, handle)
                if target is None:
                    unplaced = True
                    break
                target.join(pool.leave_behind(prior), now)
                pool.counters.words[SPILLED] += 1
                self.touch(target)
                handle = pool.behind(prior)
            if pool.waiting:
                backlog.append(pool)
                self.next_aged = min(self.next_aged, self.comes_of_age(pool))
            else:
                pool.backlogged = False
        self.backlog = backlog
        if over:
            self.schedule()
        if unplaced or self.unplaced:
            for pool in self.pools:
                if pool is not None:
                    pool.wanted = unplaced
            self.unplaced = unplaced
        return 0

    cdef int64_t patience(self, PoolBase pool) noexcept:
        """Return for how many ns packets wait there before they go elsewhere.

        Where none is slower than the others, longer: it may be but a burst. And while this process is the bottleneck,
        for good: it is our time that is short, and moving packets about bends the shares and brings nothing.
        """
        return self.spill_ns if pool.slow else EQUALS * self.spill_ns if self.steady else INT64_MAX // 2

    cdef int64_t comes_of_age(self, PoolBase pool) noexcept:
        """Return when the oldest packet that waits there (one must) has waited long enough."""
        return pool.since(pool.behind(pool.before_oldest())) + self.patience(pool)

    cdef int find_room(self) except -1:
        cdef PoolBase pool
        cdef int32_t slot
        self.roomy_count = 0
        for slot in range(<int32_t>self.slots):
            if self.share[slot] > 0:
                pool = <PoolBase>self.pools[slot]
                if not pool.paused and pool.spare() > 0:
                    self.roomy[self.roomy_count] = slot
                    self.roomy_count += 1
        return 0

    cdef PoolBase relief(self, PoolBase waiting, uint32_t handle):
        """Return the pool that takes a packet that waits there, None if no analyzer has room: in turn, by weight.

        One that it has failed on only when no other has room.
        """
        cdef PoolBase pool, best = None
        cdef double start, begun = 0
        cdef Retrying retrying = self.failed_on(handle) if self.ring.entries[handle].flags & WATCHED else None
        cdef bint again, best_again = False
        cdef Py_ssize_t at = 0
        cdef int32_t slot
        while at < self.roomy_count:
            slot = self.roomy[at]
            pool = <PoolBase>self.pools[slot]
            if pool.spare() <= 0:
                self.roomy_count -= 1
                self.roomy[at] = self.roomy[self.roomy_count]
                continue
            at += 1
            if pool is waiting:
                continue
            start = max(self.finish[slot], self.spill_clock)
            again = retrying is not None and retrying.has(slot)
            if best is None or again < best_again or (again == best_again and start < begun):
                best, begun, best_again = pool, start, again
        if best is not None:
            self.spill_clock = begun
            self.finish[best.slot] = begun + self.units(&waiting.ring.entries[handle]) / self.share[best.slot]
        return best

    def judge(self, bint steady):
        """Note whether this process has time to spare; to be called as well when analyzers became ``slow`` or are no more."""
        self.steady = steady
        self.next_aged = 0

    def pools_waiting(self):
        """Return the pools of analyzers that something waits for."""
        cdef PoolBase pool
        return [pool for pool in self.pools if pool is not None and pool.waiting]

    def pools_in_use(self, bint idle_too):
        """Return the pools of analyzers with requests in flight; ``idle_too``: with open connections."""
        cdef PoolBase pool
        return [pool for pool in self.pools
                if pool is not None and (pool.requests_in_flight or (idle_too and pool.open_connections))]

    def spill_at(self, int64_t now):
        """Spill what has waited long enough at ``now`` (monotonic ns), though nothing else happens."""
        if self.spill_ns >= 0 and now >= self.next_aged and self.backlog:
            self.part_end = mono_ns() + self.part_ns
            self.spill(now)
            if self.touched:
                self.schedule()

    def linger_over(self):
        """Look again at what has waited long enough for its batch to fill, or for a connection."""
        cdef PoolBase pool
        cdef int64_t now = mono_ns()
        cdef list lingering = []
        self.linger_timer, self.lingers_until, self.timer_due = None, FOREVER, FOREVER
        for pool in self.lingering:
            if pool.look_at_ns <= now:
                pool.look_at_ns = 0
                self.touch(pool)
            else:
                lingering.append(pool)
                self.lingers_until = min(self.lingers_until, pool.look_at_ns)
        self.lingering = lingering
        self.schedule()  # and no second flush in an iteration that has one already

    def touch(self, PoolBase pool):
        """Have the pool looked at in the next flush."""
        if not pool.touched:
            pool.touched = True
            self.touched.append(pool)

    def go_on(self):
        """Have the next flush go on with what is done in parts."""
        self.work_left = True
        self.schedule()

    def another(self, uint32_t handle, Retrying retrying):
        """Return the slot of one that a packet has not failed on in this round, by weight; -1 without any.

        With the strategy ``sticky`` it is the next in the packet's own order.
        """
        cdef int32_t slot
        cdef int i
        if self.strategy != STICKY and self.table is not None:
            for i in range(DRAWS):  # nearly always one of them will do
                self.chance += GOLDEN
                slot = self.table.at(mix(self.chance))
                if not retrying.has(slot):
                    return slot
        if self.takers is None:
            self.takers = self.make_takers()
            if self.takers is None:
                return -1
        return self.pick_from(self.takers, handle, retrying)

    def pick_from(self, Rendezvous candidates, uint32_t handle, Retrying retrying):
        """Return the slot of one of the candidates as ``another`` does."""
        cdef uint64_t digest = retrying.mark(self.marks, True)
        cdef int32_t slot
        if self.strategy == STICKY:
            slot = candidates.best_besides(self.ring.entries[handle].emitter, self.marks, digest)
        else:
            self.chance += GOLDEN
            slot = candidates.race(mix(self.chance), self.marks)
        retrying.mark(self.marks, False)
        return slot
