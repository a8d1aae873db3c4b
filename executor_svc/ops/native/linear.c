/* Linear projection over the panels of pack.h, with float32 sums.
 *
 * Few rows (decode), bound by memory: each weight is read once and widened on the way.
 *
 *   parallel for panel:
 *     for tile of rows:                  the panel stays in the cache for all tiles
 *       tile kernel over the whole depth
 *
 * Many rows (prefill), bound by arithmetic: the loop nest of Goto and van de Geijn ("Anatomy of
 * High-Performance Matrix Multiplication", 2008), with a strip of the panel widened once.
 *
 *   parallel for panel, block of rows:
 *     for strip of DEPTH_STRIP in depth: widen the strip of the panel; it stays in L1
 *       for tile of rows in the block:   sums continue where the last strip left them
 *         tile kernel over the strip
 *
 * What the dot instruction takes as it is needs no widening and hence no strips: two loads from L2
 * feed twice as many multiplications as tiles have rows.
 *
 * Activations are first transposed into tiles [depth][rows of the tile], for the dot instruction
 * also rounded to bfloat16: rows of a power-of-two length would fight for the same cache sets.
 */
#include "linear.h"

#include <stdbool.h>

#include "pack.h"
#include "quantized.h"

enum {
    DEPTH_STRIP = 128,                 /* PANEL * DEPTH_STRIP floats: half of a 32 KiB L1 */
    BLOCK_TILES = 20,                  /* tiles of a row block: its activations stay in L2 or L3 */
    DIRECT_TILES = 3,                  /* up to so many, widening on the way costs less */
    FETCHING_TILES = 8,                /* beyond, the wait for a panel is lost in its use */
};

static const float NO_BIAS[PANEL]; /* where a bias is read whether there is one or not */

static size_t linear_workspace(int64_t rows, int64_t in_size)
{
    return (size_t)rows * (in_size + 4); /* linear_dot.c uses it all, and for one row too */
}

