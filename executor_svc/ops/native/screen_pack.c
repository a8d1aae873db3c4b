/* Makes the screen of a packed head, once, at load. Columns lie in lanes, as in the panels.
 *
 *   parallel for panel:
 *     for vector of columns:
 *       for k in depth:    scale = largest |w[k]| / 127
 *       for k in depth:    codes = round(w[k] / scale); sums of squares of w, codes and errors
 *     bounds[panel] = the largest of its columns
 */
#include "screen.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "pack.h"

/* No output's scale is smaller: denormals, which some instructions take for zeros, are far below
 * one unit of it. */
#define LEAST_SCALE 1e-15f

typedef struct {
    const Linear *head;
    Screen screen;
    atomic_bool *is_finite;
} ScreenPacking;

static Screen open_screen(const Linear *head, const void *memory)
{
    int64_t panels = num_panels(head->out_size);
    Screen screen = {.codes = (uint8_t *)memory};
    screen.scales = (float *)(screen.codes + panels * num_steps(head->in_size) * PANEL * DOT);
    screen.bounds = (PanelBound *)(screen.scales + panels * PANEL);
    return screen;
}

/* Weights k of LANES columns of a panel, from `column` on. */
INLINE vec panel_weights(const void *panel, const enum dtype type, int64_t k, int64_t column)
{
    if (depth_group(type) == 1)
        return widen(panel, k * PANEL + column, type);
    uvec pairs = (uvec)load((const float *)panel + k / 2 * PANEL + column);
    return (vec)(k % 2 == 0 ? pairs << 16 : pairs & 0xffff0000u);
}

/* One step of LANES columns: DOT codes of each, side by side. */
INLINE void store_step(ivec codes, uint8_t *to)
{
    int32_t lanes[LANES];
    memcpy(lanes, &codes, sizeof lanes);
    for (int i = 0; i < LANES; i++)
        memcpy(to + i * DOT, &lanes[i], DOT);
}

INLINE vec column_scales(const void *panel, const enum dtype type, int64_t in_size, int64_t column)
{
    vec most = splat(0);
    for (int64_t k = 0; k < in_size; k++)
        most = vec_max((vec)((ivec)panel_weights(panel, type, k, column) & 0x7fffffff), most);
    return vec_max(most / 127, splat(LEAST_SCALE));
}

/* Let `bound` cover LANES columns too, given sums of squares. It is no number if they are none. */
static void widen_bound(PanelBound *bound, int64_t in_size, vec scales, vec weights, vec codes,
                        vec errors)
{
    float slack = rounding_slack(in_size);
    for (int i = 0; i < LANES; i++) {
        float error = (sqrtf(errors[i]) + slack * sqrtf(weights[i])) * (1 + slack) / scales[i];
        float length = sqrtf(codes[i]) * (1 + slack);
        bound->error = error > bound->error || isnan(error) ? error : bound->error;
        bound->length = length > bound->length || isnan(length) ? length : bound->length;
    }
}

/* LANES columns of a panel, from `column` on. */
INLINE void screen_columns(const void *panel, const enum dtype type, int64_t in_size,
                           int64_t column, uint8_t *codes, float *scales, PanelBound *bound)
{
    const vec shifter = splat(0x1.8p23f); /* leaves the rounded value in the low bits */
    vec scale = column_scales(panel, type, in_size, column), factor = 1 / scale;
    vec weight_squares = splat(0), code_squares = splat(0), error_squares = splat(0);
    store(scales + column, scale);
    codes += column * DOT;
    for (int64_t step = 0; step < num_steps(in_size); step++, codes += PANEL * DOT) {
        ivec packed = {0};
        for (int64_t i = 0, k = step * DOT; i < DOT && k < in_size; i++, k++) {
            vec weight = panel_weights(panel, type, k, column), shifted = weight * factor + shifter;
            vec code = shifted - shifter, error = weight - code * scale;
            packed |= (((ivec)shifted - (ivec)shifter + WEIGHT_ZERO) & 0xff) << (8 * i);
            weight_squares += weight * weight;
            code_squares += code * code;
            error_squares += error * error;
        }
        store_step(packed, codes);
    }
    widen_bound(bound, in_size, scale, weight_squares, code_squares, error_squares);
}

INLINE void screen_panels(const ScreenPacking *p, const enum dtype type, int64_t first,
                          int64_t last)
{
    const Linear *head = p->head;
    for (int64_t panel = first; panel < last; panel++) {
        PanelBound bound = {0, 0};
        uint8_t *codes = p->screen.codes + panel * num_steps(head->in_size) * PANEL * DOT;
        for (int64_t column = 0; column < PANEL; column += LANES)
            screen_columns(panel_of(head, panel), type, head->in_size, column, codes,
                           p->screen.scales + panel * PANEL, &bound);
        p->screen.bounds[panel] = bound;
        if (!isfinite(bound.error + bound.length))
            atomic_store(p->is_finite, false);
    }
}

static void screen_any_panels(const void *arg, int64_t first, int64_t last)
{
    const ScreenPacking *p = arg;
    if (p->head->dtype == FLOAT32)
        screen_panels(p, FLOAT32, first, last);
    else if (p->head->dtype == BFLOAT16)
        screen_panels(p, BFLOAT16, first, last);
    else
        screen_panels(p, FLOAT16, first, last);
}

/* Bytes of the screen of a head [out_size, in_size]; 0: it shall have none. */
EXPORT int64_t headrace_screen_bytes(int64_t out_size, int64_t in_size)
{
    if (!HAS_SCREEN || in_size > MAX_SCREEN_DEPTH)
        return 0;
    int64_t output_bytes = num_steps(in_size) * DOT + sizeof(float);
    return num_panels(out_size) * (PANEL * output_bytes + sizeof(PanelBound));
}

/* Make the screen of a packed head of floats, which has no bias, in zeroed memory of
 * headrace_screen_bytes(). 0: it is of no use, because not all weights are finite or their squares
 * are not. */
EXPORT int64_t headrace_make_screen(Pool *pool, const Linear *head, void *memory)
{
    atomic_bool is_finite = true;
    ScreenPacking packing = {head, open_screen(head, memory), &is_finite};
    pool_run(pool, num_panels(head->out_size), (double)head->in_size * PANEL, screen_any_panels,
             &packing);
    return atomic_load(&is_finite);
}
