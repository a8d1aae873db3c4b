#include "aclnn.h"

#include <c10/core/InferenceMode.h>

#include <cstring>
#include <memory>

extern "C" void omp_set_num_threads(int);

namespace emulated {
namespace {

constexpr aclError kParameterError = 161002;  // ACLNN_ERR_PARAM_INVALID
constexpr size_t kMaxCleared = 64 << 10;

// A stream's thread must not spread one small operator over all cores of the host.
void use_one_thread() {
    thread_local bool is_set = (omp_set_num_threads(1), true);
    (void)is_set;
}

// Without arithmetic (EMULATED_CANN_COMPUTE=0) small results, token ids among them, are zeros;
// large ones keep what the memory held, because clearing them would cost host time.
void clear_small(const std::vector<Tensor>& outputs) {
    for (Tensor output : outputs) {
        if (output.nbytes() <= kMaxCleared) output.zero_();
    }
}

std::function<void(Timeline&)> work_of(Plan plan) {
    if (!settings().compute) {
        return [outputs = std::move(plan.outputs)](Timeline&) {
            c10::InferenceMode guard;
            clear_small(outputs);
        };
    }
    return [compute = std::move(plan.compute)](Timeline&) {
        c10::InferenceMode guard;
        use_one_thread();
        try {
            compute();
        } catch (const c10::Error& error) {
            throw std::runtime_error(error.what_without_backtrace());
        }
    };
}

}  // namespace

double num_bytes(const Tensor& tensor) {
    return tensor.defined() ? static_cast<double>(tensor.nbytes()) : 0;
}

Plan plan(std::vector<Tensor> inputs, std::vector<Tensor> outputs, std::function<void()> compute) {
    Cost cost;
    for (const Tensor& input : inputs) cost.bytes += num_bytes(input);
    for (const Tensor& output : outputs) {
        cost.bytes += num_bytes(output);
        cost.vector_flops += 4.0 * output.numel();
    }
    return {std::move(compute), std::move(outputs), cost};
}

Tensor view(const aclTensor* tensor) { return tensor ? tensor->view() : Tensor(); }

std::vector<Tensor> views(const aclTensorList* list) {
    std::vector<Tensor> all;
    for (const aclTensor* tensor : list->tensors) all.push_back(view(tensor));
    return all;
}

aclError prepare(const char* name, uint64_t* workspace_size, aclOpExecutor** executor,
                 const std::function<Plan()>& make) {
    *workspace_size = 0;
    try {
        Plan made = make();
        Task task{name};
        task.cost = made.cost;
        task.run = work_of(std::move(made));
        *executor = new aclOpExecutor{std::move(task)};
        return ACL_SUCCESS;
    } catch (const std::exception& error) {
        set_last_error(std::string(name) + ": " + error.what());
        return kParameterError;
    }
}

aclError launch_prepared(aclOpExecutor* executor, aclrtStream stream) {
    std::unique_ptr<aclOpExecutor> owned(executor);
    return answer([&] { launch(stream, std::move(owned->task)); });
}

}  // namespace emulated

extern "C" aclError aclDestroyAclOpExecutor(aclOpExecutor* executor) {
    delete executor;
    return ACL_SUCCESS;
}
