"""Recovery: a ring is opened as a killed process, a power cut or a damaged disk has left its file.

Where the header says that the queue begins, records follow one another. What is no record is passed over, to the next
sound one: up to the place that the header names as the tail it is damage, and reported; behind that it may be what was
being written when the process was killed, and counts only if sound records follow.

A power cut may leave records that were written after the header that it leaves. Where they lie beyond what that header
knows of they are none: numbers grow with the position, and no process uses those of another (``skip_numbers``), so they
are not mistaken for a successor's. But one that lies in the place of records which the header still counts tells that
these are done.
"""


cdef bint is_header(const Header *copy) noexcept:
    return copy.magic[:8] == HEADER_MAGIC[:8] and copy.header_crc == header_crc(copy)


cdef int open_header(PacketRing ring) except -1:
    """Read whichever header copies are sound; of two, the one that knows of more."""
    cdef Header[2] copies
    cdef Header *header = NULL
    cdef Header *best = NULL
    cdef Header *copy
    cdef int64_t trusted = FOREVER
    cdef int i, stray, whole = 0
    formats, torn, whys = set(), [], []
    if os.fstat(ring.file.fd).st_size < HEADER_BYTES:
        raise RingError("shorter than a ring's header")
    for i in range(2):
        whys.append(read_header(ring.file, i * SECOND_COPY, &copies[i]))
    stray = stray_copy(ring, copies)
    for i in range(2):
        copy = &copies[i]
        if i == stray:
            ring.damage.append((i * SECOND_COPY, "header copy of another ring"))
        elif not is_header(copy):
            ring.damage.append((i * SECOND_COPY, whys[i]))
        elif copy.version != FORMAT:
            formats.add(copy.version)
        else:
            header = copy
            if copy.saved.check != crc32c(crc32c(0, &copy.salt, 8), &copy.saved.positions, sizeof(Positions)):
                torn.append((i * SECOND_COPY, "positions in a header copy"))
                continue
            whole += 1
            trusted = min(trusted, copy.saved.positions.trusted)  # one copy is written after the other
            if best == NULL or (copy.saved.positions.next_number, copy.saved.positions.head) > (
                    best.saved.positions.next_number, best.saved.positions.head):
                best = copy
    if formats:  # though it be one copy: another version may have been killed while it changed them
        raise (NewerFormatError if max(formats) > FORMAT else OtherFormatError)(max(formats))
    if header == NULL:
        whys = [f"; at {i * SECOND_COPY}: {whys[i]}" for i in range(2) if ring.file.unreadable]
        raise RingError("no intact ring header" + "".join(whys))
    if header.capacity != round_capacity(header.capacity):
        raise RingError(f"a capacity of {header.capacity} bytes, which no ring has")
    ring.use(header)
    if (ring.damage or torn) and ring.file.shared:
        write_headers(ring.file.fd, header if best == NULL else best)  # if that fails one copy has to do
    if best == NULL:
        ring.damage += torn
        find_ends(ring)
        return 0
    ring.notes += torn  # a process was killed while it wrote one copy: what the other is there for
    # What one copy cannot tell any more may have been that a sync has failed.
    ring.trusted = trusted if whole == 2 else -1
    ring.head, ring.tail = best.saved.positions.head, best.saved.positions.tail
    ring.next_sequence, ring.next_number = best.saved.positions.next_sequence, best.saved.positions.next_number
    ring.file.limit = best.saved.positions.limit
    return 0


cdef str read_header(RingFile file, int64_t offset, Header *header):
    """Read a header copy; return how to report one that is not sound."""
    cdef bytes image = b""
    cdef str why = "header copy"
    try:
        image = os.pread(file.fd, sizeof(Header), offset)
    except OSError as error:
        file.unreadable.append((offset, PAGE, error.errno))
        file.broken = True
        why = f"header copy that cannot be read: {error.strerror} (errno {error.errno})"
    image = image.ljust(sizeof(Header), b"\0")
    memcpy(header, PyBytes_AS_STRING(image), sizeof(Header))
    return why


cdef int write_headers(int fd, const Header *header) noexcept:
    """Write both copies of the header; return 0, or an errno."""
    cdef int i, failed = 0
    for i in range(2):
        failed = write_all(fd, header, sizeof(Header), i * SECOND_COPY) or failed
    return failed


