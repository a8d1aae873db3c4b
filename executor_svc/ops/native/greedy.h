/* The likeliest token of each row, without its logits ever lying in memory. */
#ifndef HEADRACE_GREEDY_H
#define HEADRACE_GREEDY_H

#include <stdbool.h>
#include <stddef.h>

#include "headrace.h"
#include "pool.h"

/* Floats of workspace that choose_tokens() needs. */
static size_t greedy_workspace(const Linear *head, int64_t rows);

/* tokens [rows] = argmax over x [rows, in_size] @ head.T, soft-capped if `soft_cap` > 0: of equals
 * the first, and a NaN wins, as in numpy.argmax over the logits that linear() would give. `screen`
 * is the head's, as headrace_make_screen() leaves it, or NULL; the tokens are the same. */
static void choose_tokens(Pool *pool, const Linear *head, const void *screen, float soft_cap,
                          const float *x, int64_t rows, int64_t *tokens, float *workspace);

/* --- its parts: the search over panels, and over all of them without a screen ----------------- */

typedef struct {
    float logit; /* behind the soft cap */
    int32_t token;
} Best;

static bool is_better(Best a, Best b);

/* The best of the panels [first, last) for a row of activations in the form that the head wants. */
static Best search_panels(const Linear *head, float soft_cap, const float *x, int64_t first,
                          int64_t last);

static size_t full_workspace(const Linear *head, int64_t rows);
static void choose_fully(Pool *pool, const Linear *head, float soft_cap, const float *x,
                         int64_t rows, int64_t *tokens, float *workspace);

#endif
