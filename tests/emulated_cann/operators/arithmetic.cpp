// Element by element: functions and arithmetic.
#include "elementwise.h"

using emulated::plan;
using emulated::Tensor;
using emulated::view;

UNARY(Abs, x.abs())
UNARY(BitwiseNot, x.bitwise_not())
UNARY(Ceil, x.ceil())
UNARY(Cos, x.cos())
UNARY(Erf, x.erf())
UNARY(Exp, x.exp())
UNARY(Floor, x.floor())
UNARY(Log, x.log())
UNARY(LogicalNot, x.logical_not())
UNARY(Neg, x.neg())
UNARY(Reciprocal, x.reciprocal())
UNARY(Relu, x.relu())
UNARY(Round, x.round())
UNARY(Rsqrt, x.rsqrt())
UNARY(Sigmoid, x.sigmoid())
UNARY(Sign, x.sign())
UNARY(Silu, at::silu(x))
UNARY(Sin, x.sin())
UNARY(Sqrt, x.sqrt())
UNARY(Tanh, x.tanh())
UNARY(Trunc, x.trunc())
UNARY(Gelu, at::gelu(x, "tanh"))  // on a card, too, this is the approximation
UNARY(IsFinite, x.isfinite())
UNARY(IsInf, x.isinf())
UNARY(IsPosInf, x.isposinf())
UNARY(IsNegInf, x.isneginf())

BINARY(Mul, x.mul(y))
BINARY(Div, x.div(y))
BINARY(Maximum, x.maximum(y))
BINARY(Minimum, x.minimum(y))
BINARY(PowTensorTensor, x.pow(y))
BINARY(RemainderTensorTensor, x.remainder(y))
BINARY(FmodTensor, x.fmod(y))
BINARY(FloorDivide, at::div(x, y, "floor"))
BINARY(LogicalAnd, x.logical_and(y))
BINARY(LogicalOr, x.logical_or(y))
BINARY(LogicalXor, x.logical_xor(y))
BINARY(BitwiseAndTensor, x.bitwise_and(y))
BINARY(BitwiseOrTensor, x.bitwise_or(y))
BINARY(BitwiseXorTensor, x.bitwise_xor(y))

WITH_SCALAR(Muls, x.mul(y))
WITH_SCALAR(Divs, x.div(y))
WITH_SCALAR(PowTensorScalar, x.pow(y))
WITH_SCALAR(RemainderTensorScalar, x.remainder(y))
WITH_SCALAR(FmodScalar, x.fmod(y))
WITH_SCALAR(FloorDivides, at::div(x, y, "floor"))
WITH_SCALAR(BitwiseAndScalar, x.bitwise_and(y))
WITH_SCALAR(BitwiseOrScalar, x.bitwise_or(y))
WITH_SCALAR(BitwiseXorScalar, x.bitwise_xor(y))
WITH_SCALAR(ClampMin, x.clamp_min(y))
WITH_SCALAR(ClampMax, x.clamp_max(y))

BINARY(EqTensor, x.eq(y))
BINARY(NeTensor, x.ne(y))
BINARY(LtTensor, x.lt(y))
BINARY(LeTensor, x.le(y))
BINARY(GtTensor, x.gt(y))
BINARY(GeTensor, x.ge(y))
WITH_SCALAR(EqScalar, x.eq(y))
WITH_SCALAR(NeScalar, x.ne(y))
WITH_SCALAR(LtScalar, x.lt(y))
WITH_SCALAR(LeScalar, x.le(y))
WITH_SCALAR(GtScalar, x.gt(y))
WITH_SCALAR(GeScalar, x.ge(y))

namespace {

// self + alpha * other, or with a negative sign.
emulated::Plan add(const aclTensor* self, const aclTensor* other, const aclScalar* alpha,
                   const aclTensor* out, bool minus) {
    Tensor x = view(self), y = view(other), z = view(out);
    return plan({x, y}, {z}, [=, a = alpha->value] { z.copy_(minus ? x.sub(y, a) : x.add(y, a)); });
}

emulated::Plan adds(const aclTensor* self, const aclScalar* other, const aclScalar* alpha,
                    const aclTensor* out, bool minus) {
    Tensor x = view(self), z = view(out);
    return plan({x}, {z}, [=, y = other->value, a = alpha->value] {
        z.copy_(minus ? x.sub(y, a) : x.add(y, a));
    });
}

const char* rounding_mode(int mode) { return mode == 1 ? "trunc" : "floor"; }

}  // namespace

ACLNN(aclnnAdd,
      (const aclTensor* self, const aclTensor* other, const aclScalar* alpha, const aclTensor* out),
      { return add(self, other, alpha, out, false); })
ACLNN(aclnnSub,
      (const aclTensor* self, const aclTensor* other, const aclScalar* alpha, const aclTensor* out),
      { return add(self, other, alpha, out, true); })
ACLNN(aclnnInplaceAdd, (const aclTensor* self, const aclTensor* other, const aclScalar* alpha),
      { return add(self, other, alpha, self, false); })
ACLNN(aclnnInplaceSub, (const aclTensor* self, const aclTensor* other, const aclScalar* alpha),
      { return add(self, other, alpha, self, true); })
