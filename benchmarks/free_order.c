/* One row times a projection of bfloat16 in an order that may be chosen: what our kernel may not do.
 *
 *   parallel for panel, segment of the depth:          segments 1: as in linear.c
 *     for k in segment, `chains` at a time:            each chain has sums of its own: while one
 *       sums[chain] += x[k + chain] * w[k + chain]     waits for its addition, the next can start
 *     part[segment] = all chains' sums
 *   out = all segments' parts
 *
 * With one chain and one segment it is the kernel's own order, and gives the kernel's own bits.
 */
#include "headrace.c"

typedef struct {
    const Linear *weight;
    const float *x; /* pairs of bfloat16 where there is a dot product of them */
    float *parts;   /* [segments][panels * PANEL] */
    int64_t chains, segments;
} FreeProduct;

INLINE void add_step(const FreeProduct *p, const float *panel, int64_t k, vec sums[PANEL_VECS])
{
    const bool is_paired = HAS_BFLOAT_DOT;
    UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        vec w = widen(panel, k * PANEL + v * LANES, is_paired ? FLOAT32 : BFLOAT16);
        sums[v] = is_paired ? dot_pairs(sums[v], splat_pair(p->x + k), w) : sums[v] + p->x[k] * w;
    }
}

INLINE void free_panel(const FreeProduct *p, const void *panel, int64_t begin, int64_t end,
                       const int chains, float *out)
{
    vec sums[8][PANEL_VECS] = {{{0}}};
    int64_t k = begin;
    for (; k + chains <= end; k += chains)
        UNROLL for (int c = 0; c < chains; c++)
            add_step(p, panel, k + c, sums[c]);
    for (; k < end; k++)
        add_step(p, panel, k, sums[0]);
    UNROLL for (int v = 0; v < PANEL_VECS; v++) {
        for (int c = 1; c < chains; c++)
            sums[0][v] += sums[c][v];
        store(out + v * LANES, sums[0][v]);
    }
}

static void free_items(const void *arg, int64_t first, int64_t last)
{
    const FreeProduct *p = arg;
    int64_t steps = depth_steps(p->weight->in_size, BFLOAT16);
    int64_t panels = num_panels(p->weight->out_size);
    for (int64_t item = first; item < last; item++) {
        int64_t panel = item / p->segments, segment = item % p->segments;
        int64_t begin = steps * segment / p->segments, end = steps * (segment + 1) / p->segments;
        float *out = p->parts + (segment * panels + panel) * PANEL;
        const void *w = panel_of(p->weight, panel);
        if (p->chains == 1)
            free_panel(p, w, begin, end, 1, out);
        else if (p->chains == 2)
            free_panel(p, w, begin, end, 2, out);
        else
            free_panel(p, w, begin, end, 4, out);
    }
}

/* out [out_size] = weight x [in_size]; chains is 1, 2 or 4. `workspace` has in_size + 1 floats and
 * `segments` times whole panels of them. */
EXPORT void free_order_linear(Pool *pool, const Linear *weight, const float *x, int64_t chains,
                              int64_t segments, float *out, float *workspace)
{
    int64_t in_size = weight->in_size, panels = num_panels(weight->out_size);
    FreeProduct product = {weight, x, workspace + in_size + 1, chains, segments};
    if (HAS_BFLOAT_DOT) {
        round_pairs(x, in_size, workspace);
        product.x = workspace;
    }
    double cost_ns = (double)in_size * PANEL * 2 / 16 / segments; /* memory at 16 GB/s */
    pool_run(pool, panels * segments, cost_ns, free_items, &product);
    for (int64_t n = 0; n < weight->out_size; n++) {
        out[n] = product.parts[n];
        for (int64_t s = 1; s < segments; s++)
            out[n] += product.parts[s * panels * PANEL + n];
    }
}
