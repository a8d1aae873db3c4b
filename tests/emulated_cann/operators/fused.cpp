// Fused operators of a decoder layer: norms, rotary embedding, gated activations.
//
// Semantics and limits: op-plugin, docs/zh/custom_APIs/torch_npu/. All compute in float32 inside.
#include <algorithm>

#include "aclnn.h"

using emulated::plan;
using emulated::require;
using emulated::Tensor;
using emulated::view;

namespace {

bool is_float(const aclTensor* tensor) {
    return tensor->data_type == ACL_FLOAT16 || tensor->data_type == ACL_BF16 ||
           tensor->data_type == ACL_FLOAT;
}

void check_norm(const aclTensor* x, const aclTensor* gamma) {
    require(is_float(x), "rms_norm takes float16, bfloat16 or float32");
    require(gamma->data_type == x->data_type || gamma->data_type == ACL_FLOAT,
            "gamma has the dtype of x, or float32");
    require(gamma->dim() <= x->dim(), "gamma has the last dimensions of x");
    bool fits = std::equal(gamma->sizes.rbegin(), gamma->sizes.rend(), x->sizes.rbegin());
    require(fits, "gamma has the last dimensions of x");
}

// x / rms(x) * gamma over the dimensions of gamma; rstd is written as well.
Tensor normalize(const Tensor& x, const Tensor& gamma, double epsilon, const Tensor& rstd) {
    Tensor wide = x.to(at::kFloat);
    std::vector<int64_t> dims;
    for (int64_t dim = x.dim() - gamma.dim(); dim < x.dim(); ++dim) dims.push_back(dim);
    Tensor scale = at::rsqrt(wide.square().mean(dims, /*keepdim=*/true).add(epsilon));
    rstd.copy_(scale.view(rstd.sizes()));
    return wide.mul(scale).mul(gamma.to(at::kFloat));
}

}  // namespace

ACLNN(aclnnRmsNorm,
      (const aclTensor* self, const aclTensor* gamma, double epsilon, const aclTensor* out,
       const aclTensor* rstd),
      {
          check_norm(self, gamma);
          Tensor x = view(self), w = view(gamma), y = view(out), r = view(rstd);
          return plan({x, w}, {y, r}, [=] { y.copy_(normalize(x, w, epsilon, r)); });
      })

// The sum, the third output, is the new residual. It is rounded to the dtype before the norm.
ACLNN(aclnnAddRmsNorm,
      (const aclTensor* x1, const aclTensor* x2, const aclTensor* gamma, double epsilon,
       const aclTensor* out, const aclTensor* rstd, const aclTensor* sum),
      {
          check_norm(x1, gamma);
          require(x1->data_type == x2->data_type && x1->sizes == x2->sizes,
                  "x1 and x2 have one dtype and shape");
          require(gamma->data_type == x1->data_type, "gamma has the dtype of x1");
          Tensor a = view(x1), b = view(x2), w = view(gamma), y = view(out), r = view(rstd),
                 s = view(sum);
          return plan({a, b, w}, {y, r, s}, [=] {
              s.copy_(a.add(b));
              y.copy_(normalize(s, w, epsilon, r));
          });
      })

ACLNN(aclnnLayerNorm,
      (const aclTensor* self, const aclIntArray* shape, const aclTensor* weight,
       const aclTensor* bias, double epsilon, const aclTensor* out, const aclTensor* mean,
       const aclTensor* rstd),
      {
          require(is_float(self), "layer_norm takes float16, bfloat16 or float32");
          Tensor x = view(self), w = view(weight), b = view(bias), y = view(out), m = view(mean),
                 r = view(rstd);
          return plan({x, w, b}, {y, m, r}, [=, dims = shape->values] {
              auto widened = [](const Tensor& part) {
                  return part.defined() ? std::optional(part.to(at::kFloat)) : std::nullopt;
              };
              auto [normed, means, scales] =
                  at::native_layer_norm(x.to(at::kFloat), dims, widened(w), widened(b), epsilon);
              y.copy_(normed);
              if (m.defined()) m.copy_(means.view(m.sizes()));
              if (r.defined()) r.copy_(scales.view(r.sizes()));
          });
      })

ACLNN(aclnnSwiGlu, (const aclTensor* self, int64_t dim, const aclTensor* out), {
    require(is_float(self), "swiglu takes float16, bfloat16 or float32");
    require(self->is_contiguous(), "swiglu takes a contiguous tensor");
    require(self->size(dim) % 2 == 0, "swiglu halves a dimension of even size");
    Tensor x = view(self), y = view(out);
    return plan({x}, {y}, [=] {
        std::vector<Tensor> halves = x.to(at::kFloat).chunk(2, dim);
        y.copy_(at::silu(halves[0]).mul(halves[1]));
    });
})

