/* Root mean square norm of one row. */
#ifndef HEADRACE_NORM_H
#define HEADRACE_NORM_H

#include "headrace.h"

/* out [size] = x / rms(x) * weight; x and out may be the same. */
static void rms_norm(const float *x, const float *weight, float eps, int64_t size, float *out);

/* sum [size] += x [size]. */
static void add_to(float *sum, const float *x, int64_t size);

#endif
