"""Batches: what agents' requests become, stored whole or not at all. Encoded packets are decoded in the same way.

A body that is whole is converted in slices (``conversion_of``), the first of them at once; until it is stored its
connection is held back, and reads nothing further. Room for all of a batch is made before its first packet is pushed. A
large batch is pushed in pieces, one an event-loop iteration (``LargeBatch``).
"""


cdef bint convert_body(IngestBase connection, const uchar *p, Py_ssize_t n) except -1:
    """Convert a body, and store what has become of it; False if that goes on in another iteration, or waits for room."""
    cdef Intake intake = connection.intake
    if isinstance(connection.outcome, LargeBatch):  # which answers by itself
        connection.held = HELD_WORK if intake.storing is connection.outcome else NOT_HELD
        return not connection.held
    if intake.draining and connection.after == IDLE:
        connection.after = DISCARDING
    if intake.closed or intake.broken_storage:
        connection.reject(connection.not_stored(False))
        return True
    if connection.outcome is None and not do_slice(connection, p, n):
        return not connection.held
    if connection.is_log:
        return connection.accept(<const uchar *>PyBytes_AS_STRING(connection.outcome), len(connection.outcome))
    return store_batch(connection, connection.outcome)


cdef bint do_slice(IngestBase connection, const uchar *p, Py_ssize_t n) except -1:
    """Do a slice of a conversion; say whether its outcome is there. If not, it is held or answered."""
    try:
        if connection.conversion is None:
            connection.begun_ns = connection.moved_ns
            connection.conversion = connection.conversion_of(connection.whole if connection.borrows else p[:n] if n else b"")
            connection.release_body()
        size = next(connection.conversion)
    except StopIteration as end:
        connection.conversion, connection.outcome, connection.batch_size = None, end.value, -1
        return True
    except Exception as error:
        connection.conversion = None
        connection.reject(connection.invalid(error))
        return False
    # A conversion tells how many bytes it has decoded, if it does.
    connection.charge(max(connection.charged, n) if size is None else size)
    if is_crowded(connection):
        return False
    connection.held = HELD_WORK
    return False


cdef bint is_crowded(IngestBase connection) except -1:
    """Whether there is no memory for what was charged; then say so."""
    cdef Intake intake = connection.intake
    if likely(intake.bodies <= intake.max_bodies) or intake.make_room(connection, intake.max_bodies):
        return False
    connection.reject(connection.crowded_out())
    return True


cdef bint store_batch(IngestBase connection, batch) except -1:
    """Put a batch into the ring, whole or not at all, and answer; False if it has to wait, for room or its turn."""
    cdef Intake intake = connection.intake
    cdef tuple packets
    cdef bytes body
    cdef int found = RING_FULL
    cdef bint is_large
    if connection.batch_size < 0:  # they may be very many: not each time that it has to wait
        connection.batch_size = 0
        for packet in batch.packets:
            body = packet.body
            connection.batch_size += size_of(0, len(body))
    is_large = connection.batch_size > intake.piece_bytes
    if is_large and intake.storing is not None:  # one at a time
        connection.charge(connection.batch_size)
        if is_crowded(connection):
            return True
        connection.held = HELD_WORK
        return False
    if connection.batch_size == 0:
        found = PUSHED
    elif not intake.wanting or intake.first_for_room is connection:
        found = intake.ring.room_for(connection.batch_size, 0)
    if likely(found == PUSHED):
        packets = tuple(batch.packets)
        if is_large:
            connection.outcome = intake.storing = LargeBatch(connection, packets, batch)
            intake.await_turn()
            connection.held = HELD_WORK
            return False
        found = push_batch(connection, packets, batch)
    if likely(found == PUSHED):
        return True
    if found == RING_FULL and may_wait_for_room(connection):
        connection.held = HELD_ROOM
        return False
    if found == NOT_WRITTEN:
        connection.flush_to_responses()
        intake.write_failed(intake.ring.file.failed)
    if found == TOO_BIG:
        connection.reject(connection.refuse(413, "too_large", f"packets of {connection.batch_size} bytes are over half of what "
                                            f"a worker's part of the queue holds ({intake.ring.capacity} bytes)"))
    elif not connection.answered:
        connection.reject(connection.not_stored(found == RING_FULL))
    return True


