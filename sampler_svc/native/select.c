/* Places in the order "likeliest first, equals in the order of the vocabulary", without sorting.
 *
 *   masses --> histogram by exponent and 7 bits --> a bucket --> by 8 bits --> by 8 bits --> equals
 *
 * A radix selection over the bits of the masses, which as floats order like integers: each level
 * sums the buckets, walks down to the one that holds the place, and goes on with its tokens alone.
 */
enum {
    FIRST_BITS = 7,                      /* of a mantissa's 23, beside the exponent */
    DEEP_BITS = 8,                       /* on each of the two levels behind it */
    FIRST_SHIFT = 23 - FIRST_BITS,
    FIRST_BUCKET = 127 << FIRST_BITS,    /* that of mass 1, the smallest */
    LAST_BUCKET = ((128 + MASS_BITS) << FIRST_BITS) - 1,
    DEEP_BUCKETS = 1 << DEEP_BITS,
    NO_MASS_BUCKETS = 64,
    FEW = 32,                            /* sorting them is faster than another histogram */
    CHUNK = 128,
};

/* `ids` ascend; NULL: they are 0, 1, 2, ... */
typedef struct {
    const float *masses;
    const int32_t *ids;
    int64_t count;
} Tokens;

/* A token, and the weight of all tokens before it. */
typedef struct {
    int32_t id;
    float mass;
    int64_t before;
} Place;

/* One thread's memory. */
typedef struct {
    int64_t *blocks;               /* [vocab_size / MASS_BLOCK + 1] */
    float *masses, *bucket_masses; /* [vocab_size] */
    int32_t *ids, *bucket_ids;     /* [vocab_size] */
    int64_t table[LAST_BUCKET + 1], deep_table[DEEP_BUCKETS];
} Space;

/* What a token adds to a sum: its mass or, where tokens are `counted`, 1. */
INLINE int64_t weight_of(float mass, bool counted) { return counted ? 1 : (int64_t)mass; }

INLINE int32_t id_of(const Tokens *tokens, int64_t index)
{
    return tokens->ids == NULL ? (int32_t)index : tokens->ids[index];
}

INLINE uint32_t bits_of(float mass)
{
    union { float value; uint32_t bits; } in = {mass};
    return in.bits;
}

/* table[bits of a mass >> shift & mask] += its mantissa, or 1. Keys and terms come first: a loop of
 * additions to memory runs half as fast with anything else in it. Tokens without mass are spread
 * over buckets that nobody reads, as an addition waits for the last one to the same address. */
INLINE void add_to_table(const Tokens *tokens, int shift, uint32_t mask, bool counted,
                         int64_t *table)
{
    uint32_t keys[CHUNK];
    int32_t terms[CHUNK];
    for (int64_t first = 0; first < tokens->count; first += CHUNK) {
        const float *masses = tokens->masses + first;
        int64_t left = tokens->count - first, count = left < CHUNK ? left : CHUNK;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = bits_of(masses[i]);
            keys[i] = bits == 0 ? i % NO_MASS_BUCKETS : bits >> shift & mask;
            terms[i] = counted ? 1 : (bits & 0x7fffff) | 0x800000;
        }
        for (int64_t i = 0; i < count; i++)
            table[keys[i]] += terms[i];
    }
}

/* All of a bucket have one exponent: from sums of their mantissas to weights. Returns the total. */
INLINE int64_t sums_to_weights(int64_t *sums, int64_t count, uint32_t exponent, bool counted)
{
    const int shift = (int)exponent - (127 + 23);
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        sums[i] = counted ? sums[i] : shift < 0 ? sums[i] >> -shift : sums[i] << shift;
        total += sums[i];
    }
    return total;
}

/* Fills the table of the first level with weights, and returns the total of those with mass. */
INLINE int64_t fill_table(const Tokens *tokens, bool counted, int64_t *table)
{
    int64_t total = 0;
    memset(table + FIRST_BUCKET, 0, (LAST_BUCKET + 1 - FIRST_BUCKET) * sizeof(int64_t));
    add_to_table(tokens, FIRST_SHIFT, ~0u, counted, table);
    for (int64_t bucket = FIRST_BUCKET; bucket < LAST_BUCKET; bucket += 1 << FIRST_BITS)
        total += sums_to_weights(table + bucket, 1 << FIRST_BITS, bucket >> FIRST_BITS, counted);
    return total;
}

