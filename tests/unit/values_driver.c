/* Compares every operator with a naive loop in double precision, and the stored types bit by bit.
 *
 * For processors on which no Python test runs: it is cross-compiled and run under an emulator. Exits
 * with 1 and a line on stderr if a value is wrong.
 */
#define _GNU_SOURCE
#include <stdio.h>

#include "headrace.c"

static uint64_t seed = 1;

static float draw(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(seed >> 40) / (1 << 23) - 1.0f;
}

static float *draw_floats(int64_t count)
{
    float *values = malloc(count * sizeof(float));
    for (int64_t i = 0; i < count; i++)
        values[i] = draw();
    return values;
}

static void expect_near(const char *what, double actual, double expected, double tolerance)
{
    if (!(fabs(actual - expected) <= tolerance * (1e-30 + fabs(expected)))) {
        fprintf(stderr, "%s: %.9g instead of %.9g\n", what, actual, expected);
        exit(1);
    }
}

/* Sums cancel: their error is relative to what was summed up, which is of the order of 1. */
static void expect_sum(const char *what, double actual, double expected, double tolerance)
{
    expect_near(what, actual - expected + 1, 1, tolerance);
}

/* Every number that a 16-bit float can be goes to float and back. */
static void check_stored_types(void)
{
    for (uint32_t first = 0; first < 1 << 16; first += LANES) {
        uint16_t bits[LANES];
        float halves[LANES], bfloats[LANES];
        for (int i = 0; i < LANES; i++)
            bits[i] = (uint16_t)(first + i);
        store(halves, widen(bits, 0, FLOAT16));
        store(bfloats, widen(bits, 0, BFLOAT16));
        for (int i = 0; i < LANES; i++) {
            int exponent = bits[i] >> 10 & 31, fraction = bits[i] & 1023;
            double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
            uint16_t half, bfloat;
            narrow_one(&half, 0, halves[i], FLOAT16);
            narrow_one(&bfloat, 0, bfloats[i], BFLOAT16);
            if (exponent < 31) {
                expect_near("half", halves[i], bits[i] >> 15 ? -size : size, 0);
                expect_near("half and back", half, bits[i], 0);
            } else {
                expect_near("half, special", fraction ? isnan(halves[i]) != 0 : isinf(halves[i]) != 0, 1, 0);
            }
            if (bfloats[i] == bfloats[i])
                expect_near("bfloat and back", bfloat, bits[i], 0);
        }
    }
}

static void check_pairs(void)
{
    enum { COUNT = 3 * LANES + 1 };
    float values[COUNT], sums[LANES];
    uint16_t bits[COUNT + 1] __attribute__((aligned(4)));
    float *pairs = (float *)bits;
    for (int i = 0; i < COUNT; i++)
        values[i] = draw();
    round_pairs(values, COUNT, pairs);
    for (int i = 0; i <= COUNT; i++) {
        uint16_t expected = i < COUNT ? float_to_bfloat(values[i]) : 0;
        expect_near("pair", bits[i], expected, 0);
    }
    vec both = load(pairs);
    store(sums, dot_pairs(splat(0.5f), splat_pair(pairs), both));
    for (int i = 0; i < LANES; i++) {
        double sum = 0.5;
        for (int j = 0; j < 2; j++)
            sum += (double)widen_one(bits, j, BFLOAT16) * widen_one(bits, 2 * i + j, BFLOAT16);
        expect_sum("dot of pairs", sums[i], sum, 1e-6);
    }
}

static void check_lanes(void)
{
    float numbers[LANES * LANES], lanes[LANES];
    vec rows[LANES];
    for (int i = 0; i < LANES * LANES; i++)
        numbers[i] = (float)i;
    for (int i = 0; i < LANES; i++)
        rows[i] = load(numbers + i * LANES);
    transpose_square(rows);
    for (int i = 0; i < LANES; i++) {
        store(lanes, rows[i]);
        for (int j = 0; j < LANES; j++)
            expect_near("transpose", lanes[j], j * LANES + i, 0);
        expect_near("lane bits", lane_bits(load(numbers) > (float)i), (2u << (LANES - 1)) - (2u << i), 0);
    }
    expect_near("sum", sum_lanes(load(numbers)), LANES * (LANES - 1) / 2.0, 0);
    expect_near("max", max_lanes(vec_max(load(numbers), splat(2.5f))), LANES - 1, 0);
}

static void check_functions(void)
{
    float lanes[LANES];
    for (double x = -86; x < 86; x += 0.0137) {
        store(lanes, vec_exp(splat((float)x)));
        expect_near("exp", lanes[0], exp((float)x), 3e-7);
        store(lanes, vec_tanh(splat((float)(x / 8))));
        expect_near("tanh", lanes[0], tanh((float)(x / 8)), 5e-7);
    }
}

