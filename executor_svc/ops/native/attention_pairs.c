/* attention_split.c's work over a bfloat16 cache, in dot products of pairs: neighbouring dims of
 * queries and keys, neighbouring tokens of weights and values.
 *
 *   for LANES tokens in the split:                 scores = query @ key.T
 *     transpose the keys, dot with each row
 *   for row:                                       scale, cap, mask, exp(score - max)
 *   for pair of tokens in the split:               out += weights @ value
 *     zip the values, dot with each row
 *
 * Few rows (decode) take keys and values in registers, straight from the cache. Many rows (prefill)
 * go through the tile kernel, for which keys and values are brought into panels once. Either way
 * a sum takes the same pairs in the same order, so a row's bits do not depend on which way it went.
 *
 * Queries and weights are rounded to bfloat16, the latter as in FlashAttention (Dao et al.,
 * arXiv:2205.14135): they are at most 1, and are divided by the sum of what they were rounded to,
 * so that an output is wrong by at most 2^-8 of the largest value it averages. All sums and the
 * softmax itself are float32.
 */
#include <stdbool.h>

#include "attention_context.h"
#include "attention_split.h"
#include "quantized.h"

enum { FEW_ROWS = 4, UNIT = 2 * LANES /* dims that a vector holds */ };

/* --- few rows ----------------------------------------------------------------------------------- */

/* Up to UNIT values of a token, from the arrays at dim `d`; with `is_whole` none is missing. */
INLINE vec load_dims(const void *array, size_t index, int64_t left, const bool is_whole)
{
    return is_whole ? load((const float *)((const uint16_t *)array + index))
                    : load_pairs(array, index, left);
}

/* The pairs of dims [d, d + UNIT) of LANES tokens, one pair a vector. */
INLINE void load_key_square(const Job *job, const size_t *index, int64_t d, const bool is_whole,
                            vec square[LANES])
{
    const void *keys = element(job->layer->key, d, BFLOAT16);
    const int64_t left = job->shape->head_dim - d;
    UNROLL for (int i = 0; i < LANES; i++)
        square[i] = load_dims(keys, index[i], left, is_whole);
    transpose_square(square);
}

/* The pairs of the tokens at index[0] and index[1], of dims [d, d + UNIT). */
INLINE void zip_values(const Job *job, const size_t *index, int64_t d, const bool is_whole,
                       vec zipped[2])
{
    const void *values = element(job->layer->value, d, BFLOAT16);
    const int64_t left = job->shape->head_dim - d;
    zip_pairs(load_dims(values, index[0], left, is_whole),
              load_dims(values, index[1], left, is_whole), zipped);
}

INLINE void score_few(const int rows, const Job *job, Span span, Scratch *scratch)
{
    const int64_t dim = job->shape->head_dim;
    for (int64_t token = span.begin / LANES * LANES; token < span.end; token += LANES) {
        const size_t *index = scratch->index + token;
        vec sums[FEW_ROWS] = {{0}}, square[LANES];
        for (int64_t d = 0; d < dim; d += UNIT) {
            const float *query = scratch->query + d / 2;
            fetch_next(job, index, d, BFLOAT16);
            load_key_square(job, index, d, true, square);
            UNROLL for (int i = 0; i < LANES; i++)
                UNROLL for (int m = 0; m < rows; m++)
                    sums[m] = dot_pairs(sums[m], splat_pair(query + m * ROW_STRIDE + i), square[i]);
        }
        UNROLL for (int m = 0; m < rows; m++)
            store(scratch->scores + m * ROW_STRIDE + token, sums[m]);
    }
}

/* Dims [d, d + units * UNIT) of keys `i` and `i + 1` of those that are read next. */
INLINE void fetch_next_keys(const int units, const Job *job, const Scratch *scratch,
                            const size_t *next, int64_t i, int64_t d)
{
    const void *keys = element(job->layer->key, d, BFLOAT16);
    if (i + 1 < scratch->num_next)
        UNROLL for (int u = 0; u < units; u++) {
            fetch(element(keys, next[i] + u * UNIT, BFLOAT16));
            fetch(element(keys, next[i + 1] + u * UNIT, BFLOAT16));
        }
}

