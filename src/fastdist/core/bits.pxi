# What bits.h offers to the other modules.

cdef extern from "bits.h" nogil:
    bint likely "fd_likely"(bint condition)
    bint unlikely "fd_unlikely"(bint condition)
    int64_t wall_ns "fd_wall_ns"()
    int64_t mono_ns "fd_mono_ns"()
    int64_t load "fd_load"(const int64_t *word)
    void store "fd_store"(int64_t *word, int64_t value)
    int64_t fetch_add "fd_fetch_add"(int64_t *word, int64_t value)
    bint compare_and_swap "fd_cas"(int64_t *word, int64_t expected, int64_t desired)
    void release_fence "fd_release"()
    void touch "fd_touch"(unsigned char *page)
    void write_uuid "fd_write_uuid"(const unsigned char *packet_id, char *text)
    void make_uuid7 "fd_make_uuid7"(int64_t wall_ns, uint64_t noise, unsigned char *packet_id)
    uint64_t fold "fd_fold"(uint64_t a, uint64_t b)
    uint64_t mix "fd_mix"(uint64_t x)
    uint64_t hash_bytes "fd_hash"(const void *data, size_t n)
    uint32_t crc32c "fd_crc32c"(uint32_t crc, const void *data, size_t n)
