/* Upper bounds of logits, from products of bytes that are exact in int32.
 *
 *   parallel for span of groups that stays in L2:
 *     for tile of rows, for group in span:
 *       for panel in group:
 *         sums = bound + codes of the panel * codes of the tile     [rows of the tile, PANEL]
 *         largest = max(largest, sums * scales)                     lane by lane
 *       upper[row][group] = the largest of its lanes
 *
 * Let w be a row of the head with codes c and scale s, and x a row of activations, as the head's
 * own kernel multiplies them, with codes d of x * f. Then, in units of s / f,
 *
 *   w.x f / s = c.d + (w / s - c).(x f) + c.(x f - d)
 *            <= c.d + |w / s - c| |x f| + |c| |x f - d|                         (Cauchy-Schwarz)
 *
 * The kernel's logit is w.x but for rounding: n products added in any order are off by at most
 * gamma |w| |x| with gamma = n u / (1 - n u), u the error of one operation (Higham, "Accuracy and
 * Stability of Numerical Algorithms", 2002, section 3.1): 2^-24, or 2^-23 where sums are rounded to
 * odd (BFDOT). rounding_slack() is twice that. What is left of it covers roundings here, all of
 * them a few u of |w| |x|: of the lengths, of sums to floats, of their product with s.
 *
 * So the bound is c.d + PanelBound.error * lengths[row] + PanelBound.length * errors[row], and one
 * unit for denormals that the kernel's instructions take for zeros: within the limits for scales
 * and activations these are less than 10^-5 units. No number here overflows within them.
 */
#include "screen.h"

#include "linear.h"
#include "pack.h"

/* A row has bounds if its largest activation is between. */
#define LEAST_ACTIVATION 1e-10f
#define MOST_ACTIVATION 1e12f

enum {
    GROUP_BYTES = 1 << 14,       /* of the head: what one candidate makes candidates.c read */
    SCREEN_SPAN_BYTES = 1 << 17, /* of the screen */
};

static int64_t group_panels(const Linear *head)
{
    int64_t panel_bytes = panel_elements(head->in_size, head->dtype) * dtype_size(head->dtype);
    return panel_bytes < GROUP_BYTES ? GROUP_BYTES / panel_bytes : 1;
}

static int64_t count_groups(const Linear *head)
{
    return (num_panels(head->out_size) + group_panels(head) - 1) / group_panels(head);
}

static int64_t span_groups(const Linear *head)
{
    int64_t group_bytes = group_panels(head) * num_steps(head->in_size) * PANEL * DOT;
    return group_bytes < SCREEN_SPAN_BYTES ? SCREEN_SPAN_BYTES / group_bytes : 1;
}

static int64_t num_pairs(const Linear *head) { return (head->in_size + 1) / 2; }

static int64_t upper_stride(const Linear *head)
{
    return (count_groups(head) + LANES - 1) / LANES * LANES;
}

static size_t screening_workspace(const Linear *head, int64_t rows)
{
    enum { COLUMNS = 4 }; /* factors, lengths, errors, starts */
    size_t codes = (num_steps(head->in_size) * DOT * sizeof(dot_code) + 3) / sizeof(float);
    return rows * (head->in_size + num_pairs(head) + upper_stride(head) + COLUMNS + codes);
}

static Screening lay_out_screening(const Linear *head, const void *screen, const float *x,
                                   int64_t rows, float *workspace)
{
    Screening s = {.head = head, .screen = open_screen(head, screen), .x = x, .rows = rows,
                   .num_groups = count_groups(head), .stride = upper_stride(head)};
    s.values = workspace;
    s.pairs = s.values + rows * head->in_size;
    s.upper = s.pairs + rows * num_pairs(head);
    s.factors = s.upper + rows * s.stride;
    s.lengths = s.factors + rows;
    s.errors = s.lengths + rows;
    s.starts = (int32_t *)(s.errors + rows);
    s.codes = (dot_code *)(s.starts + rows);
    return s;
}

/* A row's activations as the head's own kernel takes them. */
static const float *take_values(const Screening *s, int64_t row)
{
    int64_t size = s->head->in_size;
    float *values = s->values + row * size, *pairs = s->pairs + row * num_pairs(s->head);
    memcpy(values, s->x + row * size, size * sizeof(float));
    if (depth_group(s->head->dtype) == 2) {
        round_pairs(values, size, pairs);
        for (int64_t k = 0; k < size; k += LANES)
            store_part(values + k, widen_part(pairs, k, size - k, BFLOAT16), size - k);
    }
    return values;
}

/* How long a row times `factor` is, and how far from it its codes are. */
static void measure_row(const float *x, int64_t size, float factor, float *length, float *error)
{
    const vec shifter = splat(0x1.8p23f);
    vec squares = splat(0), error_squares = splat(0);
    for (int64_t k = 0; k < size; k += LANES) {
        vec scaled = load_part(x + k, size - k) * factor;
        vec rest = scaled - ((scaled + shifter) - shifter);
        squares += scaled * scaled;
        error_squares += rest * rest;
    }
    float slack = rounding_slack(size);
    *length = sqrtf(sum_lanes(squares)) * (1 + slack);
    *error = sqrtf(sum_lanes(error_squares)) * (1 + slack);
}

