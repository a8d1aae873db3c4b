/* Threads that share a step's work in chunks that each of them takes when it is free. */
#ifndef HEADRACE_POOL_H
#define HEADRACE_POOL_H

#include <stdint.h>

typedef struct Pool Pool;
/* Works on the indices [first, last). */
typedef void (*RangeTask)(const void *arg, int64_t first, int64_t last);

/* `num_threads` counts the caller. NULL if memory or threads cannot be had. */
Pool *pool_create(int num_threads);
void pool_destroy(Pool *pool);

/* Threads that work, the caller included. */
int pool_threads(const Pool *pool);

/* Run `task` over [0, count), in chunks that take roughly CHUNK_NS each by the caller's estimate
 * `cost_ns` of one index; work of one chunk runs right here and wakes nobody. Returns when all of
 * it is done. What a chunk computes must not depend on where chunks begin. */
void pool_run(Pool *pool, int64_t count, double cost_ns, RangeTask task, const void *arg);

#endif