cdef bint may_wait_for_room(IngestBase connection) except -1:
    """Whether a batch may wait for room, or go on doing so; answered if there is no memory for it."""
    if connection.room_due == 0:
        connection.room_due = connection.moved_ns + connection.intake.room_wait_ns
        connection.charge(connection.batch_size)
    return not is_crowded(connection) and connection.moved_ns < connection.room_due


cdef int push_batch(IngestBase connection, tuple packets, batch) except -1:
    """Push packets for which there is room, all or none: PUSHED or NOT_WRITTEN. Answer if they were."""
    cdef Intake intake = connection.intake
    cdef bint waits = connection.wait_seconds >= 0 and len(packets)
    cdef bytes data = None if waits else connection.stored(batch)
    cdef Part part
    cdef uint64_t first
    cdef PendingResponse response = None
    connection.flush_to_responses()
    first = intake.ring.next_sequence
    begin_part(connection, waits, batch, &part)
    if not push_all(intake, packets, connection.batch_size, waits, False, &part):
        return NOT_WRITTEN
    if packets and (waits or intake.holds):
        response = connection.hold_place()
        response.otherwise = connection.withdrawn()
    count_batch(intake, &part, batch, response, connection.begun_ns)
    if waits:
        connection.awaiting(response, connection.wait_seconds, batch)(range(first, intake.ring.next_sequence))
    elif response is not None:
        response.take(data)
    else:
        connection.emit(data)
    return PUSHED


cdef int begin_part(IngestBase connection, bint waits, batch, Part *part) except -1:
    memset(part, 0, sizeof(Part))
    part.batch = True
    if waits:  # it is counted when its response is known
        connection.response_due = max(connection.response_due, connection.moved_ns + connection.wait_seconds * 1000000000)
    else:
        part.request = connection.intake.counters.request_word(connection.route.number, batch.reply.status)
    return 0


cdef int count_batch(Intake intake, Part *part, batch, PendingResponse response, int64_t begun_ns) except -1:
    """Count a batch that is in the ring, or have it counted when it is safe."""
    cdef int64_t *counters = intake.counters.words
    if batch.reply.status >= 400:  # what came before a fault is stored
        counters[INVALID] += 1
    if intake.holds and part.packets:
        response.position, response.read_ns = part.position, begun_ns
        response.connection.await_sync()
        intake.outbox.add(part, NULL)
        return 0
    counters[ACCEPTED] += part.packets
    counters[MESSAGES_ACCEPTED] += part.messages
    counters[BYTES_ACCEPTED] += part.body_bytes
    if part.request:
        intake.counters.count_request(part.request, part.messages)
    if part.packets:
        observe(intake.counters.ingest, mono_ns() - begun_ns, 1)
    return 0


cdef bint push_all(Intake intake, packets, int64_t size, bint waits, bint apart, Part *part) except -1:
    """Push packets, whose records have ``size`` bytes, and add them up in ``part``; False: none, one could not be written.

    ``apart``: they are written here and now, with nothing else.
    """
    cdef PacketRing ring = intake.ring
    cdef int64_t start, now = mono_ns() + ring.clock_offset
    cdef uint64_t first
    cdef unsigned char[16] packet_id
    cdef bytes body
    cdef uint32_t messages
    cdef uint64_t emitter
    cdef int pushed = PUSHED
    # If they are collected, they are written with all else in one piece, or nothing of that is. If not, some may be in the
    # file already when the next cannot be written: so nothing else is to be in it.
    apart = not ring.file.direct and (apart or not ring.file.collects(ring.tail, size))
    for packet in packets:
        body = packet.body
        apart = apart or (not ring.file.direct and size_of(0, len(body)) >= LARGE)
    if apart and ring.write() != 0:
        return False
    start, first = ring.tail, ring.next_sequence
    intake.wall = wall_ns()
    for packet in packets:
        body, messages, emitter = packet.body, packet.messages, packet.emitter_hash
        intake.make_id(intake.wall, packet_id)
        pushed = ring.put_packet(<const uchar *>PyBytes_AS_STRING(body), len(body), NULL, 0, packet_id, messages, emitter,
                                 now, WAITED if waits else 0)
        if unlikely(pushed != PUSHED):
            break
        part.packets += 1
        part.messages += messages
        part.body_bytes += len(body)
    if pushed != PUSHED or (apart and ring.write() != 0):
        if ring.tail > start:
            ring.take_back(start, ring.next_sequence - first)
        return False
    part.position = ring.tail
    return True