cdef int stray_copy(PacketRing ring, Header *copies) except -2:
    """Return which header copy is another ring's (-1: none): the one whose salt fewer of the records have."""
    cdef int i
    found = []
    for i in range(2):
        if not is_header(&copies[i]) or copies[i].version != FORMAT:
            return -1
    if copies[0].salt == copies[1].salt and copies[0].ring_id[:16] == copies[1].ring_id[:16]:
        return -1
    for i in range(2):
        found.append(count_records(ring, &copies[i]))
    return 0 if found[0] < found[1] else 1


cdef int64_t count_records(PacketRing ring, const Header *header) except -1:
    """Return how many sound records there are for this header."""
    cdef int64_t offset, count = 0
    cdef RingFile file = ring.file
    cdef list unreadable = list(file.unreadable)
    cdef bint broken = file.broken
    if header.capacity != round_capacity(header.capacity) or os.fstat(file.fd).st_size < file_size(header.capacity):
        return 0
    ring.use(header)
    file.look(ring.capacity)
    for offset in range(0, ring.capacity, 8):
        count += record_at(file, offset) != NULL
    file.unmap()
    file.readable, file.unreadable, file.broken = 0, unreadable, broken
    return count


cdef Record *record_at(RingFile file, int64_t offset) noexcept nogil:
    """Return the sound record that lies at this offset in the data, whatever its position; NULL without one."""
    cdef Record *record = <Record *>(file.data + offset)
    if record.magic == RECORD_MAGIC and record.position % file.capacity == offset and file.sound(
            record, record.position, record.position + file.capacity):
        return record
    return NULL


cdef int find_ends(PacketRing ring) except -1:
    """The positions are gone: take the newest record's end as the tail, and all of the ring as in use."""
    cdef int64_t offset, tail = 0, lowest = FOREVER
    cdef uint64_t newest = 0
    cdef Record *record
    ring.file.look(ring.capacity)
    for offset in range(0, ring.capacity, 8):
        record = record_at(ring.file, offset)
        if record != NULL and record.number >= newest:
            newest, tail = record.number, record.position + record_size(record)
    for offset in range(0, ring.capacity, 8):
        record = record_at(ring.file, offset)
        if record != NULL and tail - ring.capacity <= record.position < tail:
            lowest = min(lowest, record.position)
    ring.tail, ring.head, ring.trusted = tail, min(lowest, tail), -1
    ring.file.limit = tail
    ring.next_sequence, ring.next_number = 1, newest + 1
    return 0


cdef int64_t given_up(PacketRing ring, uint64_t number) except -1:
    """Return the position before which all is done, as records of at least this number tell that lie in its place."""
    cdef int64_t offset, end = 0
    cdef Record *record
    ring.file.look(ring.head + ring.capacity)
    for offset in range(0, ring.capacity, 8):
        record = record_at(ring.file, offset)
        if record != NULL and record.number >= number:
            end = max(end, record.position + record_size(record))
    return end - ring.capacity


cdef int64_t next_sound(RingFile file, int64_t position, int64_t end, uint64_t min_number) noexcept nogil:
    """Return where the next sound record is that has at least this number and ends by ``end``, -1 without one."""
    cdef Record *record
    while position + SMALLEST <= end:
        record = file.at(position)
        if record.magic == RECORD_MAGIC and record.number >= min_number and file.sound(record, position, end):
            return position
        position += 8
    return -1


cdef int64_t search_once(PacketRing ring, int64_t position, int64_t end) noexcept nogil:
    """Return where the next sound record is behind a damaged one in a ring in use; ``end`` without one before.

    Nothing is searched again: it may be very much, and until the place is claimed it is asked for again and again.
    """
    cdef int64_t found, start = position + 8
    if ring.barren <= position < ring.barren_end:
        start = max(start, ring.barren_end)
    else:
        ring.barren = position
    found = next_sound(ring.file, start, end, 0)
    ring.barren_end = max(start, end if found < 0 else found)
    return end if found < 0 else found


cdef int64_t sound_behind(RingFile file, int64_t position, int64_t end, uint64_t min_number) except? -2:
    """Do the same where it was not seen yet that the pages can be read."""
    file.look(end)
    return next_sound(file, position, end, min_number)