/* Columns [column, column + units * UNIT) of the result. The values are in the cache by now: time
 * for memory to bring the next keys, without which all of it took a third longer. */
INLINE void weigh_columns(const int rows, const int units, const Job *job, Span span,
                          int64_t column, const Scratch *scratch, const Partial *to)
{
    const size_t *next = scratch->index + behind_panels(span);
    vec sums[FEW_ROWS][4] = {{{0}}};
    for (int64_t pair = span.begin / 2; 2 * pair < span.end; pair++) {
        fetch_next_keys(units, job, scratch, next, 2 * pair - span.begin, column);
        UNROLL for (int u = 0; u < units; u++) {
            const int64_t d = column + u * UNIT;
            vec zipped[2];
            zip_values(job, scratch->index + 2 * pair, d, true, zipped);
            UNROLL for (int m = 0; m < rows; m++) {
                vec weight = splat_pair(scratch->scores + m * ROW_STRIDE + pair);
                sums[m][2 * u] = dot_pairs(sums[m][2 * u], weight, zipped[0]);
                sums[m][2 * u + 1] = dot_pairs(sums[m][2 * u + 1], weight, zipped[1]);
            }
        }
    }
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < 2 * units; v++)
            store(to->out + m * to->out_row + column + v * LANES, sums[m][v]);
}

INLINE void weigh_few(const int rows, const Job *job, Span span, const Scratch *scratch,
                      const Partial *to)
{
    int64_t column = 0;
    for (; column + 2 * UNIT <= job->out_row; column += 2 * UNIT)
        weigh_columns(rows, 2, job, span, column, scratch, to);
    for (; column < job->out_row; column += UNIT)
        weigh_columns(rows, 1, job, span, column, scratch, to);
}

/* --- many rows ---------------------------------------------------------------------------------- */

/* [pairs of dims][PANEL]: a panel of keys as columns, zeros behind head_dim. */
static void pack_keys(const Job *job, const size_t *index, float *keys)
{
    const int64_t dim = job->shape->head_dim;
    for (int64_t first = 0; first < PANEL; first += LANES, index += LANES) {
        float *to = keys + first;
        for (int64_t d = 0; d < dim; d += UNIT) {
            vec square[LANES];
            fetch_next(job, index, d, BFLOAT16);
            if (d + UNIT <= dim)
                load_key_square(job, index, d, true, square);
            else
                load_key_square(job, index, d, false, square);
            UNROLL for (int i = 0; i < LANES; i++, to += PANEL)
                store(to, square[i]);
        }
    }
}

/* [out_row / PANEL][SPLIT / 2][PANEL]: pairs of the span's tokens. */
static void pack_values(const Job *job, Span span, Scratch *scratch)
{
    const int64_t dim = job->shape->head_dim;
    const size_t *index = scratch->index;
    for (int64_t pair = span.begin / 2; 2 * pair < span.end; pair++)
        for (int64_t d = 0; d < job->out_row; d += UNIT) {
            float *to = scratch->panel + (d / PANEL * (SPLIT / 2) + pair) * PANEL + d % PANEL;
            vec zipped[2];
            if (d + UNIT <= dim)
                zip_values(job, index + 2 * pair, d, true, zipped);
            else
                zip_values(job, index + 2 * pair, d, false, zipped);
            store(to, zipped[0]);
            store(to + LANES, zipped[1]);
        }
}

static void score_tile(const Job *job, Span rows, int64_t panel, Scratch *scratch)
{
    Tile tile = {
        .x = scratch->query + rows.begin * ROW_STRIDE,
        .w = scratch->panel,
        .w_step = PANEL,
        .out = scratch->scores + rows.begin * ROW_STRIDE + panel,
        .out_row = ROW_STRIDE,
        .depth = (job->shape->head_dim + 1) / 2,
    };
    multiply_tile(rows.end - rows.begin, true, &tile);
}

