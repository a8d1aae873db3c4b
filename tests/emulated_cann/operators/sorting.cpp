// Sorting and searching.
#include "aclnn.h"

using emulated::plan;
using emulated::Tensor;
using emulated::view;

ACLNN(aclnnSort,
      (const aclTensor* self, bool, int64_t dim, bool descending, const aclTensor* values,
       const aclTensor* indices),
      {
          Tensor x = view(self), v = view(values), i = view(indices);
          return plan({x}, {v, i}, [=] {
              auto [sorted, places] = at::sort(x, /*stable=*/std::optional(true), dim, descending);
              v.copy_(sorted);
              i.copy_(places);
          });
      })

ACLNN(aclnnTopk,
      (const aclTensor* self, int64_t k, int64_t dim, bool largest, bool is_sorted,
       const aclTensor* values, const aclTensor* indices),
      {
          Tensor x = view(self), v = view(values), i = view(indices);
          return plan({x}, {v, i}, [=] {
              auto [top, places] = at::topk(x, k, dim, largest, is_sorted);
              v.copy_(top);
              i.copy_(places);
          });
      })

namespace {

emulated::Plan search(Tensor sorted, Tensor values, bool right, Tensor out) {
    return plan({values, out}, {out},
                [=] { out.copy_(at::searchsorted(sorted, values, /*out_int32=*/false, right)); });
}

}  // namespace

ACLNN(aclnnSearchSorted,
      (const aclTensor* sorted, const aclTensor* self, bool, bool right, const aclTensor* sorter,
       const aclTensor* out),
      {
          emulated::require(!sorter, "searchsorted with a sorter is not emulated");
          return search(view(sorted), view(self), right, view(out));
      })

ACLNN(aclnnSearchSorteds,
      (const aclTensor* sorted, const aclScalar* self, bool, bool right, const aclTensor* sorter,
       const aclTensor* out),
      {
          emulated::require(!sorter, "searchsorted with a sorter is not emulated");
          return search(view(sorted), at::scalar_tensor(self->value, view(sorted).scalar_type()),
                        right, view(out));
      })