cdef int recover(PacketRing ring) except -1:
    """Count what is not done, skip and report what is damaged."""
    cdef RingFile file = ring.file
    cdef int64_t known = ring.tail, head, position, size
    cdef uint64_t number = ring.next_number
    cdef Record *record
    cdef dict moved = {}
    cdef list gaps = []
    cdef int damages = len(ring.damage), notes = len(ring.notes)
    # Where the positions are gone all was read.
    file.readable = ring.head if file.readable < ring.capacity else ring.head + ring.capacity
    walk(ring, number, moved, gaps)
    head = given_up(ring, number) if ring.corrupt else 0
    if head > ring.head:  # start there
        del ring.damage[damages:], ring.notes[notes:], gaps[:]
        moved.clear()
        ring.corrupt = ring.undone = ring.undone_bytes = ring.largest = ring.move_count = 0
        ring.late.clear()
        position = sound_behind(file, head, max(known, file.limit), 0 if head < known else number)
        ring.head = position if position >= 0 else max(known, head)
        ring.tail = max(known, ring.head)
        walk(ring, number, moved, gaps)
    file.written = ring.marked = ring.tail
    for position, size in gaps:
        file.put_gap(position, size)
    for position in moved.values():  # its copy never made it
        record = file.at(position)
        file.mark(record.number, position, QUEUED, file.read_mark(record).attempts)
        count_undone(ring, record)
    file.write_marks()
    ring.skip_numbers()
    ring.answered = max(ring.answered, ring.tail)  # what was found is claimable and never to be withdrawn
    ring.trusted = min(ring.trusted, ring.tail)
    ring.synced = max(ring.synced, max(ring.trusted, ring.head))
    ring.cursor = ring.next_unclaimed(ring.head)
    ring.advance()
    if ring.save() != 0:
        file.limit = 0  # nothing can be pushed before it is
    report_unreadable(ring)
    return 0


cdef int report_unreadable(PacketRing ring) except -1:
    """List what cannot be read as damage, one entry for pages in a row. (Header copies are listed already.)"""
    cdef list spans = []
    for offset, size, code in sorted(ring.file.unreadable):
        if offset < HEADER_BYTES:
            continue
        if spans and spans[-1][0] + spans[-1][1] == offset and spans[-1][2] == code:
            spans[-1][1] += size
        else:
            spans.append([offset, size, code])
    for offset, size, code in spans:
        ring.damage.append((offset, f"{size} bytes that cannot be read: {os.strerror(code)} (errno {code})"))
    return 0


cdef int walk(PacketRing ring, uint64_t number, dict moved, list gaps) except -1:
    """Go along the records, from the head to where the header says that there may be any.

    Behind the tail that it names they have at least this number. ``moved``: gets the positions of moved records without
    a copy, by sequence; ``gaps``: (position, bytes) of what is to be passed over from now on.
    """
    cdef RingFile file = ring.file
    cdef int64_t position = ring.head, known = ring.tail, end = ring.head + ring.capacity, limit, found
    cdef uint64_t min_number = 0
    cdef Record *record
    limit = max(known, min(file.limit, end))
    while position < limit:
        if position >= known:
            min_number = max(min_number, number)
        file.look(position + SMALLEST)
        record = file.at(position)
        if record.number >= min_number and file.sound(record, position, end):
            file.look(position + record_size(record))
            min_number = record.number + 1
            if position >= known and not file.body_sound(record) and sound_behind(
                    file, position + record_size(record), limit, min_number) < 0:
                ring.notes.append((HEADER_BYTES + position % ring.capacity, "a packet that was not written to its end"))
                break
            take_over(ring, record, position, moved, gaps)
            position += record_size(record)
            continue
        found = sound_behind(file, position + 8, limit, min_number)
        if position < known <= found:
            found = sound_behind(file, known, limit, max(min_number, number))
        if found < 0 and position >= known:
            break
        if found < 0:
            found = known
        if record.magic == GAP_MAGIC and 0 < gap_bytes(record) <= found - position:
            position += gap_bytes(record)
            continue
        report(ring, position, f"{found - position} bytes that are no record")
        gaps.append((position, found - position))
        position = found
    ring.tail = position
    return 0


