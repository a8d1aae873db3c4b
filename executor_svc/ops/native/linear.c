/* Linear projection: weights packed in panels, activations and sums in float32.
 *
 * A weight [out, in] is stored as [out / PANEL][in][PANEL], so that the inner kernel reads memory
 * strictly forward whatever the number of rows; the last panel is padded with zeros.
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
 * For two rows or more the activations are first transposed into tiles [depth][rows of the tile]:
 * rows of a power-of-two length would otherwise fight for the same cache sets.
 */
#include "linear.h"

#include "tile.h"

enum {
    DEPTH_STRIP = 128,                 /* PANEL * DEPTH_STRIP floats: half of a 32 KiB L1 */
    BLOCK_TILES = 20,                  /* tiles of a row block: its activations stay in L2 or L3 */
    DIRECT_TILES = 3,                  /* up to so many, widening on the way costs less */
};

static const float NO_BIAS[PANEL];

static int64_t num_panels(int64_t out_size) { return (out_size + PANEL - 1) / PANEL; }

static size_t packed_elements(int64_t out_size, int64_t in_size)
{
    return (size_t)num_panels(out_size) * PANEL * in_size;
}

static size_t linear_workspace(int64_t rows, int64_t in_size)
{
    return rows > 1 ? (size_t)rows * in_size : 0;
}