static void weigh_tile(const Job *job, Span rows, Span span, Scratch *scratch, const Partial *to)
{
    int64_t pair = span.begin / 2;
    for (int64_t column = 0; column < job->out_row; column += PANEL) {
        Tile tile = {
            .x = scratch->scores + rows.begin * ROW_STRIDE + pair,
            .w = scratch->panel + (column / PANEL * (SPLIT / 2) + pair) * PANEL,
            .w_step = PANEL,
            .out = to->out + rows.begin * to->out_row + column,
            .out_row = to->out_row,
            .depth = (span.end + 1) / 2 - pair,
        };
        multiply_tile(rows.end - rows.begin, true, &tile);
    }
}

/* --- the softmax between the products ------------------------------------------------------------ */

/* 2^x, relative error below 4e-6, which is nothing beside rounding to bfloat16; x is at most 0 and
 * taken for -126 below that. */
INLINE vec exp2_below(vec x)
{
    const vec shifter = splat(0x1.8p23f);
    x = vec_max(splat(-126.0f), x);
    vec shifted = x + shifter; /* its low bits are the rounded x */
    vec r = x - (shifted - shifter);
    vec y = splat(9.5701e-3f);
    y = multiply_add(y, r, splat(5.591786e-2f));
    y = multiply_add(y, r, splat(0.24024745f));
    y = multiply_add(y, r, splat(0.69312181f));
    y = multiply_add(y, r, splat(0.99999926f));
    return (vec)((uvec)y + ((uvec)shifted << 23));
}

INLINE bool are_seen(int64_t first, int64_t count, Span own)
{
    return own.begin <= first && first + count <= own.end;
}

/* LANES scores from `first` on; -inf where the row does not see the token. */
INLINE vec mask_scores(vec scores, int64_t first, Span own)
{
    ivec at;
    for (int l = 0; l < LANES; l++)
        at[l] = l;
    at += (int32_t)first;
    ivec is_seen = (at >= (int32_t)own.begin) & (at < (int32_t)own.end);
    return choose(is_seen, scores, splat(-INFINITY));
}

static void cap_scores(const Attention *shape, float *scores, Span own)
{
    for (int64_t i = own.begin / LANES * LANES; i < own.end; i += LANES) {
        vec score = load(scores + i) * shape->scale;
        store(scores + i, shape->soft_cap * vec_tanh(score / shape->soft_cap));
    }
}

static float largest_score(const float *scores, Span own)
{
    vec highest = splat(-INFINITY);
    for (int64_t i = own.begin / LANES * LANES; i < own.end; i += LANES) {
        vec score = load(scores + i);
        highest = vec_max(are_seen(i, LANES, own) ? score : mask_scores(score, i, own), highest);
    }
    return max_lanes(highest);
}

/* 2^(score * scale - max) of LANES tokens, zero where the row does not see the token. */
INLINE vec weights_at(const float *scores, int64_t first, Span own, float scale, float max)
{
    if (first + LANES <= own.begin || first >= own.end)
        return splat(0);
    vec score = load(scores + first);
    vec weight = exp2_below(multiply_add(score, splat(scale), splat(-max)));
    if (are_seen(first, LANES, own))
        return weight;
    return choose(mask_scores(score, first, own) == -INFINITY, splat(0), weight);
}

/* A row's scores in place to weights exp(score - max) for the span's pairs of tokens. */
static void soften_pairs(const Attention *shape, float *scores, Span span, Span own, float *max,
                         float *sum)
{
    const float log2_e = 1.44269504088896341f;
    vec sums = splat(0), ones = round_two(splat(1), splat(1));
    float scale = shape->scale;
    if (shape->soft_cap > 0) {
        cap_scores(shape, scores, own);
        scale = 1;
    }
    float largest = largest_score(scores, own);
    for (int64_t i = span.begin / UNIT * UNIT; i < span.end; i += UNIT) {
        vec low = weights_at(scores, i, own, scale * log2_e, largest * (scale * log2_e));
        vec high = weights_at(scores, i + LANES, own, scale * log2_e, largest * (scale * log2_e));
        vec pairs = round_two(low, high);
        sums = dot_pairs(sums, pairs, ones);
        store(scores + i / 2, pairs);
    }
    *max = largest * scale;
    *sum = sum_lanes(sums);
}

