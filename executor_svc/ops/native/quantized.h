/* Linear projections over quantized weights: codes and the grid that gives them their values. */
#ifndef HEADRACE_QUANTIZED_H
#define HEADRACE_QUANTIZED_H

#include <stdbool.h>

#include "headrace.h"
#include "pool.h"
#include "vec.h"

static inline bool is_quantized(int64_t dtype) { return dtype > FLOAT16; }

/* linear() for a weight of codes. */
static void linear_quantized(Pool *pool, const Linear *weight, const float *x, int64_t rows,
                             float *out, float *workspace);

/* Row `row` of an ungrouped INT8 or INT8_DIGITS weight [out, in], as floats: an embedding that is
 * also the head. */
static void quantized_row(const Linear *weight, int64_t row, float *out);

/* a * b + c, rounded once where the instruction set can. Said aloud: left to itself, the compiler
 * fuses in one caller and not in another, and two ways to the same result would differ by a bit. */
INLINE vec multiply_add(vec a, vec b, vec c)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < LANES; i++)
        c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

#if defined(__aarch64__)
/* The LANES bytes at `from`, the first of eight. */
INLINE uint8x8_t load_bytes(const void *from)
{
    uint32_t bytes;
    memcpy(&bytes, from, sizeof bytes);
    return (uint8x8_t)vdup_n_u32(bytes);
}
#endif

/* LANES codes as floats. */
INLINE vec widen_int8(const int8_t *from)
{
    /* As in vec.h: GCC 12 converts a generic vector in pieces, hence the intrinsics. */
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#elif defined(__aarch64__)
    int16x8_t wide = vmovl_s8((int8x8_t)load_bytes(from));
    return (vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
#else
    vec out;
    for (int i = 0; i < LANES; i++)
        out[i] = from[i];
    return out;
#endif
}

/* LANES bytes, each two codes of 4 bits: the low halves and the high halves as floats. */
INLINE void widen_int4(const uint8_t *from, vec *low, vec *high)
{
#if defined(__AVX512F__)
    ivec bytes = (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    ivec bytes = (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#elif defined(__aarch64__)
    ivec bytes = (ivec)vmovl_u16(vget_low_u16(vmovl_u8(load_bytes(from))));
#else
    ivec bytes;
    for (int i = 0; i < LANES; i++)
        bytes[i] = from[i];
#endif
    *low = __builtin_convertvector(bytes & 15, vec);
    *high = __builtin_convertvector(bytes >> 4, vec);
}

#endif
