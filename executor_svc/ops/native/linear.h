/* Linear projections over packed weights. */
#ifndef HEADRACE_LINEAR_H
#define HEADRACE_LINEAR_H

#include <stddef.h>

#include "headrace.h"
#include "pool.h"
#include "tile.h"

/* Floats of workspace that linear() needs for `rows` rows of `in_size`, whatever the weight. */
static size_t linear_workspace(int64_t rows, int64_t in_size);

/* out [rows, out_size] = x [rows, in_size] @ weight.T + bias. */
static void linear(Pool *pool, const Linear *weight, const float *x, int64_t rows, float *out,
                   float *workspace);

/* --- the parts of linear(), for who takes the columns of a panel as soon as they are there ------ */

/* Rows of activations times a weight, cut into panels of columns and tiles of rows. */
typedef struct {
    const Linear *weight;
    const float *x; /* tiles [groups of in_size][rows of the tile], one behind the other */
    float *out;     /* [rows, out_size] */
    int64_t rows;
} Product;

/* Bring the rows into the form that the weight wants. */
static Product begin_product(Pool *pool, const Linear *weight, const float *x, int64_t rows,
                             float *workspace);

/* Rows are dealt to tiles evenly: 13 rows are tiles of 7 and 6, not of 12 and 1. */
static int64_t num_tiles(int64_t rows);
static int64_t tile_begin(int64_t rows, int64_t tile);

/* A tile of rows whose sums go to `sums` [rows of the tile, PANEL]. */
static Tile open_tile(const Product *product, int64_t tile_index, float *sums);

/* sums = the tile times one panel over the whole depth, the bits that linear() gives. Columns
 * behind the last output are zero. */
static void multiply_panel(const Product *product, int64_t panel, int64_t rows, Tile *tile);

/* Roughly the nanoseconds that all rows times one panel take. */
static double panel_cost_ns(const Product *product);

#endif
