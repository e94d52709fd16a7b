/* Small machine-level pieces that Cython has no words for: clocks, atomics, hashes, CRC-32C. */
#ifndef FASTDIST_BITS_H
#define FASTDIST_BITS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define fd_likely(x) __builtin_expect(!!(x), 1)
#define fd_unlikely(x) __builtin_expect(!!(x), 0)

/* Nanoseconds since 1970: for what is stored and compared between processes and over restarts. */
static inline int64_t fd_wall_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Nanoseconds since boot: for time-outs, the same in every process of this machine. */
static inline int64_t fd_mono_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The words of the shared block have one writer unless their description says otherwise; these are for the others. */
static inline int64_t fd_load(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void fd_store(int64_t *p, int64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline int64_t fd_fetch_add(int64_t *p, int64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
static inline int fd_cas(int64_t *p, int64_t expected, int64_t desired) {
    return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
/* Keeps the compiler (and, where the machine needs telling, the processor) from moving stores across a commit point. */
static inline void fd_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }

/* Writes what is there already: makes the kernel take the page for changed. */
static inline void fd_touch(unsigned char *p) { *(volatile unsigned char *)p = *(volatile unsigned char *)p; }

/* 64 x 64 -> 128 bits, folded: one multiplication mixes all bits of both. */
static inline uint64_t fd_fold(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* A UUID's 36 characters. */
static inline void fd_write_uuid(const unsigned char *id, char *text) {
    static const char hex[] = "0123456789abcdef";
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) *text++ = '-';
        *text++ = hex[id[i] >> 4];
        *text++ = hex[id[i] & 15];
    }
}

/* A UUIDv7 (RFC 9562): 48 bits of milliseconds, 12 of their fraction, 62 of `noise`. */
static inline void fd_make_uuid7(int64_t wall_ns, uint64_t noise, unsigned char *id) {
    uint64_t ms = (uint64_t)wall_ns / 1000000, fraction = (uint64_t)wall_ns % 1000000 * 4096 / 1000000;
    uint64_t high = ms << 16 | 0x7000 | fraction, low = noise >> 2 | (uint64_t)1 << 63;
    for (int i = 0; i < 8; i++) {
        id[i] = (unsigned char)(high >> (56 - 8 * i));
        id[8 + i] = (unsigned char)(low >> (56 - 8 * i));
    }
}

static inline uint64_t fd_mix(uint64_t x) { return fd_fold(x ^ 0x9E3779B97F4A7C15u, 0xD6E8FEB86659FD93u); }

/* Not for secrets: spreads keys evenly, the same in every process, on every machine, in every version. */
static inline uint64_t fd_hash(const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t h = 0x2545F4914F6CDD1Du ^ n, w;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&w, p, 8);
        h = fd_fold(h ^ w, 0x9FB21C651E98DF25u);
    }
    w = 0;
    if (n) memcpy(&w, p, n);
    return fd_mix(fd_fold(h ^ w, 0xA0761D6478BD642Fu));
}

/* CRC-32C (Castagnoli), as in iSCSI (RFC 3720). `crc` is the result of the preceding piece, 0 at first. */
#define FD_CRC_LANE 512
static uint32_t fd_crc_table[256];
static uint32_t fd_crc_skip[4][256]; /* what FD_CRC_LANE zero bytes make of each byte of a checksum */
static inline void fd_crc32c_prepare(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0);
        fd_crc_table[i] = c;
    }
    for (int bit = 0; bit < 32; bit++) {
        uint32_t c = (uint32_t)1 << bit;
        for (int n = 0; n < FD_CRC_LANE; n++) c = fd_crc_table[c & 0xFF] ^ (c >> 8);
        /* A checksum is linear in its bits: each value is that of its highest bit and of the rest. */
        for (uint32_t rest = 0; rest < (uint32_t)1 << (bit & 7); rest++)
            fd_crc_skip[bit >> 3][((uint32_t)1 << (bit & 7)) | rest] = c ^ fd_crc_skip[bit >> 3][rest];
    }
}
static inline uint32_t fd_crc32c_skip(uint32_t c) {
    return fd_crc_skip[0][c & 0xFF] ^ fd_crc_skip[1][c >> 8 & 0xFF] ^ fd_crc_skip[2][c >> 16 & 0xFF] ^
           fd_crc_skip[3][c >> 24];
}
static inline uint32_t fd_crc32c_soft(uint32_t crc, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    uint32_t c = ~crc;
    for (; n; n--) c = fd_crc_table[(c ^ *p++) & 0xFF] ^ (c >> 8);
    return ~c;
}
#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static inline uint32_t fd_crc32c_hw(uint32_t crc, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t c = (uint32_t)~crc, w;
    /* The instruction takes three cycles, but one can be started in each: three lanes side by side. */
    for (; n >= 3 * FD_CRC_LANE; n -= 3 * FD_CRC_LANE, p += 3 * FD_CRC_LANE) {
        uint64_t second = 0, third = 0;
        for (int i = 0; i < FD_CRC_LANE; i += 8) {
            uint64_t words[3];
            memcpy(&words[0], p + i, 8);
            memcpy(&words[1], p + i + FD_CRC_LANE, 8);
            memcpy(&words[2], p + i + 2 * FD_CRC_LANE, 8);
            c = __builtin_ia32_crc32di(c, words[0]);
            second = __builtin_ia32_crc32di(second, words[1]);
            third = __builtin_ia32_crc32di(third, words[2]);
        }
        c = fd_crc32c_skip(fd_crc32c_skip((uint32_t)c) ^ (uint32_t)second) ^ third;
    }
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&w, p, 8);
        c = __builtin_ia32_crc32di(c, w);
    }
    for (; n; n--) c = __builtin_ia32_crc32qi((uint32_t)c, *p++);
    return ~(uint32_t)c;
}
static inline int fd_crc32c_is_hw(void) { return __builtin_cpu_supports("sse4.2"); }
#else
static inline uint32_t fd_crc32c_hw(uint32_t crc, const void *data, size_t n) { return fd_crc32c_soft(crc, data, n); }
static inline int fd_crc32c_is_hw(void) { return 0; }
#endif

static inline uint32_t fd_crc32c(uint32_t crc, const void *data, size_t n) {
    static int hardware = -1;
    if (fd_unlikely(hardware < 0)) {
        fd_crc32c_prepare();
        hardware = fd_crc32c_is_hw();
    }
    return hardware ? fd_crc32c_hw(crc, data, n) : fd_crc32c_soft(crc, data, n);
}

#endif
