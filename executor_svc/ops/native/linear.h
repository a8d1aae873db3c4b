/* Linear projections over packed weights. */
#ifndef HEADRACE_LINEAR_H
#define HEADRACE_LINEAR_H

#include <stddef.h>

#include "headrace.h"
#include "pool.h"

/* Elements that the packed form of a weight [out, in] takes. */
static size_t packed_elements(int64_t out_size, int64_t in_size);

/* Floats of workspace that linear() needs for `rows` rows of `in_size`. */
static size_t linear_workspace(int64_t rows, int64_t in_size);

/* out [rows, out_size] = x [rows, in_size] @ weight.T + bias. */
static void linear(Pool *pool, const Linear *weight, const float *x, int64_t rows, float *out,
                   float *workspace);

#endif
