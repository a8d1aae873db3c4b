/* What this machine can do at most: the measures that benchmarks hold the kernels against.
 *
 *   read:      parallel for chunk: sum up memory, 8 independent sums         -> bytes a second
 *   multiply:  parallel for chunk: TILE_ROWS x PANEL_VECS independent sums   -> multiply-adds a second
 */
#include <stdbool.h>

#include "pack.h"
#include "pool.h"
#include "vec.h"

enum { PROBE_CHUNK = 1 << 16, MULTIPLY_ROUNDS = 1 << 12 };

typedef struct {
    const float *from;
    float *to; /* one float a chunk, so that nothing is optimised away */
} Probe;

static void probe_read_chunk(const void *arg, int64_t first, int64_t last)
{
    const Probe *probe = arg;
    for (int64_t chunk = first; chunk < last; chunk++) {
        const float *from = probe->from + chunk * PROBE_CHUNK;
        vec sums[8] = {{0}};
        for (int64_t i = 0; i < PROBE_CHUNK; i += 8 * LANES)
            UNROLL for (int s = 0; s < 8; s++)
                sums[s] += load(from + i + s * LANES);
        for (int s = 1; s < 8; s++)
            sums[0] += sums[s];
        probe->to[chunk] = sum_lanes(sums[0]);
    }
}

INLINE void multiply_chunk(const Probe *probe, const bool is_paired, int64_t chunk)
{
    vec sums[TILE_ROWS][PANEL_VECS], a = load(probe->from), b = load(probe->from + LANES);
    for (int m = 0; m < TILE_ROWS; m++)
        for (int v = 0; v < PANEL_VECS; v++)
            sums[m][v] = splat(m * PANEL_VECS + v); /* all different, or they would be one */
    for (int round = 0; round < MULTIPLY_ROUNDS; round++)
        UNROLL for (int m = 0; m < TILE_ROWS; m++)
            UNROLL for (int v = 0; v < PANEL_VECS; v++)
                sums[m][v] = is_paired ? dot_pairs(sums[m][v], a, b) : sums[m][v] * a + b;
    for (int m = 0; m < TILE_ROWS; m++)
        for (int v = 0; v < PANEL_VECS; v++)
            sums[0][0] += sums[m][v];
    probe->to[chunk] = sum_lanes(sums[0][0]);
}

static void probe_multiply_chunk(const void *arg, int64_t first, int64_t last)
{
    for (int64_t chunk = first; chunk < last; chunk++)
        multiply_chunk(arg, false, chunk);
}

static void probe_dot_chunk(const void *arg, int64_t first, int64_t last)
{
    for (int64_t chunk = first; chunk < last; chunk++)
        multiply_chunk(arg, true, chunk);
}

/* Read `chunks` times 256 KiB once; `to` has a float for each. */
EXPORT void headrace_probe_read(Pool *pool, const float *from, int64_t chunks, float *to)
{
    Probe probe = {from, to};
    pool_run(pool, chunks, 1e5, probe_read_chunk, &probe);
}

/* Do `chunks` rounds of what the tile kernel does with weights of this dtype, on the 2 * LANES
 * floats `from`; returns how many multiply-adds that are. */
EXPORT int64_t headrace_probe_multiply(Pool *pool, const float *from, int64_t chunks, float *to,
                                       int64_t dtype)
{
    Probe probe = {from, to};
    int64_t group = depth_group(dtype);
    pool_run(pool, chunks, 1e5, group == 2 ? probe_dot_chunk : probe_multiply_chunk, &probe);
    return chunks * MULTIPLY_ROUNDS * TILE_ROWS * PANEL_VECS * LANES * group;
}
