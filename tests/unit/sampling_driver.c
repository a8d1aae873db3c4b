/* Drives the sampling head on heap blocks of exactly the right size, for the sanitizers to watch.
 *
 * Every token is checked for being one that may be drawn; the Python tests check which. Exits with
 * 1 and a line on stderr if one is not.
 */
#define _GNU_SOURCE /* as in sampling.c, before the first header */

#include <stdio.h>

#include "sampling.c"

static uint64_t seed = 1;

static double draw(void)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (double)(seed >> 11) * 0x1p-53;
}

static void fail(const char *what, int64_t row)
{
    fprintf(stderr, "%s of row %d is wrong\n", what, (int)row);
    exit(1);
}

/* Spread, in steps, flat, almost flat, with holes, and nothing that is a number. */
static float draw_logit(int64_t kind)
{
    double value = draw();
    switch (kind % 7) {
    case 0: return (float)(value * 9);
    case 1: return (float)(int)(value * 4);
    case 2: return 0;
    case 3: return (float)(value * 1e-5);
    case 4: return value < 0.5 ? -INFINITY : (float)value;
    case 5: return value < 0.1 ? INFINITY : value < 0.2 ? NAN : (float)value;
    default: return NAN;
    }
}

static void drive_choice(const Head *head, int64_t num_rows, int64_t vocab_size)
{
    float *logits = malloc(num_rows * vocab_size * sizeof(float));
    float *temperatures = malloc(num_rows * sizeof(float));
    float *min_p = malloc(num_rows * sizeof(float));
    double *top_p = malloc(num_rows * sizeof(double));
    double *uniforms = malloc(num_rows * sizeof(double));
    int64_t *top_k = malloc(num_rows * sizeof(int64_t)), *ids = malloc(num_rows * sizeof(int64_t));
    for (int64_t row = 0; row < num_rows; row++) {
        for (int64_t i = 0; i < vocab_size; i++)
            logits[row * vocab_size + i] = draw_logit(row);
        temperatures[row] = row % 5 == 4 ? 0 : (float)(0.2 + draw() * 2);
        min_p[row] = row % 3 == 0 ? 0.01f : 0;
        top_k[row] = row % 4 == 1 ? 1 + (int64_t)(draw() * (double)vocab_size) : 0;
        top_p[row] = row % 2 == 0 ? draw() : 1;
        uniforms[row] = draw();
    }
    Choice choice = {logits, temperatures, min_p, top_k, top_p, uniforms, ids,
                     num_rows, vocab_size, vocab_size};
    sampling_choose_tokens(head, &choice);
    for (int64_t row = 0; row < num_rows; row++) {
        if (ids[row] < 0 || ids[row] >= vocab_size)
            fail("the token", row);
        float logit = logits[row * vocab_size + ids[row]];
        if (row % 7 < 5 && !(logit > -INFINITY) && (row % 7 != 4 || vocab_size > 60))
            fail("the token's logit", row);
    }
    free(logits);
    free(temperatures);
    free(min_p);
    free(top_p);
    free(uniforms);
    free(top_k);
    free(ids);
}

static void drive_logprobs(const Head *head, int64_t num_rows, int64_t vocab_size, int64_t num_top)
{
    float *logits = malloc(num_rows * vocab_size * sizeof(float));
    float *logprobs = malloc(num_rows * sizeof(float));
    float *top_logprobs = malloc(num_rows * num_top * sizeof(float));
    int32_t *ranks = malloc(num_rows * sizeof(int32_t));
    int32_t *top_ids = malloc(num_rows * num_top * sizeof(int32_t));
    int64_t *rows = malloc(num_rows * sizeof(int64_t)), *ids = malloc(num_rows * sizeof(int64_t));
    for (int64_t row = 0; row < num_rows; row++) {
        for (int64_t i = 0; i < vocab_size; i++)
            logits[row * vocab_size + i] = draw_logit(row);
        rows[row] = num_rows - 1 - row;
        ids[row] = (int64_t)(draw() * (double)vocab_size);
    }
    Logprobs query = {logits, rows, ids, logprobs, ranks, top_ids, top_logprobs,
                      num_rows, num_top, vocab_size, vocab_size};
    sampling_logprobs(head, &query);
    for (int64_t token = 0; token < num_rows; token++) {
        const float *own = logits + rows[token] * vocab_size;
        double sum = 0;
        int32_t rank = 1;
        for (int64_t i = 0; i < vocab_size; i++) {
            sum += exp(own[i]);
            rank += own[i] > own[ids[token]];
        }
        if (ranks[token] != rank)
            fail("the rank", token);
        double expected = own[ids[token]] - log(sum);
        if (isfinite(expected) && fabs(logprobs[token] - expected) > 1e-4)
            fail("the log-probability", token);
    }
    free(logits);
    free(logprobs);
    free(top_logprobs);
    free(ranks);
    free(top_ids);
    free(rows);
    free(ids);
}

int main(void)
{
    const int64_t sizes[] = {1, 2, LANES, LANES + 1, 63, MASS_BLOCK, MASS_BLOCK + 3, 1500};
    for (int64_t threads = 1; threads <= 4; threads += 3)
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            Head *head = sampling_create(threads, sizes[i]);
            drive_choice(head, 70, sizes[i]);
            drive_logprobs(head, 30, sizes[i], sizes[i] < 5 ? sizes[i] : 5);
            sampling_destroy(head);
        }
    return 0;
}
