/* What the JSON scanner (packet_scan.pxi) cannot say in Cython: vector instructions where they are worth it, for passing over
 * plain text, and that some code is hardly ever run. */
#ifndef FASTDIST_JSON_H
#define FASTDIST_JSON_H

#include <stdint.h>
#include <string.h>

/* fd_stops looks at FD_BLOCK bytes at once for those that are not plain text: quotes, backslashes, control characters,
 * and the bytes of characters beyond ASCII. Its result has FD_STRIDE bits for each, from the lowest ones on for the
 * first; one of them is set if the byte is such a one. */
#if defined(__SSE2__)
#include <emmintrin.h>
enum { FD_BLOCK = 16, FD_STRIDE = 1 };
typedef uint32_t fd_stop_bits;

static inline fd_stop_bits fd_stops(const unsigned char *p) {
    __m128i text = _mm_loadu_si128((const __m128i *)p);
    __m128i quote = _mm_cmpeq_epi8(text, _mm_set1_epi8('"')), backslash = _mm_cmpeq_epi8(text, _mm_set1_epi8('\\'));
    /* Signed: less than a space are the control characters, and the bytes from 0x80 on. */
    __m128i other = _mm_cmplt_epi8(text, _mm_set1_epi8(' '));
    return (fd_stop_bits)_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(quote, backslash), other));
}
#else
#define FD_EVERY(byte) (0x0101010101010101u * (byte))
enum { FD_BLOCK = 8, FD_STRIDE = 8 };
typedef uint64_t fd_stop_bits;

/* The top bit of every byte: whether the byte is not 0. No sum is too large for its byte. */
static inline uint64_t fd_is_set(uint64_t x) { return ((x & FD_EVERY(0x7F)) + FD_EVERY(0x7F)) | x; }

static inline fd_stop_bits fd_stops(const unsigned char *p) {
    uint64_t text, plain;
    memcpy(&text, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    text = __builtin_bswap64(text);
#endif
    plain = fd_is_set(text ^ FD_EVERY('"')) & fd_is_set(text ^ FD_EVERY('\\')) & fd_is_set(text & FD_EVERY(0xE0));
    return (~plain | text) & FD_EVERY(0x80);
}
#endif

static inline unsigned fd_first(fd_stop_bits stops) { return (unsigned)__builtin_ctzll(stops) / FD_STRIDE; }

/* The first byte of [p, end) that is not plain text, `end` without one. The last few bytes are looked at together
 * with those before p, so there must be FD_BLOCK bytes of the body before `end`. */
static inline const unsigned char *fd_plain_end(const unsigned char *p, const unsigned char *end) {
    fd_stop_bits stops;
    for (; end - p >= FD_BLOCK; p += FD_BLOCK) {
        stops = fd_stops(p);
        if (stops) return p + fd_first(stops);
    }
    if (p == end) return end;
    stops = fd_stops(end - FD_BLOCK) >> (FD_STRIDE * (FD_BLOCK - (end - p)));
    return stops ? p + fd_first(stops) : end;
}

/* Where and why something was last not JSON. The scanning thread holds the GIL. */
typedef struct {
    const unsigned char *at;
    const char *why;
} fd_stop;
static fd_stop fd_stopped;

__attribute__((cold, noinline)) static const unsigned char *fd_no(const unsigned char *at, const char *why) {
    fd_stopped.at = at;
    fd_stopped.why = why;
    return NULL;
}

#endif
