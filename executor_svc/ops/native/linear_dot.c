/* Linear projection of 8-bit weights by dot products of bytes, whose sums are exact in int32.
 *
 * A row of activations, each row by itself, becomes integers of `digits` digits to the base 256:
 *
 *   number[k] = round(x[k] * limit / largest |x|) = sum over d of 256^(digits - 1 - d) * code[d][k]
 *   out[n] = sum over d of 256^(...) * sum(code[d] * weight[n]) * largest |x| / limit * scale[n]
 *
 *   INT8_DOT     1 digit, limit 127: activations of 8 bits (w8a8)
 *   INT8_DIGITS  FLOAT_DIGITS, which stand for floats: 2 have a limit of 127 * 257, so that a number
 *                is wrong by 2^-16 of the row's largest at most
 *
 * Exact sums may be added up in any order, so nothing here depends on a row's company. To the
 * kernel, digits are rows. A weight [out, in] is stored [out / PANEL][in / DOT][PANEL][DOT], a tile
 * of activations [in / DOT][rows of the tile][digits][DOT]; in is padded to whole DOTs with codes
 * of zero.
 *
 *   parallel for panel, block of rows:
 *     for tile of rows in the block:                    the panel stays in the cache
 *       for k in in / DOT: for m, d in rows, digits:    sum[m][d] += dots(w[k], codes[m][d][k])
 *
 * Storing weights plus 128 (VNNI) adds 128 * sum(code[d]) to each sum: sums start at minus that.
 * What overflows on the way wraps around and comes back.
 */
#include "dot.h"
#include "linear.h"
#include "quantized.h"

enum { MAX_DIGITS = 2, BASE = 256 };
/* A row whose largest is below counts as zeros: its factor would be infinite. */
#define TINY_ROW 1e-30f

/* The quantized rows of x, in linear()'s workspace. */
typedef struct {
    float *scales;   /* [rows] */
    int32_t *starts; /* [rows][digits] */
    dot_code *codes;
} DotRows;

typedef struct {
    const Linear *weight;
    const float *x;
    float *out;
    DotRows quantized;
    int64_t rows, steps; /* in / DOT */
    int digits;
} DotProduct;

static int64_t num_steps(int64_t in_size) { return (in_size + DOT - 1) / DOT; }

/* Tiles have as many rows as their digits leave room for, dealt evenly as in linear.c. */
static int64_t num_dot_tiles(const DotProduct *p)
{
    int64_t most = TILE_ROWS / p->digits;
    return (p->rows + most - 1) / most;
}

static int64_t dot_tile_begin(const DotProduct *p, int64_t tile)
{
    return p->rows * tile / num_dot_tiles(p);
}

/* Parts of `workspace`, which has in_size + 4 floats a row. */
static DotRows lay_out_rows(float *workspace, int64_t rows, int digits)
{
    return (DotRows){workspace, (int32_t *)(workspace + rows),
                     (dot_code *)(workspace + (1 + digits) * rows)};
}

/* The largest |x|, or a NaN if there is one: as integers NaNs are the largest. */
static float largest_size(const float *x, int64_t size)
{
    union { int32_t bits; float value; } largest = {0};
    ivec most = {0};
    for (int64_t k = 0; k < size; k += LANES) {
        ivec bits = (ivec)load_part(x + k, size - k) & 0x7fffffff, is_more = bits > most;
        most = (is_more & bits) | (~is_more & most);
    }
    for (int i = 0; i < LANES; i++)
        largest.bits = most[i] > largest.bits ? most[i] : largest.bits;
    return largest.value;
}

/* One step's codes of each digit, to every `stride`-th place of DOT codes. */
INLINE void scatter_digits(const ivec *number, const int digits, int64_t steps, dot_code *to,
                           int64_t stride)
{
    UNROLL for (int d = 0; d < digits; d++) {
        dot_code codes[LANES];
        store_codes(codes, number[d]);
        for (int64_t i = 0; i < steps; i++)
            memcpy(to + i * stride + d * DOT, codes + i * DOT, DOT * sizeof(dot_code));
    }
}

