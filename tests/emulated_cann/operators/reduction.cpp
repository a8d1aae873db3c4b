// Reductions and scans.
#include "aclnn.h"

using emulated::plan;
using emulated::Tensor;
using emulated::view;

namespace {

using Reduce = Tensor (*)(const Tensor&, at::IntArrayRef, bool);

emulated::Plan reduce(const aclTensor* self, const aclIntArray* dims, bool keepdim,
                      const aclTensor* out, Reduce f) {
    Tensor x = view(self), y = view(out);
    std::vector<int64_t> over = dims ? dims->values : std::vector<int64_t>{};
    if (over.empty()) {
        for (int64_t dim = 0; dim < x.dim(); ++dim) over.push_back(dim);
    }
    return plan({x}, {y}, [=] { y.copy_(f(x, over, keepdim)); });
}

Tensor all_of(const Tensor& x, at::IntArrayRef dims, bool keepdim) {
    return at::all(x, at::OptionalIntArrayRef(dims), keepdim);
}
Tensor any_of(const Tensor& x, at::IntArrayRef dims, bool keepdim) {
    return at::any(x, at::OptionalIntArrayRef(dims), keepdim);
}

}  // namespace

#define REDUCTION(name, expression)                                                               \
    ACLNN(aclnn##name,                                                                            \
          (const aclTensor* self, const aclIntArray* dims, bool keepdim, const aclTensor* out), { \
              return reduce(self, dims, keepdim, out,                                             \
                            [](const Tensor& x, at::IntArrayRef over, bool keep) -> Tensor {      \
                                return expression;                                                \
                            });                                                                   \
          })

#define TYPED_REDUCTION(name, expression)                                                    \
    ACLNN(aclnn##name,                                                                       \
          (const aclTensor* self, const aclIntArray* dims, bool keepdim, aclDataType,        \
           const aclTensor* out),                                                            \
          {                                                                                  \
              return reduce(self, dims, keepdim, out,                                        \
                            [](const Tensor& x, at::IntArrayRef over, bool keep) -> Tensor { \
                                return expression;                                           \
                            });                                                              \
          })

REDUCTION(Amax, x.amax(over, keep))
REDUCTION(Amin, x.amin(over, keep))
REDUCTION(All, all_of(x, over, keep))
REDUCTION(Any, any_of(x, over, keep))
REDUCTION(LogSumExp, x.logsumexp(over, keep))
TYPED_REDUCTION(ReduceSum, x.sum(over, keep))
TYPED_REDUCTION(Mean, x.to(at::kFloat).mean(over, keep))

ACLNN(aclnnMax, (const aclTensor* self, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.max()); });
})

ACLNN(aclnnMin, (const aclTensor* self, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.min()); });
})

ACLNN(aclnnMaxDim,
      (const aclTensor* self, int64_t dim, bool keepdim, const aclTensor* out,
       const aclTensor* indices),
      {
          Tensor x = view(self), y = view(out), i = view(indices);
          return plan({x}, {y, i}, [=] {
              auto [values, places] = x.max(dim, keepdim);
              y.copy_(values);
              i.copy_(places);
          });
      })

ACLNN(aclnnMinDim,
      (const aclTensor* self, int64_t dim, bool keepdim, const aclTensor* out,
       const aclTensor* indices),
      {
          Tensor x = view(self), y = view(out), i = view(indices);
          return plan({x}, {y, i}, [=] {
              auto [values, places] = x.min(dim, keepdim);
              y.copy_(values);
              i.copy_(places);
          });
      })

ACLNN(aclnnArgMax, (const aclTensor* self, int64_t dim, bool keepdim, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.argmax(dim, keepdim).view(y.sizes())); });
})

ACLNN(aclnnArgMin, (const aclTensor* self, int64_t dim, bool keepdim, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.argmin(dim, keepdim).view(y.sizes())); });
})

ACLNN(aclnnCumsum, (const aclTensor* self, int64_t dim, aclDataType, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.cumsum(dim)); });
})

ACLNN(aclnnProd, (const aclTensor* self, aclDataType, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.prod()); });
})

ACLNN(aclnnSoftmax, (const aclTensor* self, int64_t dim, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.softmax(dim)); });
})

ACLNN(aclnnLogSoftmax, (const aclTensor* self, int64_t dim, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.log_softmax(dim)); });
})

ACLNN(aclnnBincount,
      (const aclTensor* self, const aclTensor* weights, int64_t minlength, const aclTensor* out), {
          Tensor x = view(self), w = view(weights), y = view(out);
          return plan({x, w}, {y}, [=] {
              y.copy_(at::bincount(x, w.defined() ? std::optional(w) : std::nullopt, minlength));
          });
      })

ACLNN(aclnnHistc,
      (const aclTensor* self, int64_t bins, const aclScalar* low, const aclScalar* high,
       const aclTensor* out),
      {
          Tensor x = view(self), y = view(out);
          return plan({x}, {y}, [=, a = low->value, b = high->value] {
              y.copy_(at::histc(x.to(at::kFloat), bins, a, b));
          });
      })
