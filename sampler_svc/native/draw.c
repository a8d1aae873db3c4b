/* One token of one row: truncation, then the inverse of the cumulated masses at a uniform number.
 *
 * The rule of draw.py, with other roundings in exp(): a row without top-k and top-p is drawn in the
 * order of the vocabulary, any other from the likeliest token down, equals in vocabulary order.
 */

enum { SCAN = 1024 };

static bool has_nan(const float *logits, int64_t count)
{
    ivec found = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vec part = load_part(logits + i, count - i);
        found |= part != part;
    }
    return lane_bits(found) != 0;
}

static int64_t first_nan(const float *logits, int64_t token)
{
    for (; logits[token] == logits[token]; token++)
        ;
    return token;
}

/* The first of the largest, and before all numbers the first that is none, as NumPy has it. Reads
 * the row once, and a second time only the part in which the token lies. */
static int64_t likeliest_token(const float *logits, int64_t count)
{
    float largest = -INFINITY;
    int64_t token = 0;
    for (int64_t i = 0; i < count; i += SCAN) {
        int64_t size = count - i < SCAN ? count - i : SCAN;
        if (has_nan(logits + i, size))
            return first_nan(logits, i);
        float own = largest_logit(logits + i, size);
        if (own > largest) {
            largest = own;
            token = i;
        }
    }
    for (; logits[token] != largest; token++)
        ;
    return token;
}

/* Where in [0, total) the draw falls. Rounding up to the total itself would leave the row. */
INLINE int64_t draw_target(double uniform, int64_t total)
{
    int64_t target = (int64_t)(uniform * (double)total);
    return target < total ? target : total - 1;
}

/* The mass that a nucleus has to reach. */
INLINE int64_t nucleus_size(double top_p, int64_t total)
{
    int64_t size = (int64_t)ceil((double)total * top_p);
    return size < 1 ? 1 : size < total ? size : total;
}

static int64_t draw_in_vocabulary_order(const float *masses, int64_t count, double uniform,
                                        int64_t *blocks)
{
    int64_t total = 0;
    for (int64_t i = 0; i < count; i += MASS_BLOCK) {
        int64_t left = count - i;
        blocks[i / MASS_BLOCK] = sum_masses(masses + i, left < MASS_BLOCK ? left : MASS_BLOCK);
        total += blocks[i / MASS_BLOCK];
    }
    if (total == 0) /* no logit is a number */
        return 0;
    int64_t target = draw_target(uniform, total), block = 0;
    for (; target >= blocks[block]; block++)
        target -= blocks[block];
    int64_t i = block * MASS_BLOCK;
    for (; target >= (int64_t)masses[i]; i++)
        target -= (int64_t)masses[i];
    return i;
}

static int64_t draw_from_likeliest(Tokens tokens, double top_p, double uniform, Space *space)
{
    int64_t total = fill_table(&tokens, false, space->table);
    if (total == 0) /* no logit is a number */
        return 0;
    if (top_p < 1) {
        int64_t size = nucleus_size(top_p, total);
        Place last = find_place(&tokens, space->table, size, false, space);
        total = last.before + (int64_t)last.mass;
    }
    int64_t rank = draw_target(uniform, total) + 1;
    return find_place(&tokens, space->table, rank, false, space).id;
}

static int64_t choose_token(const Choice *choice, int64_t row, Space *space)
{
    const float *logits = choice->logits + row * choice->stride;
    int64_t vocab_size = choice->vocab_size, top_k = choice->top_k[row];
    double top_p = choice->top_p[row], uniform = choice->uniforms[row];
    if (choice->temperatures[row] == 0)
        return likeliest_token(logits, vocab_size);
    fill_masses(logits, vocab_size, choice->temperatures[row], choice->min_p[row], space->masses);
    bool is_cut = top_k > 0 && top_k < vocab_size;
    if (!is_cut && top_p >= 1)
        return draw_in_vocabulary_order(space->masses, vocab_size, uniform, space->blocks);
    Tokens tokens = {space->masses, NULL, vocab_size};
    if (is_cut)
        tokens = keep_likeliest(&tokens, top_k, space);
    return draw_from_likeliest(tokens, top_p, uniform, space);
}