/* Quantize one row: digit d into every `stride`-th place of DOT codes from to[d * DOT] on. The sum
 * of each digit's codes goes to sums [digits].
 *
 * A row that is alone in its tile is written in whole vectors: in small pieces it took up to 5 us more,
 * as the store buffer held few of the lines that the other threads had read last. */
INLINE void quantize_row(const float *x, int64_t size, float factor, const int digits,
                         dot_code *to, int64_t stride, int32_t *sums)
{
    const vec shifter = splat(0x1.8p23f); /* leaves the rounded value in the low bits */
    const bool is_alone = stride == digits * DOT;
    ivec totals[MAX_DIGITS] = {{0}};
    for (int64_t k = 0; k < size; k += LANES, to += LANES / DOT * stride) {
        ivec rest = (ivec)(load_part(x + k, size - k) * factor + shifter) - (ivec)shifter;
        ivec number[MAX_DIGITS];
        UNROLL for (int d = digits - 1; d >= 0; d--) {
            ivec higher = d > 0 ? (rest + BASE / 2) >> 8 : (ivec){0};
            number[d] = rest - higher * BASE;
            totals[d] += number[d];
            rest = higher;
        }
        int64_t left = num_steps(size - k);
        if (!is_alone || left < LANES / DOT)
            scatter_digits(number, digits, left < LANES / DOT ? left : LANES / DOT, to, stride);
        else if (digits == 1)
            store_codes(to, number[0]);
        else
            store_two_digits(to, number[0], number[1]);
    }
    UNROLL for (int d = 0; d < digits; d++) {
        sums[d] = 0;
        for (int i = 0; i < LANES; i++)
            sums[d] += totals[d][i];
    }
}

INLINE void quantize_tile(const DotProduct *p, int64_t tile, const int digits)
{
    int64_t in_size = p->weight->in_size, begin = dot_tile_begin(p, tile);
    int64_t rows = dot_tile_begin(p, tile + 1) - begin;
    float limit = digits == 1 ? 127 : 127 * (BASE + 1);
    dot_code *codes = p->quantized.codes + begin * digits * p->steps * DOT;
    for (int64_t m = 0; m < rows; m++) {
        const float *x = p->x + (begin + m) * in_size;
        float most = largest_size(x, in_size), factor = most >= TINY_ROW ? limit / most : 0;
        int32_t *starts = p->quantized.starts + (begin + m) * digits;
        quantize_row(x, in_size, factor, digits, codes + m * digits * DOT, rows * digits * DOT,
                     starts);
        p->quantized.scales[begin + m] = most / limit;
        UNROLL for (int d = 0; d < digits; d++)
            starts[d] *= -WEIGHT_ZERO;
    }
}

static void quantize_tiles(const void *arg, int64_t first, int64_t last)
{
    const DotProduct *p = arg;
    for (int64_t tile = first; tile < last; tile++)
        if (p->digits == 1)
            quantize_tile(p, tile, 1);
        else
            quantize_tile(p, tile, 2);
}

