/* Drives every kernel on heap blocks of exactly the right size, for the sanitizers to watch.
 *
 * Values are checked where a naive loop is short; the Python tests check the rest. Exits with 1 and
 * a line on stderr if a value is wrong.
 */
#include <stdio.h>

#include "headrace.c"

static uint64_t seed = 1;

static float draw(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(seed >> 40) / (1 << 24) - 0.5f;
}

static float *draw_floats(int64_t count)
{
    float *values = malloc(count * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        values[i] = draw();
    return values;
}

/* A stored array of random values of any type. */
static void *draw_array(int64_t count, enum dtype type)
{
    void *values = malloc(count * dtype_size(type));
    for (int64_t i = 0; i < count; i++)
        narrow_one(values, i, draw(), type);
    return values;
}

static void expect_close(const char *what, double actual, double expected)
{
    if (fabs(actual - expected) > 1e-4 * (1 + fabs(expected))) {
        fprintf(stderr, "%s: %g instead of %g\n", what, actual, expected);
        exit(1);
    }
}

static Linear make_linear(int64_t out_size, int64_t in_size, enum dtype type, void **plain)
{
    int64_t size = packed_elements(out_size, in_size);
    void *rows = draw_array(out_size * in_size, type), *panels = calloc(size, dtype_size(type));
    headrace_pack_weight(rows, out_size, in_size, type, panels);
    float *bias = calloc(size / in_size, sizeof(float));
    for (int64_t i = 0; i < out_size; i++)
        bias[i] = draw();
    if (plain != NULL)
        *plain = rows;
    else
        free(rows);
    return (Linear){panels, bias, out_size, in_size, type};
}

static void free_linear(Linear weight)
{
    free((void *)weight.panels);
    free((void *)weight.bias);
}

static void drive_linear(Pool *pool, int64_t rows, int64_t out_size, int64_t in_size,
                         enum dtype type)
{
    void *plain;
    Linear weight = make_linear(out_size, in_size, type, &plain);
    float *x = draw_floats(rows * in_size), *out = malloc(rows * out_size * sizeof(float));
    float *space = malloc(linear_workspace(rows, in_size) * sizeof(float));
    headrace_linear(pool, &weight, x, rows, out, space);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < out_size; n++) {
            double sum = weight.bias[n];
            for (int64_t k = 0; k < in_size; k++)
                sum += (double)x[m * in_size + k] * widen_one(plain, n * in_size + k, type);
            expect_close("linear", out[m * out_size + n], sum);
        }
    free_linear(weight);
    free(plain);
    free(x);
    free(out);
    free(space);
}

/* One sequence of `context` tokens in blocks in reverse order; its last `queries` attend. */
static void drive_attention(Pool *pool, int64_t context, int64_t queries, Attention shape,
                            int64_t block_size, enum dtype type)
{
    int64_t blocks = (context + block_size - 1) / block_size, dim = shape.head_dim;
    int64_t slots = (blocks + 1) * shape.num_kv_heads * block_size;
    LayerCache layer = {draw_array(slots * dim, type), draw_array(slots * dim, type)};
    Cache cache = {&layer, blocks + 1, block_size, type};
    int32_t *table = malloc(blocks * sizeof(int32_t)), start[] = {0, queries}, len[] = {context};
    for (int64_t i = 0; i < blocks; i++)
        table[i] = blocks - i;
    Batch batch = {.query_start = start, .seq_lens = len, .block_tables = table,
                   .num_tokens = queries, .num_seqs = 1, .table_stride = blocks};
    int64_t width = shape.num_heads * dim, group = shape.num_heads / shape.num_kv_heads;
    float *query = draw_floats(queries * width), *out = malloc(queries * width * sizeof(float));
    float *space = malloc(attention_workspace(pool, &shape, &batch) * sizeof(float));
    headrace_attention(pool, &shape, &cache, &batch, query, out, space);

    int64_t head = shape.num_heads - 1, first = shape.window > 0 ? context - shape.window : 0;
    const float *last = query + (queries - 1) * width + head * dim;
    double sum = 0, mean = 0; /* of the last query's last head, element 0 */
    for (int64_t j = first > 0 ? first : 0; j < context; j++) {
        int64_t row = (table[j / block_size] * shape.num_kv_heads + head / group) * block_size;
        int64_t at = (row + j % block_size) * dim;
        double score = 0;
        for (int64_t d = 0; d < dim; d++)
            score += (double)last[d] * widen_one(layer.key, at + d, type);
        sum += exp(score * shape.scale);
        mean += exp(score * shape.scale) * widen_one(layer.value, at, type);
    }
    expect_close("attention", out[(queries - 1) * width + head * dim], mean / sum);
    free(layer.key);
    free(layer.value);
    free(table);
    free(query);
    free(out);
    free(space);
}

