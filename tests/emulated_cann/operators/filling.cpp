// Filling, padding, copying and casting; random numbers.
#include <ATen/CPUGeneratorImpl.h>

#include "aclnn.h"

using emulated::plan;
using emulated::require;
using emulated::Tensor;
using emulated::view;

ACLNN(aclnnInplaceCopy, (const aclTensor* self, const aclTensor* source), {
    Tensor x = view(self), y = view(source);
    return plan({y}, {x}, [=] { x.copy_(y); });
})

ACLNN(aclnnCast, (const aclTensor* self, aclDataType, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x); });
})

ACLNN(aclnnInplaceFillScalar, (const aclTensor* self, const aclScalar* value), {
    Tensor x = view(self);
    return plan({}, {x}, [=, v = value->value] { x.fill_(v); });
})

ACLNN(aclnnInplaceFillTensor, (const aclTensor* self, const aclTensor* value), {
    Tensor x = view(self), v = view(value);
    return plan({v}, {x}, [=] { x.copy_(v.expand_as(x)); });
})

ACLNN(aclnnInplaceZero, (const aclTensor* self), {
    Tensor x = view(self);
    return plan({}, {x}, [=] { x.zero_(); });
})

ACLNN(aclnnInplaceOne, (const aclTensor* self), {
    Tensor x = view(self);
    return plan({}, {x}, [=] { x.fill_(1); });
})

ACLNN(aclnnInplaceMaskedFillScalar,
      (const aclTensor* self, const aclTensor* mask, const aclScalar* value), {
          Tensor x = view(self), m = view(mask);
          return plan({x, m}, {x}, [=, v = value->value] { x.masked_fill_(m, v); });
      })

ACLNN(aclnnInplaceMaskedFillTensor,
      (const aclTensor* self, const aclTensor* mask, const aclTensor* value), {
          Tensor x = view(self), m = view(mask), v = view(value);
          return plan({x, m}, {x}, [=] { x.masked_fill_(m, v.reshape({})); });
      })

ACLNN(aclnnArange,
      (const aclScalar* start, const aclScalar* end, const aclScalar* step, const aclTensor* out), {
          Tensor x = view(out);
          return plan({}, {x}, [=, a = start->value, b = end->value, c = step->value] {
              x.copy_(at::arange(a, b, c));
          });
      })

ACLNN(aclnnRange,
      (const aclScalar* start, const aclScalar* end, const aclScalar* step, const aclTensor* out), {
          Tensor x = view(out);
          return plan({}, {x}, [=, a = start->value, b = end->value, c = step->value] {
              x.copy_(at::range(a, b, c));
          });
      })

ACLNN(aclnnLinspace,
      (const aclScalar* start, const aclScalar* end, int64_t steps, const aclTensor* out), {
          Tensor x = view(out);
          return plan({}, {x}, [=, a = start->value, b = end->value] {
              x.copy_(at::linspace(a, b, steps));
          });
      })

ACLNN(aclnnEye, (int64_t rows, int64_t columns, const aclTensor* out), {
    Tensor x = view(out);
    return plan({}, {x}, [=] { x.copy_(at::eye(rows, columns)); });
})

ACLNN(aclnnTriu, (const aclTensor* self, int64_t diagonal, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.triu(diagonal)); });
})

ACLNN(aclnnTril, (const aclTensor* self, int64_t diagonal, const aclTensor* out), {
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] { y.copy_(x.tril(diagonal)); });
})

ACLNN(aclnnConstantPadNd,
      (const aclTensor* self, const aclIntArray* pad, const aclScalar* value, const aclTensor* out), {
          Tensor x = view(self), y = view(out);
          return plan({x}, {y}, [=, by = pad->values, v = value->value] {
              y.copy_(at::constant_pad_nd(x, by, v));
          });
      })

// Random numbers are a function of (seed, offset), as on a card, but not the card's.

namespace {

at::Generator generator(int64_t seed, int64_t offset) {
    return at::detail::createCPUGenerator(static_cast<uint64_t>(seed) * 1000003 +
                                          static_cast<uint64_t>(offset));
}

}  // namespace

ACLNN(aclnnInplaceUniform,
      (const aclTensor* self, double low, double high, int64_t seed, int64_t offset), {
          Tensor x = view(self);
          return plan({}, {x}, [=] { x.uniform_(low, high, generator(seed, offset)); });
      })

ACLNN(aclnnInplaceNormal,
      (const aclTensor* self, float mean, float deviation, int64_t seed, int64_t offset), {
          Tensor x = view(self);
          return plan({}, {x}, [=] { x.normal_(mean, deviation, generator(seed, offset)); });
      })

ACLNN(aclnnInplaceRandom,
      (const aclTensor* self, int64_t low, int64_t high, int64_t seed, int64_t offset), {
          Tensor x = view(self);
          return plan({}, {x}, [=] { x.random_(low, high, generator(seed, offset)); });
      })

ACLNN(aclnnSimThreadExponential,
      (const aclTensor* self, int64_t, double rate, int64_t seed, int64_t offset), {
          Tensor x = view(self);
          return plan({}, {x}, [=] { x.exponential_(rate, generator(seed, offset)); });
      })

ACLNN(aclnnMultinomial,
      (const aclTensor* self, int64_t num_samples, bool replacement, int64_t seed, int64_t offset,
       const aclTensor* out),
      {
          Tensor x = view(self), y = view(out);
          return plan({x}, {y}, [=] {
              y.copy_(at::multinomial(x, num_samples, replacement, generator(seed, offset)));
          });
      })
