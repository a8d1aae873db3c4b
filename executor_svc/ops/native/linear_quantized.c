/* Linear projection over quantized weights; activations and sums stay float32. Weights that are
 * multiplied byte by byte are linear_dot.c's.
 *
 * A weight [out, in] lies in panels as in linear.c, with a code in the place of each element:
 *
 *   INT8   [out / PANEL][in][PANEL] signed bytes
 *   INT4   [out / PANEL][in / 2][PANEL] bytes: rows k (low half) and k + 1 (high half), unsigned
 *
 * In groups of group_size rows an element is code * scale + offset, with a scale and an offset for
 * each column, [out / PANEL][groups][PANEL]; without offsets zero is the middle code. A group_size
 * of 0 is INT8 only: the column's one scale multiplies the finished sum.
 *
 * Few rows, bound by memory: elements are made in registers, on the way to the multiply-add.
 *
 *   parallel for panel:
 *     for group, for k in group:          two rows of the panel to floats
 *       for m in rows:                    sum[m] += x[m][k] * w[k]
 *
 * More rows: elements of a strip are made once, then it is the loop nest and the tile of linear.c.
 *
 *   parallel for panel, block of rows:
 *     for strip of DEPTH_STRIP in depth:  the strip to floats; it stays in L1
 *       for tile of rows in the block:    sums continue where the last strip left them
 *
 * Both make the same floats and add them up in the same order: a row's result does not depend on
 * which of the two it took.
 */
#include "linear.h"
#include "quantized.h"
#include "tile.h"

static void linear_dot(Pool *pool, const Linear *weight, const float *x, int64_t rows, float *out,
                       float *workspace);
static void dot_row(const Linear *weight, int64_t row, float *out);

/* Up to so many rows, a strip's way through L1 costs more than it saves. Their sums, two rows of
 * the panel and its grid are all in registers. */
enum { DIRECT_ROWS = TILE_ROWS * 2 / 3 };
/* The code of 4 bits that is zero where there are no offsets; times a scale it is exact. */
#define INT4_MIDDLE 8.0f

/* The scales and offsets of one group of a panel; the offsets of ungrouped weights are unused. */
typedef struct {
    vec scale[PANEL_VECS], offset[PANEL_VECS];
} Grid;

static int64_t num_groups(const Linear *weight)
{
    int64_t size = weight->group_size;
    return size > 0 ? (weight->in_size + size - 1) / size : 1;
}

INLINE Grid load_grid(const enum dtype type, const Linear *weight, int64_t panel, int64_t group)
{
    size_t index = ((size_t)panel * num_groups(weight) + group) * PANEL;
    Grid grid;
    UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        grid.scale[v] = load(weight->scales + index + v * LANES);
        if (weight->offsets != NULL)
            grid.offset[v] = load(weight->offsets + index + v * LANES);
        else
            grid.offset[v] = grid.scale[v] * (type == INT4 ? -INT4_MIDDLE : 0.0f);
    }
    return grid;
}

static const uint8_t *panel_codes(const enum dtype type, const Linear *weight, int64_t panel)
{
    int64_t rows = type == INT4 ? (weight->in_size + 1) / 2 : weight->in_size;
    return (const uint8_t *)weight->panels + panel * rows * PANEL;
}

/* Rows k and k + 1 of a panel as floats; k is even for INT4. The second may lie behind the last. */
INLINE void decode_rows(const enum dtype type, const bool is_grouped, const uint8_t *codes,
                        int64_t k, const int rows, const Grid *grid, vec w[2][PANEL_VECS])
{
    UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        if (type == INT4)
            widen_int4(codes + k / 2 * PANEL + v * LANES, &w[0][v], &w[1][v]);
        else
            UNROLL for (int r = 0; r < rows; r++)
                w[r][v] = widen_int8((const int8_t *)codes + (k + r) * PANEL + v * LANES);
        UNROLL for (int r = 0; r < rows; r++)
            if (is_grouped)
                w[r][v] = multiply_add(w[r][v], grid->scale[v], grid->offset[v]);
    }
}

INLINE vec finish_column(vec sum, vec scale, vec bias) { return multiply_add(sum, scale, bias); }

typedef vec Sums[DIRECT_ROWS][PANEL_VECS];

INLINE void add_rows(const int rows, const enum dtype type, const bool is_grouped,
                     const uint8_t *codes, const float *x, int64_t k, const int count,
                     const Grid *grid, Sums sums)
{
    vec w[2][PANEL_VECS];
    decode_rows(type, is_grouped, codes, k, count, grid, w);
    UNROLL for (int r = 0; r < count; r++)
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int v = 0; v < PANEL_VECS; v++)
                sums[m][v] += x[(k + r) * rows + m] * w[r][v];
}

