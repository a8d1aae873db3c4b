/* A whole decoder step as one call: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3.
 *
 *   hidden = embedding[token] * scale
 *   for layer:
 *     normed = norm(hidden)                       qkv = normed @ qkv
 *     query, key: norm, rotary                    key, value -> paged cache
 *     in the last layer: go on with the wanted tokens alone
 *     x = attention @ output                      (norm x)  hidden += x
 *     normed = norm(hidden)                       gate_up = normed @ gate_up
 *     x = activation(gate_up) @ down              (norm x)  hidden += x
 *   logits = norm(hidden) @ head                or only the likeliest token of each
 *
 * Each line is one parallel loop over tokens, panels or attention items. Activations are float32
 * whatever the weights are. Nothing here depends on which tokens share a step.
 */
#include <stdlib.h>

#include "activation.h"
#include "attention.h"
#include "greedy.h"
#include "linear.h"
#include "norm.h"
#include "pack.h"
#include "rotary.h"
#include "vec.h"

/* Rough cost of a pass over a row of activations, per element. */
static const double ELEMENT_NS = 0.2, NARROW_NS = 1.0, ANGLE_NS = 30.0;

/* The rows of one step; all but `hidden` are scratch between two loops. */
typedef struct {
    float *hidden, *normed; /* [T, hidden_size] */
    float *wide;            /* [T, qkv or gate_up size] */
    float *narrow;          /* [T, attention or inner or hidden size] */
    float *angles;          /* [num_ropes][T, 2 * half], rope by rope */
    float *scratch;         /* of linear() and paged_attention() */
} Rows;

typedef struct {
    const Decoder *decoder;
    const Cache *cache;
    const Batch *batch;
    const Layer *layer;
    const LayerCache *layer_cache;
    Rows rows;
    int64_t num_rows; /* all tokens; behind the last attention only those whose logits are wanted */
    const float *angles;
    /* What join() adds, under which norm, and the norm of what follows. */
    const float *behind_norm, *next_norm;
} Step;

/* A step's runner: threads and a workspace that grows to the largest step seen. */
typedef struct {
    Pool *pool;
    float *workspace;
    size_t capacity;
} Engine;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static void embed(const void *arg, int64_t first, int64_t last)
{
    const Step *step = arg;
    const Decoder *decoder = step->decoder;
    int64_t size = decoder->hidden_size;
    for (int64_t token = first; token < last; token++) {
        float *hidden = step->rows.hidden + token * size;
        int64_t id = step->batch->token_ids[token];
        if (decoder->embedding == NULL)
            packed_row(&decoder->head, id, hidden);
        else
            for (int64_t i = 0; i < size; i++)
                hidden[i] = widen_one(decoder->embedding, id * size + i, decoder->embedding_dtype);
        for (int64_t i = 0; i < size; i++)
            hidden[i] *= decoder->embedding_scale;
        rms_norm(hidden, decoder->layers[0].attention_norm, decoder->rms_norm_eps, size,
                 step->rows.normed + token * size);
    }
}

/* The angles of tokens [first, last), for each rope that some layer uses. */
static void compute_angles(const void *arg, int64_t first, int64_t last)
{
    const Step *step = arg;
    float *angles = step->rows.angles;
    for (int64_t rope = 0; rope < step->decoder->num_ropes; rope++) {
        const Rope *own = &step->decoder->ropes[rope];
        for (int64_t token = first; token < last; token++)
            rotary_angles(own, step->batch->positions[token], angles + token * 2 * own->half);
        angles += step->batch->num_tokens * 2 * own->half;
    }
}

static const float *angles_of(const Step *step)
{
    const float *angles = step->rows.angles;
    for (int64_t rope = 0; rope < step->layer->rope; rope++)
        angles += step->batch->num_tokens * 2 * step->decoder->ropes[rope].half;
    return angles;
}

/* Norm and rotate the query and key heads of tokens [first, last), store keys and values. */
static void place_heads(const void *arg, int64_t first, int64_t last)
{
    const Step *step = arg;
    const Layer *layer = step->layer;
    const Attention *shape = &layer->attention;
    int64_t dim = shape->head_dim, half = step->decoder->ropes[layer->rope].half;
    for (int64_t token = first; token < last; token++) {
        float *heads = step->rows.wide + token * layer->qkv.out_size;
        for (int64_t i = 0; i < shape->num_heads + shape->num_kv_heads; i++) {
            const float *norm = i < shape->num_heads ? layer->query_norm : layer->key_norm;
            if (norm != NULL)
                rms_norm(heads + i * dim, norm, step->decoder->rms_norm_eps, dim, heads + i * dim);
            rotate(heads + i * dim, step->angles + token * 2 * half, half);
        }
        float *key = heads + shape->num_heads * dim;
        write_kv(step->cache, step->layer_cache, shape, step->batch->slots[token], key,
                 key + shape->num_kv_heads * dim);
    }
}

static void activate(const void *arg, int64_t first, int64_t last)
{
    const Step *step = arg;
    int64_t size = step->decoder->inner_size;
    for (int64_t token = first; token < last; token++)
        gated_activation(step->decoder->activation, step->rows.wide + token * 2 * size, size,
                         step->rows.narrow + token * size);
}

