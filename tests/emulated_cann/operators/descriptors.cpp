// Making and destroying the descriptors of aclnn calls.
#include <cstdint>

#include "aclnn.h"

namespace {

at::ScalarType scalar_type(aclDataType type) {
    switch (type) {
        case ACL_FLOAT: return at::kFloat;
        case ACL_FLOAT16: return at::kHalf;
        case ACL_BF16: return at::kBFloat16;
        case ACL_DOUBLE: return at::kDouble;
        case ACL_INT8: return at::kChar;
        case ACL_UINT8: return at::kByte;
        case ACL_INT16: return at::kShort;
        case ACL_INT32: return at::kInt;
        case ACL_INT64: return at::kLong;
        case ACL_BOOL: return at::kBool;
        default:
            throw std::invalid_argument("no emulation of acl data type " + std::to_string(type));
    }
}

at::Scalar scalar(const void* value, aclDataType type) {
    switch (type) {
        case ACL_FLOAT: return *static_cast<const float*>(value);
        case ACL_DOUBLE: return *static_cast<const double*>(value);
        case ACL_FLOAT16: return static_cast<float>(*static_cast<const at::Half*>(value));
        case ACL_BF16: return static_cast<float>(*static_cast<const at::BFloat16*>(value));
        case ACL_INT8: return static_cast<int64_t>(*static_cast<const int8_t*>(value));
        case ACL_UINT8: return static_cast<int64_t>(*static_cast<const uint8_t*>(value));
        case ACL_INT16: return static_cast<int64_t>(*static_cast<const int16_t*>(value));
        case ACL_INT32: return static_cast<int64_t>(*static_cast<const int32_t*>(value));
        case ACL_INT64: return *static_cast<const int64_t*>(value);
        case ACL_BOOL: return *static_cast<const bool*>(value);
        default:
            throw std::invalid_argument("no emulation of a scalar of acl data type " +
                                        std::to_string(type));
    }
}

}  // namespace

at::ScalarType aclTensor::dtype() const { return scalar_type(data_type); }

at::Tensor aclTensor::view() const {
    emulated::require(!is_tiled(), "FRACTAL_NZ is taken by matrix products only");
    auto type = dtype();
    auto* first =
        static_cast<char*>(address) + offset * static_cast<int64_t>(c10::elementSize(type));
    return at::from_blob(first, sizes, strides, at::TensorOptions().dtype(type));
}

int64_t aclTensor::numel() const {
    int64_t product = 1;
    for (int64_t size : sizes) product *= size;
    return product;
}

bool aclTensor::is_contiguous() const {
    int64_t expected = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        if (sizes[i] != 1 && strides[i] != expected) return false;
        expected *= sizes[i];
    }
    return true;
}

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dim, aclDataType type,
                           const int64_t* strides, int64_t offset, aclFormat format,
                           const int64_t* storage_sizes, uint64_t storage_dim, void* address) {
    return new aclTensor{{sizes, sizes + dim},
                         {strides, strides + dim},
                         offset,
                         type,
                         format,
                         {storage_sizes, storage_sizes + storage_dim},
                         address};
}

aclScalar* aclCreateScalar(void* value, aclDataType type) {
    return new aclScalar{scalar(value, type)};
}

aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
    return new aclIntArray{{values, values + size}};
}
aclFloatArray* aclCreateFloatArray(const float* values, uint64_t size) {
    return new aclFloatArray{{values, values + size}};
}
aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) {
    return new aclBoolArray{std::vector<bool>(values, values + size)};
}

aclTensorList* aclCreateTensorList(const aclTensor* const* tensors, uint64_t size) {
    return new aclTensorList{{tensors, tensors + size}};
}

aclScalarList* aclCreateScalarList(const aclScalar* const* scalars, uint64_t size) {
    return new aclScalarList{{scalars, scalars + size}};
}

int aclDestroyTensor(const aclTensor* tensor) { return delete tensor, 0; }
int aclDestroyScalar(const aclScalar* scalar) { return delete scalar, 0; }
int aclDestroyIntArray(const aclIntArray* array) { return delete array, 0; }
int aclDestroyFloatArray(const aclFloatArray* array) { return delete array, 0; }
int aclDestroyBoolArray(const aclBoolArray* array) { return delete array, 0; }

// A list owns what it lists.
int aclDestroyTensorList(const aclTensorList* list) {
    for (const aclTensor* tensor : list->tensors) delete tensor;
    return delete list, 0;
}

int aclDestroyScalarList(const aclScalarList* list) {
    for (const aclScalar* scalar : list->scalars) delete scalar;
    return delete list, 0;
}

}  // extern "C"
