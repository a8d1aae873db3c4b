/* Drives every kernel on heap blocks of exactly the right size, for the sanitizers to watch.
 *
 * Values are checked where a naive loop is short; the Python tests check the rest. Exits with 1 and
 * a line on stderr if a value is wrong.
 */
#define _GNU_SOURCE
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

static void expect_within(const char *what, double actual, double expected, double tolerance)
{
    if (fabs(actual - expected) > tolerance * (1 + fabs(expected))) {
        fprintf(stderr, "%s: %g instead of %g\n", what, actual, expected);
        exit(1);
    }
}

static void expect_close(const char *what, double actual, double expected)
{
    expect_within(what, actual, expected, 1e-4);
}

static Linear make_linear(int64_t out_size, int64_t in_size, enum dtype type, void **plain)
{
    int64_t size = packed_elements(out_size, in_size, type);
    void *rows = draw_array(out_size * in_size, type), *panels = calloc(size, dtype_size(type));
    headrace_pack_weight(rows, out_size, in_size, type, panels);
    float *bias = calloc(num_panels(out_size) * PANEL, sizeof(float));
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

/* An activation as a product with a weight of this type takes it. */
static double activation(float x, enum dtype type)
{
    uint16_t rounded = float_to_bfloat(x);
    return depth_group(type) == 2 ? widen_one(&rounded, 0, BFLOAT16) : x;
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
                sum += activation(x[m * in_size + k], type) *
                       widen_one(plain, n * in_size + k, type);
            expect_close("linear", out[m * out_size + n], sum);
        }
    free_linear(weight);
    free(plain);
    free(x);
    free(out);
    free(space);
}

static void *make_screen(Pool *pool, const Linear *head)
{
    void *screen = calloc(headrace_screen_bytes(head->out_size, head->in_size), 1);
    if (!headrace_make_screen(pool, head, screen))
        exit(1);
    return screen;
}

static void expect_argmax(const float *out, int64_t rows, int64_t out_size, const int64_t *tokens)
{
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < out_size; n++)
            if (out[m * out_size + n] > out[m * out_size + tokens[m]]) {
                fprintf(stderr, "row %d: %d is no argmax\n", (int)m, (int)tokens[m]);
                exit(1);
            }
}

/* The argmax in the head is that of the head's logits, with a screen and without. */
static void drive_greedy(Pool *pool, int64_t rows, int64_t out_size, int64_t in_size,
                         enum dtype type)
{
    Linear head = make_linear(out_size, in_size, type, NULL);
    float *x = draw_floats(rows * in_size), *out = malloc(rows * out_size * sizeof(float));
    float *space = malloc(greedy_workspace(&head, rows) * sizeof(float));
    int64_t *tokens = malloc(rows * sizeof(int64_t));
    headrace_linear(pool, &head, x, rows, out, space);
    choose_tokens(pool, &head, NULL, 0, x, rows, tokens, space);
    expect_argmax(out, rows, out_size, tokens);
    if (HAS_SCREEN) {
        void *screen = make_screen(pool, &head);
        memset((void *)head.bias, 0, num_panels(out_size) * PANEL * sizeof(float));
        x[0] = NAN; /* the first row is searched fully */
        headrace_linear(pool, &head, x, rows, out, space);
        choose_tokens(pool, &head, screen, 3.0f, x, rows, tokens, space);
        headrace_soft_cap(out, 3.0f, rows * out_size);
        expect_argmax(out, rows, out_size, tokens);
        free(screen);
    }
    free_linear(head);
    free(x);
    free(out);
    free(space);
    free(tokens);
}

/* A quantized projection of random codes in blocks of exact size; `group_size` 0: one scale. */
static Linear make_quantized(int64_t out_size, int64_t in_size, enum dtype type,
                             int64_t group_size, int has_offsets)
{
    int64_t panels = num_panels(out_size), steps = type == INT4 ? (in_size + 1) / 2 : in_size;
    if (type == INT8_DOT || type == INT8_DIGITS)
        steps = num_steps(in_size) * DOT;
    int64_t groups = group_size > 0 ? (in_size + group_size - 1) / group_size : 1;
    uint8_t *codes = malloc(panels * steps * PANEL);
    for (int64_t i = 0; i < panels * steps * PANEL; i++)
        codes[i] = (uint8_t)((draw() + 0.5f) * 255);
    Linear weight = {.panels = codes, .bias = draw_floats(panels * PANEL), .out_size = out_size,
                     .in_size = in_size, .dtype = type, .group_size = group_size,
                     .scales = draw_floats(panels * groups * PANEL)};
    if (has_offsets) { /* a checkpoint with zero points, and with columns in another order */
        int32_t *order = malloc(in_size * sizeof(int32_t));
        for (int64_t k = 0; k < in_size; k++)
            order[k] = in_size - 1 - k;
        weight.offsets = draw_floats(panels * groups * PANEL);
        weight.order = order;
    }
    return weight;
}

static void free_quantized(Linear weight)
{
    free_linear(weight);
    free((void *)weight.scales);
    free((void *)weight.offsets);
    free((void *)weight.order);
}

/* Each row alone gives the bits that it gives among all; the values are the Python tests'. */
static void drive_quantized(Pool *pool, int64_t rows, int64_t in_size, enum dtype type,
                            int64_t group_size, int has_offsets)
{
    enum { OUT = 2 * PANEL + 3 };
    Linear weight = make_quantized(OUT, in_size, type, group_size, has_offsets);
    float *x = draw_floats(rows * in_size), *out = malloc(rows * OUT * sizeof(float));
    float *space = malloc(linear_workspace(rows, in_size) * sizeof(float)), alone[OUT];
    headrace_linear(pool, &weight, x, rows, out, space);
    for (int64_t m = 0; m < rows; m++) {
        headrace_linear(pool, &weight, x + m * in_size, 1, alone, space);
        if (memcmp(alone, out + m * OUT, sizeof alone) != 0) {
            fprintf(stderr, "quantized %d: row %d of %d\n", type, (int)m, (int)rows);
            exit(1);
        }
    }
    free_quantized(weight);
    free(x);
    free(out);
    free(space);
}

