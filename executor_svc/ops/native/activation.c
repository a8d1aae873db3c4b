/* The gated activations of the MLP: SwiGLU and GeGLU (Shazeer, arXiv:2002.05202), in one pass.
 *
 *   for i in size:  out[i] = act(gate_up[i]) * gate_up[size + i]
 */
#include "activation.h"

#include "vec.h"

static vec silu(vec x) { return x / (1.0f + vec_exp(-x)); }

/* The tanh approximation of Hendrycks and Gimpel (arXiv:1606.08415). */
static vec gelu_tanh(vec x)
{
    vec inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + vec_tanh(inner));
}

static void gated_activation(enum activation kind, const float *gate_up, int64_t size, float *out)
{
    for (int64_t i = 0; i < size; i += LANES) {
        vec gate = load_part(gate_up + i, size - i), up = load_part(gate_up + size + i, size - i);
        vec active = kind == SILU ? silu(gate) : gelu_tanh(gate);
        store_part(out + i, active * up, size - i);
    }
}

static void soft_cap(float *x, float cap, int64_t size)
{
    for (int64_t i = 0; i < size; i += LANES)
        store_part(x + i, cap * vec_tanh(load_part(x + i, size - i) / cap), size - i);
}

EXPORT void headrace_gated_activation(int64_t kind, const float *gate_up, int64_t rows,
                                      int64_t size, float *out)
{
    for (int64_t row = 0; row < rows; row++)
        gated_activation(kind, gate_up + 2 * row * size, size, out + row * size);
}

EXPORT void headrace_soft_cap(float *x, float cap, int64_t size) { soft_cap(x, cap, size); }
