/* Greedy tokens by way of the head's screen: bounds for all panels, exact logits for a few.
 *
 *   upper = bounds of all groups of panels
 *   for row:
 *     best = the exact search over the group with the highest bound
 *     for any other group whose bound is not below best:  search it too
 *
 * A group that is passed over has no logit as large as one that was found, so neither the largest
 * nor an equal of it: the result is that of the search over all panels, bit for bit.
 *
 * A row with many such groups waits for the others: all that wait are searched as above, or fully
 * in tiles, whichever costs less. Rows without bounds are searched fully.
 */
#include "greedy.h"

#include <math.h>
#include <stdbool.h>

#include "linear.h"
#include "pack.h"
#include "screen.h"

enum {
    FEW_CANDIDATES = 4, /* of a row that need not wait, and */
    GROUPS_A_CANDIDATE = 16,
    SHARING_ROWS = 8, /* so many in a tile cost what one costs alone */
};

/* In the place of a token: a row without bounds, or minus the candidates of one that waits. */
#define NO_BOUNDS INT64_MIN

typedef struct {
    Screening screening;
    float soft_cap;
    int64_t most_candidates; /* of a row: else it waits */
    int64_t *tokens;
} Choice;

/* What a logit must be at least to be `capped` or more behind a soft cap, times `factor`, rounded
 * down.
 *
 * Different logits can be equal behind the cap, and vec_tanh() is off by less than 10^-6 of the
 * largest value: twice that is left for both. */
static float least_bound(float capped, float cap, float factor)
{
    double logit = capped;
    if (cap > 0) {
        double share = capped / (double)cap - 2e-6;
        logit = share > -1 ? cap * atanh(share) : -INFINITY;
    }
    double scaled = logit * factor;
    return (float)(scaled - fabs(scaled) * 0x1p-20);
}

/* The next group from `from` on whose bound is not below `least`; num_groups if there is none. */
static int64_t next_candidate(const Screening *s, int64_t row, int64_t from, float least)
{
    const float *upper = s->upper + row * s->stride;
    for (int64_t first = from / LANES * LANES; first < s->num_groups; first += LANES) {
        uint32_t lanes = lane_bits(load(upper + first) >= least);
        if (first < from)
            lanes &= ~0u << (from - first);
        if (lanes != 0) {
            int64_t group = first + __builtin_ctz(lanes);
            return group < s->num_groups ? group : s->num_groups;
        }
    }
    return s->num_groups;
}

static int64_t highest_group(const Screening *s, int64_t row)
{
    vec highest = splat(-INFINITY);
    for (int64_t group = 0; group < s->stride; group += LANES)
        highest = vec_max(highest, load(s->upper + row * s->stride + group));
    return next_candidate(s, row, 0, max_lanes(highest));
}

static Best search_group(const Choice *choice, int64_t row, int64_t group)
{
    const Screening *s = &choice->screening;
    const Linear *head = s->head;
    bool is_paired = depth_group(head->dtype) == 2;
    const float *x = is_paired ? s->pairs + row * num_pairs(head) : s->values + row * head->in_size;
    int64_t size = group_panels(head), panels = num_panels(head->out_size);
    int64_t end = (group + 1) * size < panels ? (group + 1) * size : panels;
    return search_panels(head, choice->soft_cap, x, group * size, end);
}

static int64_t count_candidates(const Screening *s, int64_t row, float least)
{
    int64_t count = 0;
    for (int64_t group = 0; group < s->stride; group += LANES)
        count += __builtin_popcount(lane_bits(load(s->upper + row * s->stride + group) >= least));
    return count;
}

/* The row's token, or what stands in its place. */
static int64_t choose_among_candidates(const Choice *choice, int64_t row)
{
    const Screening *s = &choice->screening;
    float factor = s->factors[row];
    if (factor == 0)
        return NO_BOUNDS;
    int64_t first = highest_group(s, row);
    Best best = search_group(choice, row, first);
    float least = least_bound(best.logit, choice->soft_cap, factor);
    int64_t count = count_candidates(s, row, least);
    if (count > choice->most_candidates)
        return -count;
    for (int64_t group = 0;; group++) {
        group = next_candidate(s, row, group, least);
        if (group == s->num_groups)
            return best.token;
        Best other = group != first ? search_group(choice, row, group) : best;
        if (is_better(other, best)) {
            best = other;
            least = least_bound(best.logit, choice->soft_cap, factor);
        }
    }
}

