/* Paged attention (Kwon et al., arXiv:2309.06180) over a ragged batch: decode rows and prefill
 * chunks alike. The query heads that share a key head are rows of one small matrix.
 *
 *   parallel for piece (sequence, up to MAX_ROWS rows), key head:
 *     for split of SPLIT tokens in the context:        at fixed places, counted from position 0
 *       attend over the split
 *       merge it into the running result
 *
 * Splits and their merge are those of Flash-Decoding (Dao et al., 2023). A row's bits do not depend
 * on its company: sums run in the order of positions, and the splits lie at the same places whether
 * one thread takes all of a row's splits or, in a small batch, each is a work item of its own whose
 * partial result waits in the workspace.
 */
#include "attention.h"

#include <stdbool.h>

#include "attention_context.h"
#include "attention_split.h"

enum { ITEMS_PER_THREAD = 4 }; /* fewer than that, and splits become items of their own */

static Partial local_partial(const Job *job, Scratch *scratch, int which)
{
    return (Partial){scratch->max[which], scratch->sum[which], scratch->out[which], job->out_row};
}

static int64_t partial_size(int64_t out_row, int64_t rows) { return rows * (out_row + 2); }

static Partial stored_partial(const Job *job, int64_t index)
{
    int64_t rows = job->max_rows;
    float *at = job->partials + index * partial_size(job->out_row, rows);
    return (Partial){at, at + rows, at + 2 * rows, job->out_row};
}

/* Take the next split of a row into its running result. */
static void merge_row(const Partial *into, const Partial *from, int64_t row)
{
    float *total = into->out + row * into->out_row;
    const float *part = from->out + row * from->out_row;
    if (from->max[row] == -INFINITY)
        return;
    float max = into->max[row] > from->max[row] ? into->max[row] : from->max[row];
    bool is_first = into->max[row] == -INFINITY;
    float keep = is_first ? 0.0f : expf(into->max[row] - max), take = expf(from->max[row] - max);
    into->sum[row] = is_first ? from->sum[row] : into->sum[row] * keep + from->sum[row] * take;
    for (int64_t d = 0; d < into->out_row; d += LANES) {
        vec sum = is_first ? load(part + d) : load(total + d) * keep + load(part + d) * take;
        store(total + d, sum);
    }
    into->max[row] = max;
}

static void clear(const Partial *partial, int64_t rows)
{
    for (int64_t row = 0; row < rows; row++)
        partial->max[row] = -INFINITY;
}

static void merge(const Partial *into, const Partial *from, int64_t rows)
{
    for (int64_t row = 0; row < rows; row++)
        merge_row(into, from, row);
}

/* Where row `row` of the piece has its query, and its result, in arrays [T, heads, dim]. */
static int64_t token_of(const Job *job, const Piece *piece, int64_t row)
{
    return job->batch->query_start[piece->seq] + (piece->first_row + row) / job->group;
}

static int64_t head_offset(const Job *job, const Piece *piece, int64_t head, int64_t row)
{
    int64_t query_head = head * job->group + (piece->first_row + row) % job->group;
    return query_head * job->shape->head_dim;
}

/* Pairs of bfloat16, with zeros up to whole vectors. */
static void round_query(const float *from, int64_t dim, float *to)
{
    int64_t whole = dim / (2 * LANES) * (2 * LANES);
    round_pairs(from, whole, to);
    if (whole < dim) {
        store(to + whole / 2, splat(0));
        round_pairs(from + whole, dim - whole, to + whole / 2);
    }
}

static void load_query(const Job *job, const Piece *piece, int64_t head, Scratch *scratch)
{
    for (int64_t row = 0; row < piece->num_rows; row++) {
        const float *from = job->query + token_of(job, piece, row) * job->query_stride +
                            head_offset(job, piece, head, row);
        if (takes_pairs(job->cache))
            round_query(from, job->shape->head_dim, scratch->query + row * ROW_STRIDE);
        else
            memcpy(scratch->query + row * ROW_STRIDE, from, job->shape->head_dim * sizeof(float));
    }
}

static void store_result(const Job *job, const Piece *piece, int64_t head, const Partial *result)
{
    int64_t dim = job->shape->head_dim, width = job->shape->num_heads * dim;
    for (int64_t row = 0; row < piece->num_rows; row++) {
        float *to = job->out + token_of(job, piece, row) * width +
                    head_offset(job, piece, head, row);
        float inverse = 1.0f / result->sum[row];
        for (int64_t d = 0; d < dim; d += LANES)
            store_part(to + d, load(result->out + row * result->out_row + d) * inverse, dim - d);
    }
}

/* The splits that some row of the piece sees. */
static Span splits_of(const Job *job, const Piece *piece)
{
    Span seen = visible_to(job, piece);
    return (Span){seen.begin / SPLIT, (seen.end + SPLIT - 1) / SPLIT};
}

/* Items [first, last) of (piece, key head), each with all its splits. */
static void attend_whole(const void *arg, int64_t first, int64_t last)
{
    const Job *job = arg;
    Scratch scratch;
    Partial total = local_partial(job, &scratch, 0), part = local_partial(job, &scratch, 1);
    for (int64_t item = first; item < last; item++) {
        const Piece *piece = &job->pieces[item / job->shape->num_kv_heads];
        int64_t head = item % job->shape->num_kv_heads;
        Span splits = splits_of(job, piece);
        load_query(job, piece, head, &scratch);
        clear(&total, piece->num_rows);
        for (int64_t split = splits.begin; split < splits.end; split++) {
            attend_split(job, piece, head, split, &scratch, &part);
            merge(&total, &part, piece->num_rows);
        }
        store_result(job, piece, head, &total);
    }
}

