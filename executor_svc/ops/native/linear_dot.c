/* Linear projection with weights and activations of 8 bits (w8a8): sums are exact in int32.
 *
 *   codes[m][k] = round(x[m][k] * 127 / largest |x[m]|)     each row by itself, as it comes
 *   out[m][n] = sum(codes[m] * weight[n]) * (largest |x[m]| / 127) * scale[n] + bias[n]
 *
 * Exact sums may be added up in any order, so nothing here depends on a row's company. A weight
 * [out, in] is stored [out / PANEL][in / DOT][PANEL][DOT], a tile of activations
 * [in / DOT][rows of the tile][DOT]; in is padded to whole DOTs with codes of zero.
 *
 *   parallel for panel, block of rows:
 *     for tile of rows in the block:                    the panel stays in the cache
 *       for k in in / DOT: for m in rows:               sum[m] += dots(w[k], codes[m][k])
 *
 * Storing weights plus 128 (VNNI) adds 128 * sum(codes[m]) to each sum: sums start at minus that.
 */
#include "dot.h"
#include "linear.h"
#include "quantized.h"

/* The quantized rows of x, in linear()'s workspace. */
typedef struct {
    float *scales;   /* [rows] */
    int32_t *starts; /* [rows] */
    dot_code *codes;
} DotRows;

typedef struct {
    const Linear *weight;
    const float *x;
    float *out;
    DotRows quantized;
    int64_t rows, steps; /* in / DOT */
} DotProduct;

static int64_t num_steps(int64_t in_size) { return (in_size + DOT - 1) / DOT; }

/* Parts of `workspace`, which has in_size + 4 floats a row. */
static DotRows lay_out_rows(float *workspace, int64_t rows)
{
    return (DotRows){workspace, (int32_t *)(workspace + rows), (dot_code *)(workspace + 2 * rows)};
}

static float largest_size(const float *x, int64_t size)
{
    vec most = {0};
    for (int64_t k = 0; k < size; k += LANES)
        most = vec_max((vec)((ivec)load_part(x + k, size - k) & 0x7fffffff), most);
    return max_lanes(most);
}

/* Quantize one row into every `stride`-th place of DOT codes; returns the sum of its codes. */
static int32_t quantize_row(const float *x, int64_t size, float factor, dot_code *to,
                            int64_t stride)
{
    const vec shifter = splat(0x1.8p23f); /* leaves the rounded value in the low bits */
    int32_t codes[LANES], sum = 0;
    for (int64_t k = 0; k < size; k += LANES) {
        vec shifted = load_part(x + k, size - k) * factor + shifter;
        ivec rounded = (ivec)shifted - (ivec)shifter;
        memcpy(codes, &rounded, sizeof codes);
        for (int64_t i = 0; i < LANES && k + i < size; i++) {
            to[(k + i) / DOT * stride + (k + i) % DOT] = (dot_code)codes[i];
            sum += (dot_code)codes[i];
        }
    }
    for (int64_t k = size; k % DOT != 0; k++)
        to[k / DOT * stride + k % DOT] = 0;
    return sum;
}

static void quantize_tiles(const void *arg, int64_t first, int64_t last)
{
    const DotProduct *p = arg;
    int64_t in_size = p->weight->in_size;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t begin = tile_begin(p->rows, tile), rows = tile_begin(p->rows, tile + 1) - begin;
        dot_code *codes = p->quantized.codes + begin * p->steps * DOT;
        for (int64_t m = 0; m < rows; m++) {
            const float *x = p->x + (begin + m) * in_size;
            float most = largest_size(x, in_size);
            int32_t sum = quantize_row(x, in_size, most > 0 ? 127 / most : 0, codes + m * DOT,
                                       rows * DOT);
            p->quantized.scales[begin + m] = most / 127;
            p->quantized.starts[begin + m] = -WEIGHT_ZERO * sum;
        }
    }
}

