// Fused attention: one call's arguments, its constraints, and its arithmetic.
#pragma once
#include <optional>

#include "aclnn.h"

namespace emulated {

enum class SparseMode : int64_t { kFullMask = 0, kCausal = 3, kBand = 4 };

// aclnnFusedInferAttentionScore. Layouts: TND query [T, H, D] with cumulative lengths; BSND, BNSD
// and BSH with one length a sequence. Keys and values are contiguous in the same layout, or paged:
// [blocks, block_size, KVH * D] or [blocks, KVH, block_size, D] behind a block table. A mask is the
// constant of modes 3 and 4, or with mode 0 and one query a sequence its own: nonzero is hidden.
struct AttentionCall {
    const aclTensor* query;
    const aclTensorList* key;
    const aclTensorList* value;
    const aclTensor* mask;
    const aclIntArray* query_lengths;
    const aclIntArray* kv_lengths;
    const aclTensor* block_table;
    std::string layout;
    int64_t num_heads;
    int64_t num_kv_heads;  // 0: as many as heads
    double scale;
    int64_t sparse_mode;
    int64_t pre_tokens;
    int64_t next_tokens;
    int64_t block_size;
    bool writes_lse;
    const aclTensor* out;
    const aclTensor* lse;
};

// Where one sequence of a call has its tokens.
struct AttentionSpan {
    int64_t index;        // of the sequence
    int64_t query_start;  // rows of a TND query and of unpaged TND keys
    int64_t num_queries;
    int64_t kv_start;
    int64_t num_keys;
};

int64_t head_dim(const AttentionCall& call);
int64_t kv_heads(const AttentionCall& call);
std::vector<AttentionSpan> spans(
    const AttentionCall& call);  // std::invalid_argument: wrong lengths
void check_attention(const AttentionCall& call, const std::vector<AttentionSpan>& spans);
Plan plan_attention(const AttentionCall& call);

}  // namespace emulated