cdef int take_over(PacketRing ring, Record *record, int64_t position, dict moved, list gaps) except -1:
    cdef Mark mark
    cdef int64_t old
    ring.file.load_mark(record.number)
    mark = ring.file.read_mark(record)
    ring.next_sequence = max(ring.next_sequence, record.sequence + 1)
    ring.next_number = max(ring.next_number, record.number + 1)
    ring.largest = max(ring.largest, record_size(record))
    if mark.state != DONE and not ring.file.body_sound(record):
        report(ring, position, f"checksum of packet {record_id(record)}")
        # No done record: what it may be a copy of still counts, and would not once this was taken for a good copy.
        gaps.append((position, record_size(record)))
        return 0
    if record.copied and record.sequence in moved:
        old = moved.pop(record.sequence)
        if ring.room_for_move():
            ring.moves[ring.move_count].position, ring.moves[ring.move_count].end = old, position + record_size(record)
            ring.move_count += 1
    if mark.state == MOVED:
        moved[record.sequence] = position
    elif mark.state == QUEUED:
        count_undone(ring, record)
    return 0


cdef int report(PacketRing ring, int64_t position, str what) except -1:
    ring.corrupt += 1
    ring.damage.append((HEADER_BYTES + position % ring.capacity, what))
    return 0


cdef void count_undone(PacketRing ring, const Record *record) noexcept nogil:
    ring.late.note(record, ring.cursor)
    ring.undone += 1
    ring.undone_bytes += record_size(record)


cdef int pass_damage(PacketRing ring) except -1:
    """What is at the cursor is no record any more: have it passed over, and all that is damaged behind it.

    What is left is counted once for all of that, as to count is to go through the queue. The first place is reported with
    all that was lost.
    """
    cdef RingFile file = ring.file
    cdef int64_t position = ring.cursor, end, gap, lost = ring.undone
    cdef uint32_t handle, ahead = ring.ahead_first
    cdef Record *record
    cdef list places = []
    ring.undone, ring.undone_bytes = ring.staged, ring.tail - file.written
    for handle in (ring.first, ring.ahead_first):
        while handle:
            ring.undone += 1
            ring.undone_bytes += ring.size_of_entry(&ring.entries[handle])
            handle = ring.entries[handle].after
    while position < file.written:
        if ahead and ring.entries[ahead].position == position:
            position += ring.size_of_entry(&ring.entries[ahead])
            ahead = ring.entries[ahead].after
            continue
        record = ring.at(position)
        gap = file.gap_at(position, file.written)
        if gap:
            position += gap
        elif file.sound(record, position, file.written):
            if not (record.copied or position < ring.marked) or file.read_mark(record).state == QUEUED:
                ring.undone += 1
                ring.undone_bytes += record_size(record)
            position += record_size(record)
        else:
            end = ring.past_damage(position, min(file.written, ring.entries[ahead].position) if ahead else file.written)
            file.put_gap(position, end - position)
            places.append((position, end - position))
            position = end
    ring.cursor += places[0][1]
    lost = max(0, lost - ring.undone)
    for position, gap in places:
        ring.found(position, f"{gap} bytes that are no record", lost, 0)
        lost = 0
    return 0


cdef set missing_of(PacketRing ring, set sequences):
    """Return those of these sequences that no packet in the ring has; those that are not written yet are there."""
    cdef set absent = {each for each in sequences if each < ring.next_sequence - ring.staged}
    cdef int64_t position = ring.first_unclaimed()
    cdef uint32_t handle
    for handle in (ring.first, ring.ahead_first):
        while handle:
            absent.discard(ring.entries[handle].sequence)
            handle = ring.entries[handle].after
    while absent and position < ring.file.written:
        absent.discard(ring.at(position).sequence)
        position = ring.next_unclaimed(position + record_size(ring.at(position)))
    return absent


cdef uint32_t header_crc(const Header *header) noexcept nogil:
    cdef Header fixed = header[0]
    fixed.header_crc = 0
    return crc32c(0, &fixed, <char *>&fixed.saved - <char *>&fixed)


cdef bytes boot_id():
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except OSError:
        return bytes(16)


cdef tuple totals_of_latest(PacketRing ring, int64_t count):
    """Return (messages, bytes of bodies) of the latest ``count`` packets that were pushed; copies do not count."""
    cdef int64_t position, turn, skip = 0, messages = 0, body_bytes = 0, end = ring.file.written
    cdef Record *record
    for turn in range(2):  # first count all there are
        skip = max(0, skip - count)
        position = ring.past_gaps(ring.head, end)
        while position < end:
            record = ring.at(position)
            position = ring.past_gaps(position + record_size(record), end)
            if record.copied:
                continue
            if turn == 0:
                skip += 1
            elif skip:
                skip -= 1
            else:
                messages += record.messages
                body_bytes += record.body_length
    return messages, body_bytes
