/* A rough copy of the head, in bytes, that says which of its panels can hold a row's largest logit.
 *
 * It gives upper bounds of logits, a byte read for each weight; the exact logits of the few panels
 * whose bounds are high enough then decide (candidates.c). screen.c proves that they are bounds.
 */
#ifndef HEADRACE_SCREEN_H
#define HEADRACE_SCREEN_H

#include <stddef.h>

#include "dot.h"
#include "headrace.h"
#include "pool.h"

/* Products of bytes have to be quicker than those that they save: with vpmaddwd they take two
 * thirds of the time, with the dot instructions half; without either, three times as long. */
enum { HAS_SCREEN = DOT > 1 };

/* Deeper heads have no screen: sums and bounds stay below 2^31. */
enum { MAX_SCREEN_DEPTH = 1 << 16 };

/* What a panel's outputs need at most, in units of their scales: how far a weight row's codes are
 * from it, the exact kernel's rounding included, and how long they are. */
typedef struct {
    float error, length;
} PanelBound;

/* The parts of a screen, which lie one behind another. */
typedef struct {
    uint8_t *codes;     /* [panels][steps][PANEL][DOT], as in linear_dot.c */
    float *scales;      /* [panels][PANEL] */
    PanelBound *bounds; /* [panels] */
} Screen;

static Screen open_screen(const Linear *head, const void *memory);

/* Twice what rounding does to a sum of `depth` products, relative to the norms' product. */
static inline float rounding_slack(int64_t depth) { return (depth + 16) * 0x1p-22f; }

/* Rows of activations and what the screen says of them, all in a workspace. */
typedef struct {
    const Linear *head;
    Screen screen;
    const float *x;
    int64_t rows, num_groups;
    int64_t stride;          /* of `upper`: the groups in whole vectors */
    float *values;           /* [rows][in_size]: the activations as the head multiplies them */
    float *pairs;            /* [rows][in_size / 2]: the same for the dot instruction */
    float *upper;            /* [rows][stride]: no logit in the group is larger, times factor */
    float *factors;          /* [rows]: codes are activations times this; 0: a row without bounds */
    float *lengths, *errors; /* [rows]: of activations times factor, and of their codes' rounding */
    int32_t *starts;         /* [rows]: what the offset of stored weights adds up to, negative */
    dot_code *codes;         /* tiles [steps][rows of the tile][DOT] */
} Screening;

/* Neighbouring panels that share a bound, and how many such groups a head has. */
static int64_t group_panels(const Linear *head);
static int64_t count_groups(const Linear *head);

/* Floats that hold a row's pairs. */
static int64_t num_pairs(const Linear *head);

/* Floats of workspace that screen_rows() needs. */
static size_t screening_workspace(const Linear *head, int64_t rows);

/* Bound the logits of x [rows, in_size] from above, group by group. The result, whose `values` are
 * what the workspace begins with, lives as long as the workspace. */
static Screening screen_rows(Pool *pool, const Linear *head, const void *screen, const float *x,
                             int64_t rows, float *workspace);

#endif
