// The C functions of fused attention: fifty parameters, of which the emulation takes eighteen and
// refuses the rest.
#include "attention.h"

using namespace emulated;

namespace {

constexpr uint64_t kWorkspaceSize = 512 << 10;  // as if a kernel needed one

void refuse_extras(std::initializer_list<const aclTensor*> extras) {
    for (const aclTensor* extra : extras) {
        require(!extra,
                "fused attention: quantization, padding, shared prefix, pse_shift and rope inputs "
                "are not emulated");
    }
}

}  // namespace

// clang-format off
#define FUSED_ATTENTION_INPUTS \
    const aclTensor *query, const aclTensorList *key, const aclTensorList *value, \
    const aclTensor *pse_shift, const aclTensor *mask, \
    const aclIntArray *query_lengths, const aclIntArray *kv_lengths, \
    const aclTensor *dequant_scale1, const aclTensor *quant_scale1, \
    const aclTensor *dequant_scale2, const aclTensor *quant_scale2, const aclTensor *quant_offset2,\
    const aclTensor *antiquant_scale, const aclTensor *antiquant_offset, \
    const aclTensor *block_table, \
    const aclTensor *query_padding, const aclTensor *kv_padding, \
    const aclTensor *key_antiquant_scale, const aclTensor *key_antiquant_offset, \
    const aclTensor *value_antiquant_scale, const aclTensor *value_antiquant_offset, \
    const aclTensor *key_shared_prefix, const aclTensor *value_shared_prefix, \
    const aclIntArray*, \
    const aclTensor *query_rope, const aclTensor *key_rope, const aclTensor *key_rope_scale, \
    int64_t num_heads, double scale, int64_t pre_tokens, int64_t next_tokens, const char *layout, \
    int64_t num_kv_heads, int64_t sparse_mode, int64_t, int64_t block_size, int64_t, \
    bool writes_lse, int64_t, int64_t, const aclTensor *out, const aclTensor *lse

#define FUSED_ATTENTION_PLAN \
    refuse_extras({pse_shift, dequant_scale1, quant_scale1, dequant_scale2, quant_scale2, \
                   quant_offset2, antiquant_scale, antiquant_offset, query_padding, kv_padding, \
                   key_antiquant_scale, key_antiquant_offset, value_antiquant_scale, \
                   value_antiquant_offset, key_shared_prefix, value_shared_prefix, query_rope, \
                   key_rope, key_rope_scale}); \
    return plan_attention({query, key, value, mask, query_lengths, kv_lengths, block_table, \
                           layout, num_heads, num_kv_heads, scale, sparse_mode, pre_tokens, \
                           next_tokens, block_size, writes_lse, out, lse});
// clang-format on

ACLNN(aclnnFusedInferAttentionScoreV3, (FUSED_ATTENTION_INPUTS), {FUSED_ATTENTION_PLAN})

// Asked once before capture; the size holds for every later set of lengths.
extern "C" aclError aclnnFusedInferAttentionScoreV3GetMaxWorkspaceSize(FUSED_ATTENTION_INPUTS,
                                                                       uint64_t* workspace_size,
                                                                       aclOpExecutor** executor) {
    aclError status = prepare("aclnnFusedInferAttentionScoreV3", workspace_size, executor,
                              [&]() -> Plan { FUSED_ATTENTION_PLAN });
    *workspace_size = kWorkspaceSize;
    return status;
}
