// Fused attention computed sequence by sequence, in float32 inside.
#include "attention.h"

#include <algorithm>
#include <limits>

namespace emulated {

int64_t kv_heads(const AttentionCall& call) {
    return call.num_kv_heads ? call.num_kv_heads : call.num_heads;
}

int64_t head_dim(const AttentionCall& call) {
    return call.layout == "BSH" ? call.query->size(2) / call.num_heads : call.query->size(-1);
}

namespace {

std::vector<AttentionSpan> ragged_spans(const AttentionCall& call) {
    require(call.query_lengths && !call.query_lengths->values.empty(),
            "TND: actual_seq_lengths must be passed");
    require(call.kv_lengths != nullptr, "TND: actual_seq_lengths_kv must be passed");
    const auto& ends = call.query_lengths->values;
    const auto& kv = call.kv_lengths->values;
    require(ends.size() == kv.size(),
            "actual_seq_lengths and actual_seq_lengths_kv name the same sequences");
    require(ends.back() == call.query->size(0),
            "TND: actual_seq_lengths is cumulative and ends at T");
    std::vector<AttentionSpan> all;
    int64_t query_start = 0, kv_start = 0;
    for (size_t i = 0; i < ends.size(); ++i) {
        require(ends[i] >= query_start,
                "TND: actual_seq_lengths is cumulative: no value is below the one before");
        int64_t num_keys = kv[i];
        if (!call.block_table) {
            require(kv[i] >= kv_start,
                    "TND without block_table: actual_seq_lengths_kv is cumulative");
            num_keys = kv[i] - kv_start;
        }
        require(num_keys >= 0, "actual_seq_lengths_kv is not negative");
        all.push_back(
            {static_cast<int64_t>(i), query_start, ends[i] - query_start, kv_start, num_keys});
        query_start = ends[i];
        if (!call.block_table) kv_start = kv[i];
    }
    if (!call.block_table) {
        require(kv_start == call.key->tensors.at(0)->size(0),
                "TND without block_table: actual_seq_lengths_kv ends at the number of keys");
    }
    return all;
}

std::vector<AttentionSpan> batched_spans(const AttentionCall& call) {
    bool is_bnsd = call.layout == "BNSD";
    int64_t batch = call.query->size(0), longest = call.query->size(is_bnsd ? 2 : 1);
    std::vector<AttentionSpan> all;
    for (int64_t i = 0; i < batch; ++i) {
        auto length = [i](const aclIntArray* lengths, int64_t otherwise) {
            if (!lengths || lengths->values.empty()) return otherwise;
            return lengths->values.size() == 1 ? lengths->values[0] : lengths->values.at(i);
        };
        int64_t num_keys = call.block_table ? 0 : call.key->tensors.at(0)->size(is_bnsd ? 2 : 1);
        all.push_back({i, 0, longest == 1 ? 1 : length(call.query_lengths, longest), 0,
                       length(call.kv_lengths, num_keys)});
        require(all.back().num_queries <= longest,
                "actual_seq_lengths is at most the length of query");
    }
    return all;
}

}  // namespace

std::vector<AttentionSpan> spans(const AttentionCall& call) {
    bool is_known = call.layout == "TND" || call.layout == "BSND" || call.layout == "BNSD" ||
                    call.layout == "BSH";
    require(is_known,
            "input_layout " + call.layout + " is not emulated (TND, BSND, BNSD and BSH are)");
    return call.layout == "TND" ? ragged_spans(call) : batched_spans(call);
}

namespace {

// What the decode kernel puts in the place of a score that a mask of one's own hides: a sequence
// with nothing visible gives the mean of its values, not zeros.
constexpr double kHiddenScore = -1e12;

// Everything that the arithmetic needs, as views of the device's memory.
struct Attention {
    Tensor query, key, value, mask, block_table, out, lse;
    std::string layout;
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    double scale;
    SparseMode mode;
    int64_t pre_tokens, next_tokens;
};

// The queries (or results) of one sequence: [queries, H, D], sharing memory.
Tensor rows(const Attention& call, const Tensor& all, const AttentionSpan& span, int64_t start,
            int64_t count, int64_t heads) {
    if (call.layout == "TND") return all.slice(0, start, start + count);
    Tensor one = all.select(0, span.index);
    if (call.layout == "BNSD") one = one.transpose(0, 1);
    if (call.layout == "BSH") one = one.view({one.size(0), heads, call.head_dim});
    return one.slice(0, 0, count);
}

// The keys or values of one sequence: [keys, KVH, D] in float32.
Tensor context(const Attention& call, const Tensor& all, const AttentionSpan& span) {
    if (!call.block_table.defined()) {
        return rows(call, all, span, span.kv_start, span.num_keys, call.num_kv_heads)
            .to(at::kFloat);
    }
    int64_t num_blocks = (span.num_keys + call.block_size - 1) / call.block_size;
    Tensor blocks = call.block_table.select(0, span.index).slice(0, 0, num_blocks).to(at::kLong);
    Tensor picked = all.index_select(0, blocks);
    if (picked.dim() == 4) picked = picked.transpose(1, 2);
    picked = picked.reshape({num_blocks * call.block_size, call.num_kv_heads, call.head_dim});
    return picked.slice(0, 0, span.num_keys).to(at::kFloat);
}

// True where key j is hidden from query i. Positions are aligned at the end of both.
Tensor hidden(const Attention& call, int64_t num_queries, int64_t num_keys) {
    Tensor i = at::arange(num_keys - num_queries, num_keys).unsqueeze(1);
    Tensor j = at::arange(num_keys).unsqueeze(0);
    if (call.mode == SparseMode::kCausal) return j > i;
    return (j > i + call.next_tokens).logical_or(j < i - call.pre_tokens);
}

void attend(const Attention& call, const AttentionSpan& span) {
    if (span.num_queries == 0) return;
    Tensor out = rows(call, call.out, span, span.query_start, span.num_queries, call.num_heads);
    if (span.num_keys == 0) {
        out.zero_();
        return;
    }
    int64_t group = call.num_heads / call.num_kv_heads;
    Tensor query = rows(call, call.query, span, span.query_start, span.num_queries, call.num_heads)
                       .to(at::kFloat);
    query =
        query.transpose(0, 1).reshape({call.num_kv_heads, group * span.num_queries, call.head_dim});
    Tensor key = context(call, call.key, span).permute({1, 2, 0});
    Tensor value = context(call, call.value, span).transpose(0, 1);
    Tensor scores =
        at::bmm(query, key).mul(call.scale).view({call.num_heads, span.num_queries, span.num_keys});
    bool is_masked =
        call.mode == SparseMode::kCausal ? span.num_queries > 1 : call.mode == SparseMode::kBand;
    if (is_masked) {
        scores.masked_fill_(hidden(call, span.num_queries, span.num_keys),
                            -std::numeric_limits<float>::infinity());
    } else if (call.mode == SparseMode::kFullMask && call.mask.defined()) {
        Tensor own = call.mask.select(0, span.index).flatten().slice(0, 0, span.num_keys);
        scores.masked_fill_(own.to(at::kBool), kHiddenScore);
    }
    // A query that sees nothing gives zeros, not NaN.
    Tensor weights =
        at::softmax(scores, -1).nan_to_num(0.0).view({call.num_kv_heads, -1, span.num_keys});
    Tensor result = at::bmm(weights, value).view({call.num_heads, span.num_queries, call.head_dim});
    out.copy_(result.transpose(0, 1));
    if (call.lse.defined()) {
        Tensor lse = scores.logsumexp(-1).transpose(0, 1).unsqueeze(-1);
        call.lse.slice(0, span.query_start, span.query_start + span.num_queries).copy_(lse);
    }
}

Cost cost_of(const AttentionCall& call, const std::vector<AttentionSpan>& spans) {
    Cost cost;
    cost.engine = Engine::kAttention;
    double size = static_cast<double>(c10::elementSize(call.query->dtype()));
    cost.bytes = 2 * size * call.query->numel();
    bool has_own_mask =
        call.mask && static_cast<SparseMode>(call.sparse_mode) == SparseMode::kFullMask;
    for (const AttentionSpan& span : spans) {
        double pairs = static_cast<double>(span.num_queries) * span.num_keys;
        if (call.mask && span.num_queries > 1)
            pairs *= 1 - 0.5 * span.num_queries / std::max<int64_t>(span.num_keys, 1);
        cost.bytes += 2 * size * span.num_keys * kv_heads(call) * head_dim(call);
        // Each head of keys reads the sequence's own mask anew.
        if (has_own_mask) cost.bytes += static_cast<double>(span.num_keys) * kv_heads(call);
        (call.query->data_type == ACL_FLOAT ? cost.float_flops : cost.half_flops) +=
            4 * pairs * call.num_heads * head_dim(call);
    }
    return cost;
}

}  // namespace

Plan plan_attention(const AttentionCall& call) {
    std::vector<AttentionSpan> all = spans(call);
    check_attention(call, all);
    Attention work{view(call.query),
                   view(call.key->tensors[0]),
                   view(call.value->tensors[0]),
                   view(call.mask),
                   view(call.block_table),
                   view(call.out),
                   call.writes_lse ? view(call.lse) : Tensor(),
                   call.layout,
                   call.num_heads,
                   kv_heads(call),
                   head_dim(call),
                   call.block_size,
                   call.scale,
                   static_cast<SparseMode>(call.sparse_mode),
                   call.pre_tokens,
                   call.next_tokens};
    auto compute = [work, all] {
        for (const AttentionSpan& span : all) attend(work, span);
    };
    return {compute, {work.out}, cost_of(call, all)};
}

}  // namespace emulated