/* One panel times `rows` rows of codes [steps][rows][DOT], into sums [rows][PANEL]. */
INLINE void dot_tile(const int rows, const uint8_t *w, const dot_code *x, const int32_t *starts,
                     int64_t steps, int32_t *out)
{
    ivec sums[TILE_ROWS][PANEL_VECS];
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            sums[m][v] = starts[m] - (ivec){0};
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
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            memcpy(out + m * PANEL + v * LANES, &sums[m][v], sizeof(ivec));
}

static void dot_any_tile(int64_t rows, const uint8_t *w, const dot_code *x, const int32_t *starts,
                         int64_t steps, int32_t *sums)
{
#define CASE(R) \
    case R: \
        if (R <= TILE_ROWS) \
            dot_tile(R, w, x, starts, steps, sums); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* From exact sums [rows][PANEL] to the results of a tile's rows in one panel. */
static void finish_dots(const DotProduct *p, int64_t panel, int64_t first, int64_t rows,
                        const int32_t *sums)
{
    const Linear *weight = p->weight;
    int64_t begin = panel * PANEL, columns = weight->out_size - begin;
    for (int64_t i = 0; i < PANEL && i < columns; i += LANES) {
        vec scale = load(weight->scales + begin + i);
        vec bias = weight->bias != NULL ? load(weight->bias + begin + i) : splat(0);
        for (int64_t m = 0; m < rows; m++) {
            ivec sum;
            memcpy(&sum, sums + m * PANEL + i, sizeof sum);
            vec scaled = __builtin_convertvector(sum, vec) * p->quantized.scales[first + m];
            store_part(p->out + (first + m) * weight->out_size + begin + i,
                       scaled * scale + bias, columns - i);
        }
    }
}

static void dot_panels(const void *arg, int64_t first, int64_t last)
{
    const DotProduct *p = arg;
    int64_t panels = num_panels(p->weight->out_size), tiles = num_tiles(p->rows);
    int32_t sums[TILE_ROWS * PANEL];
    for (int64_t item = first; item < last; item++) {
        int64_t panel = item % panels, tile = item / panels * BLOCK_TILES;
        int64_t end = tile + BLOCK_TILES < tiles ? tile + BLOCK_TILES : tiles;
        const uint8_t *w = (const uint8_t *)p->weight->panels + panel * p->steps * PANEL * DOT;
        for (; tile < end; tile++) {
            int64_t begin = tile_begin(p->rows, tile), rows = tile_begin(p->rows, tile + 1) - begin;
            dot_any_tile(rows, w, p->quantized.codes + begin * p->steps * DOT,
                         p->quantized.starts + begin, p->steps, sums);
            finish_dots(p, panel, begin, rows, sums);
        }
    }
}

static void linear_dot(Pool *pool, const Linear *weight, const float *x, int64_t rows, float *out,
                       float *workspace)
{
    int64_t panels = num_panels(weight->out_size), tiles = num_tiles(rows);
    DotProduct product = {weight, x, out, lay_out_rows(workspace, rows), rows,
                          num_steps(weight->in_size)};
    pool_run(pool, tiles, 1e-9 + (double)weight->in_size * TILE_ROWS, quantize_tiles, &product);
    /* A panel's cost: 8 GB/s for its bytes, or 64 multiply-adds a nanosecond. */
    double elements = (double)weight->in_size * PANEL;
    double memory_ns = elements / 8, arithmetic_ns = elements * rows / 64;
    int64_t blocks = (tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    double cost_ns = (memory_ns > arithmetic_ns ? memory_ns : arithmetic_ns) / blocks;
    pool_run(pool, panels * blocks, cost_ns, dot_panels, &product);
}

/* How this build stores INT8_DOT: codes side by side in a column, and what is added to each. */
EXPORT void headrace_dot_layout(int64_t *dot, int64_t *weight_zero)
{
    *dot = DOT;
    *weight_zero = WEIGHT_ZERO;
}
