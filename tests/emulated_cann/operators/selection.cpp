// Operators whose result's shape depends on the data. torch_npu waits for them and asks for it.
#include <algorithm>

#include "aclnn.h"

using emulated::plan;
using emulated::Tensor;
using emulated::view;

namespace {

// Write the result to the front of the output's memory and shape the output like it.
void give(aclTensor* out, const Tensor& found) {
    Tensor result = found.contiguous();
    out->sizes = result.sizes().vec();
    out->strides = result.strides().vec();
    out->view().copy_(result);
}

}  // namespace

extern "C" int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* dim) {
    *dim = tensor->sizes.size();
    *sizes = new int64_t[tensor->sizes.size()];
    std::copy(tensor->sizes.begin(), tensor->sizes.end(), *sizes);
    return ACL_SUCCESS;
}

ACLNN(aclnnMaskedSelect, (const aclTensor* self, const aclTensor* mask, aclTensor* out), {
    Tensor x = view(self), m = view(mask);
    return plan({x, m}, {view(out)}, [=] { give(out, x.masked_select(m)); });
})

ACLNN(aclnnNonzero, (const aclTensor* self, aclTensor* out), {
    Tensor x = view(self);
    return plan({x}, {view(out)}, [=] { give(out, x.nonzero()); });
})

// One row of coordinates for each dimension.
ACLNN(aclnnNonzeroV2, (const aclTensor* self, aclTensor* out), {
    Tensor x = view(self);
    return plan({x}, {view(out)}, [=] { give(out, x.nonzero().t()); });
})
