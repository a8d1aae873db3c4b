/* Rounds a float weight to int8 and packs it in one pass, once, at load.
 *
 *   parallel for panel:
 *     for row of the weight in the panel:      scale = largest |row| / 127
 *       for k in in:                           its code goes to the row's column of the panel
 */
#include "dot.h"
#include "headrace.h"
#include "pool.h"
#include "quantized.h"

/* `from` is a dense weight [out_size, in_size] of `type`; codes are as `to` says. */
typedef struct {
    const void *from;
    enum dtype type, to;
    int64_t out_size, in_size;
    uint8_t *packed; /* zeros */
    float *scales;
} Quantize;

INLINE float largest_element(const void *row, int64_t size, const enum dtype type)
{
    vec most = {0};
    for (int64_t k = 0; k < size; k += LANES)
        most = vec_max((vec)((ivec)widen_part(row, k, size - k, type) & 0x7fffffff), most);
    return max_lanes(most);
}

/* One row of the weight into every column-th code of a panel whose steps take `unit` codes. */
INLINE void quantize_elements(const void *row, int64_t size, const enum dtype type, float scale,
                              const int unit, const int zero, uint8_t *to)
{
    const vec shifter = splat(0x1.8p23f); /* leaves the rounded value in the low bits */
    int32_t codes[LANES];
    for (int64_t k = 0; k < size; k += LANES) {
        vec shifted = widen_part(row, k, size - k, type) / scale + shifter;
        ivec rounded = (ivec)shifted - (ivec)shifter;
        memcpy(codes, &rounded, sizeof codes);
        for (int64_t i = 0; i < LANES && k + i < size; i++)
            to[(k + i) / unit * PANEL * unit + (k + i) % unit] = (uint8_t)(codes[i] + zero);
    }
}

INLINE void quantize_rows(const Quantize *q, const enum dtype type, int64_t first, int64_t last)
{
    int64_t in_size = q->in_size, steps = num_steps(in_size);
    for (int64_t row = first; row < last; row++) {
        const char *from = (const char *)q->from + row * in_size * dtype_size(type);
        int64_t panel = row / PANEL, column = row % PANEL;
        float scale = largest_element(from, in_size, type) / 127;
        q->scales[row] = scale;
        if (scale == 0) /* all zeros, or nearly; its codes would not matter */
            scale = 1;
        if (q->to != INT8)
            quantize_elements(from, in_size, type, scale, DOT, WEIGHT_ZERO,
                              q->packed + (panel * steps * PANEL + column) * DOT);
        else
            quantize_elements(from, in_size, type, scale, 1, 0,
                              q->packed + panel * in_size * PANEL + column);
    }
}

static void quantize_panels(const void *arg, int64_t first, int64_t last)
{
    const Quantize *q = arg;
    int64_t begin = first * PANEL, end = last * PANEL < q->out_size ? last * PANEL : q->out_size;
    if (q->type == FLOAT32)
        quantize_rows(q, FLOAT32, begin, end);
    else if (q->type == BFLOAT16)
        quantize_rows(q, BFLOAT16, begin, end);
    else
        quantize_rows(q, FLOAT16, begin, end);
}

/* Quantize a dense weight [out_size, in_size] of `dtype` to codes `to`, INT8 or INT8_DOT, with a
 * scale for each output; `packed` and `scales` are zeroed memory for whole panels. */
EXPORT void headrace_quantize_weight(Pool *pool, const void *weight, int64_t out_size,
                                     int64_t in_size, int64_t dtype, int64_t to, void *packed,
                                     float *scales)
{
    Quantize quantize = {weight, dtype, to, out_size, in_size, packed, scales};
    pool_run(pool, (out_size + PANEL - 1) / PANEL, (double)in_size * PANEL, quantize_panels,
             &quantize);
}
