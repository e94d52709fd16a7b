/* The one step of the JSON scanner (schema.pyx) that is worth vector instructions: passing over the text of a string. */
#ifndef FASTDIST_JSON_H
#define FASTDIST_JSON_H

#include <stdint.h>
#include <string.h>

/* fd_stops finds, in FD_BLOCK bytes at once, those that are not plain text: quotes, backslashes, control characters, and
 * the bytes of characters beyond ASCII. Its result shifted right by FD_STRIDE bits for each byte passed over has a bit
 * set at the lowest position that belongs to such a byte, and none above unless there is one. */
#if defined(__SSE2__)
#include <emmintrin.h>
enum { FD_BLOCK = 16, FD_STRIDE = 1 };
typedef uint32_t fd_mask;

static inline fd_mask fd_stops(const unsigned char *p) {
    __m128i text = _mm_loadu_si128((const __m128i *)p);
    __m128i quote = _mm_cmpeq_epi8(text, _mm_set1_epi8('"')), backslash = _mm_cmpeq_epi8(text, _mm_set1_epi8('\\'));
    /* Signed: less than a space are the control characters, and the bytes from 0x80 on. */
    __m128i other = _mm_cmplt_epi8(text, _mm_set1_epi8(' '));
    return (fd_mask)_mm_movemask_epi8(_mm_or_si128(_mm_or_si128(quote, backslash), other));
}
#else
enum { FD_BLOCK = 8, FD_STRIDE = 8 };
typedef uint64_t fd_mask;

/* (x - 0x01…) & ~x has the top bit of a byte set where x has a zero byte. A borrow can set it further up as well, but only
 * above a byte that is zero in truth, and the lowest one is all that is asked for. */
static inline fd_mask fd_stops(const unsigned char *p) {
    const uint64_t ones = 0x0101010101010101u;
    uint64_t text, quote, backslash;
    memcpy(&text, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    text = __builtin_bswap64(text);
#endif
    quote = text ^ (ones * '"');
    backslash = text ^ (ones * '\\');
    return (((quote - ones) & ~quote) | ((backslash - ones) & ~backslash) | ((text - ones * ' ') & ~text) | text) &
           (ones * 0x80);
}
#endif

static inline unsigned fd_lowest(fd_mask mask) {
    return (unsigned)(sizeof mask == 8 ? __builtin_ctzll(mask) : __builtin_ctz((unsigned)mask)) / FD_STRIDE;
}

/* The first byte of [p, end) that is not plain text, `end` if there is none. The last few bytes are looked at together
 * with those before p, so there must be 16 bytes of text before `end`. */
static inline const unsigned char *fd_plain_end(const unsigned char *p, const unsigned char *end) {
    for (; end - p >= FD_BLOCK; p += FD_BLOCK) {
        fd_mask stops = fd_stops(p);
        if (stops) return p + fd_lowest(stops);
    }
    if (p == end) return end;
    fd_mask stops = fd_stops(end - FD_BLOCK) >> (FD_STRIDE * (FD_BLOCK - (end - p)));
    return stops ? p + fd_lowest(stops) : end;
}

#endif
