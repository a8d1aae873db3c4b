// Filtering of logits before a draw.
//
// Source: op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_top_k_top_p.md.
#include <limits>

#include "aclnn.h"

using emulated::plan;
using emulated::require;
using emulated::Tensor;
using emulated::view;

namespace {

constexpr int64_t kMaxTopK = 1024;

void check(const aclTensor* logits, const aclTensor* p, const aclTensor* k) {
    require(logits->dim() == 2, "logits are [batch, vocabulary]");
    if (p) {
        require(p->data_type == logits->data_type, "p has the dtype of logits");
        require(p->dim() == 1 && p->size(0) == logits->size(0), "p has one value for each row");
    }
    if (k) {
        require(k->data_type == ACL_INT32, "k is int32");
        require(k->dim() == 1 && k->size(0) == logits->size(0), "k has one value for each row");
    }
}

// Ascending and stable; ties of the k-th value stay, and so does the last column.
Tensor keep_top(const Tensor& logits, const Tensor& p, const Tensor& k) {
    const double kOut = -std::numeric_limits<double>::infinity();
    auto [sorted, places] = at::sort(logits.to(at::kFloat), /*stable=*/std::optional(true),
                                     /*dim=*/-1, /*descending=*/false);
    if (k.defined()) {
        int64_t most = std::min(kMaxTopK, logits.size(1));
        require(k.min().item<int64_t>() >= 1 && k.max().item<int64_t>() <= most,
                "k is 1 to 1024, at most the vocabulary");
        Tensor threshold =
            sorted.gather(-1, k.to(at::kLong).neg().add(logits.size(1)).unsqueeze(-1));
        sorted = sorted.masked_fill(sorted.lt(threshold), kOut);
    }
    if (p.defined()) {
        Tensor below =
            sorted.softmax(-1).cumsum(-1).le(p.to(at::kFloat).neg().add(1).unsqueeze(-1));
        below.select(-1, -1).fill_(false);
        sorted = sorted.masked_fill(below, kOut);
    }
    return at::empty_like(sorted).scatter_(-1, places, sorted);
}

}  // namespace

ACLNN(aclnnApplyTopKTopP,
      (const aclTensor* logits, const aclTensor* p, const aclTensor* k, const aclTensor* out), {
          check(logits, p, k);
          Tensor x = view(logits), top_p = view(p), top_k = view(k), y = view(out);
          return plan({x}, {y}, [=] { y.copy_(keep_top(x, top_p, top_k)); });
      })
