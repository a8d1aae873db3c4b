/* Log-probabilities of one token and of the likeliest of its row, under the logits as they are. */

/* log(sum of exp(logit - largest)). Masses are that by 2^40, and their sum is exact. */
static double log_total(const float *logits, int64_t count, float *masses)
{
    int64_t total = 0;
    fill_masses(logits, count, 1, 0, masses);
    for (int64_t i = 0; i < count; i += MASS_BLOCK)
        total += sum_masses(masses + i, count - i < MASS_BLOCK ? count - i : MASS_BLOCK);
    return log((double)total * 0x1p-40);
}

/* 1 and the number of tokens that are likelier. */
static int32_t rank_of(const float *logits, int64_t count, float logit)
{
    int32_t rank = 1;
    for (int64_t i = 0; i < count; i += LANES) {
        int64_t left = count - i;
        uint32_t likelier = lane_bits(load_part(logits + i, left) > logit);
        rank += __builtin_popcount(left < LANES ? likelier & ((1u << left) - 1) : likelier);
    }
    return rank;
}

/* The `wanted` largest, descending, equals in the order of the vocabulary; what is no number comes
 * never. An insertion sort: of the many logits few are larger than the least that is kept so far.
 * Returns how many were found. */
static int64_t find_largest(const float *logits, int64_t count, int64_t wanted, float *values,
                            int32_t *ids)
{
    int64_t found = 0;
    for (int64_t i = 0; i < count && wanted > 0; i += LANES) {
        int64_t left = count - i;
        vec part = load_part(logits + i, left);
        uint32_t hits = lane_bits(found < wanted ? part == part : part > values[found - 1]);
        hits &= left < LANES ? (1u << left) - 1 : ~0u;
        for (; hits != 0; hits &= hits - 1) {
            int32_t id = (int32_t)i + __builtin_ctz(hits);
            float value = logits[id];
            if (found < wanted)
                found++;
            else if (!(value > values[found - 1]))
                continue;
            int64_t at = found - 1;
            for (; at > 0 && values[at - 1] < value; at--) {
                values[at] = values[at - 1];
                ids[at] = ids[at - 1];
            }
            values[at] = value;
            ids[at] = id;
        }
    }
    return found;
}

static void fill_logprobs(const Logprobs *query, int64_t token, Space *space)
{
    const float *logits = query->logits + query->rows[token] * query->stride;
    int64_t vocab_size = query->vocab_size, num_top = query->num_top;
    float *top_logprobs = query->top_logprobs + token * num_top;
    int32_t *top_ids = query->top_ids + token * num_top;
    float logit = logits[query->token_ids[token]], largest = largest_logit(logits, vocab_size);
    double total = log_total(logits, vocab_size, space->masses);
    query->logprobs[token] = (float)((double)logit - largest - total);
    query->ranks[token] = rank_of(logits, vocab_size, logit);
    int64_t found = find_largest(logits, vocab_size, num_top, top_logprobs, top_ids);
    for (int64_t i = 0; i < num_top; i++) {
        top_ids[i] = i < found ? top_ids[i] : 0;
        top_logprobs[i] = i < found ? (float)((double)top_logprobs[i] - largest - total) : NAN;
    }
}
