/* From logits to probabilities as integers, 2^40 being the likeliest token's.
 *
 * Integer sums are exact and so do not depend on the order of summation. A mass is kept as a float,
 * which holds it exactly: below 2^24 every integer, above as many bits as exp() gave.
 */
#include "vec.h"

enum { MASS_BITS = 40 };

/* The largest logit; -INFINITY where none is a number. */
static float largest_logit(const float *logits, int64_t count)
{
    const vec least = splat(-INFINITY);
    vec a = least, b = least, c = least, d = least; /* four chains: a maximum takes four cycles */
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        a = vec_max(load(logits + i), a);
        b = vec_max(load(logits + i + LANES), b);
        c = vec_max(load(logits + i + 2 * LANES), c);
        d = vec_max(load(logits + i + 3 * LANES), d);
    }
    float largest = max_lanes(vec_max(vec_max(a, b), vec_max(c, d)));
    for (; i < count; i++)
        largest = logits[i] > largest ? logits[i] : largest;
    return largest;
}

/* Round(2^(t + MASS_BITS)) for t <= 0, and 0 where t is not a number. A polynomial of degree 5 for
 * 2^f, |f| <= 1/2, relative error below 1.7e-7, fitted by minimax with p(0) = 1: the largest logit
 * has exactly 2^MASS_BITS. */
INLINE vec exp2_mass(vec t)
{
    const vec shifter = splat(0x1.8p23f + MASS_BITS), smallest_odd = splat(0x1p23f);
    t = vec_max(t, splat(-MASS_BITS - 2.0f)); /* rounds to no mass */
    vec shifted = t + shifter; /* its low bits are the rounded t plus MASS_BITS */
    vec f = t - (shifted - shifter);
    vec y = splat(0x1.5bba14p-10f);
    y = y * f + 0x1.3cea88p-7f;
    y = y * f + 0x1.c6b752p-5f;
    y = y * f + 0x1.ebf9bcp-3f;
    y = y * f + 0x1.62e42ap-1f;
    y = y * f + 1.0f;
    vec mass = (vec)((uvec)y + ((uvec)shifted << 23));
    /* A float of 2^23 or more is an integer; adding itself to it and taking it away is exact. */
    vec size = vec_max(mass, smallest_odd);
    return (mass + size) - size;
}

/* Where a logit is infinite the largest share all there is: equal masses. */
static void fill_equal_masses(const float *logits, int64_t count, float largest, float *masses)
{
    for (int64_t i = 0; i < count; i++)
        masses[i] = logits[i] == largest ? 0x1p40f : 0;
}

/* masses[i] = 2^40 exp((logits[i] - largest) / temperature), 0 below min_p of the likeliest. */
static void fill_masses(const float *logits, int64_t count, float temperature, float min_p,
                        float *masses)
{
    float largest = largest_logit(logits, count);
    if (isinf(largest)) {
        fill_equal_masses(logits, count, largest, masses);
        return;
    }
    const float scale = 1.44269504f / temperature;
    const vec smallest = splat(min_p * 0x1p40f);
    for (int64_t i = 0; i < count; i += LANES) {
        vec mass = exp2_mass((load_part(logits + i, count - i) - largest) * scale);
        store_part(masses + i, (vec)((ivec)mass & (mass >= smallest)), count - i);
    }
}

/* The sum of at most MASS_BLOCK masses, exactly. Each is split at 2^20: a lane's sum of upper parts
 * is then a multiple of 2^20 that fits a float's 24 bits, and so does that of the lower parts. */
enum { BLOCK_VECS = 16, MASS_BLOCK = BLOCK_VECS * LANES };

static int64_t sum_masses(const float *masses, int64_t count)
{
    const vec splitter = splat(0x1.8p43f); /* added to a mass, its last bit is worth 2^20 */
    vec upper = {0}, lower = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vec mass = load_part(masses + i, count - i);
        vec rounded = (mass + splitter) - splitter;
        upper += rounded;
        lower += mass - rounded;
    }
    float uppers[LANES], lowers[LANES];
    store(uppers, upper * 0x1p-20f);
    store(lowers, lower);
    int32_t upper_sum = 0, lower_sum = 0;
    for (int l = 0; l < LANES; l++) {
        upper_sum += (int32_t)uppers[l];
        lower_sum += (int32_t)lowers[l];
    }
    return (int64_t)upper_sum * (1 << 20) + lower_sum;
}
