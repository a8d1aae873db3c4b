// Matrix products on the cube units, with ordinary and with FRACTAL_NZ weights.
#include "aclnn.h"

using emulated::Plan;
using emulated::require;
using emulated::Tensor;
using emulated::view;

namespace {

// FRACTAL_NZ stores a matrix [R, C] as [C / c0, R / 16, 16, c0], padded with zeros. It is laid out
// for the untransposed matrix; strides of the descriptor may say that the caller passes its
// transpose.
Tensor untiled(const aclTensor* tensor) {
    auto type = tensor->dtype();
    const auto& tiles = tensor->storage_sizes;
    require(tiles.size() == 4, "FRACTAL_NZ: a matrix has a storage of four dimensions");
    bool is_transposed = tensor->dim() == 2 && tensor->strides[0] == 1 && tensor->strides[1] != 1;
    int64_t rows = tensor->size(is_transposed ? 1 : 0),
            columns = tensor->size(is_transposed ? 0 : 1);
    Tensor stored = at::from_blob(tensor->address, tiles, at::TensorOptions().dtype(type));
    Tensor matrix =
        stored.permute({1, 2, 0, 3}).reshape({tiles[1] * tiles[2], tiles[0] * tiles[3]});
    matrix = matrix.slice(0, 0, rows).slice(1, 0, columns);
    return is_transposed ? matrix.t() : matrix;
}

// Read an operand when the product runs, not when it is planned.
std::function<Tensor()> reader(const aclTensor* tensor) {
    if (!tensor->is_tiled()) return [x = view(tensor)] { return x; };
    return [copy = *tensor] { return untiled(&copy); };
}

void check(const aclTensor* a, const aclTensor* b) {
    require(a->dtype() == b->dtype(), "both operands of a matrix product have one dtype");
    bool is_float =
        a->data_type == ACL_FLOAT16 || a->data_type == ACL_BF16 || a->data_type == ACL_FLOAT;
    require(is_float, "a matrix product takes float16, bfloat16 or float32");
    require(!a->is_tiled(), "only the weight, the second operand, may be FRACTAL_NZ");
}

emulated::Cost cost_of(const aclTensor* a, const aclTensor* b, const aclTensor* out) {
    emulated::Cost cost;
    double size = static_cast<double>(c10::elementSize(a->dtype()));
    cost.bytes = size * (a->numel() + b->numel() + out->numel());
    double flops = 2.0 * out->numel() * a->size(-1);
    (a->data_type == ACL_FLOAT ? cost.float_flops : cost.half_flops) = flops;
    return cost;
}

Plan product(const aclTensor* a, const aclTensor* b, const aclTensor* out) {
    check(a, b);
    Tensor z = view(out);
    return {
        [read_a = reader(a), read_b = reader(b), z] { z.copy_(at::matmul(read_a(), read_b())); },
        {z},
        cost_of(a, b, out)};
}

Plan sum_with_product(const aclTensor* c, const aclTensor* a, const aclTensor* b,
                      const aclScalar* beta, const aclScalar* alpha, const aclTensor* out) {
    check(a, b);
    Tensor base = view(c), z = view(out);
    auto compute = [read_a = reader(a), read_b = reader(b), base, z, x = beta->value,
                    y = alpha->value] {
        Tensor result = at::matmul(read_a(), read_b()).mul(y);
        z.copy_(x.toDouble() == 0 ? result : base.mul(x).add(result));
    };
    return {compute, {z}, cost_of(a, b, out)};
}

}  // namespace

ACLNN(aclnnMm, (const aclTensor* a, const aclTensor* b, const aclTensor* out, int8_t),
      { return product(a, b, out); })
ACLNN(aclnnMatmul, (const aclTensor* a, const aclTensor* b, const aclTensor* out, int8_t),
      { return product(a, b, out); })
ACLNN(aclnnBatchMatMul, (const aclTensor* a, const aclTensor* b, const aclTensor* out, int8_t),
      { return product(a, b, out); })
ACLNN(aclnnMatmulWeightNz, (const aclTensor* a, const aclTensor* b, const aclTensor* out, int8_t),
      { return product(a, b, out); })

ACLNN(aclnnAddmm,
      (const aclTensor* c, const aclTensor* a, const aclTensor* b, const aclScalar* beta,
       const aclScalar* alpha, const aclTensor* out, int8_t),
      { return sum_with_product(c, a, b, beta, alpha, out); })
ACLNN(aclnnAddmmWeightNz,
      (const aclTensor* c, const aclTensor* a, const aclTensor* b, const aclScalar* beta,
       const aclScalar* alpha, const aclTensor* out, int8_t),
      { return sum_with_product(c, a, b, beta, alpha, out); })
ACLNN(aclnnBaddbmm,
      (const aclTensor* c, const aclTensor* a, const aclTensor* b, const aclScalar* beta,
       const aclScalar* alpha, const aclTensor* out, int8_t),
      { return sum_with_product(c, a, b, beta, alpha, out); })
