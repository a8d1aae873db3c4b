/* Head and argmax in one: a panel's logits are compared while they are in L1. A vocabulary of 32k
 * makes 128 KiB of logits a row, which cost as much to write and read as a small model to compute.
 *
 *   parallel for span of panels that stay in L2:
 *     for tile of rows:
 *       for panel in span:
 *         logits = tile @ panel, capped                     [rows of the tile, PANEL], in L1
 *         for row:  largest = max(largest, logits)          LANES running maxima and where they are
 *       for row:  the best of its LANES maxima -> best[span]
 *   for row:  the best of best[all spans]
 *
 * A lane meets its columns in ascending order and keeps the first of equals; between lanes and
 * spans the smaller index wins among equals. So the result does not depend on how the work is cut.
 */
#include "greedy.h"

#include <math.h>

#include "activation.h"
#include "linear.h"
#include "pack.h"

enum { SPAN_BYTES = 1 << 17, MAX_SPAN_PANELS = 32 };

typedef struct {
    Product product;
    float soft_cap;
    Best *best; /* [span][rows] */
} Search;

/* LANES running maxima of one row. */
typedef struct {
    vec logit;
    ivec token;
} Largest;

static int64_t span_panels(const Linear *head)
{
    size_t panel_bytes = panel_elements(head->in_size, head->dtype) * dtype_size(head->dtype);
    int64_t panels = SPAN_BYTES / panel_bytes;
    return panels < 1 ? 1 : panels < MAX_SPAN_PANELS ? panels : MAX_SPAN_PANELS;
}

static int64_t num_spans(const Linear *head)
{
    return (num_panels(head->out_size) + span_panels(head) - 1) / span_panels(head);
}

static size_t full_workspace(const Linear *head, int64_t rows)
{
    size_t best = num_spans(head) * rows * sizeof(Best) / sizeof(float);
    return linear_workspace(rows, head->in_size) + best;
}

static ivec columns_from(int64_t first)
{
    ivec columns;
    for (int lane = 0; lane < LANES; lane++)
        columns[lane] = (int32_t)first + lane;
    return columns;
}

/* Cap a tile's logits, and hide the columns behind the vocabulary. */
static void finish_logits(const Search *search, int64_t panel, int64_t rows, float *logits)
{
    int64_t columns = search->product.weight->out_size - panel * PANEL;
    if (search->soft_cap > 0)
        soft_cap(logits, search->soft_cap, rows * PANEL);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t column = columns; column < PANEL; column++)
            logits[m * PANEL + column] = -INFINITY;
}

static bool is_better(Best a, Best b)
{
    bool is_nan = a.logit != a.logit, other_is_nan = b.logit != b.logit;
    if (is_nan != other_is_nan)
        return is_nan;
    if (a.logit == b.logit || is_nan)
        return a.token < b.token;
    return a.logit > b.logit;
}

static Best best_lane(const Largest *largest)
{
    Best best = {largest->logit[0], largest->token[0]};
    for (int lane = 1; lane < LANES; lane++) {
        Best other = {largest->logit[lane], largest->token[lane]};
        best = is_better(other, best) ? other : best;
    }
    return best;
}

/* One tile of rows over the panels [first, last), into the rows of `best`. */
static void search_tile(const Search *search, int64_t tile_index, int64_t first, int64_t last,
                        Best *best)
{
    const Product *product = &search->product;
    int64_t begin = tile_begin(product->rows, tile_index);
    int64_t rows = tile_begin(product->rows, tile_index + 1) - begin;
    float logits[TILE_ROWS * PANEL] __attribute__((aligned(64)));
    Tile tile = open_tile(product, tile_index, logits);
    Largest largest[TILE_ROWS];
    for (int64_t m = 0; m < rows; m++)
        largest[m] = (Largest){splat(-INFINITY), columns_from(first * PANEL)};
    for (int64_t panel = first; panel < last; panel++) {
        multiply_panel(product, panel, rows, &tile);
        finish_logits(search, panel, rows, logits);
        ivec columns = columns_from(panel * PANEL);
        for (int64_t m = 0; m < rows; m++)
            UNROLL for (int v = 0; v < PANEL_VECS; v++)
                keep_larger(load(logits + m * PANEL + v * LANES), columns + v * LANES,
                            &largest[m].logit, &largest[m].token);
    }
    for (int64_t m = 0; m < rows; m++)
        best[begin + m] = best_lane(&largest[m]);
}

static void search_spans(const void *arg, int64_t first, int64_t last)
{
    const Search *search = arg;
    const Linear *head = search->product.weight;
    int64_t panels = num_panels(head->out_size), size = span_panels(head);
    for (int64_t span = first; span < last; span++) {
        int64_t begin = span * size, end = begin + size < panels ? begin + size : panels;
        for (int64_t tile = 0; tile < num_tiles(search->product.rows); tile++)
            search_tile(search, tile, begin, end, search->best + span * search->product.rows);
    }
}

static Best search_panels(const Linear *head, float soft_cap, const float *x, int64_t first,
                          int64_t last)
{
    Search search = {.product = {.weight = head, .x = x, .rows = 1}, .soft_cap = soft_cap};
    Best best;
    search_tile(&search, 0, first, last, &best);
    return best;
}

static void choose_fully(Pool *pool, const Linear *head, float soft_cap, const float *x,
                         int64_t rows, int64_t *tokens, float *workspace)
{
    if (rows == 0)
        return;
    Best *best = (Best *)(workspace + linear_workspace(rows, head->in_size));
    Search search = {begin_product(pool, head, x, rows, workspace), soft_cap, best};
    int64_t spans = num_spans(head);
    pool_run(pool, spans, panel_cost_ns(&search.product) * span_panels(head), search_spans,
             &search);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t span = 1; span < spans; span++)
            if (is_better(best[span * rows + row], best[row]))
                best[row] = best[span * rows + row];
        tokens[row] = best[row].token;
    }
}