namespace {

constexpr int64_t kHalf = 0;
constexpr int64_t kInterleave = 1;
constexpr int64_t kMaxRotaryDim = 896;

Tensor rotate(const Tensor& x, int64_t mode) {
    if (mode == kHalf) {
        std::vector<Tensor> halves = x.chunk(2, -1);
        return at::cat({halves[1].neg(), halves[0]}, -1);
    }
    Tensor even = x.slice(-1, 0, std::nullopt, 2), odd = x.slice(-1, 1, std::nullopt, 2);
    return at::stack({odd.neg(), even}, -1).flatten(-2);
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode) {
    Tensor wide = x.to(at::kFloat);
    return wide.mul(cos.to(at::kFloat)).add(rotate(wide, mode).mul(sin.to(at::kFloat)));
}

void check_rotary(const aclTensor* x, const aclTensor* cos, const aclTensor* sin, int64_t mode) {
    require(is_float(x), "rotary_mul takes float16, bfloat16 or float32");
    require(cos->data_type == x->data_type && sin->data_type == x->data_type,
            "rotary_mul: cos and sin have the dtype of x");
    require(mode == kHalf || mode == kInterleave, "rotary_mode is 'half' or 'interleave'");
    require(x->dim() == 4 || x->dim() == 3, "rotary_mul takes three or four dimensions");
    require(cos->dim() == x->dim() && cos->sizes == sin->sizes,
            "cos and sin have as many dimensions as x, and one shape");
    require(cos->size(-1) == x->size(-1), "cos and sin are as wide as x");
    require(x->size(-1) % 2 == 0 && x->size(-1) < kMaxRotaryDim,
            "rotary_mul: the head dim is even and below 896");
    for (int64_t dim = 0; dim < x->dim() - 1; ++dim) {
        require(cos->size(dim) == 1 || cos->size(dim) == x->size(dim),
                "cos and sin have the sizes of x, or 1");
    }
}

}  // namespace

ACLNN(aclnnRotaryPositionEmbedding,
      (const aclTensor* self, const aclTensor* cos, const aclTensor* sin, int64_t mode,
       const aclTensor* out),
      {
          check_rotary(self, cos, sin, mode);
          Tensor x = view(self), c = view(cos), s = view(sin), y = view(out);
          return plan({x, c, s}, {y}, [=] { y.copy_(rotary(x, c, s, mode)); });
      })

namespace {

// cos and sin of each token: [tokens, 1, rotary_dim], the half repeated as the mode wants it.
Tensor spread(const Tensor& half, bool is_neox) {
    Tensor full = is_neox ? at::cat({half, half}, -1) : half.repeat_interleave(2, -1);
    return full.unsqueeze(1);
}

void rotate_heads(const Tensor& x, const Tensor& cos_sin, int64_t head_size, bool is_neox,
                  const Tensor& out) {
    std::vector<Tensor> halves = cos_sin.chunk(2, -1);
    int64_t rotary_dim = cos_sin.size(-1);
    Tensor heads = x.reshape({x.size(0), -1, head_size});
    Tensor turned = rotary(heads.slice(-1, 0, rotary_dim), spread(halves[0], is_neox),
                           spread(halves[1], is_neox), is_neox ? kHalf : kInterleave);
    out.copy_(
        at::cat({turned.to(x.scalar_type()), heads.slice(-1, rotary_dim)}, -1).view(out.sizes()));
}

emulated::Plan rope_with_cache(const aclTensor* positions, const aclTensor* query,
                               const aclTensor* key, const aclTensor* cos_sin_cache,
                               const aclIntArray* sections, int64_t head_size, bool is_neox,
                               const aclTensor* query_out, const aclTensor* key_out) {
    require(positions->dim() == 1, "npu_mrope: only one-dimensional positions are emulated");
    bool has_sections = sections && std::any_of(sections->values.begin(), sections->values.end(),
                                                [](int64_t size) { return size != 0; });
    require(!has_sections, "npu_mrope: mrope_section is not emulated");
    require(query->dim() == 2 && key->dim() == 2,
            "npu_mrope takes query and key [tokens, heads * head_size]");
    require(query->data_type == key->data_type && query->data_type == cos_sin_cache->data_type,
            "npu_mrope: query, key and cos_sin_cache have one dtype");
    int64_t multiple = query->data_type == ACL_FLOAT ? 16 : 32;
    int64_t rotary_dim = cos_sin_cache->size(-1);
    require(head_size % multiple == 0 && rotary_dim % multiple == 0 && rotary_dim <= head_size,
            "npu_mrope: head_size and rotary_dim are multiples of " + std::to_string(multiple) +
                ", rotary_dim <= head_size");
    Tensor p = view(positions), q = view(query), k = view(key), table = view(cos_sin_cache);
    Tensor new_q = view(query_out), new_k = view(key_out);
    return plan({p, q, k}, {new_q, new_k}, [=] {
        Tensor cos_sin = table.index_select(0, p);
        rotate_heads(q, cos_sin, head_size, is_neox, new_q);
        rotate_heads(k, cos_sin, head_size, is_neox, new_k);
    });
}

}  // namespace

ACLNN(aclnnRopeWithSinCosCache,
      (const aclTensor* positions, const aclTensor* query, const aclTensor* key,
       const aclTensor* cos_sin_cache, const aclIntArray* sections, int64_t head_size, bool is_neox,
       const aclTensor* query_out, const aclTensor* key_out),
      {
          return rope_with_cache(positions, query, key, cos_sin_cache, sections, head_size, is_neox,
                                 query_out, key_out);
      })
