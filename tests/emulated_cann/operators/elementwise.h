// Forms that many operators share, so that each operator is one line.
#pragma once
#include "aclnn.h"

namespace emulated {

using Unary = Tensor (*)(const Tensor&);
using Binary = Tensor (*)(const Tensor&, const Tensor&);
using WithScalar = Tensor (*)(const Tensor&, const at::Scalar&);

inline Plan unary(const aclTensor* self, const aclTensor* out, Unary f) {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(f(x)); });
}

inline Plan binary(const aclTensor* self, const aclTensor* other, const aclTensor* out, Binary f) {
    Tensor x = view(self), y = view(other), z = view(out);
    return plan({x, y}, {z}, [=] { z.copy_(f(x, y)); });
}

inline Plan with_scalar(const aclTensor* self, const aclScalar* other, const aclTensor* out,
                        WithScalar f) {
    Tensor x = view(self), z = view(out);
    return plan({x}, {z}, [=, y = other->value] { z.copy_(f(x, y)); });
}

}  // namespace emulated

// aclnnX(self, out) and aclnnInplaceX(self), an expression of x.
#define UNARY(name, expression)                                                               \
    ACLNN(aclnn##name, (const aclTensor* self, const aclTensor* out), {                       \
        return emulated::unary(self, out,                                                     \
                               [](const at::Tensor& x) -> at::Tensor { return expression; }); \
    })                                                                                        \
    ACLNN(aclnnInplace##name, (const aclTensor* self), {                                      \
        return emulated::unary(self, self,                                                    \
                               [](const at::Tensor& x) -> at::Tensor { return expression; }); \
    })

// aclnnX(self, other, out) and aclnnInplaceX(self, other), an expression of x and y.
#define BINARY(name, expression)                                                                \
    ACLNN(aclnn##name, (const aclTensor* self, const aclTensor* other, const aclTensor* out), { \
        return emulated::binary(                                                                \
            self, other, out,                                                                   \
            [](const at::Tensor& x, const at::Tensor& y) -> at::Tensor { return expression; }); \
    })                                                                                          \
    ACLNN(aclnnInplace##name, (const aclTensor* self, const aclTensor* other), {                \
        return emulated::binary(                                                                \
            self, other, self,                                                                  \
            [](const at::Tensor& x, const at::Tensor& y) -> at::Tensor { return expression; }); \
    })

// The same where the other operand is a scalar of the host.
#define WITH_SCALAR(name, expression)                                                           \
    ACLNN(aclnn##name, (const aclTensor* self, const aclScalar* other, const aclTensor* out), { \
        return emulated::with_scalar(                                                           \
            self, other, out,                                                                   \
            [](const at::Tensor& x, const at::Scalar& y) -> at::Tensor { return expression; }); \
    })                                                                                          \
    ACLNN(aclnnInplace##name, (const aclTensor* self, const aclScalar* other), {                \
        return emulated::with_scalar(                                                           \
            self, other, self,                                                                  \
            [](const at::Tensor& x, const at::Scalar& y) -> at::Tensor { return expression; }); \
    })