/* Add a sublayer's result, which lies in rows.normed, to the residual; norm the sum. */
static void join(const void *arg, int64_t first, int64_t last)
{
    const Step *step = arg;
    int64_t size = step->decoder->hidden_size;
    float eps = step->decoder->rms_norm_eps;
    for (int64_t token = first; token < last; token++) {
        float *hidden = step->rows.hidden + token * size, *x = step->rows.normed + token * size;
        if (step->behind_norm != NULL)
            rms_norm(x, step->behind_norm, eps, size, x);
        add_to(hidden, x, size);
        rms_norm(hidden, step->next_norm, eps, size, x);
    }
}

static void cap_logits(const void *arg, int64_t first, int64_t last)
{
    const Step *step = arg;
    int64_t size = step->decoder->head.out_size;
    soft_cap(step->batch->logits + first * size, step->decoder->logits_soft_cap,
             (last - first) * size);
}

/* Whether the tokens whose logits are wanted can move to the front one after the other. */
static int wants_ascending(const Batch *batch)
{
    for (int64_t i = 1; i < batch->num_logits; i++)
        if (batch->logits_indices[i] <= batch->logits_indices[i - 1])
            return 0;
    return 1;
}

static void keep_wanted(const Batch *batch, float *rows, int64_t size)
{
    for (int64_t i = 0; i < batch->num_logits; i++)
        if (batch->logits_indices[i] != i)
            memcpy(rows + i * size, rows + batch->logits_indices[i] * size, size * sizeof(float));
}

/* Behind the last attention nobody reads the other tokens: of a prompt all but its end. */
static void drop_unwanted(Step *step)
{
    if (step->batch->num_logits == step->num_rows || !wants_ascending(step->batch))
        return;
    keep_wanted(step->batch, step->rows.hidden, step->decoder->hidden_size);
    keep_wanted(step->batch, step->rows.narrow, step->layer->output.in_size);
    step->num_rows = step->batch->num_logits;
}

static void attend(Pool *pool, Step *step)
{
    const Layer *layer = step->layer;
    const Attention *shape = &layer->attention;
    int64_t tokens = step->num_rows;
    step->angles = angles_of(step);
    linear(pool, &layer->qkv, step->rows.normed, tokens, step->rows.wide, step->rows.scratch);
    double cost_ns = layer->qkv.out_size * NARROW_NS;
    pool_run(pool, tokens, cost_ns, place_heads, step);
    paged_attention(pool, shape, step->cache, step->layer_cache, step->batch, step->rows.wide,
                    layer->qkv.out_size, step->rows.narrow, step->rows.scratch);
    if (layer == &step->decoder->layers[step->decoder->num_layers - 1])
        drop_unwanted(step);
    linear(pool, &layer->output, step->rows.narrow, step->num_rows, step->rows.normed,
           step->rows.scratch);
}

static void feed_forward(Pool *pool, Step *step)
{
    const Layer *layer = step->layer;
    int64_t tokens = step->num_rows;
    linear(pool, &layer->gate_up, step->rows.normed, tokens, step->rows.wide, step->rows.scratch);
    pool_run(pool, tokens, step->decoder->inner_size * 4 * ELEMENT_NS, activate, step);
    linear(pool, &layer->down, step->rows.narrow, tokens, step->rows.normed, step->rows.scratch);
}

static void run_layer(Pool *pool, Step *step, int64_t index)
{
    const Decoder *decoder = step->decoder;
    const Layer *layer = step->layer = &decoder->layers[index];
    double join_ns = decoder->hidden_size * 2 * ELEMENT_NS;
    step->layer_cache = &step->cache->layers[index];
    attend(pool, step);
    step->behind_norm = layer->behind_attention_norm;
    step->next_norm = layer->mlp_norm;
    pool_run(pool, step->num_rows, join_ns, join, step);
    feed_forward(pool, step);
    step->behind_norm = layer->behind_mlp_norm;
    step->next_norm = index + 1 < decoder->num_layers ? layer[1].attention_norm
                                                      : decoder->final_norm;
    pool_run(pool, step->num_rows, join_ns, join, step);
}

/* Logits of the wanted tokens, or their argmax. */
static void finish(Pool *pool, const Step *step)
{
    const Batch *batch = step->batch;
    const Linear *head = &step->decoder->head;
    int64_t size = head->in_size;
    float *wanted = step->rows.narrow;
    int is_dropped = step->num_rows < batch->num_tokens;
    for (int64_t i = 0; i < batch->num_logits; i++)
        memcpy(wanted + i * size,
               step->rows.normed + (is_dropped ? i : batch->logits_indices[i]) * size,
               size * sizeof(float));
    if (batch->logits == NULL) {
        choose_tokens(pool, head, step->decoder->screen, step->decoder->logits_soft_cap, wanted,
                      batch->num_logits, batch->chosen, step->rows.scratch);
        return;
    }
    linear(pool, head, wanted, batch->num_logits, batch->logits, step->rows.scratch);
    if (step->decoder->logits_soft_cap > 0)
        pool_run(pool, batch->num_logits, head->out_size * 4 * ELEMENT_NS, cap_logits, step);
}

