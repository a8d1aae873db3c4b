/* The one inner kernel: a tile of output rows times one weight panel, all sums in registers.
 *
 *   for k in depth:                      w: the panel's row k, PANEL columns, widened to float
 *     for m in rows:                     x[m][k], broadcast
 *       sum[m][0..PANEL) += x[m][k] * w[k][0..PANEL)
 *
 * It is the register tile of BLIS (Van Zee and van de Geijn, "BLIS: A Framework for Rapidly
 * Instantiating BLAS Functionality", 2015). Each output element has one sum, over k in ascending
 * order and with one fused multiply-add a step: its bits depend neither on the number of rows nor
 * on how rows, columns and depth are cut into calls (a cut in depth stores and reloads the sum,
 * which is exact). Everything that is batch-invariant here rests on that.
 *
 * A paired tile takes two neighbours in depth at each step, both sides in bfloat16: the order of
 * its sums is that of the dot instruction, and as fixed.
 */
#ifndef HEADRACE_TILE_H
#define HEADRACE_TILE_H

#include <stdbool.h>
#include <stddef.h>

#include "vec.h"

/* Where a tile reads and writes. Strides are in elements. */
typedef struct {
    const float *x;          /* element (m, k), or pair, at m * x_row + k * x_step */
    size_t x_row, x_step;
    const void *w;           /* row k at k * w_step, PANEL elements, or pairs */
    size_t w_step;
    const float *start;      /* initial sums: row m at m * start_row; NULL: zeros */
    size_t start_row;
    float *out;              /* row m at m * out_row, PANEL columns */
    size_t out_row;
    int64_t depth;
    const char *fetch;       /* a paired tile brings fetch_step bytes a step of it into L2; or NULL */
    size_t fetch_step;
} Tile;

/* Fully unrolled over rows: all but `tile` must be constants where this is inlined. */
INLINE void tile_of(const int rows, const enum dtype type, const bool is_paired, const Tile *tile)
{
    vec sums[TILE_ROWS][PANEL_VECS];
    const float *start = tile->start;
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            sums[m][v] = start != NULL ? load(start + m * tile->start_row + v * LANES) : splat(0);
    const float *x = tile->x;
    const size_t x_row = tile->x_row, x_step = tile->x_step, w_step = tile->w_step;
    float *out = tile->out; /* a store might change the tile, for all the compiler knows */
    const size_t out_row = tile->out_row;
    const char *fetch = tile->fetch != NULL ? tile->fetch : (const char *)x;
    const size_t fetch_step = tile->fetch_step;
    size_t w = 0;
    for (int64_t k = 0; k < tile->depth; k++, x += x_step, w += w_step) {
        if (is_paired) {
            __builtin_prefetch(fetch, 0, 2);
            fetch += fetch_step;
        }
        vec weights[PANEL_VECS];
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            weights[v] = widen(tile->w, w + v * LANES, is_paired ? FLOAT32 : type);
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int v = 0; v < PANEL_VECS; v++)
                sums[m][v] = is_paired ? dot_pairs(sums[m][v], splat_pair(x + m * x_row), weights[v])
                                       : sums[m][v] + x[m * x_row] * weights[v];
    }
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++)
            store(out + m * out_row + v * LANES, sums[m][v]);
}

#endif
