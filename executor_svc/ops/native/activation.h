/* Gated activations and the soft cap. */
#ifndef HEADRACE_ACTIVATION_H
#define HEADRACE_ACTIVATION_H

#include "headrace.h"

/* out [size] = act(gate) * up, where gate_up holds gate [size] and up [size]; out may be gate_up. */
static void gated_activation(enum activation kind, const float *gate_up, int64_t size, float *out);

/* x [size] = cap * tanh(x / cap), Gemma 2 (arXiv:2408.00118, section 2). */
static void soft_cap(float *x, float cap, int64_t size);

#endif
