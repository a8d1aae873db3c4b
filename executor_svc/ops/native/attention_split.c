/* One split of the context for up to MAX_ROWS query rows that share a key head: two small matrix
 * products around a softmax, both through the tile kernel of linear layers.
 *
 *   for PANEL tokens in the split:                 scores = query @ key.T
 *     widen and transpose the keys, tile kernel
 *   for row:                                       scale, cap, mask, exp(score - max)
 *   for PANEL tokens in the split:                 out += weights @ value
 *     widen the values, tile kernel
 *
 * What a row cannot see has the weight zero and changes no bit of its sums. A bfloat16 cache takes
 * another way where there is a dot product for it, see attention_pairs.c.
 */
#include "attention_split.h"

#include <stdbool.h>

#include "attention_context.h"

/* All kernels over rows of MAX_ROWS x ROW_STRIDE scratch: out += x @ w, TILE_ROWS rows at a time. */
static void multiply_rows(int64_t num_rows, Tile tile)
{
    while (num_rows > 0) {
        int64_t rows = min_of(num_rows, TILE_ROWS);
        multiply_tile(rows, false, &tile);
        tile.x += rows * ROW_STRIDE;
        if (tile.start != NULL)
            tile.start += rows * tile.start_row;
        tile.out += rows * tile.out_row;
        num_rows -= rows;
    }
}

/* keys [step of dims][PANEL]: dims from `d` on of LANES tokens, given by their elements in the
 * cache; with `is_whole` no dim is missing. */
INLINE void load_square(const Job *job, const size_t *index, int64_t d, const bool is_whole,
                        const enum dtype type, float *keys)
{
    const void *array = job->layer->key;
    const int64_t left = is_whole ? 2 * LANES : job->shape->head_dim - d;
    vec square[LANES];
    UNROLL for (int i = 0; i < LANES; i++)
        square[i] = type == BFLOAT16 ? load_pairs(array, index[i] + d, left)
                                     : widen_part(array, index[i] + d, left, type);
    transpose_square(square);
    UNROLL for (int i = 0; i < LANES; i++) {
        if (type == BFLOAT16) {
            store(keys + 2 * i * PANEL, (vec)((uvec)square[i] << 16));
            store(keys + (2 * i + 1) * PANEL, (vec)((uvec)square[i] & 0xffff0000u));
        } else {
            store(keys + i * PANEL, square[i]);
        }
    }
}

/* keys [dim][PANEL]: a panel of tokens as columns. */
INLINE void load_keys(const Job *job, const size_t *index, enum dtype type, float *keys)
{
    const int64_t dim = job->shape->head_dim, step = type == BFLOAT16 ? 2 * LANES : LANES;
    for (int64_t first = 0; first < PANEL; first += LANES, index += LANES) {
        float *to = keys + first;
        for (int64_t d = 0; d < dim; d += step, to += step * PANEL) {
            fetch_next(job, index, d, type);
            if (dim % step == 0)
                load_square(job, index, d, true, type, to);
            else
                load_square(job, index, d, false, type, to);
        }
    }
}

/* values [span][row]: zero behind head_dim, up to whole panels. */
INLINE void load_values(const Job *job, const size_t *index, Span span, enum dtype type,
                        int64_t row, float *values)
{
    const void *array = job->layer->value;
    int64_t dim = job->shape->head_dim, whole = dim / LANES * LANES, width = job->out_row;
    for (int64_t token = span.begin; token < span.end; token++, values += row) {
        for (int64_t d = 0; d < whole; d += LANES)
            store(values + d, widen(array, index[token] + d, type));
        for (int64_t d = whole; d < width; d += LANES)
            store(values + d, widen_part(array, index[token] + d, max_of(dim - d, 0), type));
    }
}

