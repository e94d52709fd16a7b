# The packet ring: record format, and what the other modules of the core call without Python.
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uint8_t

cdef enum:
    PUSHED = 0
    RING_FULL
    TOO_BIG

cdef enum:
    WAITED = 1           # flag of a record: an emitter waits for its delivery (Prefer: wait)

cdef enum:
    ID_TEXT = 64         # the longest id, in characters

# The states have a large Hamming distance: a flipped bit never turns one into another.
cdef enum:
    QUEUED = 0x51AA51AA
    MOVED = 0x2CC32CC3
    DONE = 0x6E3C6E3C

cdef struct Record:
    # Sealed by head_crc (from position to body_crc), once, when the record is written.
    uint32_t magic
    uint32_t head_crc
    int64_t position         # where the record starts, in bytes since the ring was made: tells laps apart
    uint64_t sequence        # of the push, from 1; a moved record keeps it
    uint8_t id[16]           # UUIDv7, unless there is a key
    int64_t accepted_ns      # wall clock of the run (clock_offset)
    uint64_t emitter         # hash of the emitterId
    uint32_t body_length     # bytes
    uint32_t messages
    uint8_t key_length       # of the Idempotency-Key that stands before the body; 0: none
    uint8_t flags
    uint16_t reserved
    uint32_t body_crc        # of key and body
    # Changed in place during the record's life.
    uint32_t state
    uint32_t attempts        # sendings begun
    uint32_t handle          # while claimed; else 0 or stale (is_claimed tells). Of a moved one: 8-byte words to its copy's end
    uint32_t moved           # 1: a copy: of a record that stood in the way, or that another ring held

cdef struct Entry:
    int64_t position         # of the record, which may be moved while it is claimed
    int64_t since_ns         # monotonic clock: when it joined the list it is in
    uint32_t next            # handle of the next in that list; 0 ends it
    uint32_t flags           # for the list's owner

cdef struct Header:
    char magic[8]
    uint32_t version
    uint32_t header_crc      # of the fixed part: magic to created_ns, this field taken as 0
    int64_t capacity
    uint64_t salt            # seeds every checksum, so that no body can imitate a record
    uint8_t ring_id[16]
    uint8_t boot_id[16]
    int64_t created_ns
    int64_t head             # changes from here on
    int64_t tail
    uint64_t next_sequence
    uint32_t position_crc    # of the three
    uint32_t reserved
    int64_t trusted          # position: a sync has covered all before it; -1: one has failed since
    uint32_t trusted_crc     # of that

cdef class PacketRing:
    cdef unsigned char *headers
    cdef unsigned char *data       # `capacity` bytes, mapped twice in a row: no record is ever split
    cdef readonly int64_t capacity
    cdef int64_t head, tail, cursor
    cdef uint64_t next_sequence
    cdef uint32_t seed
    cdef Entry *entries
    cdef uint32_t entry_count, free_entry
    cdef uint32_t released_first, released_last
    cdef readonly uint32_t claimed
    cdef public int64_t clock_offset   # ns from the monotonic clock to the one packets are stamped with
    cdef readonly int64_t undone       # packets pushed and not done
    cdef readonly int64_t undone_bytes # of records, headers included
    cdef readonly int64_t corrupt
    cdef int64_t largest               # bytes of the largest record since the ring was empty, at least
    cdef int64_t synced, settled       # positions: on stable storage up to; nothing but done and moved records up to
    cdef int64_t answered              # position: packets before it are not withdrawn any more
    cdef int64_t trusted               # as the header has it
    cdef bint claims_wait_for_sync
    cdef uint32_t moved_alive
    cdef int64_t moved_oldest_ns
    cdef readonly list damage          # (offset in the file, what) of all that was found wrong
    cdef readonly list notes           # the same of what is no damage: a process was killed while it wrote there
    cdef int sharing

    cdef int push_packet(self, const unsigned char *body, size_t length, const unsigned char *key, size_t key_length,
                         const uint8_t *packet_id, uint32_t messages, uint64_t emitter, int64_t now_ns,
                         int flags) noexcept nogil
    cdef uint32_t claim_next(self) except? 0
    cdef void finish(self, uint32_t handle) noexcept nogil
    cdef void give_back(self, uint32_t handle) noexcept nogil
    cdef void give_all_back(self, uint32_t first, uint32_t last, int64_t count) noexcept nogil
    cdef bint has_unclaimed(self) noexcept nogil
    cdef int64_t past_gaps(self, int64_t position, int64_t end) noexcept nogil
    cdef int64_t oldest(self) noexcept nogil
    cdef inline Record *record_of(self, uint32_t handle) noexcept nogil:
        return self.at(self.entries[handle].position)
    cdef inline Record *at(self, int64_t position) noexcept nogil:
        return <Record *>(self.data + position % self.capacity)
    cdef inline bint is_claimed(self, Record *record) noexcept nogil:
        return 0 < record.handle < self.entry_count and self.entries[record.handle].position == record.position
    cdef void publish(self) noexcept nogil
    cdef void publish_trusted(self) noexcept nogil
    cdef void advance(self) noexcept nogil
    cdef bint make_room(self, int64_t size) noexcept nogil
    cdef void move(self, Record *old, int64_t size) noexcept nogil
    cdef void seal(self, Record *record) noexcept nogil
    cdef bint sound(self, Record *record, int64_t position, int64_t end) noexcept nogil
    cdef bint body_sound(self, Record *record) noexcept nogil
    cdef bint _supersedes(self, Record *record, int64_t position, int64_t old) noexcept nogil
    cdef int _adopt(self, Record *record, int64_t position, dict moved) except -1
    cdef uint32_t new_entry(self) except? 0

cdef int64_t record_size(Record *record) noexcept nogil
cdef const unsigned char *record_body(Record *record) noexcept nogil
cdef size_t write_id(Record *record, char *text) noexcept nogil