/* From bucket `last` down to the one at which the sum `before` reaches `rank`. */
INLINE uint32_t walk_down(const int64_t *table, uint32_t last, int64_t rank, int64_t *before)
{
    uint32_t bucket = last;
    for (; *before + table[bucket] < rank; bucket--)
        *before += table[bucket];
    return bucket;
}

/* Keep those with bits >> shift == prefix, in order. */
static Tokens collect(const Tokens *tokens, int shift, uint32_t prefix, Space *space)
{
    int64_t found = 0;
    for (int64_t i = 0; i < tokens->count; i += LANES) {
        uvec bits = (uvec)load_part(tokens->masses + i, tokens->count - i);
        uint32_t hits = lane_bits((ivec)((bits >> shift) == prefix));
        for (; hits != 0; hits &= hits - 1) {
            int64_t index = i + __builtin_ctz(hits);
            space->bucket_masses[found] = tokens->masses[index];
            space->bucket_ids[found++] = id_of(tokens, index);
        }
    }
    return (Tokens){space->bucket_masses, space->bucket_ids, found};
}

/* Sorts the bucket; an insertion sort keeps equals in order. */
INLINE Place find_among_few(Space *space, int64_t count, int64_t rank, bool counted,
                            int64_t before)
{
    float *masses = space->bucket_masses;
    int32_t *ids = space->bucket_ids;
    for (int64_t i = 1; i < count; i++) {
        float mass = masses[i];
        int32_t id = ids[i];
        int64_t j = i;
        for (; j > 0 && masses[j - 1] < mass; j--) {
            masses[j] = masses[j - 1];
            ids[j] = ids[j - 1];
        }
        masses[j] = mass;
        ids[j] = id;
    }
    int64_t i = 0;
    for (; before + weight_of(masses[i], counted) < rank; i++)
        before += weight_of(masses[i], counted);
    return (Place){ids[i], masses[i], before};
}

/* The token at which the sum of weights from the likeliest down reaches `rank`, which is from 1 to
 * the total. `table` is fill_table's of `all`. */
INLINE Place find_place(const Tokens *all, const int64_t *table, int64_t rank, bool counted,
                        Space *space)
{
    int64_t before = 0, *deep_table = space->deep_table;
    uint32_t prefix = walk_down(table, LAST_BUCKET, rank, &before);
    Tokens tokens = collect(all, FIRST_SHIFT, prefix, space);
    for (int shift = FIRST_SHIFT - DEEP_BITS; shift >= 0; shift -= DEEP_BITS) {
        if (tokens.count <= FEW)
            return find_among_few(space, tokens.count, rank, counted, before);
        memset(deep_table, 0, sizeof space->deep_table);
        add_to_table(&tokens, shift, DEEP_BUCKETS - 1, counted, deep_table);
        sums_to_weights(deep_table, DEEP_BUCKETS, bits_of(tokens.masses[0]) >> 23, counted);
        uint32_t bucket = walk_down(deep_table, DEEP_BUCKETS - 1, rank, &before);
        prefix = prefix << DEEP_BITS | bucket;
        tokens = collect(&tokens, shift, prefix, space);
    }
    int64_t weight = weight_of(tokens.masses[0], counted); /* all that are left are equal */
    int64_t index = (rank - before - 1) / weight;
    return (Place){tokens.ids[index], tokens.masses[index], before + index * weight};
}

/* The first `count` tokens of the order: compacts space->masses, where `all` has its own. */
static Tokens keep_likeliest(const Tokens *all, int64_t count, Space *space)
{
    int64_t num_with_mass = fill_table(all, true, space->table);
    if (num_with_mass <= count)
        return *all;
    Place last = find_place(all, space->table, count, true, space);
    int64_t kept = 0;
    for (int64_t i = 0; i < all->count; i += LANES) {
        uint32_t hits = lane_bits(load_part(all->masses + i, all->count - i) >= last.mass);
        for (; hits != 0; hits &= hits - 1) {
            int32_t id = (int32_t)i + __builtin_ctz(hits);
            float mass = all->masses[id];
            space->masses[kept] = mass;
            space->ids[kept] = id;
            kept += mass > last.mass || id <= last.id;
        }
    }
    return (Tokens){space->masses, space->ids, kept};
}