static void choose_rows(const void *arg, int64_t first, int64_t last)
{
    const Choice *choice = arg;
    for (int64_t row = first; row < last; row++)
        if (choice->tokens[row] < 0)
            choice->tokens[row] = choose_among_candidates(choice, row);
}

/* Do the candidates of all rows that wait, each row on one thread, take less time than a full
 * search of these rows on all of them? */
static bool are_candidates_fewer(const Pool *pool, const Choice *choice)
{
    const Screening *s = &choice->screening;
    double rows = 0, candidates = 0, threads = pool_threads(pool);
    for (int64_t row = 0; row < s->rows; row++)
        if (choice->tokens[row] < 0 && choice->tokens[row] != NO_BOUNDS) {
            rows++;
            candidates -= choice->tokens[row];
        }
    double full = rows > SHARING_ROWS ? s->num_groups * rows / SHARING_ROWS : s->num_groups;
    return rows > 0 && candidates / (rows < threads ? rows : threads) < full / threads;
}

/* Where the rest begins in the workspace: whole pairs, as an int64_t wants it. */
static size_t behind_values(int64_t rows, int64_t in_size)
{
    return (rows * in_size + 1) / 2 * 2;
}

/* Search all panels for the rows that have no token yet, brought together at the front of `values`.
 * That the head's kernel rounds them again changes nothing. */
static void choose_rest(Pool *pool, const Choice *choice)
{
    const Screening *s = &choice->screening;
    int64_t size = s->head->in_size, count = 0;
    for (int64_t row = 0; row < s->rows; row++)
        if (choice->tokens[row] < 0)
            memmove(s->values + count++ * size, s->values + row * size, size * sizeof(float));
    int64_t *tokens = (int64_t *)(s->values + behind_values(s->rows, size));
    float *workspace = (float *)(tokens + s->rows);
    choose_fully(pool, s->head, choice->soft_cap, s->values, count, tokens, workspace);
    for (int64_t row = 0; row < s->rows; row++)
        if (choice->tokens[row] < 0)
            choice->tokens[row] = *tokens++;
}

static size_t greedy_workspace(const Linear *head, int64_t rows)
{
    enum { TOKEN_FLOATS = sizeof(int64_t) / sizeof(float) };
    size_t screening = screening_workspace(head, rows);
    size_t rest = behind_values(rows, head->in_size) + rows * TOKEN_FLOATS +
                  full_workspace(head, rows);
    return screening > rest ? screening : rest;
}

static void choose_tokens(Pool *pool, const Linear *head, const void *screen, float soft_cap,
                          const float *x, int64_t rows, int64_t *tokens, float *workspace)
{
    if (screen == NULL || rows == 0) {
        choose_fully(pool, head, soft_cap, x, rows, tokens, workspace);
        return;
    }
    Choice choice = {screen_rows(pool, head, screen, x, rows, workspace), soft_cap, 0, tokens};
    choice.most_candidates = FEW_CANDIDATES + choice.screening.num_groups / GROUPS_A_CANDIDATE;
    double group_ns = (double)group_panels(head) * head->in_size * PANEL / 8;
    for (int64_t row = 0; row < rows; row++)
        tokens[row] = NO_BOUNDS;
    pool_run(pool, rows, 2 * group_ns, choose_rows, &choice);
    if (are_candidates_fewer(pool, &choice)) {
        choice.most_candidates = choice.screening.num_groups;
        pool_run(pool, rows, choice.screening.num_groups / GROUPS_A_CANDIDATE * group_ns,
                 choose_rows, &choice);
    }
    choose_rest(pool, &choice);
}

EXPORT int64_t headrace_greedy_workspace(const Linear *head, int64_t rows)
{
    return greedy_workspace(head, rows);
}

EXPORT void headrace_choose_tokens(Pool *pool, const Linear *head, const void *screen,
                                   float soft_cap, const float *x, int64_t rows, int64_t *tokens,
                                   float *workspace)
{
    choose_tokens(pool, head, screen, soft_cap, x, rows, tokens, workspace);
}
