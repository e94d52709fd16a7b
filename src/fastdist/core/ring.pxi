"""The packet ring: queue, store and in-flight table of one worker, in a file or in shared memory (ringfile.pxi).

Facts it rests on:
1. One process writes a ring at a time. Positions are bytes since the ring was made and only grow; the place of a record
   is its position modulo the capacity. The data area is mapped twice in a row, so every record is contiguous.
2. A record is pushed at the tail, and counts once it is in the file (``write``); until then it cannot be claimed, and
   when it cannot be written it has never been there. Where the records end is not written down: recovery
   goes on from the header's head for as long as there are sound ones.
3. Records are done out of order; the head moves over done ones. What lies between head and tail and is not done has not
   been delivered, whatever else was lost: the ring is the truth, counters are reconciled with it.
4. A claimed record is known by its handle, because it may move: when records at the head cannot be delivered and space
   runs short, they are copied to the tail (same sequence, id, time, attempts). The old one counts until the copy is synced.
5. Either copy of the header is enough, and whenever the process dies one of them is whole. All checksums are seeded with
   the ring's salt, so neither another ring's records nor a body that looks like a record is ever taken for one.
6. A file may be damaged while it is in use. So a record's head is checked when it is claimed and all of it when it is sent
   (unless it is still in memory that the file cannot change); in between only what was noted of it is relied on.
7. What is synced is a position: ``mark_synced`` tells that all before it is on stable storage. A sync reads
   ``sync_position`` first. After a sync that failed it is unknown what reached the disk: what was not synced before is
   withdrawn, and everything is written again (``write_again``). The header keeps that position, or that a sync has failed
   (``forget_synced``), for the process that opens the ring next: a process that was killed cannot tell.
8. Opening a ring writes only what has to change: a backlog is not to be copied, or written back, for being looked at.
9. Packets are stamped with the monotonic clock plus ``clock_offset``: the wall clock, but that it does not jump when that
   is set. So spans are right within a run, whose processes all have one offset, and as good as the clocks over restarts.
"""

cdef enum:
    PUSHED = 0
    RING_FULL
    TOO_BIG
    NOT_WRITTEN

cdef enum:
    WAITED = 1           # flag of a record: an emitter waits for its delivery (Prefer: wait)

cdef enum:
    ID_TEXT = 64         # the longest id, in characters

cdef struct Entry:           # of a claimed packet: with what is relied on later, as its record may be damaged then
    int64_t position         # of the record, which may be moved while it is claimed; -1: the entry is free
    int64_t since_ns         # monotonic clock: when it joined the list it is in
    uint32_t next            # handle of the next in that list; 0 ends it
    uint32_t flags           # for the list's owner
    uint32_t attempts        # begun
    uint32_t length          # bytes of the body
    uint32_t before, after   # neighbours among the claimed, by position
    uint64_t number          # of the record, as all that follows
    uint64_t sequence
    uint64_t emitter
    int64_t accepted_ns
    uint32_t messages
    uint8_t key_length
    uint8_t waited           # WAITED, or 0
    bint copied

cdef struct Move:
    int64_t position         # of a record that was moved
    int64_t end              # of its copy: once that is synced, the old place is free

cdef enum:
    MOVES_A_PUSH = 16
    USUAL = 16               # what part of a ring a packet takes at most that is unlike few others
    A_COPY = 0x100           # beside the flags of a push: of a packet another ring holds
    AHEAD = 4 << 20          # bytes that may be written until the header has to be
    A_STEP = 1000000000      # ns by which the wall clock has to differ from what it was to have been set

HEADER_SIZE = HEADER_BYTES
FORMAT_VERSION = FORMAT
FLAG_WAITED = WAITED
STATES = {QUEUED: "queued", MOVED: "moved", DONE: "done"}

Packet = namedtuple("Packet", "sequence id body attempts accepted_ns messages emitter flags")
Packet.__doc__ = "A record as Python sees it: ``body`` is a copy, ``accepted_ns`` nanoseconds of the wall clock, as it is set now."