/* Codes of a row, DOT of them in every `stride`-th place, and what is to be known of it. */
static void prepare_row(const Screening *s, int64_t row, dot_code *codes, int64_t stride)
{
    int64_t size = s->head->in_size;
    const float *values = take_values(s, row);
    float most = largest_size(values, size);
    s->factors[row] = s->lengths[row] = s->errors[row] = 0;
    s->starts[row] = 0;
    for (int64_t group = s->num_groups; group < s->stride; group++)
        s->upper[row * s->stride + group] = -INFINITY;
    if (!(most >= LEAST_ACTIVATION && most <= MOST_ACTIVATION))
        return; /* whatever its codes are: nobody asks for its bounds */
    float factor = 127 / most;
    s->factors[row] = factor;
    measure_row(values, size, factor, &s->lengths[row], &s->errors[row]);
    quantize_row(values, size, factor, 1, codes, stride, &s->starts[row]);
    s->starts[row] *= -WEIGHT_ZERO;
}

static void prepare_tiles(const void *arg, int64_t first, int64_t last)
{
    const Screening *s = arg;
    for (int64_t tile = first; tile < last; tile++) {
        int64_t begin = tile_begin(s->rows, tile), rows = tile_begin(s->rows, tile + 1) - begin;
        dot_code *codes = s->codes + begin * num_steps(s->head->in_size) * DOT;
        for (int64_t m = 0; m < rows; m++)
            prepare_row(s, begin + m, codes + m * DOT, rows * DOT);
    }
}

/* A panel's part in the largest bounds of `rows` rows from `begin` on, lane by lane. */
INLINE void screen_panel(const int rows, const Screening *s, int64_t begin, int64_t panel,
                         vec *largest)
{
    const Screen *screen = &s->screen;
    const float *lengths = s->lengths + begin, *errors = s->errors + begin;
    const int32_t *starts = s->starts + begin;
    int64_t steps = num_steps(s->head->in_size);
    PanelBound bound = screen->bounds[panel];
    int32_t start[TILE_ROWS];
    for (int m = 0; m < rows; m++) /* 2: one to round up, one for denormals */
        start[m] = starts[m] + 2 + (int32_t)(bound.error * lengths[m] + bound.length * errors[m]);
    ivec sums[TILE_ROWS][PANEL_VECS];
    dot_panel(rows, screen->codes + panel * steps * PANEL * DOT, s->codes + begin * steps * DOT,
              steps, start, sums);
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < PANEL_VECS; v++) {
            vec scale = load(screen->scales + panel * PANEL + v * LANES);
            largest[m] = vec_max(largest[m], __builtin_convertvector(sums[m][v], vec) * scale);
        }
}

/* `rows` rows from `begin` on over the groups [first, last). */
INLINE void screen_tile(const int rows, const Screening *s, int64_t begin, int64_t first,
                        int64_t last)
{
    int64_t size = group_panels(s->head), panels = num_panels(s->head->out_size);
    for (int64_t group = first; group < last; group++) {
        int64_t end = (group + 1) * size < panels ? (group + 1) * size : panels;
        vec largest[TILE_ROWS];
        UNROLL for (int m = 0; m < rows; m++)
            largest[m] = splat(-INFINITY);
        for (int64_t panel = group * size; panel < end; panel++)
            screen_panel(rows, s, begin, panel, largest);
        UNROLL for (int m = 0; m < rows; m++)
            s->upper[(begin + m) * s->stride + group] = max_lanes(largest[m]);
    }
}

static void screen_any_tile(int64_t rows, const Screening *s, int64_t begin, int64_t first,
                            int64_t last)
{
#define CASE(R) \
    case R: \
        if (R <= TILE_ROWS) \
            screen_tile(R, s, begin, first, last); \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

static void screen_spans(const void *arg, int64_t first, int64_t last)
{
    const Screening *s = arg;
    int64_t size = span_groups(s->head), groups = s->num_groups;
    for (int64_t span = first; span < last; span++) {
        int64_t end = (span + 1) * size < groups ? (span + 1) * size : groups;
        for (int64_t tile = 0; tile < num_tiles(s->rows); tile++) {
            int64_t begin = tile_begin(s->rows, tile), rows = tile_begin(s->rows, tile + 1) - begin;
            screen_any_tile(rows, s, begin, span * size, end);
        }
    }
}

/* 8 GB/s for its bytes, or 64 multiply-adds a nanosecond, whichever is more. */
static double span_cost_ns(const Screening *s)
{
    double elements = (double)span_groups(s->head) * group_panels(s->head) * s->head->in_size *
                      PANEL;
    return s->rows > 8 ? elements * s->rows / 64 : elements / 8;
}

static Screening screen_rows(Pool *pool, const Linear *head, const void *screen, const float *x,
                             int64_t rows, float *workspace)
{
    Screening s = lay_out_screening(head, screen, x, rows, workspace);
    pool_run(pool, num_tiles(rows), (double)head->in_size * TILE_ROWS / 2, prepare_tiles, &s);
    pool_run(pool, (s.num_groups + span_groups(head) - 1) / span_groups(head), span_cost_ns(&s),
             screen_spans, &s);
    return s;
}
