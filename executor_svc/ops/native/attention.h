/* Paged attention over a ragged batch. */
#ifndef HEADRACE_ATTENTION_H
#define HEADRACE_ATTENTION_H

#include <stddef.h>

#include "headrace.h"
#include "pool.h"

/* Floats of workspace that paged_attention() may need for this batch. */
static size_t attention_workspace(const Pool *pool, const Attention *attention, const Batch *batch);

/* out [T, num_heads * head_dim]: query over each sequence's cached context. Token t's query heads
 * are at query + t * query_stride. Reads no slot that the token cannot see. */
static void paged_attention(Pool *pool, const Attention *attention, const Cache *cache,
                            const LayerCache *layer, const Batch *batch, const float *query,
                            int64_t query_stride, float *out, float *workspace);

#endif