/* Quantizing on the way: what the codes mean is within half a step of what was there. */
static void drive_quantize(Pool *pool, int64_t out_size, int64_t in_size, enum dtype type)
{
    void *plain = draw_array(out_size * in_size, type);
    int64_t panels = num_panels(out_size);
    uint8_t *codes = calloc(panels * in_size, PANEL);
    uint8_t *dots = calloc(panels * num_steps(in_size), PANEL * DOT);
    float *scales = calloc(panels * PANEL, sizeof(float)), *row = malloc(in_size * sizeof(float));
    headrace_quantize_weight(pool, plain, out_size, in_size, type, INT8_DOT, dots, scales);
    headrace_quantize_weight(pool, plain, out_size, in_size, type, INT8, codes, scales);
    Linear weights[] = {
        {.panels = codes, .out_size = out_size, .in_size = in_size, .dtype = INT8,
         .scales = scales},
        {.panels = dots, .out_size = out_size, .in_size = in_size, .dtype = INT8_DIGITS,
         .scales = scales},
    };
    for (int64_t i = 0; i < 2 * out_size; i++) {
        int64_t n = i / 2;
        quantized_row(&weights[i % 2], n, row);
        for (int64_t k = 0; k < in_size; k++)
            if (fabsf(row[k] - widen_one(plain, n * in_size + k, type)) > scales[n] * 0.501f) {
                fprintf(stderr, "quantize: row %d\n", (int)n);
                exit(1);
            }
    }
    free(plain);
    free(codes);
    free(dots);
    free(scales);
    free(row);
}

static void drive_all_quantized(Pool *pool)
{
    for (int64_t rows = 1; rows <= 13; rows += rows < 9 ? 1 : 4) {
        drive_quantized(pool, rows, 37, INT8, 0, 0);
        drive_quantized(pool, rows, 37, INT8, 8, 1);
        drive_quantized(pool, rows, 37, INT4, 8, 0);
        drive_quantized(pool, rows, 38, INT4, 1000, 1);
        drive_quantized(pool, rows, 37, INT8_DOT, 0, 0);
        if (FLOAT_DIGITS > 0)
            drive_quantized(pool, rows, 37, INT8_DIGITS, 0, 0);
    }
    drive_quantized(pool, 4 * TILE_ROWS + 5, 261, INT4, 32, 1);
    drive_quantized(pool, 4 * TILE_ROWS + 5, 261, INT8, 0, 0);
    for (enum dtype type = FLOAT32; type <= FLOAT16; type++)
        drive_quantize(pool, PANEL + 3, 35, type);
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
            score += activation(last[d], type) * widen_one(layer.key, at + d, type);
        sum += exp(score * shape.scale);
        mean += exp(score * shape.scale) * widen_one(layer.value, at, type);
    }
    double tolerance = takes_pairs(&cache) ? 0x1p-8 : 1e-4; /* weights are rounded, too */
    expect_within("attention", out[(queries - 1) * width + head * dim], mean / sum, tolerance);
    free(layer.key);
    free(layer.value);
    free(table);
    free(query);
    free(out);
    free(space);
}

static double largest_of(const float *values, int64_t count)
{
    double largest = values[0];
    for (int64_t i = 1; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    return largest;
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
    Decoder decoder = {&layer, &rope, make_linear(VOCAB, HIDDEN, type, NULL), norm, NULL, type, 1, 1,
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
    int64_t *chosen = malloc(3 * sizeof(int64_t));
    batch.logits = NULL;
    batch.chosen = chosen;
    if (headrace_decoder_step(engine, &decoder, &cache, &batch) != STATUS_OK)
        exit(1);
    for (int64_t i = 0; i < 3; i++)
        expect_close("chosen", logits[i * VOCAB + chosen[i]], largest_of(logits + i * VOCAB, VOCAB));
    free(chosen);
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

int main(void)
{
    for (int threads = 1; threads <= 4; threads += 3) {
        Pool *pool = pool_create(threads);
        for (enum dtype type = FLOAT32; type <= FLOAT16; type++) {
            for (int64_t rows = 1; rows <= 13; rows++)
                drive_linear(pool, rows, 2 * PANEL + 3, 19, type);
            drive_linear(pool, 4 * TILE_ROWS + 5, PANEL + 1, 261, type);
            drive_greedy(pool, 1, PANEL - 3, 7, type);
            drive_greedy(pool, 22 * TILE_ROWS + 1, 70 * PANEL + 5, 9, type);
            drive_attention(pool, 601, 1, (Attention){6, 2, 20, 0, 0.2f, 0}, 16, type);
            drive_attention(pool, 300, 1, (Attention){2, 2, 64, 33, 0.1f, 0}, 3, type);
            drive_attention(pool, 275, 1, (Attention){8, 2, 2 * PANEL, 0, 0.1f, 0}, 16, type);
            drive_attention(pool, 290, 75, (Attention){4, 1, 256, 0, 0.1f, 0}, 16, type);
            drive_attention(pool, 70, 70, (Attention){1, 1, 2, 9, 1.0f, 0}, 32, type);
            drive_decoder(threads, type);
        }
        drive_all_quantized(pool);
        pool_destroy(pool);
    }
    return 0;
}
