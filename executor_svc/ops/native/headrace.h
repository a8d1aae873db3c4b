/* The C ABI: plain structures and pointers, mirrored by abi.py. No Python, no torch.
 *
 * Whoever changes a structure changes abi.py with it; headrace_abi_sizes() lets the loader refuse
 * a library that was built from other sources. Sizes count elements, not bytes. Dtypes are those of
 * vec.h. All arrays are dense and row-major unless said otherwise.
 */
#ifndef HEADRACE_H
#define HEADRACE_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum status { STATUS_OK = 0, STATUS_NO_MEMORY = 1, STATUS_BAD_INDEX = 2 };
enum activation { SILU = 0, GELU_TANH = 1 };
enum { MAX_HEAD_DIM = 256 };

/* A projection; `panels` as headrace_pack_weight leaves them, or as linear_quantized.c and
 * linear_dot.c say. What follows `dtype` is for quantized weights only. */
typedef struct {
    const void *panels;
    const float *bias; /* padded with zeros to whole panels, or NULL */
    int64_t out_size, in_size;
    int64_t dtype;
    const float *scales, *offsets; /* [panels][groups][PANEL]; offsets may be NULL */
    const int32_t *order;          /* [in_size]: column k works on x[order[k]]; NULL: on x[k] */
    int64_t group_size;            /* columns that share a scale; 0: all */
} Linear;

/* One layer's paged cache: both [num_blocks, num_kv_heads, block_size, head_dim]. */
typedef struct {
    void *key, *value;
} LayerCache;

typedef struct {
    const LayerCache *layers;
    int64_t num_blocks, block_size, dtype;
} Cache;

/* One step: n sequences, T tokens. Indices are checked, block tables are not. */
typedef struct {
    const int64_t *token_ids;    /* [T] */
    const int64_t *positions;    /* [T] */
    const int64_t *slots;        /* [T]: block * block_size + offset */
    const int32_t *query_start;  /* [n + 1] */
    const int32_t *seq_lens;     /* [n], this step's tokens included */
    const int32_t *block_tables; /* row i at i * table_stride */
    const int64_t *logits_indices; /* [m] */
    float *logits;               /* [m, vocab_size], or NULL: the likeliest tokens instead */
    int64_t num_tokens, num_seqs, num_logits, table_stride;
    int64_t *chosen;             /* [m], or NULL if there are logits */
} Batch;

typedef struct {
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t window; /* a token sees this many, itself included; 0: all before it */
    float scale, soft_cap; /* soft_cap 0: none */
} Attention;

/* Angles are position * frequencies[i]; cos and sin are multiplied by `scale`. */
typedef struct {
    const float *frequencies; /* [half] */
    int64_t half;
    float scale, padding;
} Rope;

/* One decoder layer; norms that the family does not have are NULL. */
typedef struct {
    Linear qkv, output, gate_up, down;
    const float *attention_norm, *query_norm, *key_norm, *behind_attention_norm;
    const float *mlp_norm, *behind_mlp_norm;
    Attention attention;
    int64_t rope; /* index into Decoder.ropes */
} Layer;

typedef struct {
    const Layer *layers;
    const Rope *ropes;
    Linear head;
    const float *final_norm;
    const void *embedding; /* [vocab, hidden] of embedding_dtype; NULL: tied, rows of the head */
    int64_t embedding_dtype, num_layers, num_ropes, hidden_size, inner_size, activation;
    float rms_norm_eps, embedding_scale, logits_soft_cap, padding;
    const void *screen; /* of the head, as headrace_make_screen() leaves it, or NULL */
} Decoder;

#endif