static void check_row_operators(int64_t size)
{
    enum { ROWS = 2 };
    float *x = draw_floats(ROWS * 2 * size), *weight = draw_floats(size), *out = draw_floats(ROWS * size);
    headrace_rms_norm(x, weight, 1e-3f, ROWS, size, out);
    for (int64_t row = 0; row < ROWS; row++) {
        double sum = 0;
        for (int64_t i = 0; i < size; i++)
            sum += (double)x[row * size + i] * x[row * size + i];
        for (int64_t i = 0; i < size; i++)
            expect_near("norm", out[row * size + i],
                        x[row * size + i] / sqrt(sum / size + 1e-3f) * weight[i], 1e-6);
    }
    for (int kind = SILU; kind <= GELU_TANH; kind++) {
        headrace_gated_activation(kind, x, ROWS, size, out);
        for (int64_t i = 0; i < ROWS * size; i++) {
            double gate = x[i / size * 2 * size + i % size];
            double up = x[i / size * 2 * size + size + i % size];
            double active = gate / (1 + exp(-gate));
            if (kind == GELU_TANH)
                active = gate / 2 * (1 + tanh(0.7978845608028654 * (gate + 0.044715 * pow(gate, 3))));
            expect_near("activation", out[i], active * up, 2e-6);
        }
    }
    memcpy(out, x, ROWS * size * sizeof(float));
    headrace_soft_cap(out, 0.7f, ROWS * size);
    for (int64_t i = 0; i < ROWS * size; i++)
        expect_near("soft cap", out[i], 0.7f * tanh(x[i] / (double)0.7f), 1e-6);
    free(x);
    free(weight);
    free(out);
}

static void check_rotary(int64_t half)
{
    enum { TOKENS = 3, HEADS = 2 };
    int64_t dim = 2 * half + 3, count = TOKENS * HEADS * dim;
    float *angles = draw_floats(TOKENS * 2 * half), *heads = draw_floats(count);
    float *before = malloc(count * sizeof(float));
    memcpy(before, heads, count * sizeof(float));
    headrace_rotary(angles, half, TOKENS, HEADS, dim, heads);
    for (int64_t i = 0; i < count; i++) {
        const float *cosine = angles + i / (HEADS * dim) * 2 * half, *sine = cosine + half;
        const float *head = before + i / dim * dim;
        int64_t at = i % dim, k = at % half;
        double turned = head[at];
        if (at < 2 * half)
            turned = at < half ? (double)head[k] * cosine[k] - (double)head[half + k] * sine[k]
                               : (double)head[half + k] * cosine[k] + (double)head[k] * sine[k];
        expect_sum("rotary", heads[i], turned, 1e-6);
    }
    free(angles);
    free(heads);
    free(before);
}

/* Code (k, n) of a weight, and what it stands for, by the layouts that the sources describe. */
static double expected_element(const Linear *weight, int64_t n, int64_t k)
{
    const uint8_t *codes = weight->panels;
    int64_t panel = n / PANEL, column = n % PANEL, in_size = weight->in_size, code;
    if (weight->dtype == INT4) {
        uint8_t both = codes[(panel * ((in_size + 1) / 2) + k / 2) * PANEL + column];
        code = k % 2 ? both >> 4 : both & 15;
    } else if (weight->dtype == INT8) {
        code = (int8_t)codes[(panel * in_size + k) * PANEL + column];
    } else {
        int64_t steps = (in_size + DOT - 1) / DOT;
        code = (int8_t)(codes[((panel * steps + k / DOT) * PANEL + column) * DOT + k % DOT] - WEIGHT_ZERO);
    }
    int64_t size = weight->group_size, groups = size > 0 ? (in_size + size - 1) / size : 1;
    int64_t grid = (panel * groups + (size > 0 ? k / size : 0)) * PANEL + column;
    double offset = weight->dtype == INT4 ? -8.0 * weight->scales[grid] : 0;
    if (weight->offsets != NULL)
        offset = weight->offsets[grid];
    return code * (double)weight->scales[grid] + offset;
}

/* The activation that the kernel multiplies instead of x[k]. */
static double expected_activation(const float *x, int64_t k, int64_t in_size, enum dtype type)
{
    if (type != INT8_DOT && type != INT8_DIGITS)
        return x[k];
    float limit = type == INT8_DOT ? 127 : 127 * 257, most = 0;
    for (int64_t i = 0; i < in_size; i++)
        most = fmaxf(most, fabsf(x[i]));
    return rintf(x[k] * (limit / most)) * (double)most / limit;
}

