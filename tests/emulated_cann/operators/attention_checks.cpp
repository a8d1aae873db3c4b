// What a real card refuses, or computes wrongly without a word, in fused attention.
//
// Sources: op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md,
// how vLLM-Ascend calls it, and, where the documentation is silent on a mask of one's own, the
// tiling that refuses (CANN ops-transformer, incre_flash_attention_tiling_check.cpp).
#include <algorithm>

#include "attention.h"

namespace emulated {
namespace {

constexpr int64_t kMaxBatch = 65536;
constexpr int64_t kMaxTndBatch = 4096;
constexpr int64_t kMaxHeads = 256;
constexpr int64_t kMaxGroup = 64;
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kMaxBlockSize = 512;
constexpr int64_t kMaskSize = 2048;
constexpr int64_t kMaxMasklessQueries = 16;  // of a decode request that drafts tokens
constexpr int64_t kMaxDecodeKeys = 262144;

void check_tensors(const AttentionCall& call) {
    const aclTensor *query = call.query, *key = call.key->tensors.at(0),
                    *value = call.value->tensors.at(0);
    bool is_half = query->data_type == ACL_FLOAT16 || query->data_type == ACL_BF16;
    bool is_allowed_float = query->data_type == ACL_FLOAT && settings().allow_float32;
    require(is_half || is_allowed_float, "query is float16 or bfloat16");
    require(key->data_type == query->data_type && value->data_type == query->data_type,
            "query, key and value have one dtype");
    require(call.key->tensors.size() == 1 && call.value->tensors.size() == 1,
            "key and value are single tensors");
    require(key->sizes == value->sizes, "key and value have one shape");
    require(query->is_contiguous(), "query is contiguous");
    require(key->is_contiguous() && value->is_contiguous(),
            "key and value, or their caches, are contiguous");
}

void check_heads(const AttentionCall& call) {
    int64_t heads = call.num_heads, kv = kv_heads(call), dim = head_dim(call);
    require(heads > 0 && heads <= kMaxHeads && kv > 0 && kv <= kMaxHeads,
            "num_heads and num_key_value_heads are 1 to 256");
    require(heads % kv == 0, "num_heads is a multiple of num_key_value_heads");
    require(heads / kv <= kMaxGroup, "num_heads / num_key_value_heads is at most 64");
    if (call.layout == "TND") {
        require(call.query->size(1) == heads, "TND: query is [T, num_heads, D]");
        require(dim == 128 || dim == 192, "TND: the head dim is 128 or 192");
    } else {
        require(dim <= kMaxHeadDim && dim % 16 == 0,
                "the head dim is a multiple of 16, at most 512");
    }
}

void check_mask_type(const aclTensor& mask) {
    bool is_flags = mask.data_type == ACL_BOOL || mask.data_type == ACL_INT8 ||
                    mask.data_type == ACL_UINT8;
    require(is_flags, "atten_mask is bool, int8 or uint8");
    require(mask.is_contiguous(), "atten_mask is contiguous");
}

// The form of one query a sequence: [batch, keys] or [batch, 1, 1, keys]. "Q_S = 1: atten_mask's
// last dimension >= block_table's second dimension * block_size"; without pages it covers the keys.
void check_own_mask(const AttentionCall& call, const std::vector<AttentionSpan>& spans) {
    const aclTensor& mask = *call.mask;
    require(call.layout != "TND", "sparse_mode 0 takes no atten_mask in TND");
    bool is_decode = call.query->size(call.layout == "BNSD" ? 2 : 1) == 1;
    require(is_decode, "sparse_mode 0 with a mask and several queries a sequence is not emulated");
    check_mask_type(mask);
    auto batch = static_cast<int64_t>(spans.size());
    bool is_row_each =
        mask.dim() == 2 || (mask.dim() == 4 && mask.size(1) == 1 && mask.size(2) == 1);
    require(is_row_each && mask.size(0) == batch,
            "with one query a sequence atten_mask is [batch, keys] or [batch, 1, 1, keys]");
    int64_t num_keys = call.block_table
                           ? call.block_table->size(1) * call.block_size
                           : call.key->tensors.at(0)->size(call.layout == "BNSD" ? 2 : 1);
    require(mask.size(-1) >= num_keys,
            "the last dimension of atten_mask is at least block_table.size(1) * block_size, or the "
            "number of keys");
}

void check_mask(const AttentionCall& call, const std::vector<AttentionSpan>& spans) {
    auto mode = static_cast<SparseMode>(call.sparse_mode);
    require(
        mode == SparseMode::kFullMask || mode == SparseMode::kCausal || mode == SparseMode::kBand,
        "sparse_mode " + std::to_string(call.sparse_mode) + " is not emulated (0, 3 and 4 are)");
    if (mode == SparseMode::kFullMask) {
        if (call.mask) check_own_mask(call, spans);
        return;
    }
    require(call.mask, "sparse_mode 3 and 4 need the constant atten_mask of 2048 x 2048");
    bool is_constant = call.mask->dim() >= 2 && call.mask->size(-1) == kMaskSize &&
                       call.mask->size(-2) == kMaskSize &&
                       call.mask->numel() == kMaskSize * kMaskSize;
    require(is_constant, "sparse_mode 3 and 4 need the constant atten_mask of 2048 x 2048");
    check_mask_type(*call.mask);
}

void check_cache_layout(const AttentionCall& call) {
    const aclTensor* cache = call.key->tensors[0];
    int64_t kv = kv_heads(call), dim = head_dim(call);
    if (cache->dim() == 3) {
        require(cache->size(1) == call.block_size && cache->size(2) == kv * dim,
                "a cache of three dimensions is [blocks, block_size, num_key_value_heads * D]");
    } else {
        require(cache->dim() == 4 && (call.layout == "TND" || call.layout == "BNSD"),
                "a cache has three dimensions, [blocks, block_size, num_key_value_heads * D]; four "
                "only with TND and BNSD");
        require(cache->size(1) == kv && cache->size(2) == call.block_size && cache->size(3) == dim,
                "a cache of four dimensions is [blocks, num_key_value_heads, block_size, D]");
    }
}

void check_paging(const AttentionCall& call, const std::vector<AttentionSpan>& spans) {
    require(call.block_table->data_type == ACL_INT32, "block_table is int32");
    require(call.block_table->dim() == 2, "block_table is [batch, blocks of a sequence]");
    require(call.block_table->is_contiguous(), "block_table is contiguous");
    require(call.kv_lengths, "actual_seq_lengths_kv must be passed with block_table");
    require(call.block_table->size(0) >= static_cast<int64_t>(spans.size()),
            "block_table has a row for each sequence");
    bool is_decode = std::all_of(spans.begin(), spans.end(),
                                 [](const AttentionSpan& span) { return span.num_queries <= 1; });
    int64_t multiple = is_decode ? 16 : 128;
    require(
        call.block_size > 0 && call.block_size <= kMaxBlockSize && call.block_size % multiple == 0,
        "block_size is a multiple of " + std::to_string(multiple) +
            (is_decode ? "" : " where a sequence has several queries") + ", at most 512");
    check_cache_layout(call);
    for (const AttentionSpan& span : spans) {
        require(call.layout == "TND" || !is_decode || span.num_keys <= kMaxDecodeKeys,
                "with one query a sequence there are at most 262144 keys");
        require(span.num_keys <= call.block_table->size(1) * call.block_size,
                "block_table covers actual_seq_lengths_kv");
        require(call.mask || span.num_queries <= kMaxMasklessQueries,
                "a decode request without a mask has at most 16 queries; longer ones need "
                "sparse_mode 3");
    }
}

}  // namespace

void check_attention(const AttentionCall& call, const std::vector<AttentionSpan>& spans) {
    int64_t max_batch = call.layout == "TND" ? kMaxTndBatch : kMaxBatch;
    require(static_cast<int64_t>(spans.size()) <= max_batch,
            "at most " + std::to_string(max_batch) + " sequences a call");
    check_tensors(call);
    check_heads(call);
    check_mask(call, spans);
    if (call.block_table) check_paging(call, spans);
    if (call.writes_lse) {
        require(call.layout == "TND", "softmax_lse_flag is emulated with TND only");
        require(call.lse->data_type == ACL_FLOAT, "softmax_lse is float32");
    }
}

}  // namespace emulated
