/* Rotary position embedding, and the way of keys and values into the paged cache. */
#ifndef HEADRACE_ROTARY_H
#define HEADRACE_ROTARY_H

#include "headrace.h"

/* cos_sin [2 * half]: the cosines and then the sines of one position. */
static void rotary_angles(const Rope *rope, int64_t position, float *cos_sin);

/* Rotate one head in place: element i of the first half together with i of the second. */
static void rotate(float *head, const float *cos_sin, int64_t half);

/* Write one token's key and value, both [num_kv_heads, head_dim], into its slot. */
static void write_kv(const Cache *cache, const LayerCache *layer, const Attention *attention,
                     int64_t slot, const float *key, const float *value);

#endif
