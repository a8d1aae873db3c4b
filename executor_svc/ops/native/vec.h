/* The only file that knows the instruction set: one vector type, its widening loads and narrowing
 * stores, and the elementary functions. Everything else is written once over `vec`.
 *
 * Built several times from the same sources: AVX512 with and without the bfloat16 dot product,
 * AVX2 + FMA, NEON with dot products of bfloat16 and bytes or of bytes alone, and the compiler's
 * baseline (SSE2 on x86, NEON on aarch64). GCC's and Clang's vector extensions give the arithmetic.
 */
#ifndef HEADRACE_VEC_H
#define HEADRACE_VEC_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* LANES floats a register. A weight panel is PANEL columns wide, PANEL_VECS registers. A tile is
 * TILE_ROWS x PANEL accumulators: as many as stay in registers beside the weights. */
#if defined(__AVX512F__)
enum { LANES = 16, PANEL_VECS = 2, TILE_ROWS = 12 };
#elif defined(__AVX2__)
enum { LANES = 8, PANEL_VECS = 2, TILE_ROWS = 6 };
#elif defined(__aarch64__)
enum { LANES = 4, PANEL_VECS = 4, TILE_ROWS = 6 };
#else
enum { LANES = 4, PANEL_VECS = 2, TILE_ROWS = 6 };
#endif
enum { PANEL = LANES * PANEL_VECS };

/* Is there an instruction for dot_pairs()? Then bfloat16 weights are multiplied by activations that
 * are rounded to bfloat16, at twice the pace of float32. */
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
enum { HAS_BFLOAT_DOT = 1 };
#else
enum { HAS_BFLOAT_DOT = 0 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));
typedef uint16_t wide_hvec __attribute__((vector_size(4 * LANES)));
/* What memory holds: any address, any declared type. */
typedef vec vec_in_memory __attribute__((aligned(1), may_alias));
typedef hvec hvec_in_memory __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
/* Accumulators live in registers only if the loops over them are gone. */
#define UNROLL _Pragma("GCC unroll 16")

INLINE vec splat(float value) { return value - (vec){0}; }

INLINE vec load(const float *from) { return *(const vec_in_memory *)from; }

INLINE void store(float *to, vec value) { *(vec_in_memory *)to = value; }

/* The first `count` of LANES floats, zero behind them; reads no further. */
INLINE vec load_part(const float *from, int64_t count)
{
    if (count >= LANES)
        return load(from);
    float lanes[LANES] = {0};
    for (int64_t i = 0; i < count; i++)
        lanes[i] = from[i];
    return load(lanes);
}