/* Items [first, last) of (piece, key head, split). */
static void attend_splits(const void *arg, int64_t first, int64_t last)
{
    const Job *job = arg;
    Scratch scratch;
    for (int64_t item = first; item < last; item++) {
        int64_t pair = item / job->num_splits, split = item % job->num_splits;
        const Piece *piece = &job->pieces[pair / job->shape->num_kv_heads];
        int64_t head = pair % job->shape->num_kv_heads;
        Span splits = splits_of(job, piece);
        if (split < splits.begin || split >= splits.end)
            continue;
        Partial part = stored_partial(job, item);
        load_query(job, piece, head, &scratch);
        attend_split(job, piece, head, split, &scratch, &part);
    }
}

/* Items [first, last) of (piece, key head): put their stored splits together. */
static void merge_splits(const void *arg, int64_t first, int64_t last)
{
    const Job *job = arg;
    Scratch scratch;
    Partial total = local_partial(job, &scratch, 0);
    for (int64_t item = first; item < last; item++) {
        const Piece *piece = &job->pieces[item / job->shape->num_kv_heads];
        Span splits = splits_of(job, piece);
        clear(&total, piece->num_rows);
        for (int64_t split = splits.begin; split < splits.end; split++) {
            Partial part = stored_partial(job, item * job->num_splits + split);
            merge(&total, &part, piece->num_rows);
        }
        store_result(job, piece, item % job->shape->num_kv_heads, &total);
    }
}

/* How a batch is cut. */
typedef struct {
    int64_t num_pieces, num_splits, max_rows, out_row;
    double item_ns;
    bool is_split;
} Plan;

static Plan plan_attention(const Pool *pool, const Attention *shape, const Batch *batch)
{
    Plan plan = {.out_row = (shape->head_dim + PANEL - 1) / PANEL * PANEL};
    int64_t group = shape->num_heads / shape->num_kv_heads, longest = 1;
    double work = 0;
    for (int64_t seq = 0; seq < batch->num_seqs; seq++) {
        int64_t rows = query_len(batch, seq) * group, context = batch->seq_lens[seq];
        int64_t pieces = (rows + MAX_ROWS - 1) / MAX_ROWS;
        plan.num_pieces += pieces;
        plan.max_rows = max_of(plan.max_rows, min_of(rows, MAX_ROWS));
        longest = max_of(longest, context);
        /* Nanoseconds: a piece reads and widens its context, then multiplies with each row. */
        work += (double)context * shape->head_dim * (0.25 * pieces + 0.04 * rows);
    }
    plan.num_splits = (longest + SPLIT - 1) / SPLIT;
    plan.item_ns = plan.num_pieces > 0 ? work / plan.num_pieces : 0;
    int64_t items = plan.num_pieces * shape->num_kv_heads, threads = pool_threads(pool);
    plan.is_split = threads > 1 && plan.num_splits > 1 && items < ITEMS_PER_THREAD * threads;
    return plan;
}

static size_t attention_workspace(const Pool *pool, const Attention *shape, const Batch *batch)
{
    Plan plan = plan_attention(pool, shape, batch);
    size_t pieces = (plan.num_pieces * sizeof(Piece) + sizeof(float) - 1) / sizeof(float);
    size_t partials = plan.is_split ? plan.num_pieces * shape->num_kv_heads * plan.num_splits : 0;
    return pieces + LANES + partials * partial_size(plan.out_row, plan.max_rows);
}

static void cut_pieces(const Batch *batch, int64_t group, Piece *pieces)
{
    for (int64_t seq = 0; seq < batch->num_seqs; seq++) {
        int64_t rows = query_len(batch, seq) * group;
        for (int64_t row = 0; row < rows; row += MAX_ROWS)
            *pieces++ = (Piece){seq, row, min_of(MAX_ROWS, rows - row)};
    }
}

static void paged_attention(Pool *pool, const Attention *shape, const Cache *cache,
                            const LayerCache *layer, const Batch *batch, const float *query,
                            int64_t query_stride, float *out, float *workspace)
{
    Plan plan = plan_attention(pool, shape, batch);
    int64_t group = shape->num_heads / shape->num_kv_heads;
    Piece *pieces = (Piece *)workspace;
    cut_pieces(batch, group, pieces);
    Job job = {
        shape, cache, layer, batch, query, query_stride, out, pieces,
        (float *)(pieces + plan.num_pieces), plan.num_pieces, plan.num_splits, plan.max_rows, group,
        plan.out_row,
    };
    int64_t items = plan.num_pieces * shape->num_kv_heads;
    if (!plan.is_split) {
        pool_run(pool, items, plan.item_ns, attend_whole, &job);
        return;
    }
    pool_run(pool, items * plan.num_splits, plan.item_ns / plan.num_splits, attend_splits, &job);
    pool_run(pool, items, 100.0 * plan.num_splits, merge_splits, &job);
}

EXPORT int64_t headrace_attention_workspace(const Pool *pool, const Attention *shape,
                                            const Batch *batch)
{
    return attention_workspace(pool, shape, batch);
}

/* Over the cache's first layer, query [T, num_heads, head_dim]. */
EXPORT void headrace_attention(Pool *pool, const Attention *shape, const Cache *cache,
                               const Batch *batch, const float *query, float *out, float *workspace)
{
    paged_attention(pool, shape, cache, cache->layers, batch, query,
                    shape->num_heads * shape->head_dim, out, workspace);
}