@cython.final
cdef class PacketRing:
    """A ring over the open file ``fd`` (of ``file_size(capacity)`` bytes, read-write; not closed here).

    ``capacity``: make a new ring; None: open the one that is there (RingError without one) and recover it.
    ``claims_wait_for_sync``: records can be claimed once ``mark_synced`` has covered them (durability fsync).
    ``volatile``: nothing outlives the kernel, so nothing ever waits for a sync (durability memory). ``replicated``: but it is
    stored elsewhere too, and counts as synced when it is (``mark_synced``).
    ``private``: look at a ring without changing it, on a copy (``fd`` may be read-only). ``clock_offset``: see rule 9; the
    wall clock of now without it. ``on_damage(offset in the file, what, packets lost, sequence if known or 0)`` is called when
    damage is found in use.
    """

    cdef RingFile file
    cdef readonly int64_t capacity
    cdef int64_t head, tail, cursor
    cdef uint64_t next_sequence, next_number
    cdef Entry *entries
    cdef uint32_t entry_count, free_entry
    cdef uint32_t released_first, released_last
    cdef uint32_t first, last          # of the claimed before the cursor, by position
    cdef uint32_t ahead_first, ahead_last  # and behind it: copies of records that were claimed when they were moved
    cdef readonly uint32_t claimed
    cdef public int64_t clock_offset   # ns from the monotonic clock to the one packets are stamped with
    cdef readonly int64_t undone       # packets pushed and not done
    cdef readonly int64_t undone_bytes # of records, headers included
    cdef readonly int64_t corrupt      # records (or what was taken for one) that were lost
    cdef public object on_damage
    cdef int64_t largest               # bytes of the largest record since the ring was empty, at least
    cdef int64_t last_size             # bytes of the record that was pushed last (see USUAL), or found no room; 0: none
    cdef int64_t reserved              # bytes that are kept free of packets, for copies of what other rings hold,
    cdef int64_t reserved_largest      # and of the largest record among these
    cdef int64_t synced                # position: on stable storage up to
    cdef int64_t answered              # position: packets before it are not withdrawn any more
    cdef int64_t trusted               # as the header has it
    cdef int64_t marked                # position: unclaimed records before it may have a mark
    cdef int64_t unfinished            # position: what is pushed behind it waits for a batch that is not whole; FOREVER: nothing
    cdef int64_t promised              # bytes that are yet to be pushed of that batch
    cdef int64_t barren, barren_end    # positions: between them there is no record, see search_once
    cdef bint claims_wait_for_sync
    cdef readonly bint wants_sync      # space is short, and a sync would free some
    cdef int64_t staged                # packets pushed and not written
    cdef Move *moves                   # whose copies are not synced: from first_move on, by position
    cdef Py_ssize_t first_move, move_count, move_room
    cdef LateRecords late
    cdef uint32_t copies_claimed
    cdef int64_t oldest_copy_ns        # of these; 0: to be looked for
    cdef readonly list damage          # (offset in the file, what) of all that was found wrong
    cdef readonly list notes           # the same of what is no damage: a process was killed while it wrote there

    cdef inline Record *record_of(self, uint32_t handle) noexcept nogil:
        return self.at(self.entries[handle].position)

    cdef inline Record *at(self, int64_t position) noexcept nogil:
        cdef Record *record = self.file.kept_at(position)
        return record if record != NULL else self.file.at(position)

    cdef inline int64_t size_of_entry(self, Entry *entry) noexcept nogil:
        return size_of(entry.key_length, entry.length)

    def __cinit__(self, int fd, capacity=None, bint claims_wait_for_sync=False, bint volatile=False, bint private=False,
                  bint replicated=False, clock_offset=None, on_damage=None):
        self.damage, self.notes, self.late = [], [], LateRecords()
        self.file = RingFile(fd, volatile or private, not private)
        self.claims_wait_for_sync = claims_wait_for_sync
        self.synced = self.answered = FOREVER if volatile and not replicated else 0
        self.unfinished = FOREVER
        self.clock_offset = wall_ns() - mono_ns() if clock_offset is None else clock_offset
        if capacity is None:
            open_header(self)
        else:
            self._create(round_capacity(capacity))
        self.new_entry()  # handle 0 stands for none
        self.claimed = 0
        if capacity is None:
            recover(self)
        self.on_damage = on_damage  # not of what `recover` finds: that is in `damage`

    def __dealloc__(self):
        free(self.entries)
        free(self.moves)

    def _create(self, int64_t capacity):
        cdef Header header
        cdef bytes noise = os.urandom(24)
        cdef bytes boot = boot_id()
        memset(&header, 0, sizeof(Header))
        memcpy(header.magic, HEADER_MAGIC, 8)
        header.version = FORMAT
        header.capacity = capacity
        memcpy(&header.salt, <char *>noise, 8)
        memcpy(header.ring_id, <char *>noise + 8, 16)
        memcpy(header.boot_id, <char *>boot, 16)
        header.created_ns = wall_ns()
        header.header_crc = header_crc(&header)
        self.next_sequence = 1
        self.use(&header)
        self.skip_numbers()
        raise_errno(write_headers(self.file.fd, &header))
        raise_errno(self.save())

    cdef int use(self, const Header *header) except -1:
        """Map what the header speaks of."""
        self.file.header = header[0]
        self.file.seed = crc32c(0, &header.salt, 8)
        self.file.map(header.capacity)
        self.capacity = header.capacity
        return 0

    cdef int save(self, int64_t coming=0) noexcept nogil:
        """Write the header, for ``coming`` bytes more; return 0, or an errno."""
        cdef Positions positions
        memset(&positions, 0, sizeof(Positions))
        positions.head = min(self.head, self.file.rewriting)  # so that nothing is written where another thread writes
        positions.tail, positions.trusted = self.file.written, self.trusted
        positions.limit = min(positions.head + self.capacity, self.tail + coming + min(self.capacity // 8, AHEAD))
        positions.next_sequence = self.next_sequence - self.staged
        positions.next_number = self.next_number - self.staged
        return self.file.save(&positions)

    cdef inline bint may_reach(self, int64_t size) noexcept nogil:
        """Whether the header says that there may be a record of this size at the tail; make it say so."""
        if likely(self.tail + size <= self.file.limit and not self.file.broken):
            return True
        self.file.failed = EIO if self.file.broken else EBUSY  # that it is being written again is the only other reason
        return not self.file.broken and self.save(size) == 0 and self.tail + size <= self.file.limit

    # ---- the writer's side

    cdef int push_packet(self, const unsigned char *body, size_t length, const unsigned char *key, size_t key_length,
                         const uint8_t *packet_id, uint32_t messages, uint64_t emitter, int64_t now_ns,
                         int flags) noexcept nogil:
        """Append a packet: PUSHED, RING_FULL, TOO_BIG, or NOT_WRITTEN: then what was not written before is gone as well."""
        cdef int found = self.room_for(size_of(key_length, length), flags)
        if unlikely(found != PUSHED):
            return found
        return self.put_packet(body, length, key, key_length, packet_id, messages, emitter, now_ns, flags)

    cdef inline int room_for(self, int64_t size, int flags) noexcept nogil:
        """Make room for records of so many bytes; return PUSHED, or what keeps them from being pushed (as ``push_packet``)."""
        cdef int64_t tail = self.tail
        cdef int64_t kept = 0 if flags & A_COPY else self.reserved
        if unlikely(2 * size > self.capacity):
            return TOO_BIG
        if unlikely(self.is_half_full(size + kept)):
            self.make_room(size, kept)
            if self.lacking(size, kept):
                if not flags & A_COPY:
                    self.last_size = size
                return RING_FULL if self.tail >= tail else NOT_WRITTEN
        if unlikely(self.tail < tail):  # a record was to be moved behind what was pushed, and that could not be written
            return NOT_WRITTEN
        return PUSHED

    cdef inline int put_packet(self, const unsigned char *body, size_t length, const unsigned char *key, size_t key_length,
                               const uint8_t *packet_id, uint32_t messages, uint64_t emitter, int64_t now_ns,
                               int flags) noexcept nogil:
        """Append a packet for which there is room: PUSHED or NOT_WRITTEN."""
        cdef int64_t size = size_of(key_length, length)
        cdef Record record
        if unlikely(not self.may_reach(size)):
            self.forget_staged()
            return NOT_WRITTEN
        record.magic = RECORD_MAGIC
        record.position, record.number, record.sequence = self.tail, self.next_number, self.next_sequence
        memcpy(record.id, packet_id, 16)
        record.accepted_ns = now_ns
        record.emitter = emitter
        record.body_length = <uint32_t>length
        record.messages = messages
        record.key_length = <uint8_t>key_length
        record.flags = <uint8_t>(flags & 0xFF)
        record.copied = 1 if flags & A_COPY else 0
        record.reserved = 0
        record.body_crc = crc32c(self.file.seed, key, key_length) if key_length else self.file.seed
        record.body_crc = crc32c(record.body_crc, body, length)
        record.head_crc = self.file.seal_of(&record)
        if unlikely(self.file.append(&record, key, body) != 0):
            self.roll_back()
            return NOT_WRITTEN
        self.late.note(&record, self.cursor)
        self.largest = max(self.largest, size)
        if likely(not flags & A_COPY):
            self.last_size = min(size, self.capacity // USUAL)
        self.undone += 1
        self.undone_bytes += size
        self.next_sequence += 1
        self.next_number += 1
        self.tail += size
        # What it had to be written for may have been staged before it.
        self.staged = self.staged + 1 if self.file.staged() > size else 1 if self.file.staged() else 0
        return PUSHED

    cdef int write(self) noexcept nogil:
        """Write what was pushed; return 0, or an errno: then the packets are gone.

        Marks can wait: for the end of the iteration, since several writes may come in one.
        """
        cdef int failed = self.file.write(self.tail)
        if unlikely(failed):
            self.roll_back()
        self.staged = 0
        if unlikely(self.file.gap_count):
            self.file.write_gaps(self.head)
        return failed

    cdef void roll_back(self) noexcept nogil:
        """Forget what was pushed and could not be written, some of which may be in the file nevertheless."""
        self.forget_staged()
        self.barren_end = min(self.barren_end, self.tail)
        self.skip_numbers()
        self.save()

    cdef void forget_staged(self) noexcept nogil:
        """Forget what was pushed and is not written. It cannot have been claimed."""
        if self.tail == self.file.written:
            self.staged = 0  # it was written before the packet that could not be
        self.undone -= self.staged
        self.undone_bytes -= self.tail - self.file.written
        self.next_sequence -= self.staged
        self.next_number -= self.staged
        self.tail = self.file.written
        self.staged = 0
        self.file.forget_staged()
        self.late.drop_from(self.tail)

    cdef void take_back(self, int64_t position, int64_t packets) noexcept nogil:
        """Forget the latest packets, which begin at ``position``, up to which all is written: no one has claimed them."""
        self.undone -= packets
        self.undone_bytes -= self.tail - position
        self.next_sequence -= packets
        self.next_number += (self.file.slots - packets % self.file.slots) % self.file.slots  # see skip_numbers
        self.tail = self.file.written = position
        self.staged = 0
        self.file.forget_kept()
        self.roll_back()

    cdef void skip_numbers(self) noexcept nogil:
        """Go on with numbers that no record has ever had: there are fewer than nanoseconds since the epoch.

        The next record's mark keeps its place, so no two of a lap ever share one.
        """
        cdef uint64_t least = max(self.next_number + KEPT // SMALLEST + 1, <uint64_t>wall_ns())
        self.next_number += (least - self.next_number + self.file.slots - 1) // self.file.slots * self.file.slots

    cdef inline int64_t spare(self) noexcept nogil:
        return self.capacity - (self.tail - self.head) - self.promised

    cdef inline bint is_half_full(self, int64_t size) noexcept nogil:
        """Whether room has to be looked after: the largest record there may be has to find room for its copy."""
        return self.spare() < size + self.capacity // 2

    cdef int64_t lacking(self, int64_t size, int64_t kept) noexcept nogil:
        """Return how far the head has to move on until a record of ``size`` finds room, with ``kept`` left; 0: it does.

        Room for one copy of the largest record is left once the old places of moved ones are free: else a packet that no
        analyzer takes pins for good a ring that was filled while nothing was claimed.
        """
        cdef int64_t spare = self.spare()
        cdef int64_t pinned = self.entries[self.first].position if self.first else self.cursor
        cdef int64_t largest = max(self.largest, size, self.reserved_largest if kept else 0)
        return max(0, size + kept - spare, size + kept + largest - (spare + pinned - self.head))

    cdef void make_room(self, int64_t size, int64_t kept) noexcept nogil:
        """Move claimed records from the head to the tail, some at a time, so they do not pin the ring.

        With a file, their old places are free once the copies are synced. No copy takes the room that there is for
        ``size``, with ``kept`` left.
        """
        cdef int64_t spare, moving, least = 0 if self.lacking(size, kept) else size + kept
        cdef Entry *entry
        cdef int moves = 0
        while self.first and self.undone_bytes <= self.capacity // 4 * 3 and moves < MOVES_A_PUSH:
            entry = &self.entries[self.first]
            moving = self.size_of_entry(entry)
            spare = self.spare()
            if spare < moving + least or spare + entry.position - self.head >= size + max(self.capacity // 4, moving):
                break
            if entry.copied and entry.position + moving > self.synced:
                break  # a copy: it has not even arrived
            if not self.move(self.first, moving):
                break
            moves += 1
        self.wants_sync = self.move_count > self.first_move

    cdef bint move(self, uint32_t handle, int64_t size) noexcept nogil:
        cdef Entry *entry = &self.entries[handle]
        cdef Record *old = self.at(entry.position)
        cdef Record copy
        if self.write() != 0 or not self.room_for_move() or not self.may_reach(size):
            return False
        if not self.intact(handle):
            return False  # it is seen to when it is to be sent
        copy = old[0]
        copy.position, copy.number, copy.copied = self.tail, self.next_number, 1
        copy.head_crc = self.file.seal_of(&copy)
        # The head last: without it there is no copy, and the old one counts whatever its mark says.
        self.file.mark(entry.number, entry.position, MOVED, entry.attempts)
        if entry.attempts:
            self.file.mark(copy.number, copy.position, QUEUED, entry.attempts)
        if self.file.write_marks() != 0 or self.file.noted_count or self.file.put(
                self.tail + sizeof(Record), <uchar *>old + sizeof(Record), size - sizeof(Record)) != 0 or self.file.put(
                self.tail, &copy, sizeof(Record)) != 0:
            self.file.mark(entry.number, entry.position, QUEUED, entry.attempts)
            self.roll_back()
            return False
        self.moves[self.move_count].position, self.moves[self.move_count].end = entry.position, self.tail + size
        self.move_count += 1
        self.unlink(handle)
        entry.position, entry.number = copy.position, copy.number
        self.link(handle, True)
        if not entry.copied:
            entry.copied = True
            self.count_copy(copy.accepted_ns)
        self.tail += size
        self.file.written = self.tail
        self.next_number += 1
        self.advance()
        return True

    cdef bint room_for_move(self) noexcept nogil:
        cdef Move *grown
        if self.first_move > self.move_count // 2:
            self.move_count -= self.first_move
            memmove(self.moves, self.moves + self.first_move, self.move_count * sizeof(Move))
            self.first_move = 0
        if self.move_count < self.move_room:
            return True
        grown = <Move *>realloc(self.moves, 2 * (self.move_room + 32) * sizeof(Move))
        if grown == NULL:
            return False
        self.moves, self.move_room = grown, 2 * (self.move_room + 32)
        return True

    # ---- the reader's side

    cdef inline int64_t claimable(self) noexcept nogil:
        return min(self.unfinished, min(self.answered, self.file.written) if self.claims_wait_for_sync else self.file.written)

    cdef bint has_unclaimed(self) noexcept nogil:
        return self.released_first != 0 or self.cursor < self.claimable()

    cdef uint32_t claim_next(self) except? 0:
        """Return a handle on the oldest unclaimed record, 0 without one."""
        cdef Record *record
        cdef Entry *entry
        cdef uint32_t handle = self.released_first, attempts
        cdef int64_t gap
        cdef Mark mark
        if handle:
            self.released_first = self.entries[handle].next
            if not self.released_first:
                self.released_last = 0
            self.entries[handle].next = 0
            self.claimed += 1
            return handle
        while self.cursor < self.claimable():
            if unlikely(self.ahead_first and self.entries[self.ahead_first].position == self.cursor):
                handle = self.ahead_first  # a copy of a claimed record that moved here
                self.unlink(handle)
                self.link(handle, False)
                self.cursor += self.size_of_entry(&self.entries[handle])
                continue
            record = self.at(self.cursor)
            if unlikely(record.magic == GAP_MAGIC or self.file.gap_count):
                gap = self.file.gap_at(self.cursor, self.file.written)
                if gap:
                    self.cursor += gap
                    continue
            if unlikely(not self.file.direct and not self.file.sound(record, self.cursor, self.file.written)):
                pass_damage(self)
                continue
            attempts = 0
            if unlikely(record.copied or self.cursor < self.marked):
                mark = self.file.read_mark(record)
                if mark.state != QUEUED:
                    self.cursor += record_size(record)
                    continue
                attempts = mark.attempts
            handle = self.new_entry()
            entry = &self.entries[handle]
            entry.position, entry.number, entry.next, entry.flags, entry.attempts = self.cursor, record.number, 0, 0, attempts
            entry.length, entry.key_length, entry.copied = record.body_length, record.key_length, record.copied
            entry.sequence, entry.emitter, entry.accepted_ns = record.sequence, record.emitter, record.accepted_ns
            entry.messages, entry.waited = record.messages, record.flags & WAITED
            if unlikely(record.copied):
                self.count_copy(record.accepted_ns)
            self.link(handle, False)
            self.cursor += record_size(record)
            self.claimed += 1
            return handle
        if self.first == 0:
            self.advance()  # over what is done or lost and was never claimed here
            if unlikely(self.undone != 0 and self.head == self.tail):
                self.undone = self.undone_bytes = 0  # marks were damaged meanwhile: more was claimed than had been counted
        return 0

    cdef void link(self, uint32_t handle, bint ahead) noexcept nogil:
        """Put an entry at the end of those before the cursor, or behind it."""
        cdef uint32_t *first = &self.ahead_first if ahead else &self.first
        cdef uint32_t *last = &self.ahead_last if ahead else &self.last
        self.entries[handle].before, self.entries[handle].after = last[0], 0
        if last[0]:
            self.entries[last[0]].after = handle
        else:
            first[0] = handle
        last[0] = handle

    cdef void unlink(self, uint32_t handle) noexcept nogil:
        cdef Entry *entry = &self.entries[handle]
        if entry.before:
            self.entries[entry.before].after = entry.after
        elif self.first == handle:
            self.first = entry.after
        else:
            self.ahead_first = entry.after
        if entry.after:
            self.entries[entry.after].before = entry.before
        elif self.last == handle:
            self.last = entry.before
        else:
            self.ahead_last = entry.before

    cdef void give_back(self, uint32_t handle) noexcept nogil:
        """Undo a claim: the record is the next but those given back before to be claimed again."""
        self.entries[handle].next = 0
        self.give_all_back(handle, handle, 1)

    cdef void give_all_back(self, uint32_t first, uint32_t last, int64_t count) noexcept nogil:
        """Undo ``count`` claims, of a list from ``first`` to ``last``: however many, that is one link."""
        if self.released_last:
            self.entries[self.released_last].next = first
        else:
            self.released_first = first
        self.released_last = last
        self.claimed -= <uint32_t>count

    cdef inline uint32_t begin_attempt(self, uint32_t handle) noexcept nogil:
        """Note that a claimed packet is being sent; return the number of attempts."""
        cdef Entry *entry = &self.entries[handle]
        entry.attempts += 1
        self.file.mark(entry.number, entry.position, QUEUED, entry.attempts)
        return entry.attempts

    cdef void finish(self, uint32_t handle) noexcept nogil:
        """The claimed packet was delivered, or is safe elsewhere: its record is done and the handle free."""
        cdef Entry *entry = &self.entries[handle]
        self.file.mark(entry.number, entry.position, DONE, entry.attempts)
        self.drop(handle)

    cdef void drop(self, uint32_t handle) noexcept nogil:
        """The claimed packet counts no more: its handle is free."""
        cdef Entry *entry = &self.entries[handle]
        cdef bint was_first = self.first == handle
        self.undone -= 1
        self.undone_bytes -= self.size_of_entry(entry)
        self.claimed -= 1
        if unlikely(entry.copied):
            self.copies_claimed -= 1
            self.oldest_copy_ns = 0  # `oldest` looks for the next one
        self.unlink(handle)
        entry.position = -1
        entry.next = self.free_entry
        self.free_entry = handle
        if was_first:
            self.advance()

    cdef bint intact(self, uint32_t handle) noexcept nogil:
        """Whether a claimed record is in the file as it was when it was claimed."""
        cdef Entry *entry = &self.entries[handle]
        cdef Record *record = self.at(entry.position)
        if self.file.direct or self.file.kept_at(entry.position) != NULL:
            return True
        return (self.file.sound(record, entry.position, self.file.written) and record.body_length == entry.length
                and self.file.body_sound(record))

    cdef int lose(self, uint32_t handle) except -1:
        """A claimed record is damaged: its packet is lost."""
        cdef int64_t position = self.entries[handle].position
        cdef uint64_t sequence = self.entries[handle].sequence
        self.file.put_gap(position, self.size_of_entry(&self.entries[handle]))
        self.drop(handle)
        self.found(position, "a damaged packet", 1, sequence)
        return 0

    cdef int found(self, int64_t position, str what, int64_t lost, uint64_t sequence) except -1:
        """Tell of damage that was found while the ring is in use, and cost so many packets."""
        self.corrupt += 1
        if self.on_damage is not None:
            self.on_damage(HEADER_BYTES + position % self.capacity, what, lost, sequence)
        return 0

    cdef void advance(self) noexcept nogil:
        """Move the head over all that is done."""
        cdef int64_t head = self.entries[self.first].position if self.first else self.cursor
        while self.first_move < self.move_count and self.moves[self.first_move].end <= self.synced:
            self.first_move += 1
        if self.first_move < self.move_count:
            head = min(head, self.moves[self.first_move].position)
        else:
            self.wants_sync = False
        if head > self.head:
            self.head = head
            if head == self.tail:
                self.largest = 0

    cdef int64_t past_gaps(self, int64_t position, int64_t end) noexcept nogil:
        """Return where the next sound record is, from ``position`` on; ``end`` without one before."""
        cdef int64_t gap
        while position < end:
            gap = self.file.gap_at(position, FOREVER)
            if gap:
                position += gap
            elif self.file.sound(self.at(position), position, self.file.written):
                return position
            else:
                position = self.past_damage(position, end)
        return min(position, end)

    cdef int64_t past_damage(self, int64_t position, int64_t end) noexcept nogil:
        """Return where the next record is behind a damaged one; ``end`` without one before."""
        return search_once(self, position, min(end, self.file.next_kept(position)))

    cdef void count_copy(self, int64_t accepted_ns) noexcept nogil:
        if self.copies_claimed == 0 or (self.oldest_copy_ns and accepted_ns < self.oldest_copy_ns):
            self.oldest_copy_ns = accepted_ns
        self.copies_claimed += 1

    cdef int64_t oldest(self) noexcept nogil:
        """Return when the oldest packet not done was accepted (see ``clock_offset``), 0 without any."""
        cdef int64_t first = FOREVER, position
        cdef uint32_t handle
        self.file.write_marks()
        if self.undone == 0:
            return 0
        if self.first:
            first = self.entries[self.first].accepted_ns
        position = self.first_unclaimed()
        if position < self.file.written:
            first = min(first, self.at(position).accepted_ns)
        first = min(first, self.late.oldest(self.cursor))
        if self.copies_claimed and self.oldest_copy_ns == 0:
            self.oldest_copy_ns = min(self.oldest_copy_of(self.first), self.oldest_copy_of(self.ahead_first))
        if self.copies_claimed:
            first = min(first, self.oldest_copy_ns)
        return first if first < FOREVER else mono_ns() + self.clock_offset  # it is not even written

    cdef int64_t oldest_copy_of(self, uint32_t handle) noexcept nogil:
        cdef int64_t oldest = FOREVER
        while handle:
            if self.entries[handle].copied:
                oldest = min(oldest, self.entries[handle].accepted_ns)
            handle = self.entries[handle].after
        return oldest

    cdef int64_t first_unclaimed(self) noexcept nogil:
        """Return where the first unclaimed record is."""
        return self.next_unclaimed(self.cursor)

    cdef int64_t next_unclaimed(self, int64_t position) noexcept nogil:
        cdef uint32_t ahead = self.ahead_first
        cdef Record *record
        position = self.past_gaps(position, self.file.written)
        while position < self.file.written:
            record = self.at(position)
            while ahead and self.entries[ahead].position < position:
                ahead = self.entries[ahead].after
            if not (ahead and self.entries[ahead].position == position) and not (
                    (record.copied or position < self.marked) and self.file.read_mark(record).state != QUEUED):
                break
            position = self.past_gaps(position + record_size(record), self.file.written)
        return position

    cdef uint32_t new_entry(self) except? 0:
        cdef uint32_t handle = self.free_entry, count, i
        cdef Entry *grown
        if likely(handle):
            self.free_entry = self.entries[handle].next
            return handle
        count = self.entry_count * 2 if self.entry_count else 1024
        grown = <Entry *>realloc(self.entries, count * sizeof(Entry))
        if grown == NULL:
            raise MemoryError
        self.entries = grown
        handle = self.entry_count
        for i in range(handle + 1, count):  # chain the rest of the new part
            grown[i].position = -1
            grown[i].next = i + 1 if i + 1 < count else 0
        self.free_entry = handle + 1
        self.entry_count = count
        return handle

    # ---- for Python

    def push(self, bytes body, str key=None, *, bytes packet_id=bytes(16), uint32_t messages=1, uint64_t emitter=0,
             int64_t accepted_ns=0, uint32_t attempts=0, int flags=0):
        """Append a packet; return its sequence, 0 when the ring is full.

        ValueError: it is too large for this ring. OSError: it cannot be written.
        """
        cdef bytes name = key.encode("ascii") if key is not None else b""
        if len(name) > ID_TEXT or len(packet_id) != 16:
            raise ValueError("a key has at most 64 characters, an id 16 bytes")
        return self._pushed(self.push_packet(<const unsigned char *>body, len(body), <const unsigned char *>name, len(name),
                                             <const uint8_t *>packet_id, messages, emitter,
                                             accepted_ns or mono_ns() + self.clock_offset, flags),
                            len(name), len(body), attempts)

    def push_copy(self, PacketRing other, uint32_t handle):
        """Append a copy of a packet that ``other`` holds claimed: same id, time and attempts, a new sequence.

        Return its sequence, 0 when the ring is full. ValueError: it is too large for this ring. OSError: it cannot be written.
        """
        cdef Entry *entry = &other.entries[other._checked(handle)]
        cdef Record *record = other.at(entry.position)
        cdef const unsigned char *key = <unsigned char *>record + sizeof(Record)
        if not other.intact(handle):
            raise DamagedError("the packet was damaged while it waited")
        return self._pushed(self.push_packet(record_body(record), entry.length, key, entry.key_length, record.id,
                                             record.messages, record.emitter, record.accepted_ns, A_COPY),
                            entry.key_length, entry.length, entry.attempts)

    def _pushed(self, int result, int64_t key_length, int64_t body_length, uint32_t attempts):
        cdef Record *record
        cdef int failed
        if result == TOO_BIG:
            raise ValueError(f"a packet of {body_length} bytes is over half of a ring of {self.capacity}")
        if result == RING_FULL:
            return 0
        failed = self.file.failed if result == NOT_WRITTEN else self.write()
        raise_errno(failed)
        if attempts:
            record = self.at(self.tail - size_of(key_length, body_length))
            self.file.mark(record.number, record.position, QUEUED, attempts)
            self.file.write_marks()
            self.marked = max(self.marked, self.tail)
        return self.next_sequence - 1

    def claim(self):
        """Return a handle on the oldest unclaimed packet, 0 without one."""
        return self.claim_next()

    def done(self, uint32_t handle):
        """Mark a claimed packet as delivered (or safe elsewhere)."""
        self.finish(self._checked(handle))
        self.file.write_marks()

    def release(self, uint32_t handle):
        """Give a claimed packet back, to be claimed again."""
        self.give_back(self._checked(handle))

    def discard(self, uint32_t handle):
        """A claimed packet was found to be damaged: count it as lost."""
        self.lose(self._checked(handle))

    def packet(self, uint32_t handle):
        """Return the claimed packet as a ``Packet``. DamagedError: it is not as it was any more."""
        if not self.intact(self._checked(handle)):
            raise DamagedError("the packet was damaged while it waited")
        return packet_of(self, self.record_of(handle), self.entries[handle].attempts)

    def sequence(self, uint32_t handle):
        """Return the sequence of the claimed packet, which unlike its handle is never used again."""
        return self.entries[self._checked(handle)].sequence

    def emitter(self, uint32_t handle):
        """Return the hash of the claimed packet's emitterId."""
        return self.entries[self._checked(handle)].emitter

    def packet_id(self, uint32_t handle):
        """Return the id of the claimed packet."""
        return record_id(self.record_of(self._checked(handle)))

    def attempts(self, uint32_t handle):
        """Return how many attempts to send the claimed packet were begun."""
        return self.entries[self._checked(handle)].attempts

    def count_attempt(self, uint32_t handle):
        """Note that an attempt to send begins; return the new number of attempts."""
        cdef uint32_t attempts = self.begin_attempt(self._checked(handle))
        self.file.write_marks()
        return attempts

    def reserve(self, int64_t size, int64_t largest):
        """Keep ``size`` bytes free of packets that are pushed, for copies of what other rings hold (see ``push_copy``).

        ``largest``: bytes of the largest record among these.
        """
        self.reserved, self.reserved_largest = size, min(largest, self.capacity // 2)

    def room_lacking(self):
        """Return how many bytes have to become free before there is room for one more packet like the last; 0: there is.

        Like one that found no room, or else of a 16th of the ring at most.

        It is what the next push goes by. Raises nothing: what cannot be moved out of the way stays.
        """
        cdef int64_t size = self.last_size or min(max(<int64_t>SMALLEST, self.largest), self.capacity // USUAL)
        # Not while the disk fails: marks that wait to be written would be pushed out by those of moves.
        if self.staged == 0 and self.is_half_full(size + self.reserved) and self.file.write_marks() == 0:
            self.make_room(size, self.reserved)
        return self.lacking(size, self.reserved)

    def free_unused(self):
        """Give back the file's space between tail and head, as far as the file system can: nothing more is pushed here."""
        cdef int64_t start = self.tail % self.capacity, size = self.capacity - (self.tail - self.head)
        cdef int64_t part = min(size, self.capacity - start)
        if size > part:
            fallocate(self.file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, HEADER_BYTES, size - part)
        if part:
            fallocate(self.file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, HEADER_BYTES + start, part)

    def write_out(self):
        """Write what was pushed and noted. Raises OSError: what was pushed since the last time is gone."""
        failed = self.write()
        self.file.write_marks()
        raise_errno(failed)

    def missing(self, set sequences):
        """Return those of these sequences whose packets are not in the ring (any more)."""
        return missing_of(self, sequences)

    def waiting(self):
        """Yield each packet that is to be claimed, in the ring's order; nothing is claimed by that, or written."""
        cdef int64_t position = self.first_unclaimed()
        cdef Record *record
        while position < self.file.written:
            record = self.at(position)
            if self.file.body_sound(record):
                yield packet_of(self, record, self.file.read_mark(record).attempts)
            position = self.next_unclaimed(position + record_size(record))

    def totals_of_latest(self, int64_t count):
        """Return (messages, bytes of bodies) of the latest ``count`` packets that were pushed; copies do not count."""
        return totals_of_latest(self, count)

    def withdraw_unsynced(self):
        """Take back what was pushed since the last sync; return (packets, messages, bytes of bodies).

        Only for a ring whose claims wait for a sync: no analyzer has these packets yet. Copies stay: what they are copies of
        was answered for long ago.
        """
        cdef int64_t position, packets = 0, messages = 0, body_bytes = 0
        cdef Record *record
        self.write()
        position = self.next_unclaimed(max(self.answered, self.cursor))
        while position < self.file.written:
            record = self.at(position)
            if not record.copied:
                self.withdraw(record.number, position, record_size(record))
                packets += 1
                messages += record.messages
                body_bytes += record.body_length
            position = self.next_unclaimed(position + record_size(record))
        self.end_withdrawing()
        return packets, messages, body_bytes

    cdef void withdraw(self, uint64_t number, int64_t position, int64_t size) noexcept nogil:
        """Take back an unclaimed record; after the last comes ``end_withdrawing``."""
        self.file.mark(number, position, DONE, 0)
        self.undone -= 1
        self.undone_bytes -= size

    cdef void end_withdrawing(self) noexcept nogil:
        """Move the cursor over what is done and will not be claimed, as far as that is allowed."""
        cdef int64_t position
        self.marked = max(self.marked, self.tail)
        self.file.write_marks()
        if not self.ahead_first:
            position = self.first_unclaimed()
            if self.first == 0 and self.undone == 0:
                self.cursor = position
                self.advance()

    def write_again(self):
        """Write again what may not have reached the disk though the kernel takes it for written. Raises OSError.

        That is all behind the position that a sync is known to have covered; after one that failed, all that counts. It
        may be the whole ring: see ``begin_writing_again``.
        """
        span = self.begin_writing_again()
        try:
            self.go_on_writing_again(span)
        finally:
            self.file.rewriting = FOREVER
        self.end_writing_again()

    def begin_writing_again(self):
        """Begin to write again; return what ``go_on_writing_again`` is to get, which may be called in another thread.

        Meanwhile the ring can be used; pushes may fail where they would overwrite what is being written. After it, also if
        it has failed, comes ``end_writing_again``. Raises OSError.
        """
        cdef int64_t start = max(self.head, self.trusted), first
        cdef uint64_t number = self.next_number
        raise_errno(self.write())
        first = self.past_gaps(start, self.tail)
        if first < self.tail:
            number = self.at(first).number
        self.file.rewriting = start
        return start, self.tail, number, self.next_number

    def go_on_writing_again(self, span):
        """Write again; see ``begin_writing_again``. Raises OSError."""
        cdef int64_t start, end
        cdef uint64_t first, last
        cdef int failed = 0
        start, end, first, last = span
        if not self.file.direct:
            with nogil:
                failed = self.file.write_again(start, end, first, last)
        raise_errno(failed)

    def end_writing_again(self):
        """Write what had to wait for the writing again. Raises OSError."""
        self.file.rewriting = FOREVER
        raise_errno(self.write_rest() or self.save())

    cdef int write_rest(self) noexcept nogil:
        """Write marks and gaps that could not be written; return 0, or an errno."""
        return self.file.write_marks() or self.file.write_gaps(self.head)

    def try_to_write(self):
        """Write what was written last, what could not be, and the header, to see whether that is possible. Raises OSError."""
        if self.file.broken:
            raise_errno(EIO)
        raise_errno(self.file.write_again(max(self.head, self.file.written - PAGE), self.file.written, 0, 0))
        raise_errno(self.write_rest() or self.save())

    def continue_at(self, uint64_t sequence):
        """Have a new ring's first packet get this sequence. Raises OSError."""
        self.next_sequence = sequence
        raise_errno(self.save())

    def forget_kept(self):
        """Read what was written last from the file again, as what was written earlier is. Raises OSError as ``write_out`` does."""
        raise_errno(self.write())
        self.file.forget_kept()

    def mark_synced(self, int64_t position):
        """All bytes up to ``position`` (a former ``sync_position``) are on stable storage."""
        self.synced = max(self.synced, position)
        self.answered = max(self.answered, position)
        self.trusted = max(self.trusted, position)
        self.advance()
        self.save()  # if that is impossible the header knows less than it might, and what is pushed will tell

    def forget_synced(self):
        """A sync has failed: until one succeeds, what is in this ring does not count as written."""
        self.trusted = -1
        self.save()

    @property
    def tail_position(self):
        """Up to where records are in the file, in bytes since the ring was made."""
        return self.file.written

    @property
    def sync_position(self):
        """Up to where records count as synced after a sync that begins now: a batch is withdrawn as a whole."""
        return min(self.file.written, self.unfinished)

    @property
    def next_sequence_number(self):
        """The sequence the next packet will get; pushes so far, plus one."""
        return self.next_sequence

    @property
    def synced_position(self):
        """Up to where everything has reached stable storage."""
        return self.synced

    @property
    def claim_position(self):
        """Up to where packets are claimed, or done."""
        return self.cursor

    @property
    def has_more(self):
        """Whether there are packets to claim."""
        return self.has_unclaimed()

    @property
    def largest_record(self):
        """Bytes of the largest record since the ring was empty, or more."""
        return self.largest

    @property
    def used(self):
        """Bytes between head and tail, including done records that the head has yet to pass."""
        return self.tail - self.head

    @property
    def oldest_ns(self):
        """When the oldest packet not done was accepted (monotonic ns + ``clock_offset``), 0 without any."""
        return self.oldest()

    @property
    def unreadable(self):
        """List of (offset in the file, bytes, errno): what cannot be read."""
        return self.file.unreadable

    @property
    def broken(self):
        """Whether data or a header copy cannot be read: then nothing can be pushed."""
        return self.file.broken

    def _checked(self, uint32_t handle):
        if 0 < handle < self.entry_count and self.entries[handle].position >= 0:
            return handle
        raise ValueError(f"{handle} is no handle of a claimed packet")


cdef object packet_of(PacketRing ring, Record *record, uint32_t attempts):
    cdef int64_t step = wall_ns() - mono_ns() - ring.clock_offset  # what the wall clock was set by meanwhile
    return Packet(record.sequence, record_id(record), record_body(record)[:record.body_length], attempts,
                  record.accepted_ns + (step if abs(step) > A_STEP else 0), record.messages, record.emitter, record.flags)
