/* Root mean square norm (Zhang and Sennrich, arXiv:1910.07467), alone or behind an addition.
 *
 *   parallel for row:
 *     for i in size:  (x += residual)  sum += x * x       LANES sums, added up at the end
 *     for i in size:  out = x / sqrt(sum / size + eps) * weight
 *
 * The second pass finds the row in L1, so a fused add costs no trip to memory.
 */
#include "norm.h"

#include "vec.h"

static void rms_norm(const float *x, const float *weight, float eps, int64_t size, float *out)
{
    vec sums = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        vec part = load_part(x + i, size - i);
        sums += part * part;
    }
    float scale = 1.0f / sqrtf(sum_lanes(sums) / size + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        vec part = load_part(x + i, size - i) * scale * load_part(weight + i, size - i);
        store_part(out + i, part, size - i);
    }
}

static void add_to(float *sum, const float *x, int64_t size)
{
    for (int64_t i = 0; i < size; i += LANES)
        store_part(sum + i, load_part(sum + i, size - i) + load_part(x + i, size - i), size - i);
}

EXPORT void headrace_rms_norm(const float *x, const float *weight, float eps, int64_t rows,
                              int64_t size, float *out)
{
    for (int64_t row = 0; row < rows; row++)
        rms_norm(x + row * size, weight, eps, size, out + row * size);
}
