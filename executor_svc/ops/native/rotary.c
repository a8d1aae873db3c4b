/* Rotary position embedding (Su et al., arXiv:2104.09864) in the half-split layout of GPT-NeoX and
 * Llama, and the store of keys and values in the cache's type.
 *
 *   for i in half:  (first, second)[i] = (first cos - second sin, second cos + first sin)
 */
#include "rotary.h"

#include "vec.h"

static void rotary_angles(const Rope *rope, int64_t position, float *cos_sin)
{
    for (int64_t i = 0; i < rope->half; i++) {
        float angle = (float)position * rope->frequencies[i];
        cos_sin[i] = cosf(angle) * rope->scale;
        cos_sin[rope->half + i] = sinf(angle) * rope->scale;
    }
}

static void rotate(float *head, const float *cos_sin, int64_t half)
{
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t left = half - i;
        vec first = load_part(head + i, left), second = load_part(head + half + i, left);
        vec cosine = load_part(cos_sin + i, left), sine = load_part(cos_sin + half + i, left);
        store_part(head + i, first * cosine - second * sine, left);
        store_part(head + half + i, second * cosine + first * sine, left);
    }
}

static void store_head(void *array, size_t index, const float *head, int64_t size, enum dtype type)
{
    for (int64_t i = 0; i < size; i++)
        narrow_one(array, index + i, head[i], type);
}

static void write_kv(const Cache *cache, const LayerCache *layer, const Attention *attention,
                     int64_t slot, const float *key, const float *value)
{
    int64_t dim = attention->head_dim, block = slot / cache->block_size;
    for (int64_t head = 0; head < attention->num_kv_heads; head++) {
        size_t row = (block * attention->num_kv_heads + head) * cache->block_size;
        size_t index = (row + slot % cache->block_size) * dim;
        store_head(layer->key, index, key + head * dim, dim, cache->dtype);
        store_head(layer->value, index, value + head * dim, dim, cache->dtype);
    }
}

/* heads [T, num_heads, head_dim] in place; cos_sin [T, 2 * half]. */
EXPORT void headrace_rotary(const float *cos_sin, int64_t half, int64_t num_tokens,
                            int64_t num_heads, int64_t head_dim, float *heads)
{
    for (int64_t i = 0; i < num_tokens * num_heads; i++)
        rotate(heads + i * head_dim, cos_sin + i / num_heads * 2 * half, half);
}

EXPORT void headrace_write_kv(const Cache *cache, const Attention *attention, const int64_t *slots,
                              int64_t num_tokens, const float *key, const float *value)
{
    int64_t size = attention->num_kv_heads * attention->head_dim;
    for (int64_t token = 0; token < num_tokens; token++)
        write_kv(cache, cache->layers, attention, slots[token], key + token * size,
                 value + token * size);
}
