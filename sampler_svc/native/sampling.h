/* The C ABI of the sampling head: plain structures and pointers, mirrored by abi.py.
 *
 * Whoever changes a structure changes abi.py with it; sampling_abi_sizes() lets the loader
 * refuse a library that was built from other sources. Sizes count elements, not bytes.
 */
#ifndef HEADRACE_SAMPLING_H
#define HEADRACE_SAMPLING_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* The rows of a step, n of them, and how the token of each is chosen. */
typedef struct {
    const float *logits;       /* row i at i * stride, vocab_size of them */
    const float *temperatures; /* [n], 0: the likeliest token */
    const float *min_p;        /* [n], 0: all tokens */
    const int64_t *top_k;      /* [n], 0: all tokens */
    const double *top_p;       /* [n], 1: all tokens */
    const double *uniforms;    /* [n], in [0, 1) */
    int64_t *token_ids;        /* [n], the result */
    int64_t num_rows, stride, vocab_size;
} Choice;

/* Tokens whose log-probabilities are wanted, n of them, with k alternatives each. */
typedef struct {
    const float *logits;      /* token i's are at rows[i] * stride, vocab_size of them */
    const int64_t *rows;      /* [n] */
    const int64_t *token_ids; /* [n] */
    float *logprobs;          /* [n] */
    int32_t *ranks;           /* [n], 1: the likeliest */
    int32_t *top_ids;         /* [n, k], the likeliest first */
    float *top_logprobs;      /* [n, k] */
    int64_t num_tokens, num_top, stride, vocab_size;
} Logprobs;

#endif
