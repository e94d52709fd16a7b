# What the other modules take from schema.pyx.
from libc.stdint cimport uint32_t, uint64_t

cdef struct PacketFacts:
    uint32_t messages      # how many log messages the packet holds
    uint64_t emitter_hash  # hash_bytes over the UTF-8 of its emitterId

# True: the body is a log packet, and `facts` is filled in. False: not certain, ask packet.check.
cdef bint scan_packet(const unsigned char *p, size_t n, bint strict, PacketFacts *facts) noexcept nogil
