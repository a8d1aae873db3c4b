// Reading and writing by index; joining and repeating. An index out of range is a fault of the
// device, as on a card: ATen throws on the stream's thread.
#include "aclnn.h"

using emulated::plan;
using emulated::Plan;
using emulated::Tensor;
using emulated::view;
using emulated::views;

namespace {

using Indices = c10::List<std::optional<Tensor>>;

// torch_npu passes an empty tensor for a dimension that is not indexed.
Indices indices_of(const aclTensorList* list) {
    Indices indices;
    for (const aclTensor* tensor : list->tensors) {
        bool is_missing = !tensor || (tensor->dim() == 1 && tensor->size(0) == 0);
        indices.push_back(is_missing ? std::nullopt : std::optional(view(tensor)));
    }
    return indices;
}

// Only what is picked moves, not the whole table.
Plan picking(Tensor index, Tensor out, std::function<void()> compute) {
    return plan({std::move(index), out}, {out}, std::move(compute));
}

}  // namespace

ACLNN(aclnnEmbedding, (const aclTensor* weight, const aclTensor* indices, const aclTensor* out), {
    Tensor w = view(weight), i = view(indices), z = view(out);
    return picking(i, z, [=] { z.copy_(at::embedding(w, i)); });
})

ACLNN(aclnnIndexSelect,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* out), {
          Tensor x = view(self), i = view(index), z = view(out);
          return picking(i, z, [=] { z.copy_(at::index_select(x, dim, i)); });
      })

ACLNN(aclnnGather,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* out), {
          Tensor x = view(self), i = view(index), z = view(out);
          return picking(i, z, [=] { z.copy_(at::gather(x, dim, i.to(at::kLong))); });
      })

ACLNN(aclnnIndex, (const aclTensor* self, const aclTensorList* indices, const aclTensor* out), {
    Tensor x = view(self), z = view(out);
    return plan({z}, {z}, [=, all = indices_of(indices)] { z.copy_(at::index(x, all)); });
})

ACLNN(aclnnIndexPutImpl,
      (const aclTensor* self, const aclTensorList* indices, const aclTensor* values,
       bool accumulate, bool),
      {
          Tensor x = view(self), v = view(values);
          return plan({v, v}, {v}, [=, all = indices_of(indices)]() mutable {
              x.index_put_(all, v, accumulate);
          });
      })

ACLNN(aclnnIndexAdd,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* source,
       const aclScalar* alpha, const aclTensor* out),
      {
          Tensor x = view(self), i = view(index), s = view(source), z = view(out);
          return plan({i, s, s}, {s},
                      [=, a = alpha->value] { z.copy_(at::index_add(x, dim, i, s, a)); });
      })

ACLNN(aclnnIndexCopy,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* source,
       const aclTensor* out),
      {
          Tensor x = view(self), i = view(index), s = view(source), z = view(out);
          return plan({x, i, s}, {z}, [=] { z.copy_(at::index_copy(x, dim, i, s)); });
      })

ACLNN(aclnnInplaceIndexCopy,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* source), {
          Tensor x = view(self), i = view(index), s = view(source);
          return plan({i, s}, {s}, [=]() mutable { x.index_copy_(dim, i, s); });
      })

ACLNN(aclnnInplaceIndexFill,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclScalar* value), {
          Tensor x = view(self), i = view(index);
          return plan({i}, {i}, [=, v = value->value]() mutable { x.index_fill_(dim, i, v); });
      })

namespace {

// reduction: 0 replaces, 1 adds, 2 multiplies
void scatter_into(Tensor x, int64_t dim, const Tensor& index, const Tensor& source,
                  int64_t reduction) {
    if (reduction == 0) {
        x.scatter_(dim, index, source);
    } else {
        x.scatter_(dim, index, source, reduction == 1 ? "add" : "multiply");
    }
}

Plan scatter(const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* source,
             int64_t reduction, const aclTensor* out) {
    Tensor x = view(self), i = view(index), s = view(source), z = view(out);
    return plan({x, i, s}, {z}, [=] {
        z.copy_(x);
        scatter_into(z, dim, i, s, reduction);
    });
}

Plan scatter_value(const aclTensor* self, int64_t dim, const aclTensor* index,
                   const aclScalar* value, const aclTensor* out) {
    Tensor x = view(self), i = view(index), z = view(out);
    return plan({x, i}, {z}, [=, v = value->value]() mutable {
        z.copy_(x);
        z.scatter_(dim, i, v);
    });
}

}  // namespace

ACLNN(aclnnScatter,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* source,
       int64_t reduction, const aclTensor* out),
      { return scatter(self, dim, index, source, reduction, out); })
ACLNN(aclnnInplaceScatter,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* source,
       int64_t reduction),
      { return scatter(self, dim, index, source, reduction, self); })
ACLNN(aclnnScatterAdd,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclTensor* source,
       const aclTensor* out),
      { return scatter(self, dim, index, source, 1, out); })
ACLNN(aclnnScatterValue,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclScalar* value, int64_t,
       const aclTensor* out),
      { return scatter_value(self, dim, index, value, out); })
ACLNN(aclnnInplaceScatterValue,
      (const aclTensor* self, int64_t dim, const aclTensor* index, const aclScalar* value, int64_t),
      { return scatter_value(self, dim, index, value, self); })

ACLNN(aclnnCat, (const aclTensorList* tensors, int64_t dim, const aclTensor* out), {
    std::vector<Tensor> all = views(tensors);
    Tensor z = view(out);
    return plan(all, {z}, [=] { z.copy_(at::cat(all, dim)); });
})

ACLNN(aclnnStack, (const aclTensorList* tensors, int64_t dim, const aclTensor* out), {
    std::vector<Tensor> all = views(tensors);
    Tensor z = view(out);
    return plan(all, {z}, [=] { z.copy_(at::stack(all, dim)); });
})

ACLNN(aclnnRepeat, (const aclTensor* self, const aclIntArray* repeats, const aclTensor* out), {
    Tensor x = view(self), z = view(out);
    return plan({x}, {z}, [=, times = repeats->values] { z.copy_(x.repeat(times)); });
})

ACLNN(aclnnRepeatInterleaveIntWithDim,
      (const aclTensor* self, int64_t repeats, int64_t dim, int64_t, const aclTensor* out), {
          Tensor x = view(self), z = view(out);
          return plan({x}, {z}, [=] { z.copy_(x.repeat_interleave(repeats, dim)); });
      })

ACLNN(aclnnFlip, (const aclTensor* self, const aclIntArray* dims, const aclTensor* out), {
    Tensor x = view(self), z = view(out);
    return plan({x}, {z}, [=, over = dims->values] { z.copy_(x.flip(over)); });
})

ACLNN(aclnnOneHot,
      (const aclTensor* self, int64_t depth, const aclTensor* on, const aclTensor* off, int64_t,
       const aclTensor* out),
      {
          Tensor x = view(self), a = view(on), b = view(off), z = view(out);
          return plan({x}, {z},
                      [=] { z.copy_(at::where(at::one_hot(x, depth).to(at::kBool), a, b)); });
      })
