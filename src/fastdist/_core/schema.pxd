# What the other modules take from schema.pyx.
from libc.stdint cimport uint32_t, uint64_t

cdef struct PacketFacts:
    uint32_t messages      # how many log messages the packet holds
    uint64_t emitter_hash  # hash_bytes over the UTF-8 of its emitterId
    # If it is none:
    const unsigned char *reached  # the member or message that is at fault
    bint in_messages       # it is a message, and so many came before: `messages`
    unsigned int seen      # members of the packet that came before

# Whether the body is a log packet. What is wrong if it is none says packet.check.
cdef bint scan_packet(const unsigned char *p, size_t n, bint strict, PacketFacts *facts) noexcept nogil
