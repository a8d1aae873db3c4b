/* What the two halves of attention share: attention_split.c computes one split of the context for
 * one piece of the queries, attention.c cuts the batch into such work and puts it together.
 */
#ifndef HEADRACE_ATTENTION_SPLIT_H
#define HEADRACE_ATTENTION_SPLIT_H

#include "headrace.h"
#include "vec.h"

enum {
    SPLIT = 256,
    MAX_ROWS = 48,
    /* Row stride of queries and scores; not a power of two, which would strain the cache sets. */
    ROW_STRIDE = 256 + 16,
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
    int64_t num_splits;   /* of the longest context */
    int64_t group, out_row;
} Job;

/* What one thread works in. */
typedef struct {
    float query[MAX_ROWS * ROW_STRIDE];
    float scores[MAX_ROWS * ROW_STRIDE];
    float panel[PANEL * ROW_STRIDE]; /* keys [dim][PANEL] or values [PANEL][out_row + LANES] */
    size_t index[SPLIT + PANEL];     /* see find_tokens() */
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

/* Attend over split number `split`: scratch->query holds the piece's queries; what they see of the
 * split goes into `to`. The split must hold something that some row of the piece sees. */
static void attend_split(const Job *job, const Piece *piece, int64_t head, int64_t split,
                         Scratch *scratch, const Partial *to);

#endif