static void check_quantized(Pool *pool, int64_t rows, enum dtype type, int64_t group_size)
{
    enum { OUT = PANEL + 5, IN = 70, CODES = 2 * PANEL * (IN + 2), GRID = 2 * PANEL * IN };
    uint8_t *codes = malloc(CODES);
    for (int64_t i = 0; i < CODES; i++)
        codes[i] = (uint8_t)((draw() + 1) * 127.5f);
    float *scales = draw_floats(GRID), *offsets = draw_floats(GRID), *bias = draw_floats(2 * PANEL);
    float *x = draw_floats(rows * IN), *out = malloc(rows * OUT * sizeof(float));
    float *space = malloc(linear_workspace(rows, IN) * sizeof(float));
    for (int64_t i = 0; i < GRID; i++)
        scales[i] /= 128 * IN;
    Linear weight = {.panels = codes, .bias = bias, .out_size = OUT, .in_size = IN, .dtype = type,
                     .scales = scales, .offsets = group_size > 0 ? offsets : NULL,
                     .group_size = group_size};
    headrace_linear(pool, &weight, x, rows, out, space);
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < OUT; n++) {
            double sum = bias[n];
            for (int64_t k = 0; k < IN; k++)
                sum += expected_activation(x + m * IN, k, IN, type) *
                       expected_element(&weight, n, k);
            expect_sum("quantized", out[m * OUT + n], sum, 5e-6);
        }
    free(codes);
    free(scales);
    free(offsets);
    free(bias);
    free(x);
    free(out);
    free(space);
}

static float as_stored(float value, enum dtype type)
{
    char bytes[4];
    narrow_one(bytes, 0, value, type);
    return widen_one(bytes, 0, type);
}

/* A chunk of queries behind what the cache holds of its sequence; the write comes first. */
static void check_attention(Pool *pool, int64_t dim, int64_t context, int64_t queries,
                            int64_t window, enum dtype type)
{
    enum { HEADS = 4, KV_HEADS = 2, SIZE = 16 };
    Attention shape = {HEADS, KV_HEADS, dim, window, 0.3f, 0};
    /* With dot products of bfloat16, queries and weights may be rounded to it too. */
    double tolerance = HAS_BFLOAT_DOT && type == BFLOAT16 ? 2e-2 : 2e-5;
    int64_t blocks = (context + SIZE - 1) / SIZE, row = KV_HEADS * dim;
    LayerCache layer = {calloc((blocks + 1) * SIZE * row, 4), calloc((blocks + 1) * SIZE * row, 4)};
    Cache cache = {&layer, blocks + 1, SIZE, type};
    int32_t *table = malloc(blocks * sizeof(int32_t)), start[] = {0, queries}, length[] = {context};
    int64_t *slots = malloc(context * sizeof(int64_t));
    for (int64_t i = 0; i < blocks; i++)
        table[i] = (int32_t)(blocks - i);
    for (int64_t i = 0; i < context; i++)
        slots[i] = table[i / SIZE] * SIZE + i % SIZE;
    Batch batch = {.query_start = start, .seq_lens = length, .block_tables = table,
                   .num_tokens = queries, .num_seqs = 1, .table_stride = blocks};
    float *key = draw_floats(context * row), *value = draw_floats(context * row);
    float *query = draw_floats(queries * HEADS * dim), *out = malloc(queries * HEADS * dim * sizeof(float));
    float *space = malloc(attention_workspace(pool, &shape, &batch) * sizeof(float));
    headrace_write_kv(&cache, &shape, slots, context, key, value);
    headrace_attention(pool, &shape, &cache, &batch, query, out, space);
    for (int64_t i = 0; i < context * row; i++) {
        key[i] = as_stored(key[i], type);
        value[i] = as_stored(value[i], type);
    }
    for (int64_t q = 0; q < queries * HEADS; q++) {
        int64_t last = context - queries + q / HEADS, head = q % HEADS / (HEADS / KV_HEADS);
        int64_t first = window > 0 && last + 1 > window ? last + 1 - window : 0;
        double sum = 0, mean[MAX_HEAD_DIM] = {0};
        for (int64_t j = first; j <= last; j++) {
            double score = 0;
            for (int64_t d = 0; d < dim; d++)
                score += (double)query[q * dim + d] * key[j * row + head * dim + d];
            sum += exp(score * shape.scale);
            for (int64_t d = 0; d < dim; d++)
                mean[d] += exp(score * shape.scale) * value[j * row + head * dim + d];
        }
        for (int64_t d = 0; d < dim; d++)
            expect_sum("attention", out[q * dim + d], mean[d] / sum, tolerance);
    }
    free(layer.key);
    free(layer.value);
    free(table);
    free(slots);
    free(key);
    free(value);
    free(query);
    free(out);
    free(space);
}

int main(void)
{
    Pool *pool = pool_create(2);
    check_stored_types();
    check_pairs();
    check_lanes();
    check_functions();
    for (int64_t size = 1; size < 40; size += 6) {
        check_row_operators(size);
        check_rotary(size);
    }
    for (int64_t rows = 1; rows <= 2 * TILE_ROWS + 1; rows += 3) {
        check_quantized(pool, rows, INT8, 0);
        check_quantized(pool, rows, INT8, 16);
        check_quantized(pool, rows, INT4, 16);
        check_quantized(pool, rows, INT8_DOT, 0);
        if (FLOAT_DIGITS > 0)
            check_quantized(pool, rows, INT8_DIGITS, 0);
    }
    for (enum dtype type = FLOAT32; type <= FLOAT16; type++) {
        check_attention(pool, 20, 300, 1, 0, type);
        check_attention(pool, 64, 90, 50, 33, type);
        check_attention(pool, 128, 520, 2, 0, type);
    }
    pool_destroy(pool);
    return 0;
}