static int64_t num_tiles(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

static int64_t tile_begin(int64_t rows, int64_t tile)
{
    int64_t tiles = num_tiles(rows), longer = rows % tiles;
    return tile * (rows / tiles) + (tile < longer ? tile : longer);
}

INLINE void tile_packed(int64_t rows, enum dtype type, const bool is_paired, Tile *tile)
{
    tile->w_step = PANEL;
    tile->x_row = 1;
    tile->x_step = rows;
#define CASE(R) \
    case R: \
        if (R <= TILE_ROWS) { \
            tile->x_step = R; \
            tile_of(R, type, is_paired, tile); \
        } \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

static void tile_float32(int64_t rows, Tile *tile) { tile_packed(rows, FLOAT32, false, tile); }
static void tile_float16(int64_t rows, Tile *tile) { tile_packed(rows, FLOAT16, false, tile); }
static void tile_bfloat16(int64_t rows, Tile *tile)
{
    tile_packed(rows, BFLOAT16, HAS_BFLOAT_DOT, tile);
}

static void run_tile(int64_t rows, enum dtype type, Tile *tile)
{
    if (type == FLOAT32)
        tile_float32(rows, tile);
    else if (type == BFLOAT16)
        tile_bfloat16(rows, tile);
    else
        tile_float16(rows, tile);
}

/* The tile of rows `tile_index` at step `k` of the depth; weights and results are left open. */
static Tile tile_at(const Product *p, int64_t tile_index, int64_t k)
{
    int64_t first = tile_begin(p->rows, tile_index);
    int64_t rows = tile_begin(p->rows, tile_index + 1) - first;
    return (Tile){.x = p->x + first * depth_steps(p->weight->in_size, p->weight->dtype) + k * rows};
}

static const float *bias_of(const Linear *weight, int64_t panel)
{
    return weight->bias != NULL ? weight->bias + panel * PANEL : NULL;
}

static const void *panel_of(const Linear *weight, int64_t panel)
{
    size_t elements = panel_elements(weight->in_size, weight->dtype);
    return (const char *)weight->panels + panel * elements * dtype_size(weight->dtype);
}

static Tile open_tile(const Product *p, int64_t tile_index, float *sums)
{
    Tile tile = tile_at(p, tile_index, 0);
    tile.depth = depth_steps(p->weight->in_size, p->weight->dtype);
    tile.out = sums;
    tile.out_row = PANEL;
    return tile;
}

static void multiply_panel(const Product *p, int64_t panel, int64_t rows, Tile *tile)
{
    tile->w = panel_of(p->weight, panel);
    tile->start = bias_of(p->weight, panel);
    run_tile(rows, p->weight->dtype, tile);
}

/* The first of a few tiles waits for the panel's memory and the others only multiply: each fetches
 * its share of the next panel. A single tile reads as fast as memory gives by itself. */
static void fetch_next_panel(const Product *p, int64_t panel, int64_t tile_index, Tile *tile)
{
    int64_t tiles = num_tiles(p->rows), num_steps = depth_steps(p->weight->in_size, BFLOAT16);
    bool is_last = panel + 1 == num_panels(p->weight->out_size);
    if (depth_group(p->weight->dtype) == 1 || is_last || tiles == 1 || tiles > FETCHING_TILES)
        return;
    size_t share = panel_elements(p->weight->in_size, BFLOAT16) * sizeof(uint16_t) / tiles;
    tile->fetch = (const char *)panel_of(p->weight, panel + 1) + tile_index * share;
    tile->fetch_step = share / num_steps;
}

/* One tile of rows times `depth` steps of a panel from step `k` on, into its place in `out`.
 * `w` is the panel's step k. */
static void multiply(const Product *p, int64_t panel, int64_t tile_index, const void *w,
                     enum dtype type, int64_t k, int64_t depth)
{
    int64_t first = tile_begin(p->rows, tile_index);
    int64_t rows = tile_begin(p->rows, tile_index + 1) - first;
    int64_t width = p->weight->out_size, columns = width - panel * PANEL;
    bool is_whole = columns >= PANEL;
    float edge[TILE_ROWS * PANEL]; /* the last panel may be narrower than the kernel writes */
    float *place = p->out + first * width + panel * PANEL;
    Tile tile = tile_at(p, tile_index, k);
    tile.w = w;
    tile.depth = depth;
    tile.out = is_whole ? place : edge;
    tile.out_row = is_whole ? width : PANEL;
    tile.start = k > 0 ? tile.out : bias_of(p->weight, panel);
    tile.start_row = k > 0 ? tile.out_row : 0;
    fetch_next_panel(p, panel, tile_index, &tile);
    if (!is_whole && k > 0)
        for (int64_t m = 0; m < rows; m++)
            memcpy(edge + m * PANEL, place + m * width, columns * sizeof(float));
    run_tile(rows, type, &tile);
    if (!is_whole)
        for (int64_t m = 0; m < rows; m++)
            memcpy(place + m * width, edge + m * PANEL, columns * sizeof(float));
}

/* Widen `count` packed elements from element `source` on; fetch the next as many meanwhile. */
INLINE void widen_strip(const void *panels, size_t source, int64_t count, enum dtype type,
                        float *strip)
{
    for (int64_t i = 0; i < count; i += LANES) {
        __builtin_prefetch((const char *)panels + (source + count + i) * dtype_size(type));
        store(strip + i, widen(panels, source + i, type));
    }
}

/* A panel times tiles [begin, end). */
static void multiply_direct(const Product *p, int64_t panel, int64_t begin, int64_t end)
{
    enum dtype type = p->weight->dtype;
    int64_t depth = depth_steps(p->weight->in_size, type);
    for (int64_t tile = begin; tile < end; tile++)
        multiply(p, panel, tile, panel_of(p->weight, panel), type, 0, depth);
}

/* The same in strips that are widened once for all tiles. */
static void multiply_widened(const Product *p, int64_t panel, int64_t begin, int64_t end)
{
    enum dtype type = p->weight->dtype;
    const void *w = panel_of(p->weight, panel);
    float strip[DEPTH_STRIP * PANEL] __attribute__((aligned(64)));
    for (int64_t k = 0; k < p->weight->in_size; k += DEPTH_STRIP) {
        int64_t left = p->weight->in_size - k, depth = left < DEPTH_STRIP ? left : DEPTH_STRIP;
        if (type == FLOAT32)
            widen_strip(w, k * PANEL, depth * PANEL, FLOAT32, strip);
        else if (type == BFLOAT16)
            widen_strip(w, k * PANEL, depth * PANEL, BFLOAT16, strip);
        else
            widen_strip(w, k * PANEL, depth * PANEL, FLOAT16, strip);
        for (int64_t tile = begin; tile < end; tile++)
            multiply(p, panel, tile, strip, FLOAT32, k, depth);
    }
}

/* Items [first, last) of (block of rows, panel). */
static void multiply_items(const void *arg, int64_t first, int64_t last)
{
    const Product *p = arg;
    int64_t tiles = num_tiles(p->rows), panels = num_panels(p->weight->out_size);
    bool is_widened = depth_group(p->weight->dtype) == 1 && tiles > DIRECT_TILES;
    for (int64_t item = first; item < last; item++) {
        int64_t begin = item / panels * BLOCK_TILES;
        int64_t end = begin + BLOCK_TILES < tiles ? begin + BLOCK_TILES : tiles;
        if (is_widened)
            multiply_widened(p, item % panels, begin, end);
        else
            multiply_direct(p, item % panels, begin, end);
    }
}

typedef struct {
    const float *x;
    float *tiles;
    int64_t rows, in_size;
} Transpose;

static void transpose_tiles(const void *arg, int64_t first, int64_t last)
{
    const Transpose *t = arg;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t begin = tile_begin(t->rows, tile), rows = tile_begin(t->rows, tile + 1) - begin;
        const float *x = t->x + begin * t->in_size;
        float *to = t->tiles + begin * t->in_size;
        for (int64_t k = 0; k < t->in_size; k++)
            for (int64_t m = 0; m < rows; m++)
                *to++ = x[m * t->in_size + k];
    }
}

/* The same in pairs of bfloat16. Rounding runs along the rows, where it fills vectors. */
static void round_tiles(const void *arg, int64_t first, int64_t last)
{
    enum { STRIP = 64 };
    const Transpose *t = arg;
    float pairs[TILE_ROWS][STRIP / 2];
    for (int64_t tile = first; tile < last; tile++) {
        int64_t begin = tile_begin(t->rows, tile), rows = tile_begin(t->rows, tile + 1) - begin;
        const float *x = t->x + begin * t->in_size;
        float *to = t->tiles + begin * depth_steps(t->in_size, BFLOAT16);
        if (rows == 1) { /* whole vectors straight to their place: see quantize_row() */
            round_pairs(x, t->in_size, to);
            continue;
        }
        for (int64_t k = 0; k < t->in_size; k += STRIP) {
            int64_t left = t->in_size - k, count = left < STRIP ? left : STRIP;
            for (int64_t m = 0; m < rows; m++)
                round_pairs(x + m * t->in_size + k, count, pairs[m]);
            for (int64_t i = 0; i < (count + 1) / 2; i++)
                for (int64_t m = 0; m < rows; m++)
                    *to++ = pairs[m][i];
        }
    }
}

static Product begin_product(Pool *pool, const Linear *weight, const float *x, int64_t rows,
                             float *workspace)
{
    Transpose transpose = {x, workspace, rows, weight->in_size};
    double row_ns = 1e-9 + (double)weight->in_size * TILE_ROWS;
    if (depth_group(weight->dtype) == 2)
        pool_run(pool, num_tiles(rows), row_ns / 2, round_tiles, &transpose);
    else if (rows > 1)
        pool_run(pool, num_tiles(rows), row_ns, transpose_tiles, &transpose);
    else
        return (Product){.weight = weight, .x = x, .rows = rows};
    return (Product){.weight = weight, .x = workspace, .rows = rows};
}

/* 8 GB/s for its bytes, or 32 multiplications a nanosecond, whichever is more. */
static double panel_cost_ns(const Product *product)
{
    const Linear *weight = product->weight;
    double elements = panel_elements(weight->in_size, weight->dtype);
    double memory_ns = elements * dtype_size(weight->dtype) / 8;
    double arithmetic_ns = elements * product->rows / (32 * depth_group(weight->dtype));
    return memory_ns > arithmetic_ns ? memory_ns : arithmetic_ns;
}

static void linear(Pool *pool, const Linear *weight, const float *x, int64_t rows, float *out,
                   float *workspace)
{
    if (rows == 0)
        return;
    if (is_quantized(weight->dtype)) {
        linear_quantized(pool, weight, x, rows, out, workspace);
        return;
    }
    Product product = begin_product(pool, weight, x, rows, workspace);
    product.out = out;
    int64_t blocks = (num_tiles(rows) + BLOCK_TILES - 1) / BLOCK_TILES;
    int64_t items = num_panels(weight->out_size) * blocks;
    pool_run(pool, items, panel_cost_ns(&product) / blocks, multiply_items, &product);
}

EXPORT int64_t headrace_linear_workspace(int64_t rows, int64_t in_size)
{
    return linear_workspace(rows, in_size);
}

EXPORT void headrace_linear(Pool *pool, const Linear *weight, const float *x, int64_t rows,
                            float *out, float *workspace)
{
    linear(pool, weight, x, rows, out, workspace);
}