/* One panel times `rows` rows of x [in][rows], into out [rows][PANEL]. */
INLINE void direct_tile(const int rows, const enum dtype type, const bool is_grouped,
                        const Linear *weight, int64_t panel, const float *x, float *out)
{
    const uint8_t *codes = panel_codes(type, weight, panel);
    const float *bias = weight->bias != NULL ? weight->bias + panel * PANEL : NO_BIAS;
    int64_t in_size = weight->in_size, size = is_grouped ? weight->group_size : in_size;
    Grid grid;
    Sums sums;
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            sums[m][v] = is_grouped ? load(bias + v * LANES) : splat(0);
    for (int64_t begin = 0, group = 0; begin < in_size; begin += size, group++) {
        int64_t end = begin + size < in_size ? begin + size : in_size, k = begin;
        grid = load_grid(type, weight, panel, group);
        for (; k + 1 < end; k += 2)
            add_rows(rows, type, is_grouped, codes, x, k, 2, &grid, sums);
        if (k < end)
            add_rows(rows, type, is_grouped, codes, x, k, 1, &grid, sums);
    }
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++) {
            vec sum = sums[m][v];
            if (!is_grouped)
                sum = finish_column(sum, grid.scale[v], load(bias + v * LANES));
            store(out + m * PANEL + v * LANES, sum);
        }
}

INLINE void direct_rows(int64_t rows, const enum dtype type, const bool is_grouped,
                        const Linear *weight, int64_t panel, const float *x, float *out)
{
#define CASE(R) \
    case R: \
        if (R <= DIRECT_ROWS) \
            direct_tile(R, type, is_grouped, weight, panel, x, out); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
    }
#undef CASE
}

static void quantized_direct_panels(const void *arg, int64_t first, int64_t last)
{
    const Product *p = arg;
    const Linear *weight = p->weight;
    float out[DIRECT_ROWS * PANEL];
    for (int64_t panel = first; panel < last; panel++) {
        if (weight->dtype == INT4)
            direct_rows(p->rows, INT4, true, weight, panel, p->x, out);
        else if (weight->group_size > 0)
            direct_rows(p->rows, INT8, true, weight, panel, p->x, out);
        else
            direct_rows(p->rows, INT8, false, weight, panel, p->x, out);
        int64_t column = panel * PANEL, columns = weight->out_size - column;
        for (int64_t m = 0; m < p->rows; m++)
            for (int64_t i = 0; i < PANEL && i < columns; i += LANES)
                store_part(p->out + m * weight->out_size + column + i, load(out + m * PANEL + i),
                           columns - i);
    }
}

/* Rows [k, k + depth) of a panel as floats. */
INLINE void decode_strip(const enum dtype type, const bool is_grouped, const Linear *weight,
                         int64_t panel, int64_t k, int64_t depth, float *strip)
{
    const uint8_t *codes = panel_codes(type, weight, panel);
    int64_t size = is_grouped ? weight->group_size : weight->in_size, last = k + depth;
    while (k < last) {
        int64_t group = k / size, end = (group + 1) * size < last ? (group + 1) * size : last;
        Grid grid = load_grid(type, weight, panel, group);
        for (; k < end; k += 2) {
            vec w[2][PANEL_VECS];
            int rows = k + 1 < end ? 2 : 1;
            if (rows == 2)
                decode_rows(type, is_grouped, codes, k, 2, &grid, w);
            else
                decode_rows(type, is_grouped, codes, k, 1, &grid, w);
            for (int r = 0; r < rows; r++, strip += PANEL)
                UNROLL for (int v = 0; v < PANEL_VECS; v++)
                    store(strip + v * LANES, w[r][v]);
        }
        k = end;
    }
}

static void decode_any_strip(const Linear *weight, int64_t panel, int64_t k, int64_t depth,
                             float *strip)
{
    if (weight->dtype == INT4)
        decode_strip(INT4, true, weight, panel, k, depth, strip);
    else if (weight->group_size > 0)
        decode_strip(INT8, true, weight, panel, k, depth, strip);
    else
        decode_strip(INT8, false, weight, panel, k, depth, strip);
}

/* Rows [first, last) of an ungrouped panel's columns: from sums to results. */
static void finish_panel(const Product *p, const float *bias, int64_t panel, int64_t first,
                         int64_t last)
{
    const Linear *weight = p->weight;
    int64_t begin = panel * PANEL, size = weight->out_size;
    int64_t end = begin + PANEL < size ? begin + PANEL : size;
    for (int64_t column = begin; column < end; column += LANES) {
        vec scale = load(weight->scales + column);
        vec start = bias != NULL ? load(bias + column) : splat(0);
        for (int64_t m = first; m < last; m++) {
            float *out = p->out + m * size + column;
            store_part(out, finish_column(load_part(out, end - column), scale, start),
                       end - column);
        }
    }
}

