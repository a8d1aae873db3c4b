/* The sampling head as one translation unit: the tokens of a step, and their log-probabilities.
 *
 * setup.py compiles this file once for each instruction set. A row's token depends on nothing but
 * the row; rows are shared out to the threads of a pool, each with memory of its own.
 */
#define _GNU_SOURCE /* the pool names cores */

#include "sampling.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "pool.c"

#include "masses.c"

#include "select.c"

#include "draw.c"

#include "logprobs.c"

typedef struct {
    Pool *pool;
    Space *spaces;          /* one a thread */
    _Atomic bool *is_taken; /* [number of spaces] */
    int num_spaces;
} Head;

typedef struct {
    const Head *head;
    const void *query;
} Job;

/* Roughly, for a token of a row that is drawn: decides how many rows a thread takes at once. */
static const double NS_PER_TOKEN = 1.0;

/* One block holds all arrays; pages that no row needs are never touched. */
static bool allocate_space(Space *space, int64_t vocab_size)
{
    size_t num_blocks = vocab_size / MASS_BLOCK + 1;
    space->blocks = malloc(num_blocks * sizeof(int64_t) + 4 * vocab_size * sizeof(float));
    if (space->blocks == NULL)
        return false;
    space->masses = (float *)(space->blocks + num_blocks);
    space->bucket_masses = space->masses + vocab_size;
    space->ids = (int32_t *)(space->bucket_masses + vocab_size);
    space->bucket_ids = space->ids + vocab_size;
    return true;
}

EXPORT void sampling_destroy(Head *head)
{
    if (head->pool != NULL)
        pool_destroy(head->pool);
    for (int i = 0; head->spaces != NULL && i < head->num_spaces; i++)
        free(head->spaces[i].blocks);
    free(head->spaces);
    free((void *)head->is_taken);
    free(head);
}

/* `num_threads` counts the caller. NULL if memory or threads cannot be had. */
EXPORT Head *sampling_create(int64_t num_threads, int64_t vocab_size)
{
    Head *head = calloc(1, sizeof(Head));
    if (head == NULL)
        return NULL;
    head->num_spaces = (int)num_threads;
    head->pool = pool_create(head->num_spaces);
    head->spaces = calloc(num_threads, sizeof(Space));
    head->is_taken = calloc(num_threads, sizeof(_Atomic bool));
    bool is_complete = head->pool != NULL && head->spaces != NULL && head->is_taken != NULL;
    for (int i = 0; is_complete && i < head->num_spaces; i++)
        is_complete = allocate_space(&head->spaces[i], vocab_size);
    if (is_complete)
        return head;
    sampling_destroy(head);
    return NULL;
}

/* There are as many as threads, so one is free. */
static int take_space(const Head *head)
{
    int i = 0;
    while (atomic_exchange(&head->is_taken[i], true))
        i = (i + 1) % head->num_spaces;
    return i;
}

static void choose_range(const void *arg, int64_t first, int64_t last)
{
    const Job *job = arg;
    const Choice *choice = job->query;
    int taken = take_space(job->head);
    for (int64_t row = first; row < last; row++)
        choice->token_ids[row] = choose_token(choice, row, &job->head->spaces[taken]);
    atomic_store(&job->head->is_taken[taken], false);
}

/* Choose a token for each row. The vocabulary has the size that `head` was created for. */
EXPORT void sampling_choose_tokens(const Head *head, const Choice *choice)
{
    Job job = {head, choice};
    pool_run(head->pool, choice->num_rows, choice->vocab_size * NS_PER_TOKEN, choose_range, &job);
}

static void logprobs_range(const void *arg, int64_t first, int64_t last)
{
    const Job *job = arg;
    int taken = take_space(job->head);
    for (int64_t token = first; token < last; token++)
        fill_logprobs(job->query, token, &job->head->spaces[taken]);
    atomic_store(&job->head->is_taken[taken], false);
}

EXPORT void sampling_logprobs(const Head *head, const Logprobs *query)
{
    Job job = {head, query};
    pool_run(head->pool, query->num_tokens, query->vocab_size * NS_PER_TOKEN, logprobs_range, &job);
}

/* The masses of one row: what tests compare with exp(). */
EXPORT void sampling_token_masses(const float *logits, int64_t vocab_size, float temperature,
                                  float min_p, float *masses)
{
    fill_masses(logits, vocab_size, temperature, min_p, masses);
}

/* The bytes of each shared structure: the loader compares them with those of abi.py. */
EXPORT void sampling_abi_sizes(int64_t sizes[2])
{
    sizes[0] = sizeof(Choice);
    sizes[1] = sizeof(Logprobs);
}
