/* How the kernels of attention read the paged cache. */
#ifndef HEADRACE_ATTENTION_CONTEXT_H
#define HEADRACE_ATTENTION_CONTEXT_H

#include "attention_split.h"

/* What some row of the piece sees. */
static Span visible_to(const Job *job, const Piece *piece)
{
    return (Span){visible(job, piece, 0).begin, visible(job, piece, piece->num_rows - 1).end};
}

/* Where the head of each token of the span begins, in elements of the layer's arrays. */
static void find_span(const Job *job, int64_t seq, int64_t head, Span span, size_t *index)
{
    int64_t size = job->cache->block_size, dim = job->shape->head_dim;
    const int32_t *block = job->batch->block_tables + seq * job->batch->table_stride;
    block += span.begin / size;
    int64_t offset = span.begin % size;
    for (int64_t left = span.end - span.begin; left > 0; offset = 0) {
        size_t row = (*block++ * job->shape->num_kv_heads + head) * size + offset;
        int64_t count = min_of(size - offset, left);
        for (int64_t i = 0; i < count; i++)
            index[i] = (row + i) * dim;
        index += count;
        left -= count;
    }
}

/* The tokens that are worked on behind split number `split`: those of the next split, or of the first
 * one of the next head or piece. False if that was the last. */
static bool find_next(const Job *job, const Piece **piece, int64_t *head, int64_t split, Span *next)
{
    *next = visible_to(job, *piece);
    if ((split + 1) * SPLIT < next->end) {
        next->begin = (split + 1) * SPLIT;
    } else {
        *head = (*head + 1) % job->shape->num_kv_heads;
        *piece += *head == 0;
        if (*piece == job->pieces + job->num_pieces)
            return false;
        *next = visible_to(job, *piece);
    }
    next->end = min_of(next->end, (next->begin / SPLIT + 1) * SPLIT);
    return true;
}

/* Where the tokens of the split's part `own` begin, counted from the split's first. Neighbours in
 * their panels get that of the nearest, so that they may be read. Behind them, a PANEL at least, is
 * what will be read next, to be fetched. */
static void find_tokens(const Job *job, const Piece *piece, int64_t head, int64_t split, Span own,
                        Scratch *scratch)
{
    int64_t base = split * SPLIT, end = behind_panels(own), found = end;
    size_t *index = scratch->index;
    Span next;
    find_span(job, piece->seq, head, (Span){base + own.begin, base + own.end}, index + own.begin);
    for (int64_t i = first_panel(own); i < own.begin; i++)
        index[i] = index[own.begin];
    for (int64_t i = own.end; i < end; i++)
        index[i] = index[own.end - 1];
    if (find_next(job, &piece, &head, split, &next)) {
        find_span(job, piece->seq, head, next, index + end);
        found += next.end - next.begin;
    }
    scratch->num_next = found - end;
    for (int64_t i = found; i < end + PANEL; i++)
        index[i] = index[i - 1];
}

INLINE const void *element(const void *array, size_t index, enum dtype type)
{
    return (const char *)array + index * dtype_size(type);
}

/* Into L2: L1 has too few requests under way to keep up, and was 1.6 times slower. */
INLINE void fetch(const void *address) { __builtin_prefetch(address, 0, 2); }

/* For LANES tokens: fetch what comes next, the keys of the tokens a panel ahead and the values
 * of these. Blocks lie anywhere, which hides them from the processor's own prefetching;
 * without, this is twice as slow. */
INLINE void fetch_next(const Job *job, const size_t *index, int64_t d, enum dtype type)
{
    const void *keys = element(job->layer->key, d, type);
    const void *values = element(job->layer->value, d, type);
    UNROLL for (int i = 0; i < LANES; i++)
        fetch(element(values, index[i], type));
    UNROLL for (int i = 0; i < LANES; i++)
        fetch(element(keys, index[PANEL + i], type));
}

/* Up to 2 * LANES values of bfloat16, zeros behind them: two neighbours travel as one lane, which
 * halves the work of transposing. */
INLINE vec load_pairs(const void *array, size_t index, int64_t count)
{
    const uint16_t *from = (const uint16_t *)array + index;
    uint16_t pairs[2 * LANES] = {0};
    if (count >= 2 * LANES)
        return load((const float *)from);
    if (count > 0)
        memcpy(pairs, from, count * sizeof(uint16_t));
    return load((const float *)pairs);
}

#endif