/* Floats that each part of Rows takes, by layer sizes at their largest. */
typedef struct {
    size_t hidden, wide, narrow, angles, scratch;
} Sizes;

static Sizes measure(const Engine *engine, const Decoder *decoder, const Batch *batch)
{
    size_t tokens = batch->num_tokens, wide = 0, narrow = decoder->hidden_size, angles = 0;
    size_t scratch = greedy_workspace(&decoder->head, batch->num_logits);
    for (int64_t i = 0; i < decoder->num_layers; i++) {
        const Layer *layer = &decoder->layers[i];
        wide = larger(wide, larger(layer->qkv.out_size, layer->gate_up.out_size));
        narrow = larger(narrow, larger(layer->output.in_size, layer->down.in_size));
        scratch = larger(scratch, attention_workspace(engine->pool, &layer->attention, batch));
    }
    scratch = larger(scratch, linear_workspace(tokens, narrow));
    for (int64_t rope = 0; rope < decoder->num_ropes; rope++)
        angles += 2 * decoder->ropes[rope].half;
    size_t most = larger(tokens, batch->num_logits); /* logits of one token may be wanted twice */
    return (Sizes){tokens * decoder->hidden_size, tokens * wide, most * narrow, tokens * angles,
                   scratch};
}

/* Lay the rows out in the engine's workspace, growing it if need be. */
static enum status lay_out(Engine *engine, Sizes sizes, Rows *rows)
{
    enum { ALIGNMENT = 64, FLOATS = ALIGNMENT / sizeof(float) };
    size_t parts[] = {sizes.hidden, sizes.hidden, sizes.wide, sizes.narrow, sizes.angles,
                      sizes.scratch};
    float **places[] = {&rows->hidden, &rows->normed, &rows->wide, &rows->narrow, &rows->angles,
                        &rows->scratch};
    size_t num_parts = sizeof parts / sizeof *parts, total = 0;
    for (size_t i = 0; i < num_parts; i++)
        total += parts[i] = (parts[i] + FLOATS - 1) / FLOATS * FLOATS;
    if (total > engine->capacity) {
        free(engine->workspace);
        engine->workspace = aligned_alloc(ALIGNMENT, total * sizeof(float));
        engine->capacity = engine->workspace != NULL ? total : 0;
        if (engine->workspace == NULL)
            return STATUS_NO_MEMORY;
    }
    float *at = engine->workspace;
    for (size_t i = 0; i < num_parts; i++, at += parts[i - 1])
        *places[i] = at;
    return STATUS_OK;
}

static int are_within(const int64_t *values, int64_t count, int64_t limit)
{
    for (int64_t i = 0; i < count; i++)
        if (values[i] < 0 || values[i] >= limit)
            return 0;
    return 1;
}

/* Whatever a wrong index would read or write is someone else's. */
static enum status check(const Decoder *decoder, const Cache *cache, const Batch *batch)
{
    int64_t tokens = batch->num_tokens;
    int is_good = are_within(batch->token_ids, tokens, decoder->head.out_size) &&
                  are_within(batch->slots, tokens, cache->num_blocks * cache->block_size) &&
                  are_within(batch->logits_indices, batch->num_logits, tokens) &&
                  batch->query_start[0] == 0 && batch->query_start[batch->num_seqs] == tokens;
    return is_good ? STATUS_OK : STATUS_BAD_INDEX;
}

EXPORT Engine *headrace_engine_create(int64_t num_threads)
{
    Engine *engine = calloc(1, sizeof(Engine));
    if (engine != NULL && (engine->pool = pool_create((int)num_threads)) == NULL) {
        free(engine);
        return NULL;
    }
    return engine;
}

EXPORT void headrace_engine_destroy(Engine *engine)
{
    pool_destroy(engine->pool);
    free(engine->workspace);
    free(engine);
}

/* The engine's threads, for the kernels that are exported one by one. */
EXPORT Pool *headrace_engine_pool(Engine *engine) { return engine->pool; }

/* Run one step: write keys and values of all tokens, logits of those wanted. One call at a time. */
EXPORT int64_t headrace_decoder_step(Engine *engine, const Decoder *decoder, const Cache *cache,
                                     const Batch *batch)
{
    Step step = {.decoder = decoder, .cache = cache, .batch = batch, .num_rows = batch->num_tokens};
    enum status status = check(decoder, cache, batch);
    if (status == STATUS_OK)
        status = lay_out(engine, measure(engine, decoder, batch), &step.rows);
    if (status != STATUS_OK)
        return status;
    Pool *pool = engine->pool;
    pool_run(pool, batch->num_tokens, decoder->hidden_size * 4 * ELEMENT_NS, embed, &step);
    int64_t angles = decoder->num_ropes > 0 ? decoder->ropes[0].half : 1;
    pool_run(pool, batch->num_tokens, angles * ANGLE_NS, compute_angles, &step);
    for (int64_t i = 0; i < decoder->num_layers; i++)
        run_layer(pool, &step, i);
    finish(pool, &step);
    return STATUS_OK;
}
