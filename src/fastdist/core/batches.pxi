"""Batches: what agents' requests become, stored whole or not at all. Encoded packets are decoded in the same way.

A body that is whole is converted in slices (``conversion_of``), the first of them at once; until it is stored its
connection is held back, and reads nothing further. Room for all of a batch is made before its first packet is pushed.
"""


cdef bint convert_body(IngestBase connection, const uchar *p, Py_ssize_t n) except -1:
    """Convert a body, and store what has become of it; False if that goes on in another turn, or waits for room."""
    cdef Intake intake = connection.intake
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
        connection.conversion, connection.outcome = None, end.value
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
    if likely(intake.bodies <= intake.most_bodies) or intake.make_room(connection, intake.most_bodies):
        return False
    connection.reject(connection.crowded_out())
    return True


cdef bint store_batch(IngestBase connection, batch) except -1:
    """Put a batch into the ring, whole or not at all, and answer; False if it has to wait for room."""
    cdef Intake intake = connection.intake
    cdef tuple packets = tuple(batch.packets)
    cdef bytes body
    cdef int found = RING_FULL
    if connection.room_due == 0:
        connection.batch_size = 0
        for packet in packets:
            body = packet.body
            connection.batch_size += size_of(0, len(body))
    if not packets:
        found = PUSHED
    elif not intake.wanting or intake.first_for_room is connection:
        found = intake.ring.room_for(connection.batch_size, 0)
    if likely(found == PUSHED):
        found = push_batch(connection, packets, batch)
    if likely(found == PUSHED):
        return True
    if found == RING_FULL and may_wait_for_room(connection):
        connection.held = HELD_ROOM
        return False
    if found == NOT_WRITTEN:
        connection.flush_to_answers()
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
    cdef PacketRing ring = intake.ring
    cdef bytes data = connection.stored(batch) if connection.wait_seconds < 0 or not packets else None
    cdef uint64_t first
    cdef Part part
    cdef Answer answer = None
    connection.flush_to_answers()
    first = ring.next_sequence
    memset(&part, 0, sizeof(Part))
    part.batch = True
    if data is not None:  # else it is counted when its answer is known
        part.request = intake.counters.request_word(connection.route.number, batch.reply.status)
    if not push_all(connection, packets, &part):
        return NOT_WRITTEN
    if batch.reply.status >= 400:  # what came before a fault is stored
        intake.counters.words[INVALID] += 1
    if intake.holds and packets:
        answer = connection.hold_place()
        answer.position, answer.read_ns = part.position, connection.begun_ns
        answer.otherwise = connection.withdrawn()
        connection.await_sync()
        intake.outbox.add(&part, NULL)
    else:
        intake.counters.words[ACCEPTED] += part.packets
        intake.counters.words[MESSAGES_ACCEPTED] += part.messages
        intake.counters.words[BYTES_ACCEPTED] += part.body_bytes
        if part.request:
            intake.counters.count_request(part.request, part.messages)
        if packets:
            observe(intake.counters.ingest, mono_ns() - connection.begun_ns, 1)
    if data is None:
        answer = answer or connection.hold_place()
        connection.answer_due = max(connection.answer_due, connection.moved_ns + connection.wait_seconds * 1000000000)
        connection.await_deliveries(answer, range(first, ring.next_sequence), connection.wait_seconds, batch)
    elif answer is not None:
        answer.take(data)
    else:
        connection.emit(data)
    return PUSHED


cdef bint push_all(IngestBase connection, tuple packets, Part *part) except -1:
    """Push the packets and sum them up in ``part``; False if one could not be written, and so none was pushed."""
    cdef Intake intake = connection.intake
    cdef PacketRing ring = intake.ring
    cdef int64_t start, now = mono_ns() + ring.clock_offset
    cdef uint64_t first
    cdef unsigned char[16] packet_id
    cdef bytes body
    cdef uint32_t messages
    cdef uint64_t emitter
    # If they are collected, they are written with all else in one piece, or nothing of that is. If not, some may be in the
    # file already when the next cannot be written: so nothing else is to be in it.
    cdef bint apart = not ring.file.direct and not ring.file.collects(ring.tail, connection.batch_size)
    cdef int pushed = PUSHED
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
                                 now, WAITED if connection.wait_seconds >= 0 else 0)
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
