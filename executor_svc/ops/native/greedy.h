/* The likeliest token of each row, without its logits ever lying in memory. */
#ifndef HEADRACE_GREEDY_H
#define HEADRACE_GREEDY_H

#include <stddef.h>

#include "headrace.h"
#include "pool.h"

/* Floats of workspace that choose_tokens() needs. */
static size_t greedy_workspace(const Linear *head, int64_t rows);

/* tokens [rows] = argmax over x [rows, in_size] @ head.T, soft-capped if `soft_cap` > 0: of equals
 * the first, and a NaN wins, as in numpy.argmax over the logits that linear() would give. */
static void choose_tokens(Pool *pool, const Linear *head, float soft_cap, const float *x,
                          int64_t rows, int64_t *tokens, float *workspace);

#endif