/* One panel times `rows` rows of codes [steps][rows][DOT], into sums [rows][PANEL]. */
INLINE void dot_tile(const int rows, const uint8_t *w, const dot_code *x, const int32_t *starts,
                     int64_t steps, int32_t *out)
{
    ivec sums[TILE_ROWS][PANEL_VECS];
    dot_panel(rows, w, x, steps, starts, sums);
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

/* One column's digits put together. The highest is rounded once if it is beyond 2^24. */
INLINE vec join_digits(const int32_t *sums, const int digits)
{
    ivec digit[MAX_DIGITS];
    UNROLL for (int d = 0; d < digits; d++)
        memcpy(&digit[d], sums + d * PANEL, sizeof(ivec));
    vec joined = __builtin_convertvector(digit[0], vec);
    if (digits == 2)
        joined = multiply_add(joined, splat(BASE), __builtin_convertvector(digit[1], vec));
    return joined;
}

/* From exact sums [rows][digits][PANEL] to the results of a tile's rows in one panel. */
INLINE void finish_dots(const DotProduct *p, int64_t panel, int64_t first, int64_t rows,
                        const int32_t *sums, const int digits)
{
    const Linear *weight = p->weight;
    int64_t begin = panel * PANEL, columns = weight->out_size - begin;
    for (int64_t i = 0; i < PANEL && i < columns; i += LANES) {
        vec scale = load(weight->scales + begin + i);
        vec bias = weight->bias != NULL ? load(weight->bias + begin + i) : splat(0);
        for (int64_t m = 0; m < rows; m++) {
            vec sum = join_digits(sums + m * digits * PANEL + i, digits);
            vec scaled = sum * p->quantized.scales[first + m];
            store_part(p->out + (first + m) * weight->out_size + begin + i,
                       scaled * scale + bias, columns - i);
        }
    }
}

static void dot_panels(const void *arg, int64_t first, int64_t last)
{
    const DotProduct *p = arg;
    int64_t panels = num_panels(p->weight->out_size), tiles = num_dot_tiles(p);
    int32_t sums[TILE_ROWS * PANEL];
    for (int64_t item = first; item < last; item++) {
        int64_t panel = item % panels, tile = item / panels * BLOCK_TILES;
        int64_t end = tile + BLOCK_TILES < tiles ? tile + BLOCK_TILES : tiles;
        const uint8_t *w = (const uint8_t *)p->weight->panels + panel * p->steps * PANEL * DOT;
        for (; tile < end; tile++) {
            int64_t begin = dot_tile_begin(p, tile), rows = dot_tile_begin(p, tile + 1) - begin;
            int64_t before = begin * p->digits;
            dot_any_tile(rows * p->digits, w, p->quantized.codes + before * p->steps * DOT,
                         p->quantized.starts + before, p->steps, sums);
            if (p->digits == 1)
                finish_dots(p, panel, begin, rows, sums, 1);
            else
                finish_dots(p, panel, begin, rows, sums, 2);
        }
    }
}

static void linear_dot(Pool *pool, const Linear *weight, const float *x, int64_t rows, float *out,
                       float *workspace)
{
    int digits = weight->dtype == INT8_DOT ? 1 : FLOAT_DIGITS;
    DotProduct product = {weight, x, out, lay_out_rows(workspace, rows, digits), rows,
                          num_steps(weight->in_size), digits};
    int64_t panels = num_panels(weight->out_size), tiles = num_dot_tiles(&product);
    pool_run(pool, tiles, 1e-9 + (double)weight->in_size * TILE_ROWS / 4, quantize_tiles, &product);
    /* A panel's cost: 8 GB/s for its bytes, or 64 multiply-adds a nanosecond. */
    double elements = (double)weight->in_size * PANEL;
    double memory_ns = elements / 8, arithmetic_ns = elements * rows * digits / 64;
    int64_t blocks = (tiles + BLOCK_TILES - 1) / BLOCK_TILES;
    double cost_ns = (memory_ns > arithmetic_ns ? memory_ns : arithmetic_ns) / blocks;
    pool_run(pool, panels * blocks, cost_ns, dot_panels, &product);
}

/* quantized_row() for this layout. */
static void dot_row(const Linear *weight, int64_t row, float *out)
{
    const uint8_t *panel = (const uint8_t *)weight->panels +
                           row / PANEL * num_steps(weight->in_size) * PANEL * DOT;
    const uint8_t *codes = panel + row % PANEL * DOT;
    for (int64_t k = 0; k < weight->in_size; k++)
        out[k] = (int8_t)(codes[k / DOT * PANEL * DOT + k % DOT] - WEIGHT_ZERO) *
                 weight->scales[row];
}

/* The layout of INT8_DOT and INT8_DIGITS: codes side by side in a column, and what is added to
 * each. `float_digits`: 0 if this build has no INT8_DIGITS. */
EXPORT void headrace_dot_layout(int64_t *dot, int64_t *weight_zero, int64_t *float_digits)
{
    *dot = DOT;
    *weight_zero = WEIGHT_ZERO;
    *float_digits = FLOAT_DIGITS;
}