@cython.final
cdef class LargeBatch:
    """A batch that is pushed in pieces, one an iteration, so that no other packet waits for all of it; see ``Intake.go_on``.

    Until it is whole nothing behind its beginning can be claimed, or counts as synced, so it can be withdrawn as a whole.
    """

    cdef Intake intake
    cdef list packets                  # None where they are pushed: their memory is free
    cdef object batch                  # without them
    cdef Py_ssize_t pushed             # packets
    cdef list pieces                   # of them: (position, number, sequence of the first record, sizes of the records)
    cdef Part part
    cdef PendingResponse response
    cdef bytes data                    # the response's; None if it waits for deliveries:
    cdef object await_deliveries       # called with the packets' sequences
    cdef int64_t begun_ns
    cdef int64_t charged               # bytes that count as a body on its way

    def __cinit__(self, IngestBase connection not None, tuple packets not None, batch):
        cdef bint waits = connection.wait_seconds >= 0
        self.intake, self.packets, self.pieces = connection.intake, list(packets), []
        self.batch = batch.without_packets()
        self.begun_ns = connection.begun_ns
        self.response = connection.hold_place()
        self.response.otherwise = connection.withdrawn()
        if waits:
            self.await_deliveries = connection.awaiting(self.response, connection.wait_seconds, batch)
        else:
            self.data = connection.stored(batch)
        begin_part(connection, waits, batch, &self.part)
        self.charged, connection.charged = connection.charged, 0
        self.intake.ring.unfinished, self.intake.ring.promised = self.intake.ring.tail, connection.batch_size

    cdef int push_piece(self) except -1:
        """Push some packets; with the last the batch is stored."""
        cdef Intake intake = self.intake
        cdef PacketRing ring = intake.ring
        cdef list packets = [], sizes = []
        cdef int64_t size = 0
        cdef bytes body
        while self.pushed < len(self.packets) and size < intake.piece_bytes:
            packet, self.packets[self.pushed] = self.packets[self.pushed], None
            body = packet.body
            packets.append(packet)
            sizes.append(size_of(0, len(body)))
            size += sizes[-1]
            self.pushed += 1
        piece = (ring.tail, ring.next_number, ring.next_sequence, sizes)
        if not push_all(intake, packets, size, self.data is None, True, &self.part):
            return intake.write_failed(ring.file.failed)  # and so it is withdrawn
        self.pieces.append(piece)
        ring.promised -= size
        if self.pushed == len(self.packets):
            self.finish()
        return 0

    cdef int finish(self) except -1:
        self.let_go()
        count_batch(self.intake, &self.part, self.batch, self.response, self.begun_ns)
        if self.data is None:
            if self.response.connection.writing != LOST:
                self.await_deliveries([first + each for _, _, first, sizes in self.pieces for each in range(len(sizes))])
        elif self.intake.holds:
            self.response.take(self.data)
        else:
            self.response.complete(self.data)
        return 0

    cdef int let_go(self) except -1:
        """Let others be claimed, and be stored."""
        self.intake.storing = None
        self.intake.bodies -= self.charged
        self.intake.ring.unfinished, self.intake.ring.promised = FOREVER, 0
        self.intake.on_accepted()
        return 0

    cdef int withdraw(self) except -1:
        """Take back what was pushed, unless it is already, and answer so."""
        cdef PacketRing ring = self.intake.ring
        cdef Record record
        cdef int64_t size
        for record.position, record.number, _, sizes in self.pieces:
            for size in sizes:
                if ring.file.read_mark(&record).state == QUEUED:
                    ring.withdraw(record.number, record.position, size)
                    self.intake.counters.words[WITHDRAWN] += 1
                record.position += size
                record.number += 1
        self.let_go()
        ring.end_withdrawing()
        self.response.complete(self.response.otherwise(self.response))
        return 0