INLINE void score_split(const Job *job, int64_t num_rows, Span span, enum dtype type,
                        Scratch *scratch)
{
    for (int64_t base = first_panel(span); base < span.end; base += PANEL) {
        load_keys(job, scratch->index + base, type, scratch->panel);
        Tile tile = {
            .x = scratch->query,
            .w = scratch->panel,
            .w_step = PANEL,
            .out = scratch->scores + base,
            .out_row = ROW_STRIDE,
            .depth = job->shape->head_dim,
        };
        multiply_rows(num_rows, tile);
    }
}

INLINE void weigh_split(const Job *job, int64_t num_rows, Span span, enum dtype type,
                        Scratch *scratch, const Partial *to)
{
    int64_t row = job->out_row + LANES; /* not a power of two */
    for (int64_t base = first_panel(span); base < span.end; base += PANEL) {
        Span part = panel_part(span, base);
        load_values(job, scratch->index, part, type, row, scratch->panel);
        bool is_first = base == first_panel(span);
        for (int64_t column = 0; column < job->out_row; column += PANEL) {
            Tile tile = {
                .x = scratch->scores + part.begin,
                .w = scratch->panel + column,
                .w_step = row,
                .start = is_first ? NULL : to->out + column,
                .start_row = is_first ? 0 : to->out_row,
                .out = to->out + column,
                .out_row = to->out_row,
                .depth = part.end - part.begin,
            };
            multiply_rows(num_rows, tile);
        }
    }
}

/* The scores of the span's panels in place to weights exp(score - max), zero for what the row does
 * not see. */
static void soften_row(const Attention *shape, float *scores, Span span, Span own, float *max,
                       float *sum)
{
    int64_t begin = first_panel(span), end = behind_panels(span);
    vec highest = splat(-INFINITY), sums = splat(0);
    ivec lane;
    for (int l = 0; l < LANES; l++)
        lane[l] = l;
    for (int64_t i = begin; i < end; i += LANES) {
        vec score = load(scores + i) * shape->scale;
        if (shape->soft_cap > 0)
            score = shape->soft_cap * vec_tanh(score / shape->soft_cap);
        ivec at = lane + (int32_t)i;
        ivec is_seen = (at >= (int32_t)own.begin) & (at < (int32_t)own.end);
        score = choose(is_seen, score, splat(-INFINITY));
        highest = vec_max(score, highest);
        store(scores + i, score);
    }
    *max = max_lanes(highest);
    for (int64_t i = begin; i < end; i += LANES) {
        vec score = load(scores + i);
        vec weight = choose(score == -INFINITY, splat(0), vec_exp(score - *max));
        sums += weight;
        store(scores + i, weight);
    }
    *sum = sum_lanes(sums);
}

INLINE void attend_split_of(const Job *job, const Piece *piece, int64_t head, int64_t split,
                            enum dtype type, Scratch *scratch, const Partial *to)
{
    int64_t base = split * SPLIT, rows = piece->num_rows;
    Span span = seen_by(job, piece, (Span){0, rows}, base);
    find_tokens(job, piece, head, split, span, scratch);
    score_split(job, rows, span, type, scratch);
    for (int64_t row = 0; row < rows; row++)
        soften_row(job->shape, scratch->scores + row * ROW_STRIDE, span,
                   seen_by(job, piece, (Span){row, row + 1}, base), &to->max[row], &to->sum[row]);
    weigh_split(job, rows, span, type, scratch, to);
}

static void attend_split(const Job *job, const Piece *piece, int64_t head, int64_t split,
                         Scratch *scratch, const Partial *to)
{
    if (takes_pairs(job->cache))
        attend_split_pairs(job, piece, head, split, scratch, to);
    else if (job->cache->dtype == FLOAT32)
        attend_split_of(job, piece, head, split, FLOAT32, scratch, to);
    else if (job->cache->dtype == BFLOAT16)
        attend_split_of(job, piece, head, split, BFLOAT16, scratch, to);
    else
        attend_split_of(job, piece, head, split, FLOAT16, scratch, to);
}
