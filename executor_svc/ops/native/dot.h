/* Dot products of bytes, exact in int32: the second file that knows the instruction set.
 *
 * FLOAT_DIGITS is how many codes an activation is split into that is not to be rounded to 8 bits;
 * 0 where floats are faster.
 *
 * A step takes DOT rows of a panel at once: lane l of `weights` holds the codes of column l, DOT
 * of them side by side, and every lane of `x` the same DOT codes of a row of activations.
 *
 *   VNNI           DOT 4  vpdpbusd: unsigned times signed bytes, so weights are stored plus 128
 *   AVX512, AVX2   DOT 2  vpmaddwd: pairs of int16 (vpmaddubsw would saturate)
 *   NEON dotprod   DOT 4  sdot: signed bytes
 *   elsewhere      DOT 1  int32 products
 */
#ifndef HEADRACE_DOT_H
#define HEADRACE_DOT_H

#include "vec.h"

#if defined(__AVX512VNNI__)

enum { DOT = 4, WEIGHT_ZERO = 128, FLOAT_DIGITS = 2 };
typedef int8_t dot_code;
INLINE ivec load_weights(const uint8_t *from) { return (ivec)_mm512_loadu_si512(from); }
INLINE ivec add_dots(ivec sums, ivec weights, ivec x)
{
    return (ivec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)x);
}
INLINE void store_codes(dot_code *to, ivec codes)
{
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)codes));
}
INLINE void store_two_digits(dot_code *to, ivec first, ivec second)
{
    __m128i a = _mm512_cvtepi32_epi8((__m512i)first), b = _mm512_cvtepi32_epi8((__m512i)second);
    _mm_storeu_si128((__m128i *)to, _mm_unpacklo_epi32(a, b));
    _mm_storeu_si128((__m128i *)to + 1, _mm_unpackhi_epi32(a, b));
}

#elif defined(__AVX512BW__)

enum { DOT = 2, WEIGHT_ZERO = 0, FLOAT_DIGITS = 0 };
typedef int16_t dot_code;
INLINE ivec load_weights(const uint8_t *from)
{
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
}
INLINE ivec add_dots(ivec sums, ivec weights, ivec x)
{
    return sums + (ivec)_mm512_madd_epi16((__m512i)weights, (__m512i)x);
}
INLINE void store_codes(dot_code *to, ivec codes)
{
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)codes));
}

#elif defined(__AVX2__)

enum { DOT = 2, WEIGHT_ZERO = 0, FLOAT_DIGITS = 0 };
typedef int16_t dot_code;
INLINE ivec load_weights(const uint8_t *from)
{
    return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
}
INLINE ivec add_dots(ivec sums, ivec weights, ivec x)
{
    return sums + (ivec)_mm256_madd_epi16((__m256i)weights, (__m256i)x);
}
INLINE void store_codes(dot_code *to, ivec codes)
{
    for (int i = 0; i < LANES; i++)
        to[i] = (dot_code)codes[i];
}

#elif defined(__ARM_FEATURE_DOTPROD)

enum { DOT = 4, WEIGHT_ZERO = 0, FLOAT_DIGITS = 2 };
typedef int8_t dot_code;
INLINE ivec load_weights(const uint8_t *from) { return (ivec)vld1q_u8(from); }
INLINE ivec add_dots(ivec sums, ivec weights, ivec x)
{
    return (ivec)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, (int8x16_t)x);
}
INLINE void store_codes(dot_code *to, ivec codes)
{
    for (int i = 0; i < LANES; i++)
        to[i] = (dot_code)codes[i];
}

#else

enum { DOT = 1, WEIGHT_ZERO = 0, FLOAT_DIGITS = 0 };
typedef int32_t dot_code;
INLINE ivec load_weights(const uint8_t *from)
{
    ivec out;
    for (int i = 0; i < LANES; i++)
        out[i] = (int8_t)from[i];
    return out;
}
INLINE ivec add_dots(ivec sums, ivec weights, ivec x) { return sums + weights * x; }
INLINE void store_codes(dot_code *to, ivec codes) { memcpy(to, &codes, sizeof codes); }

#endif

#if !defined(__AVX512VNNI__)
/* Codes of two digits in turns: DOT of the first, DOT of the second. */
INLINE void store_two_digits(dot_code *to, ivec first, ivec second)
{
    dot_code a[LANES], b[LANES];
    store_codes(a, first);
    store_codes(b, second);
    for (int i = 0; i < LANES; i += DOT, to += 2 * DOT) {
        memcpy(to, a + i, DOT * sizeof(dot_code));
        memcpy(to + DOT, b + i, DOT * sizeof(dot_code));
    }
}
#endif

/* DOT codes, the same in every lane. */
INLINE ivec spread_codes(const dot_code *from)
{
    int32_t codes = 0;
    memcpy(&codes, from, DOT * sizeof(dot_code));
    return codes - (ivec){0};
}

/* The codes of `rows` rows times those of a panel, on top of sums that begin at `start`. */
INLINE void dot_panel(const int rows, const uint8_t *w, const dot_code *x, int64_t steps,
                      const int32_t *start, ivec sums[TILE_ROWS][PANEL_VECS])
{
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            sums[m][v] = start[m] - (ivec){0};
    for (int64_t k = 0; k < steps; k++, w += PANEL * DOT, x += rows * DOT) {
        ivec weights[PANEL_VECS];
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            weights[v] = load_weights(w + v * LANES * DOT);
        UNROLL for (int m = 0; m < rows; m++) {
            ivec own = spread_codes(x + m * DOT);
            UNROLL for (int v = 0; v < PANEL_VECS; v++)
                sums[m][v] = add_dots(sums[m][v], weights[v], own);
        }
    }
}

#endif
