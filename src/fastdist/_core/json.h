/* The one step of the JSON scanner (schema.pyx) that is worth vector instructions: passing over the text of a string. */
#ifndef FASTDIST_JSON_H
#define FASTDIST_JSON_H

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* The first byte of [p, end) that is not plain text: a quote, a backslash, a control character, or a byte of a character
 * beyond ASCII; `end` if there is none. Reads nothing outside [p, end), which is why the last few bytes go one by one. */
static inline const unsigned char *fd_plain_end(const unsigned char *p, const unsigned char *end) {
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"'), backslash = _mm_set1_epi8('\\'), space = _mm_set1_epi8(' ');
    for (; end - p >= 16; p += 16) {
        __m128i text = _mm_loadu_si128((const __m128i *)p);
        /* The comparison is signed: control characters are less than a space, and so is every byte from 0x80 on. */
        __m128i stop = _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(text, quote), _mm_cmpeq_epi8(text, backslash)),
                                    _mm_cmplt_epi8(text, space));
        int mask = _mm_movemask_epi8(stop);
        if (mask) return p + __builtin_ctz((unsigned)mask);
    }
#elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    /* The same eight bytes at a time. (x - 0x01…) & ~x has the top bit of every zero byte of x set; a borrow may mark
     * bytes above a zero byte by mistake, never the lowest one, which is the one asked for. */
    const uint64_t ones = 0x0101010101010101u;
    for (; end - p >= 8; p += 8) {
        uint64_t text, quote, backslash, stop;
        memcpy(&text, p, 8);
        quote = text ^ (ones * '"');
        backslash = text ^ (ones * '\\');
        stop = ((quote - ones) & ~quote) | ((backslash - ones) & ~backslash) | ((text - ones * ' ') & ~text) | text;
        stop &= ones * 0x80;
        if (stop) return p + __builtin_ctzll(stop) / 8;
    }
#endif
    while (p < end && *p >= ' ' && *p < 0x80 && *p != '"' && *p != '\\') p++;
    return p;
}

#endif
