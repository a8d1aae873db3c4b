/* Ranges of chunks that threads take from at both ends without a lock.
 *
 * A range is one 64-bit word: generation of the job, next chunk, end. Whoever takes compares and
 * swaps the whole word: if that succeeds the job was the current one and stays it, because no job
 * ends before its chunks are done. The generation keeps the words of two jobs apart.
 */
#ifndef HEADRACE_RANGES_H
#define HEADRACE_RANGES_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    COUNT_BITS = 20,
    MAX_CHUNKS = (1 << COUNT_BITS) - 1,
    NUM_GENERATIONS = 1 << (64 - 2 * COUNT_BITS),
};

typedef struct {
    uint64_t generation;
    int64_t next, end;
} Range;

static Range unpack_range(uint64_t word)
{
    return (Range){word >> (2 * COUNT_BITS), (word >> COUNT_BITS) & MAX_CHUNKS, word & MAX_CHUNKS};
}

static uint64_t pack_range(Range range)
{
    return range.generation << (2 * COUNT_BITS) | (uint64_t)range.next << COUNT_BITS |
           (uint64_t)range.end;
}

/* The first chunk of one's own range. False if it is empty. */
static bool take_first(_Atomic uint64_t *own, int64_t *chunk)
{
    uint64_t word = atomic_load(own);
    for (;;) {
        Range range = unpack_range(word);
        if (range.next >= range.end)
            return false;
        *chunk = range.next++;
        if (atomic_compare_exchange_weak(own, &word, pack_range(range)))
            return true;
    }
}

/* The rear half of another's range becomes one's own, which was empty and of `generation`. False if
 * there is nothing to take.
 *
 * Only of the same job: while the next one is being published, one's own range could still come
 * and would be overwritten. */
static bool take_rear(_Atomic uint64_t *from, uint64_t generation, _Atomic uint64_t *own)
{
    uint64_t word = atomic_load(from);
    for (;;) {
        Range front = unpack_range(word), rear = front;
        if (front.next >= front.end || front.generation != generation)
            return false;
        front.end = rear.next = front.next + (front.end - front.next) / 2;
        if (atomic_compare_exchange_weak(from, &word, pack_range(front))) {
            atomic_store(own, pack_range(rear));
            return true;
        }
    }
}

#endif