/* A whole step of a small model: a chunk and a decode row, every pointer of exact size. */
static void drive_decoder(int64_t num_threads, enum dtype type)
{
    enum { HIDDEN = 37, INNER = 45, DIM = 18, HEADS = 3, VOCAB = 71, TOKENS = 42 };
    float *norm = draw_floats(HIDDEN), *head_norm = draw_floats(DIM), *angles = draw_floats(DIM / 2);
    Layer layer = {
        .qkv = make_linear((HEADS + 2) * DIM, HIDDEN, type, NULL),
        .output = make_linear(HIDDEN, HEADS * DIM, type, NULL),
        .gate_up = make_linear(2 * INNER, HIDDEN, type, NULL),
        .down = make_linear(HIDDEN, INNER, type, NULL),
        .attention_norm = norm, .query_norm = head_norm, .key_norm = head_norm,
        .behind_attention_norm = norm, .mlp_norm = norm, .behind_mlp_norm = norm,
        .attention = {HEADS, 1, DIM, 20, 0.3f, 4.0f},
    };
    Rope rope = {angles, DIM / 2, 1, 0};
    Decoder decoder = {&layer, &rope, make_linear(VOCAB, HIDDEN, type, NULL), norm, NULL, 1, 1,
                       HIDDEN, INNER, GELU_TANH, 1e-6f, 2.0f, 9.0f, 0};
    LayerCache pages = {draw_array(5 * 16 * DIM, type), draw_array(5 * 16 * DIM, type)};
    Cache cache = {&pages, 5, 16, type};
    int64_t ids[TOKENS], positions[TOKENS], slots[TOKENS], wanted[] = {0, TOKENS - 1, 5};
    for (int64_t i = 0; i < TOKENS; i++) {
        ids[i] = i % VOCAB;
        positions[i] = i == 0 ? 3 : i - 1;
        slots[i] = i == 0 ? 16 + 3 : 32 + i - 1;
    }
    int32_t start[] = {0, 1, TOKENS}, lens[] = {4, TOKENS - 1}, tables[] = {1, 0, 0, 2, 3, 4};
    float *logits = malloc(3 * VOCAB * sizeof(float));
    Batch batch = {ids, positions, slots, start, lens, tables, wanted, logits, TOKENS, 2, 3, 3};
    Engine *engine = headrace_engine_create(num_threads);
    for (int round = 0; round < 3; round++)
        if (headrace_decoder_step(engine, &decoder, &cache, &batch) != STATUS_OK)
            exit(1);
    ids[0] = VOCAB;
    if (headrace_decoder_step(engine, &decoder, &cache, &batch) != STATUS_BAD_INDEX)
        exit(1);
    headrace_engine_destroy(engine);
    free_linear(layer.qkv);
    free_linear(layer.output);
    free_linear(layer.gate_up);
    free_linear(layer.down);
    free_linear(decoder.head);
    free(pages.key);
    free(pages.value);
    free(norm);
    free(head_norm);
    free(angles);
    free(logits);
}

static void count(const void *arg, int64_t first, int64_t last)
{
    int *visits = *(int *const *)arg;
    for (int64_t i = first; i < last; i++)
        visits[i]++;
}

/* Many jobs of many sizes one right behind the other: each index is visited once a job. */
static void drive_pool(int num_threads)
{
    enum { MOST = 400, JOBS = 3000 };
    int visits[MOST] = {0}, *pointer = visits;
    int64_t expected[MOST] = {0};
    Pool *pool = pool_create(num_threads);
    for (int job = 0; job < JOBS; job++) {
        int64_t size = job * 7 % MOST;
        pool_run(pool, size, job % 3 ? 5000 : 100000, count, &pointer);
        for (int64_t i = 0; i < size; i++)
            if (visits[i] != ++expected[i]) {
                fprintf(stderr, "job %d visited %d %d times\n", job, (int)i, visits[i]);
                exit(1);
            }
    }
    pool_destroy(pool);
}

int main(void)
{
    for (int threads = 1; threads <= 4; threads += 3) {
        Pool *pool = pool_create(threads);
        for (enum dtype type = FLOAT32; type <= FLOAT16; type++) {
            for (int64_t rows = 1; rows <= 13; rows++)
                drive_linear(pool, rows, 2 * PANEL + 3, 19, type);
            drive_linear(pool, 4 * TILE_ROWS + 5, PANEL + 1, 261, type);
            drive_attention(pool, 601, 1, (Attention){6, 2, 20, 0, 0.2f, 0}, 16, type);
            drive_attention(pool, 300, 1, (Attention){2, 2, 64, 33, 0.1f, 0}, 3, type);
            drive_attention(pool, 290, 75, (Attention){4, 1, 256, 0, 0.1f, 0}, 16, type);
            drive_attention(pool, 70, 70, (Attention){1, 1, 2, 9, 1.0f, 0}, 32, type);
            drive_decoder(threads, type);
        }
        pool_destroy(pool);
        drive_pool(threads);
    }
    return 0;
}
