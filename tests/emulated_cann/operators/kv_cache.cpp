// Writing keys and values into the paged cache, and reading them back.
//
// Source: op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_scatter_pa_kv_cache.md.
#include <string>

#include "aclnn.h"

using emulated::plan;
using emulated::require;
using emulated::Tensor;
using emulated::view;

namespace {

void check_scatter(const aclTensor* key, const aclTensor* key_cache, const aclTensor* slots,
                   const aclTensor* value, const aclTensor* value_cache, const std::string& mode) {
    require(mode == "Norm", "cache_mode '" + mode +
                                "' is not emulated: pass cache_mode='Norm', a cache in ND format");
    require(key->dim() == 3 && value->dim() == 3, "key and value are [tokens, heads, head_size]");
    require(key_cache->dim() == 4 && value_cache->dim() == 4,
            "a cache is [blocks, block_size, heads, head_size]");
    require(key->data_type == value->data_type && key->data_type == key_cache->data_type &&
                key->data_type == value_cache->data_type,
            "key, value and their caches have one dtype");
    require(key->is_contiguous() && value->is_contiguous(), "key and value are contiguous");
    require(key_cache->is_contiguous() && value_cache->is_contiguous(),
            "key_cache and value_cache are contiguous");
    require(key->size(0) == value->size(0) && key->size(1) == value->size(1),
            "key and value have the same tokens and heads");
    for (auto [part, cache] : {std::pair(key, key_cache), std::pair(value, value_cache)}) {
        require(part->size(1) == cache->size(2) && part->size(2) == cache->size(3),
                "a cache has the heads and head_size of what is written");
    }
    require(slots->data_type == ACL_INT32 || slots->data_type == ACL_INT64,
            "slot_mapping is int32 or int64");
    require(slots->dim() == 1 && slots->size(0) == key->size(0),
            "slot_mapping has one slot for each token");
    require(slots->is_contiguous(), "slot_mapping is contiguous");
}

// The slots are on the device: what is wrong with them shows when the kernel runs. A real card
// corrupts the cache without a word; here it is a fault.
void check_slots(const Tensor& slots, int64_t num_slots) {
    if (slots.numel() == 0) return;
    require(slots.min().item<int64_t>() >= 0 && slots.max().item<int64_t>() < num_slots,
            "slot_mapping: a slot outside the cache");
    Tensor sorted = std::get<0>(slots.sort());
    bool is_unique = !sorted.slice(0, 1).eq(sorted.slice(0, 0, -1)).any().item<bool>();
    require(is_unique, "slot_mapping: a slot occurs twice");
}

}  // namespace

// A negative slot, padding of a captured batch, is skipped.
ACLNN(aclnnScatterPaKvCache,
      (const aclTensor* key, const aclTensor* key_cache, const aclTensor* slots,
       const aclTensor* value, const aclTensor* value_cache, const aclTensor* compress_lens,
       const aclTensor* compress_offsets, const aclTensor* seq_lens, const char* mode, const char*,
       const aclIntArray*, const aclIntArray*),
      {
          check_scatter(key, key_cache, slots, value, value_cache, mode ? mode : "Norm");
          require(!compress_lens && !compress_offsets && !seq_lens,
                  "compressed scatter is not emulated");
          Tensor k = view(key), v = view(value), s = view(slots);
          Tensor k_slots = view(key_cache).flatten(0, 1), v_slots = view(value_cache).flatten(0, 1);
          return plan({k, v, k, v, s}, {s.slice(0, 0, 0)}, [=]() mutable {
              Tensor kept = s.ge(0);
              Tensor used = s.to(at::kLong).index({kept});
              check_slots(used, k_slots.size(0));
              k_slots.index_copy_(0, used, k.index({kept}));
              v_slots.index_copy_(0, used, v.index({kept}));
          });
      })
