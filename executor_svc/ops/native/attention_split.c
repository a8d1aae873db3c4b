/* One split of the context for up to MAX_ROWS query rows that share a key head: two small matrix
 * products around a softmax, both through the tile kernel of linear layers.
 *
 *   for PANEL tokens in the split:                 scores = query @ key.T
 *     widen and transpose the keys, tile kernel
 *   for row:                                       scale, cap, mask, exp(score - max)
 *   for PANEL tokens in the split:                 out += weights @ value
 *     widen the values, tile kernel
 *
 * What a row cannot see has the weight zero and changes no bit of its sums.
 */
#include "attention_split.h"

#include <stdbool.h>

#include "tile.h"

/* Where the panels begin and end that the span touches. */
static int64_t first_panel(Span span) { return span.begin / PANEL * PANEL; }
static int64_t behind_panels(Span span) { return (span.end + PANEL - 1) / PANEL * PANEL; }

/* For each token of the span, counted from the split's first: the element where its head begins in
 * the layer's key and value arrays. Neighbours, which are only ever fetched, get that of the nearest. */
static void find_tokens(const Job *job, int64_t seq, int64_t head, int64_t base, Span span,
                        size_t *index)
{
    int64_t size = job->cache->block_size, dim = job->shape->head_dim;
    const int32_t *block = job->batch->block_tables + seq * job->batch->table_stride;
    block += span.begin / size;
    int64_t offset = span.begin % size;
    for (int64_t position = span.begin; position < span.end; position++) {
        int64_t row = (*block * job->shape->num_kv_heads + head) * size + offset;
        index[position - base] = (size_t)row * dim;
        if (++offset == size) {
            offset = 0;
            block++;
        }
    }
    Span own = {span.begin - base, span.end - base};
    for (int64_t i = first_panel(own); i < own.begin; i++)
        index[i] = index[own.begin];
    for (int64_t i = own.end; i < behind_panels(own) + PANEL; i++)
        index[i] = index[own.end - 1];
}

/* All kernels over rows of MAX_ROWS x ROW_STRIDE scratch: out += x @ w, TILE_ROWS rows at a time. */
static void multiply_rows(int64_t num_rows, Tile tile)
{
    tile.x_row = ROW_STRIDE;
    tile.x_step = 1;
    while (num_rows > 0) {
        int64_t rows = min_of(num_rows, TILE_ROWS);
#define CASE(R) \
    case R: \
        if (R <= TILE_ROWS) \
            tile_of(R, FLOAT32, false, &tile); \
        break;
        switch (rows) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
        }
#undef CASE
        tile.x += rows * ROW_STRIDE;
        if (tile.start != NULL)
            tile.start += rows * tile.start_row;
        tile.out += rows * tile.out_row;
        num_rows -= rows;
    }
}

INLINE const void *element(const void *array, size_t index, enum dtype type)
{
    return (const char *)array + index * dtype_size(type);
}

/* Into L2: L1 has too few requests under way to keep up, and was 1.6 times slower. */
INLINE void fetch(const void *address) { __builtin_prefetch(address, 0, 2); }

/* Two neighbouring bfloat16 values travel as one lane, which halves the work of transposing. */
INLINE vec load_pairs(const uint16_t *from, int64_t count)
{
    uint16_t pairs[2 * LANES] = {0};
    if (count >= 2 * LANES)
        return load((const float *)from);
    memcpy(pairs, from, count * sizeof(uint16_t));
    return load((const float *)pairs);
}

/* keys [step of dims][PANEL]: dims from `d` on of LANES tokens, given by their elements in the
 * cache; with `is_whole` no token and no dim is missing. */
INLINE void load_square(const Job *job, const size_t *index, int64_t d, Span part,
                        const bool is_whole, const enum dtype type, float *keys)
{
    const void *array = job->layer->key;
    const int64_t left = is_whole ? 2 * LANES : job->shape->head_dim - d;
    vec square[LANES];
    UNROLL for (int i = 0; i < LANES; i++) {
        if (!is_whole && (i < part.begin || i >= part.end))
            square[i] = splat(0);
        else if (type == BFLOAT16)
            square[i] = load_pairs(element(array, index[i] + d, type), left);
        else
            square[i] = widen_part(array, index[i] + d, left, type);
    }
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

/* keys [dim][PANEL]: the tokens from `base` on as columns, zero where outside the part. Meanwhile
 * fetch what comes next, the keys of the following panel and the values of this one: blocks lie
 * anywhere, which hides them from the processor's own prefetching. */
INLINE void load_keys(const Job *job, const size_t *index, int64_t base, Span part,
                      enum dtype type, float *keys)
{
    const int64_t dim = job->shape->head_dim, step = type == BFLOAT16 ? 2 * LANES : LANES;
    bool is_whole = part.end - part.begin == PANEL && dim % step == 0;
    for (int64_t first = base; first < base + PANEL; first += LANES) {
        Span own = {part.begin - first, part.end - first};
        for (int64_t d = 0; d < dim; d += step, keys += step * PANEL) {
            UNROLL for (int i = 0; i < LANES; i++) {
                fetch(element(job->layer->key, index[first + PANEL + i] + d, type));
                fetch(element(job->layer->value, index[first + i] + d, type));
            }
            if (is_whole)
                load_square(job, index + first, d, own, true, type, keys);
            else
                load_square(job, index + first, d, own, false, type, keys);
        }
        keys += LANES - (dim + step - 1) / step * step * PANEL;
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

/* The part of the span that lies in the panel of tokens from `base` on. */
static Span panel_part(Span span, int64_t base)
{
    return (Span){max_of(span.begin, base), min_of(span.end, base + PANEL)};
}

INLINE void score_split(const Job *job, int64_t num_rows, Span span, enum dtype type,
                        Scratch *scratch)
{
    for (int64_t base = first_panel(span); base < span.end; base += PANEL) {
        Span part = panel_part(span, base);
        load_keys(job, scratch->index, base, part, type, scratch->panel);
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

/* The part of `span` that lies in the split from `base` on, counted from there. */
static Span split_part(Span span, int64_t base)
{
    int64_t begin = max_of(span.begin - base, 0), end = min_of(span.end - base, SPLIT);
    return (Span){begin, max_of(begin, end)};
}

INLINE void attend_split_of(const Job *job, const Piece *piece, int64_t head, int64_t split,
                            enum dtype type, Scratch *scratch, const Partial *to)
{
    int64_t base = split * SPLIT, rows = piece->num_rows;
    Span seen = {visible(job, piece, 0).begin, visible(job, piece, rows - 1).end};
    Span span = split_part(seen, base); /* what some row sees */
    seen = (Span){base + span.begin, base + span.end};
    find_tokens(job, piece->seq, head, base, seen, scratch->index);
    score_split(job, rows, span, type, scratch);
    for (int64_t row = 0; row < rows; row++)
        soften_row(job->shape, scratch->scores + row * ROW_STRIDE, span,
                   split_part(visible(job, piece, row), base), &to->max[row], &to->sum[row]);
    weigh_split(job, rows, span, type, scratch, to);
}

static void attend_split(const Job *job, const Piece *piece, int64_t head, int64_t split,
                         Scratch *scratch, const Partial *to)
{
    if (job->cache->dtype == FLOAT32)
        attend_split_of(job, piece, head, split, FLOAT32, scratch, to);
    else if (job->cache->dtype == BFLOAT16)
        attend_split_of(job, piece, head, split, BFLOAT16, scratch, to);
    else
        attend_split_of(job, piece, head, split, FLOAT16, scratch, to);
}
