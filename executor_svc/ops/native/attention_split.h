/* What the two halves of attention share: attention_split.c computes one split of the context for
 * one piece of the queries, attention.c cuts the batch into such work and puts it together.
 */
#ifndef HEADRACE_ATTENTION_SPLIT_H
#define HEADRACE_ATTENTION_SPLIT_H

#include "headrace.h"
#include "tile.h"
#include "vec.h"

enum {
    SPLIT = 256,
    MAX_ROWS = 96,
    /* Row stride of queries and scores; not a power of two, which would strain the cache sets. */
    ROW_STRIDE = 256 + 16,
    /* Of float32: keys [dim][PANEL] or values [PANEL][out_row + LANES]. Of pairs of bfloat16: keys
     * [dim / 2][PANEL] or values [out_row / PANEL][SPLIT / 2][PANEL]. */
    PANELS_SIZE = (SPLIT / 2 > PANEL ? SPLIT / 2 : PANEL) * ROW_STRIDE,
};
_Static_assert(SPLIT <= ROW_STRIDE && (int)MAX_HEAD_DIM <= ROW_STRIDE, "scratch rows are too short");
_Static_assert(SPLIT % (int)PANEL == 0, "a split is whole panels");

/* Rows [first_row, first_row + num_rows) of a sequence; row = token * group + head in group. */
typedef struct {
    int32_t seq, first_row, num_rows;
} Piece;

/* Softmax over some tokens, not yet divided by its sum: for each row the largest score (-inf if it
 * sees none of the tokens), the sum of exp(score - max), and the values under these weights. */
typedef struct {
    float *max, *sum, *out; /* out: row r at r * out_row */
    int64_t out_row;
} Partial;

/* One call of paged_attention(). */
typedef struct {
    const Attention *shape;
    const Cache *cache;
    const LayerCache *layer;
    const Batch *batch;
    const float *query;
    int64_t query_stride;
    float *out;
    const Piece *pieces;
    float *partials;      /* [piece, key head, split] of partial_size() floats each */
    int64_t num_pieces;
    int64_t num_splits;   /* of the longest context */
    int64_t max_rows;     /* of any piece */
    int64_t group, out_row;
} Job;

/* What one thread works in. */
typedef struct {
    float query[MAX_ROWS * ROW_STRIDE];
    float scores[MAX_ROWS * ROW_STRIDE];
    float panel[PANELS_SIZE]; /* keys or values, as their kernel wants them */
    size_t index[2 * SPLIT]; /* see find_tokens() */
    int64_t num_next;        /* tokens there that are read next */
    float max[2][MAX_ROWS], sum[2][MAX_ROWS], out[2][MAX_ROWS * MAX_HEAD_DIM]; /* partials */
} Scratch;

typedef struct {
    int64_t begin, end;
} Span;

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t query_len(const Batch *batch, int64_t seq)
{
    return batch->query_start[seq + 1] - batch->query_start[seq];
}

/* What row `row` of a sequence sees. */
static Span visible(const Job *job, const Piece *piece, int64_t row)
{
    int64_t start = job->batch->seq_lens[piece->seq] - query_len(job->batch, piece->seq);
    int64_t end = start + (piece->first_row + row) / job->group + 1;
    int64_t window = job->shape->window;
    return (Span){window > 0 ? max_of(0, end - window) : 0, end};
}

/* Where the panels begin and end that a span, counted from its split's first token, touches. */
INLINE int64_t first_panel(Span span) { return span.begin / PANEL * PANEL; }
INLINE int64_t behind_panels(Span span) { return (span.end + PANEL - 1) / PANEL * PANEL; }

/* The part of the span that lies in the panel of tokens from `base` on. */
INLINE Span panel_part(Span span, int64_t base)
{
    return (Span){max_of(span.begin, base), min_of(span.end, base + PANEL)};
}

/* What rows [rows.begin, rows.end) of the piece see of the split from token `base` on, counted from
 * there. */
static Span seen_by(const Job *job, const Piece *piece, Span rows, int64_t base)
{
    int64_t end = max_of(0, min_of(visible(job, piece, rows.end - 1).end - base, SPLIT));
    int64_t begin = max_of(0, min_of(visible(job, piece, rows.begin).begin - base, end));
    return (Span){begin, end};
}

/* out += x @ w for up to TILE_ROWS rows of x, which lie ROW_STRIDE apart. */
INLINE void multiply_tile(int64_t rows, const bool is_paired, Tile *tile)
{
    tile->x_row = ROW_STRIDE;
    tile->x_step = 1;
#define CASE(R) \
    case R: \
        if (R <= TILE_ROWS) \
            tile_of(R, FLOAT32, is_paired, tile); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* Does attention over this cache multiply in pairs of bfloat16? Queries are rounded then. */
INLINE bool takes_pairs(const Cache *cache) { return HAS_BFLOAT_DOT && cache->dtype == BFLOAT16; }

/* Attend over split number `split`: scratch->query holds the piece's queries; what they see of the
 * split goes into `to`. The split must hold something that some row of the piece sees. */
static void attend_split(const Job *job, const Piece *piece, int64_t head, int64_t split,
                         Scratch *scratch, const Partial *to);

/* The same where takes_pairs(): scratch->query holds pairs, with zeros up to whole vectors. */
static void attend_split_pairs(const Job *job, const Piece *piece, int64_t head, int64_t split,
                               Scratch *scratch, const Partial *to);

#endif