ACLNN(aclnnAdds,
      (const aclTensor* self, const aclScalar* other, const aclScalar* alpha, const aclTensor* out),
      { return adds(self, other, alpha, out, false); })
ACLNN(aclnnSubs,
      (const aclTensor* self, const aclScalar* other, const aclScalar* alpha, const aclTensor* out),
      { return adds(self, other, alpha, out, true); })
ACLNN(aclnnInplaceAdds, (const aclTensor* self, const aclScalar* other, const aclScalar* alpha),
      { return adds(self, other, alpha, self, false); })
ACLNN(aclnnInplaceSubs, (const aclTensor* self, const aclScalar* other, const aclScalar* alpha),
      { return adds(self, other, alpha, self, true); })

// other - alpha * self
ACLNN(aclnnRsubs,
      (const aclTensor* self, const aclScalar* other, const aclScalar* alpha, const aclTensor* out),
      {
          Tensor x = view(self), z = view(out);
          return plan({x}, {z},
                      [=, y = other->value, a = alpha->value] { z.copy_(at::rsub(x, y, a)); });
      })

// scalar + alpha * other, used where the first operand is on the host
ACLNN(aclnnAddV3,
      (const aclScalar* self, const aclTensor* other, const aclScalar* alpha, const aclTensor* out),
      {
          Tensor y = view(other), z = view(out);
          return plan({y}, {z},
                      [=, x = self->value, a = alpha->value] { z.copy_(y.mul(a).add(x)); });
      })

ACLNN(aclnnDivMod, (const aclTensor* self, const aclTensor* other, int mode, const aclTensor* out),
      {
          Tensor x = view(self), y = view(other), z = view(out);
          return plan({x, y}, {z}, [=] { z.copy_(at::div(x, y, rounding_mode(mode))); });
      })

ACLNN(aclnnDivMods, (const aclTensor* self, const aclScalar* other, int mode, const aclTensor* out),
      {
          Tensor x = view(self), z = view(out);
          return plan({x}, {z},
                      [=, y = other->value] { z.copy_(at::div(x, y, rounding_mode(mode))); });
      })

ACLNN(aclnnInplaceDivMods, (const aclTensor* self, const aclScalar* other, int mode), {
    Tensor x = view(self);
    return plan({x}, {x}, [=, y = other->value] { x.copy_(at::div(x, y, rounding_mode(mode))); });
})

ACLNN(aclnnInplaceDivMod, (const aclTensor* self, const aclTensor* other, int mode), {
    Tensor x = view(self), y = view(other);
    return plan({x, y}, {x}, [=] { x.copy_(at::div(x, y, rounding_mode(mode))); });
})

ACLNN(aclnnRemainderScalarTensor,
      (const aclScalar* self, const aclTensor* other, const aclTensor* out), {
          Tensor y = view(other), z = view(out);
          return plan({y}, {z}, [=, x = self->value] { z.copy_(at::remainder(x, y)); });
      })

ACLNN(aclnnPowScalarTensor,
      (const aclScalar* self, const aclTensor* exponent, const aclTensor* out), {
          Tensor y = view(exponent), z = view(out);
          return plan({y}, {z}, [=, x = self->value] { z.copy_(at::pow(x, y)); });
      })

// approximate: 0 erf, 1 tanh
ACLNN(aclnnGeluV2, (const aclTensor* self, int64_t approximate, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(at::gelu(x, approximate ? "tanh" : "none")); });
})

ACLNN(aclnnClamp,
      (const aclTensor* self, const aclScalar* low, const aclScalar* high, const aclTensor* out), {
          Tensor x = view(self), y = view(out);
          std::optional<at::Scalar> from, to;
          if (low) from = low->value;
          if (high) to = high->value;
          return plan({x}, {y}, [=] { y.copy_(x.clamp(from, to)); });
      })

ACLNN(aclnnClampTensor,
      (const aclTensor* self, const aclTensor* low, const aclTensor* high, const aclTensor* out), {
          Tensor x = view(self), from = view(low), to = view(high), y = view(out);
          return plan({x, from, to}, {y}, [=] {
              y.copy_(at::clamp(x, from.defined() ? std::optional(from) : std::nullopt,
                                to.defined() ? std::optional(to) : std::nullopt));
          });
      })

BINARY(ClampMinTensor, at::clamp_min(x, y))
BINARY(ClampMaxTensor, at::clamp_max(x, y))

ACLNN(aclnnSWhere,
      (const aclTensor* condition, const aclTensor* self, const aclTensor* other,
       const aclTensor* out),
      {
          Tensor c = view(condition), x = view(self), y = view(other), z = view(out);
          return plan({c, x, y}, {z}, [=] { z.copy_(at::where(c, x, y)); });
      })

ACLNN(aclnnAddcmul,
      (const aclTensor* self, const aclTensor* a, const aclTensor* b, const aclScalar* value,
       const aclTensor* out),
      {
          Tensor x = view(self), y = view(a), z = view(b), o = view(out);
          return plan({x, y, z}, {o}, [=, v = value->value] { o.copy_(at::addcmul(x, y, z, v)); });
      })