static void quantized_blocked_panels(const void *arg, int64_t first, int64_t last)
{
    const Product *p = arg;
    const Linear *weight = p->weight;
    int64_t in_size = weight->in_size, tiles = num_tiles(p->rows);
    int64_t panels = num_panels(weight->out_size);
    Linear unbiased = *weight;
    Product product = *p;
    if (weight->group_size == 0) { /* the bias comes behind the scale */
        unbiased.bias = NULL;
        product.weight = &unbiased;
    }
    float strip[DEPTH_STRIP * PANEL] __attribute__((aligned(64)));
    for (int64_t item = first; item < last; item++) {
        int64_t panel = item % panels, begin = item / panels * BLOCK_TILES;
        int64_t end = begin + BLOCK_TILES < tiles ? begin + BLOCK_TILES : tiles;
        for (int64_t k = 0; k < in_size; k += DEPTH_STRIP) {
            int64_t depth = in_size - k < DEPTH_STRIP ? in_size - k : DEPTH_STRIP;
            decode_any_strip(weight, panel, k, depth, strip);
            for (int64_t tile = begin; tile < end; tile++)
                multiply(&product, panel, tile, strip, FLOAT32, k, depth);
        }
        if (weight->group_size == 0)
            finish_panel(p, weight->bias, panel, tile_begin(p->rows, begin),
                         tile_begin(p->rows, end));
    }
}

typedef struct {
    const float *x;
    const int32_t *order; /* column k of the weight belongs to column order[k] of x */
    float *tiles;
    int64_t rows, in_size;
} Gather;

/* transpose_tiles() of linear.c with x's columns in another order. */
static void gather_tiles(const void *arg, int64_t first, int64_t last)
{
    const Gather *g = arg;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t begin = tile_begin(g->rows, tile), rows = tile_begin(g->rows, tile + 1) - begin;
        const float *x = g->x + begin * g->in_size;
        float *to = g->tiles + begin * g->in_size;
        for (int64_t k = 0; k < g->in_size; k++)
            for (int64_t m = 0; m < rows; m++)
                *to++ = x[m * g->in_size + g->order[k]];
    }
}

/* Bring x into tiles, in the order of the weight's columns; returns where they are. */
static const float *arrange_rows(Pool *pool, const Linear *weight, const float *x, int64_t rows,
                                 float *workspace)
{
    double tile_ns = 1e-9 + (double)weight->in_size * TILE_ROWS;
    if (weight->order != NULL) {
        Gather gather = {x, weight->order, workspace, rows, weight->in_size};
        pool_run(pool, num_tiles(rows), tile_ns, gather_tiles, &gather);
        return workspace;
    }
    if (rows == 1)
        return x;
    Transpose transpose = {x, workspace, rows, weight->in_size};
    pool_run(pool, num_tiles(rows), tile_ns, transpose_tiles, &transpose);
    return workspace;
}

static void linear_quantized(Pool *pool, const Linear *weight, const float *x, int64_t rows,
                             float *out, float *workspace)
{
    if (weight->dtype == INT8_DOT || weight->dtype == INT8_DIGITS) {
        linear_dot(pool, weight, x, rows, out, workspace);
        return;
    }
    Product product = {weight, arrange_rows(pool, weight, x, rows, workspace), out, rows};
    /* As in linear.c: memory at 8 GB/s or 32 multiply-adds a nanosecond, whichever takes longer. */
    double elements = (double)weight->in_size * PANEL, arithmetic_ns = elements * rows / 32;
    int64_t panels = num_panels(weight->out_size), tiles = num_tiles(rows);
    if (rows <= DIRECT_ROWS) {
        double memory_ns = elements / (weight->dtype == INT4 ? 16 : 8);
        double cost_ns = memory_ns > arithmetic_ns ? memory_ns : arithmetic_ns;
        pool_run(pool, panels, cost_ns, quantized_direct_panels, &product);
    } else {
        int64_t blocks = (tiles + BLOCK_TILES - 1) / BLOCK_TILES;
        pool_run(pool, panels * blocks, arithmetic_ns / blocks, quantized_blocked_panels, &product);
    }
}

static void quantized_row(const Linear *weight, int64_t row, float *out)
{
    if (weight->dtype == INT8_DIGITS) {
        dot_row(weight, row, out);
        return;
    }
    const uint8_t *codes = panel_codes(INT8, weight, row / PANEL) + row % PANEL;
    for (int64_t k = 0; k < weight->in_size; k++)
        out[k] = (int8_t)codes[k * PANEL] * weight->scales[row];
}