INLINE void store_part(float *to, vec value, int64_t count)
{
    if (count >= LANES) {
        store(to, value);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        to[i] = value[i];
}

/* mask ? a : b, lane by lane; comparisons give such masks. */
INLINE vec choose(ivec mask, vec a, vec b)
{
    return (vec)((mask & (ivec)a) | (~mask & (ivec)b));
}

/* a > b ? a : b, which is one instruction on x86: b where either is not a number. */
INLINE vec vec_max(vec a, vec b)
{
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* a < b ? a : b; b where either is not a number. */
INLINE vec vec_min(vec a, vec b)
{
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return choose(a < b, a, b);
#endif
}

/* Bit l says whether lane l of a mask, as comparisons give it, is set. */
INLINE uint32_t lane_bits(ivec mask)
{
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#else
    uint32_t bits = 0;
    for (int l = 0; l < LANES; l++)
        bits |= (uint32_t)(mask[l] & 1) << l;
    return bits;
#endif
}

/* Where `value` is larger than the best so far, or the first NaN, it and its index take over. */
INLINE void keep_larger(vec value, ivec at, vec *best, ivec *index)
{
    ivec is_better = ~(value <= *best) & (*best == *best);
    *best = choose(is_better, value, *best);
    *index = (is_better & at) | (~is_better & *index);
}

/* Lane l of the result is lane mask[l] of a and b put side by side. */
INLINE vec mix(vec a, vec b, ivec mask)
{
#if defined(__clang__)
    vec out;
    for (int l = 0; l < LANES; l++)
        out[l] = mask[l] < LANES ? a[mask[l]] : b[mask[l] - LANES];
    return out;
#else
    return __builtin_shuffle(a, b, mask);
#endif
}

/* Lane l of the result is lane l + width, around the end. */
INLINE vec rotate_lanes(vec value, const int width)
{
    ivec from = {0};
    UNROLL for (int l = 0; l < LANES; l++)
        from[l] = (l + width) % LANES;
    return mix(value, value, from);
}

/* Both reductions halve the vector until one lane is left: one fixed order. */
INLINE float sum_lanes(vec value)
{
    if (LANES > 8)
        value += rotate_lanes(value, 8);
    if (LANES > 4)
        value += rotate_lanes(value, 4);
    value += rotate_lanes(value, 2);
    value += rotate_lanes(value, 1);
    return value[0];
}

INLINE float max_lanes(vec value)
{
    if (LANES > 8)
        value = vec_max(value, rotate_lanes(value, 8));
    if (LANES > 4)
        value = vec_max(value, rotate_lanes(value, 4));
    value = vec_max(value, rotate_lanes(value, 2));
    value = vec_max(value, rotate_lanes(value, 1));
    return value[0];
}

/* Swap bit `width` of the row's index with the same bit of the lane's. */
INLINE void transpose_bit(vec rows[LANES], const int width)
{
    ivec low = {0}, high = {0};
    UNROLL for (int l = 0; l < LANES; l++) {
        low[l] = l & width ? LANES + l - width : l;
        high[l] = l & width ? LANES + l : l + width;
    }
    UNROLL for (int i = 0; i < LANES; i++) {
        if (i & width)
            continue;
        vec a = rows[i], b = rows[i + width];
        rows[i] = mix(a, b, low);
        rows[i + width] = mix(a, b, high);
    }
}

/* Transpose LANES x LANES floats in registers, in log2(LANES) rounds (Eklundh, 1972). */
INLINE void transpose_square(vec rows[LANES])
{
    transpose_bit(rows, 1);
    transpose_bit(rows, 2);
    if (LANES > 4)
        transpose_bit(rows, 4 % LANES);
    if (LANES > 8)
        transpose_bit(rows, 8 % LANES);
}

/* --- the stored types: what weights and the KV cache are made of ------------------------------ */

/* Behind FLOAT16 are the codes of quantized weights, which only their own kernels read. */
enum dtype {
    FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3, INT4 = 4, INT8_DOT = 5, INT8_DIGITS = 6
};

INLINE size_t dtype_size(enum dtype type) { return type == FLOAT32 ? 4 : 2; }

INLINE float half_to_float(uint16_t bits)
{
    /* Shift the exponent into place as if it had float's bias, then multiply by the difference of
     * the biases, which also makes subnormals right; infinity and NaN need their exponent back. */
    union { uint32_t bits; float value; } wide = {.bits = (uint32_t)(bits & 0x7fff) << 13};
    wide.value *= 0x1p112f;
    if ((bits & 0x7c00) == 0x7c00)
        wide.bits |= 0x7f800000;
    wide.bits |= (uint32_t)(bits & 0x8000) << 16;
    return wide.value;
}

/* Round to nearest even, as the hardware does. */
INLINE uint16_t float_to_half(float value)
{
    union { float value; uint32_t bits; } in = {value};
    uint16_t sign = (in.bits >> 16) & 0x8000;
    in.bits &= 0x7fffffff;
    if (in.bits > 0x7f800000)
        return sign | 0x7e00;
    if (in.bits >= 0x477ff000) /* rounds beyond 65504 */
        return sign | 0x7c00;
    if (in.bits < 0x38800000) { /* subnormal: let float addition round at the right place */
        in.value += 0.5f;
        return sign | (uint16_t)(in.bits - 0x3f000000);
    }
    uint32_t odd = (in.bits >> 13) & 1;
    return sign | (uint16_t)((in.bits - 0x38000000 + 0xfff + odd) >> 13);
}

INLINE vec widen_half(const uint16_t *from)
{
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__)
    return (vec)vcvt_f32_f16((float16x4_t)*(const hvec_in_memory *)from);
#else
    vec out;
    for (int i = 0; i < LANES; i++)
        out[i] = half_to_float(from[i]);
    return out;
#endif
}

INLINE vec widen_bfloat(const uint16_t *from)
{
    /* GCC 12 converts a generic vector in two halves, hence the intrinsics. */
#if defined(__AVX512F__)
    uvec bits = (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
    uvec bits = (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__)
    uvec bits = (uvec)vmovl_u16((uint16x4_t)*(const hvec_in_memory *)from);
#else
    uvec bits = __builtin_convertvector(*(const hvec_in_memory *)from, uvec);
#endif
    return (vec)(bits << 16);
}

/* LANES elements at element `index` of an array of `type`, as floats. */
INLINE vec widen(const void *array, size_t index, enum dtype type)
{
    if (type == FLOAT32)
        return load((const float *)array + index);
    if (type == BFLOAT16)
        return widen_bfloat((const uint16_t *)array + index);
    return widen_half((const uint16_t *)array + index);
}

INLINE float widen_one(const void *array, size_t index, enum dtype type)
{
    if (type == FLOAT32)
        return ((const float *)array)[index];
    uint16_t bits = ((const uint16_t *)array)[index];
    if (type == FLOAT16)
        return half_to_float(bits);
    union { uint32_t bits; float value; } wide = {.bits = (uint32_t)bits << 16};
    return wide.value;
}

INLINE vec widen_part(const void *array, size_t index, int64_t count, enum dtype type)
{
    if (count >= LANES)
        return widen(array, index, type);
    float lanes[LANES] = {0};
    for (int64_t i = 0; i < count; i++)
        lanes[i] = widen_one(array, index + i, type);
    return load(lanes);
}

INLINE uint16_t float_to_bfloat(float value)
{
    union { float value; uint32_t bits; } in = {value};
    if (value != value) /* rounding could carry a NaN's bits into something finite */
        return 0x7fc0;
    return (uint16_t)((in.bits + 0x7fff + ((in.bits >> 16) & 1)) >> 16);
}

INLINE void narrow_one(void *array, size_t index, float value, enum dtype type)
{
    if (type == FLOAT32)
        ((float *)array)[index] = value;
    else
        ((uint16_t *)array)[index] =
            type == BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

/* --- pairs of bfloat16: what one lane of the dot product takes --------------------------------- */

/* Round `count` floats to bfloat16, to nearest even; a zero fills the last pair. */
INLINE void round_pairs(const float *from, int64_t count, float *pairs)
{
    char *to = (char *)pairs;
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + LANES <= count; i += LANES, to += 2 * LANES)
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)load(from + i)));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    for (; i + LANES <= count; i += LANES, to += 2 * LANES)
        *(hvec_in_memory *)to = (hvec)vcvt_bf16_f32((float32x4_t)load(from + i));
