"""Packets of a ring as messages of a stream: see ``fastdist.storage.jetstream.message`` for what one holds.

What concerns every packet is here; a message with a single packet that has a key, or whose emitter waits, is Python's.
"""

cdef enum:
    MAX_BUNDLE = 1000
    AROUND_BODY = 67  # bytes at most that a packet without a key takes beside its body

cdef inline uchar *put_number(uchar *out, uchar kind, uint64_t value, int size) noexcept nogil:
    """Put MessagePack's ``kind`` and a number of ``size`` bytes, most significant first."""
    cdef int at
    out[0] = kind
    for at in range(size):
        out[1 + at] = <uchar>(value >> (8 * (size - 1 - at)))
    return out + 1 + size


def claim_bundle(PacketRing ring, Py_ssize_t limit, int64_t max_bytes):
    """Claim packets that may share a message: those without a key, for whose delivery no emitter waits.

    Return (MessagePack of their list, their handles, when the first was accepted (wall clock, ns), where they begin and
    end, the handle of one that was claimed behind them and has to travel alone or 0); None if there are none. ``limit``:
    packets; ``max_bytes``: of the list.
    """
    cdef uint32_t[MAX_BUNDLE] handles
    cdef Py_ssize_t count = 0, at
    cdef int64_t begin = ring.cursor, end = begin, size = 8, step = wall_ns() - mono_ns() - ring.clock_offset
    cdef uint32_t handle = 0
    cdef Entry *entry
    cdef uchar *out
    cdef char[64] text
    cdef bytes payload
    step = step if abs(step) > A_STEP else 0  # what the wall clock was set by meanwhile
    limit = min(limit, MAX_BUNDLE)
    while count < limit:
        handle = ring.claim_next()
        if not handle:
            break
        entry = &ring.entries[handle]
        if entry.key_length or entry.waited or (count and size + AROUND_BODY + entry.length > max_bytes):
            break
        handles[count] = handle
        count += 1
        size += AROUND_BODY + entry.length
        end = ring.cursor
        handle = 0
    if not count and not handle:
        return None
    payload = PyBytes_FromStringAndSize(NULL, size)
    out = <uchar *>PyBytes_AS_STRING(payload)
    out = put_number(out, 0xdc, count, 2)
    for at in range(count):
        entry = &ring.entries[handles[at]]
        out[0] = 0x95  # a list of five
        out = put_number(out + 1, 0xd9, write_id(ring.record_of(handles[at]), text), 1)
        memcpy(out, text, 36)
        out = put_number(out + 36, 0xc6, entry.length, 4)
        memcpy(out, record_body(ring.record_of(handles[at])), entry.length)
        out = put_number(out + entry.length, 0xcf, entry.emitter, 8)
        out = put_number(out, 0xce, entry.messages, 4)
        out = put_number(out, 0xcf, <uint64_t>(entry.accepted_ns + step), 8)
    return (payload[:out - <uchar *>PyBytes_AS_STRING(payload)], [handles[at] for at in range(count)],
            ring.entries[handles[0]].accepted_ns + step if count else 0, begin, end, handle)


def done_all(PacketRing ring, list handles):
    """Mark claimed packets as delivered (or safe elsewhere)."""
    for handle in handles:
        ring.finish(ring._checked(handle))
    ring.file.write_marks()