static void soften_rows(const Job *job, const Piece *piece, Span rows, int64_t base,
                        Scratch *scratch, const Partial *to)
{
    Span span = seen_by(job, piece, rows, base);
    for (int64_t row = rows.begin; row < rows.end; row++)
        soften_pairs(job->shape, scratch->scores + row * ROW_STRIDE, span,
                     seen_by(job, piece, (Span){row, row + 1}, base), &to->max[row], &to->sum[row]);
}

/* --- both products ------------------------------------------------------------------------------- */

/* Tiles see different parts of the span: each works on its own. */
static void score_many(const Job *job, const Piece *piece, int64_t base, Span span,
                       Scratch *scratch)
{
    for (int64_t panel = first_panel(span); panel < span.end; panel += PANEL) {
        pack_keys(job, scratch->index + panel, scratch->panel);
        for (int64_t row = 0; row < piece->num_rows; row += TILE_ROWS) {
            Span rows = {row, min_of(row + TILE_ROWS, piece->num_rows)};
            Span own = panel_part(seen_by(job, piece, rows, base), panel);
            if (own.begin < own.end)
                score_tile(job, rows, panel, scratch);
        }
    }
}

static void weigh_many(const Job *job, const Piece *piece, int64_t base, Span span,
                       Scratch *scratch, const Partial *to)
{
    pack_values(job, span, scratch);
    for (int64_t row = 0; row < piece->num_rows; row += TILE_ROWS) {
        Span rows = {row, min_of(row + TILE_ROWS, piece->num_rows)};
        Span own = seen_by(job, piece, rows, base);
        if (own.begin < own.end)
            weigh_tile(job, rows, own, scratch, to);
    }
}

/* Rows that take the short way: one query group, whose heads fill vectors. */
static int64_t few_rows(const Job *job, const Piece *piece)
{
    bool is_whole = job->out_row == job->shape->head_dim && job->out_row % UNIT == 0;
    return is_whole && piece->num_rows <= FEW_ROWS ? piece->num_rows : 0;
}

static void score_pairs(const Job *job, const Piece *piece, int64_t base, Span span,
                        Scratch *scratch)
{
    switch (few_rows(job, piece)) {
    case 1: score_few(1, job, span, scratch); break;
    case 2: score_few(2, job, span, scratch); break;
    case 3: score_few(3, job, span, scratch); break;
    case 4: score_few(4, job, span, scratch); break;
    default: score_many(job, piece, base, span, scratch);
    }
}

static void weigh_pairs(const Job *job, const Piece *piece, int64_t base, Span span,
                        Scratch *scratch, const Partial *to)
{
    switch (few_rows(job, piece)) {
    case 1: weigh_few(1, job, span, scratch, to); break;
    case 2: weigh_few(2, job, span, scratch, to); break;
    case 3: weigh_few(3, job, span, scratch, to); break;
    case 4: weigh_few(4, job, span, scratch, to); break;
    default: weigh_many(job, piece, base, span, scratch, to);
    }
}

static void attend_split_pairs(const Job *job, const Piece *piece, int64_t head, int64_t split,
                               Scratch *scratch, const Partial *to)
{
    int64_t base = split * SPLIT, rows = piece->num_rows;
    Span span = seen_by(job, piece, (Span){0, rows}, base);
    find_tokens(job, piece, head, split, span, scratch);
    score_pairs(job, piece, base, span, scratch);
    for (int64_t row = 0; row < rows; row += TILE_ROWS)
        soften_rows(job, piece, (Span){row, min_of(row + TILE_ROWS, rows)}, base, scratch, to);
    weigh_pairs(job, piece, base, span, scratch, to);
}