/* Rows are dealt to tiles evenly: 13 rows are tiles of 7 and 6, not of 12 and 1. */
static int64_t num_tiles(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

static int64_t tile_begin(int64_t rows, int64_t tile)
{
    int64_t tiles = num_tiles(rows), longer = rows % tiles;
    return tile * (rows / tiles) + (tile < longer ? tile : longer);
}

typedef struct {
    const Linear *weight;
    const float *x; /* tiles [in_size][rows of the tile], one behind the other */
    float *out;
    int64_t rows;
} Product;

INLINE void tile_packed(int64_t rows, enum dtype type, Tile *tile)
{
    tile->w_step = PANEL;
    tile->x_row = 1;
    tile->x_step = rows;
#define CASE(R) \
    case R: \
        if (R <= TILE_ROWS) { \
            tile->x_step = R; \
            tile_of(R, type, tile); \
        } \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

static void tile_float32(int64_t rows, Tile *tile) { tile_packed(rows, FLOAT32, tile); }
static void tile_bfloat16(int64_t rows, Tile *tile) { tile_packed(rows, BFLOAT16, tile); }
static void tile_float16(int64_t rows, Tile *tile) { tile_packed(rows, FLOAT16, tile); }

static void run_tile(int64_t rows, enum dtype type, Tile *tile)
{
    if (type == FLOAT32)
        tile_float32(rows, tile);
    else if (type == BFLOAT16)
        tile_bfloat16(rows, tile);
    else
        tile_float16(rows, tile);
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

/* One tile of rows times `depth` steps of a panel from step `k` on, into its place in `out`.
 * `w` is the panel's row k. */
static void multiply(const Product *p, int64_t panel, int64_t tile_index, const void *w,
                     enum dtype type, int64_t k, int64_t depth)
{
    const Linear *weight = p->weight;
    int64_t first = tile_begin(p->rows, tile_index);
    int64_t rows = tile_begin(p->rows, tile_index + 1) - first;
    int64_t column = panel * PANEL, columns = weight->out_size - column;
    float *out = p->out + first * weight->out_size + column;
    float edge[TILE_ROWS * PANEL];
    Tile tile = {
        .x = p->x + first * weight->in_size + k * rows,
        .w = w,
        .start = k > 0 ? out : weight->bias != NULL ? weight->bias + column : NO_BIAS,
        .start_row = k > 0 ? weight->out_size : 0,
        .out = out,
        .out_row = weight->out_size,
        .depth = depth,
    };
    if (columns >= PANEL) {
        run_tile(rows, type, &tile);
        return;
    }
    if (k > 0) { /* the last panel may be narrower than the kernel writes */
        for (int64_t m = 0; m < rows; m++)
            memcpy(edge + m * PANEL, out + m * weight->out_size, columns * sizeof(float));
        tile.start = edge;
        tile.start_row = PANEL;
    }
    tile.out = edge;
    tile.out_row = PANEL;
    run_tile(rows, type, &tile);
    for (int64_t m = 0; m < rows; m++)
        memcpy(out + m * weight->out_size, edge + m * PANEL, columns * sizeof(float));
}

static void direct_panels(const void *arg, int64_t first, int64_t last)
{
    const Product *p = arg;
    int64_t in_size = p->weight->in_size, tiles = num_tiles(p->rows);
    enum dtype type = p->weight->dtype;
    for (int64_t panel = first; panel < last; panel++) {
        const void *w = (const char *)p->weight->panels + panel * in_size * PANEL * dtype_size(type);
        for (int64_t tile = 0; tile < tiles; tile++)
            multiply(p, panel, tile, w, type, 0, in_size);
    }
}

static void blocked_panels(const void *arg, int64_t first, int64_t last)
{
    const Product *p = arg;
    int64_t in_size = p->weight->in_size, tiles = num_tiles(p->rows);
    int64_t panels = num_panels(p->weight->out_size);
    enum dtype type = p->weight->dtype;
    float strip[DEPTH_STRIP * PANEL] __attribute__((aligned(64)));
    for (int64_t item = first; item < last; item++) {
        int64_t panel = item % panels, begin = item / panels * BLOCK_TILES;
        int64_t end = begin + BLOCK_TILES < tiles ? begin + BLOCK_TILES : tiles;
        for (int64_t k = 0; k < in_size; k += DEPTH_STRIP) {
            int64_t depth = in_size - k < DEPTH_STRIP ? in_size - k : DEPTH_STRIP;
            size_t source = ((size_t)panel * in_size + k) * PANEL;
            if (type == FLOAT32)
                widen_strip(p->weight->panels, source, depth * PANEL, FLOAT32, strip);
            else if (type == BFLOAT16)
                widen_strip(p->weight->panels, source, depth * PANEL, BFLOAT16, strip);
            else
                widen_strip(p->weight->panels, source, depth * PANEL, FLOAT16, strip);
            for (int64_t tile = begin; tile < end; tile++)
                multiply(p, panel, tile, strip, FLOAT32, k, depth);
        }
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

static void linear(Pool *pool, const Linear *weight, const float *x, int64_t rows, float *out,
                   float *workspace)
{
    if (rows == 0)
        return;
    Product product = {weight, x, out, rows};
    double row_ns = 1e-9 + (double)weight->in_size * TILE_ROWS;
    if (rows > 1) {
        Transpose transpose = {x, workspace, rows, weight->in_size};
        pool_run(pool, num_tiles(rows), row_ns, transpose_tiles, &transpose);
        product.x = workspace;
    }
    /* A panel's cost: 8 GB/s for its bytes, or 32 multiply-adds a nanosecond, whichever is more. */
    double elements = (double)weight->in_size * PANEL;
    double memory_ns = elements * dtype_size(weight->dtype) / 8, arithmetic_ns = elements * rows / 32;
    int64_t panels = num_panels(weight->out_size), tiles = num_tiles(rows);
    if (tiles <= DIRECT_TILES) {
        double cost_ns = memory_ns > arithmetic_ns ? memory_ns : arithmetic_ns;
        pool_run(pool, panels, cost_ns, direct_panels, &product);
    } else {
        int64_t blocks = (tiles + BLOCK_TILES - 1) / BLOCK_TILES;
        pool_run(pool, panels * blocks, arithmetic_ns / blocks, blocked_panels, &product);
    }
}

/* One panel: `rows` rows of `size`-byte elements become columns. In square blocks, so that both
 * sides stay in L1. */
INLINE void pack_panel(const char *from, int64_t rows, int64_t in_size, const size_t size, char *to)
{
    for (int64_t begin = 0; begin < in_size; begin += PANEL) {
        int64_t end = in_size - begin < PANEL ? in_size : begin + PANEL;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t k = begin; k < end; k++)
                memcpy(to + (k * PANEL + row) * size, from + (row * in_size + k) * size, size);
    }
}

/* Bring a dense weight [out_size, in_size] of any alignment into its packed form; `packed` is
 * zeroed memory of headrace_packed_elements() elements. */
EXPORT void headrace_pack_weight(const void *weight, int64_t out_size, int64_t in_size,
                                 int64_t dtype, void *packed)
{
    for (int64_t row = 0; row < out_size; row += PANEL) {
        int64_t rows = out_size - row < PANEL ? out_size - row : PANEL;
        const char *from = (const char *)weight + row * in_size * dtype_size(dtype);
        char *to = (char *)packed + row * in_size * dtype_size(dtype);
        if (dtype == FLOAT32)
            pack_panel(from, rows, in_size, sizeof(float), to);
        else
            pack_panel(from, rows, in_size, sizeof(uint16_t), to);
    }
}

EXPORT int64_t headrace_packed_elements(int64_t out_size, int64_t in_size)
{
    return packed_elements(out_size, in_size);
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
