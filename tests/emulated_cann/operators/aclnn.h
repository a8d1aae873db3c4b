// The form of every operator: what torch_npu calls (aclnnX and aclnnXGetWorkspaceSize), the
// descriptors it passes, and the plan that an operator makes of them.
#pragma once
#include <ATen/ATen.h>
#include <acl/acl.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../runtime/errors.h"
#include "../runtime/launch.h"
#include "../runtime/settings.h"

// A tensor on the device. In FRACTAL_NZ its memory is tiled: read() and write() translate.
struct aclTensor {
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int64_t offset;
    aclDataType data_type;
    aclFormat format;
    std::vector<int64_t> storage_sizes;
    void* address;

    at::Tensor view() const;  // shares the device's memory; not for FRACTAL_NZ
    at::ScalarType dtype() const;
    int64_t dim() const { return static_cast<int64_t>(sizes.size()); }
    int64_t size(int64_t dim) const { return sizes.at(dim < 0 ? dim + sizes.size() : dim); }
    int64_t numel() const;
    bool is_contiguous() const;
    bool is_tiled() const { return format == ACL_FORMAT_FRACTAL_NZ; }
};

struct aclScalar {
    at::Scalar value;
};

struct aclIntArray {
    std::vector<int64_t> values;
};

struct aclFloatArray {
    std::vector<float> values;
};

struct aclBoolArray {
    std::vector<bool> values;
};

struct aclTensorList {
    std::vector<const aclTensor*> tensors;
};

struct aclScalarList {
    std::vector<const aclScalar*> scalars;
};

namespace emulated {

using at::Tensor;

// What one call will do on its stream. The descriptors may be gone by then: `compute` holds views.
struct Plan {
    std::function<void()> compute;
    std::vector<Tensor> outputs;
    Cost cost;
};

// A plan whose memory traffic is every given tensor once.
Plan plan(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::function<void()> compute);
double num_bytes(const Tensor& tensor);

Tensor view(const aclTensor* tensor);  // undefined for a null pointer
std::vector<Tensor> views(const aclTensorList* list);

// The constraints of an operator: a violated one is the error text of the torch_npu call.
inline void require(bool holds, const std::string& constraint) {
    if (!holds) throw std::invalid_argument(constraint);
}

}  // namespace emulated

struct aclOpExecutor {
    emulated::Task task;
};

namespace emulated {

aclError prepare(const char* name, uint64_t* workspace_size, aclOpExecutor** executor,
                 const std::function<Plan()>& make);
aclError launch_prepared(aclOpExecutor* executor, aclrtStream stream);

}  // namespace emulated

// Define the two C functions of an operator. The body returns its Plan; it runs on the host, in the
// caller's thread, and checks the constraints there, as a real card's tiling does.
#define ACLNN_PARAMETERS(...) (__VA_ARGS__, uint64_t* workspace_size, aclOpExecutor** executor)
#define ACLNN(name, parameters, ...)                                                         \
    extern "C" aclError name##GetWorkspaceSize ACLNN_PARAMETERS parameters {                 \
        return emulated::prepare(#name, workspace_size,                                      \
                                 executor, [&]()->emulated::Plan __VA_ARGS__);               \
    }                                                                                        \
    extern "C" aclError name(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) { \
        return emulated::launch_prepared(executor, stream);                                  \
    }