#endif
    for (; i < count + count % 2; i++, to += 2) {
        uint16_t bits = i < count ? float_to_bfloat(from[i]) : 0;
        memcpy(to, &bits, sizeof bits);
    }
}

/* The same of two whole vectors: the pairs of `low`, then those of `high`. */
INLINE vec round_two(vec low, vec high)
{
#if defined(__AVX512BF16__)
    return (vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
    float floats[2 * LANES], pairs[LANES];
    store(floats, low);
    store(floats + LANES, high);
    round_pairs(floats, 2 * LANES, pairs);
    return load(pairs);
#endif
}

/* Element i of `first` and of `second`, 2 * LANES each, become pair i, of which there are two
 * vectors. */
INLINE void zip_pairs(vec first, vec second, vec zipped[2])
{
    wide_hvec a = (wide_hvec)first, b = (wide_hvec)second, low, high;
#if defined(__clang__)
    for (int l = 0; l < LANES; l++) {
        low[2 * l] = a[l], low[2 * l + 1] = b[l];
        high[2 * l] = a[LANES + l], high[2 * l + 1] = b[LANES + l];
    }
#else
    wide_hvec from_low, from_high;
    UNROLL for (int l = 0; l < LANES; l++) {
        from_low[2 * l] = l, from_low[2 * l + 1] = 2 * LANES + l;
        from_high[2 * l] = LANES + l, from_high[2 * l + 1] = 3 * LANES + l;
    }
    low = __builtin_shuffle(a, b, from_low);
    high = __builtin_shuffle(a, b, from_high);
#endif
    zipped[0] = (vec)low;
    zipped[1] = (vec)high;
}

/* The pair at `pair` in every lane. */
INLINE vec splat_pair(const float *pair)
{
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return (vec)((ivec){0} + bits);
}

/* sums += a.first * b.first + a.second * b.second, lane by lane. */
INLINE vec dot_pairs(vec sums, vec a, vec b)
{
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (vec)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    const uvec high = (uvec){0} + 0xffff0000u;
    sums += (vec)((uvec)a << 16) * (vec)((uvec)b << 16);
    return sums + (vec)((uvec)a & high) * (vec)((uvec)b & high);
#endif
}

/* --- elementary functions --------------------------------------------------------------------- */

/* exp, relative error below 2e-7; arguments are clamped to +-87. The polynomial is that of Cephes'
 * expf (S. Moshier): exp(x) = 2^n exp(r) with r = x - n ln 2 in two parts. */
INLINE vec vec_exp(vec x)
{
    const vec low = splat(-87.0f), high = splat(87.0f), shifter = splat(0x1.8p23f);
    x = vec_min(high, vec_max(low, x)); /* a NaN stays */
    vec shifted = x * 1.44269504088896341f + shifter; /* its low bits are the rounded n */
    vec n = shifted - shifter;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + (r + 1.0f);
    uvec power = ((uvec)shifted - (uvec)shifter + 127u) << 23;
    return y * (vec)power;
}

/* tanh, relative error below 4e-7: a polynomial near zero, where 1 - 2 / (exp(2x) + 1) would
 * cancel (Cephes' tanhf). */
INLINE vec vec_tanh(vec x)
{
    vec size = choose(x < 0.0f, -x, x), z = x * x;
    vec p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z + -5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z + -3.33332819422e-1f;
    vec near = x + x * z * p;
    vec far = 1.0f - 2.0f / (vec_exp(2.0f * size) + 1.0f);
    far = choose(x < 0.0f, -far, far);
    return choose(size < 0.625f, near, far);
}

#endif
