// The acl API of old: operators by name. torch_npu falls back to it for what has no aclnn function;
// only what the change of a matrix between ND and FRACTAL_NZ needs is emulated.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "errors.h"
#include "launch.h"

struct aclTensorDesc {
    aclDataType data_type;
    std::vector<int64_t> sizes;
    aclFormat storage_format;
};

struct aclDataBuffer {
    void* address;
    size_t size;
};

struct aclopAttr {};

using namespace emulated;

namespace {

// Element (row, column) of a tiled matrix, [C / c0, R / 16, 16, c0] with tiles of 16 x 32 bytes.
struct Tiling {
    static constexpr size_t kRows = 16;
    static constexpr size_t kRowBytes = 32;

    size_t rows, element_size;

    size_t offset(size_t row, size_t column) const {
        size_t columns = element_size > 2 ? kRowBytes / 2 : kRowBytes / element_size;
        size_t padded_rows = (rows + kRows - 1) / kRows * kRows;
        return ((column / columns) * padded_rows + row) * columns + column % columns;
    }
};

void change_format(const char* from, bool from_tiled, char* to, size_t to_size, size_t columns,
                   Tiling tiling) {
    if (!from_tiled) std::memset(to, 0, to_size);
    for (size_t row = 0; row < tiling.rows; ++row) {
        for (size_t column = 0; column < columns; ++column) {
            size_t plain = (row * columns + column) * tiling.element_size;
            size_t tiled = tiling.offset(row, column) * tiling.element_size;
            std::memcpy(to + (from_tiled ? plain : tiled), from + (from_tiled ? tiled : plain),
                        tiling.element_size);
        }
    }
}

// A copy; where the two descriptions name different formats, a change of format.
Task transfer_task(const aclTensorDesc& input, const aclDataBuffer& from,
                   const aclTensorDesc& output, const aclDataBuffer& to) {
    bool from_tiled = input.storage_format == ACL_FORMAT_FRACTAL_NZ;
    bool to_tiled = output.storage_format == ACL_FORMAT_FRACTAL_NZ;
    if (from_tiled != to_tiled && input.sizes.size() != 2) {
        throw Refusal{ACL_ERROR_UNSUPPORTED_DATA_TYPE,
                      "a change between ND and FRACTAL_NZ is emulated for matrices"};
    }
    Task task{"TransData"};
    task.cost.bytes = static_cast<double>(from.size + to.size);
    auto* source = static_cast<const char*>(from.address);
    auto* target = static_cast<char*>(to.address);
    if (from_tiled == to_tiled) {
        task.run = [=, size = std::min(from.size, to.size)](Timeline&) {
            std::memcpy(target, source, size);
        };
        return task;
    }
    size_t rows = input.sizes[0], columns = input.sizes[1],
           element_size = aclDataTypeSize(input.data_type);
    task.run = [=, size = to.size](Timeline&) {
        change_format(source, from_tiled, target, size, columns, {rows, element_size});
    };
    return task;
}

}  // namespace

extern "C" {

size_t aclDataTypeSize(aclDataType type) {
    switch (type) {
        case ACL_FLOAT16:
        case ACL_BF16:
        case ACL_INT16: return 2;
        case ACL_INT8:
        case ACL_UINT8:
        case ACL_BOOL: return 1;
        case ACL_INT64:
        case ACL_DOUBLE: return 8;
        default: return 4;
    }
}

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int num_dims, const int64_t* dims,
                                   aclFormat format) {
    return new aclTensorDesc{type, {dims, dims + num_dims}, format};
}

void aclDestroyTensorDesc(const aclTensorDesc* description) { delete description; }
void aclSetTensorDescName(aclTensorDesc*, const char*) {}
aclDataType aclGetTensorDescType(const aclTensorDesc* description) {
    return description->data_type;
}
aclFormat aclGetTensorDescFormat(const aclTensorDesc* description) {
    return description->storage_format;
}
size_t aclGetTensorDescNumDims(const aclTensorDesc* description) {
    return description->sizes.size();
}

aclError aclGetTensorDescDimV2(const aclTensorDesc* description, size_t index, int64_t* size) {
    *size = description->sizes.at(index);
    return ACL_SUCCESS;
}

aclError aclSetTensorFormat(aclTensorDesc* description, aclFormat format) {
    description->storage_format = format;
    return ACL_SUCCESS;
}

aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }

aclDataBuffer* aclCreateDataBuffer(void* address, size_t size) {
    return new aclDataBuffer{address, size};
}

aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
    delete buffer;
    return ACL_SUCCESS;
}

aclopAttr* aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr* attribute) { delete attribute; }

aclError aclopCompileAndExecute(const char* name, int num_inputs,
                                const aclTensorDesc* const input_descriptions[],
                                const aclDataBuffer* const inputs[], int num_outputs,
                                const aclTensorDesc* const output_descriptions[],
                                aclDataBuffer* const outputs[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream stream) {
    return answer([&] {
        std::string kind = num_inputs == 1 && num_outputs == 1 ? name : "";
        if (kind != "TransData" && kind != "Identity") {
            throw Refusal{ACL_ERROR_OP_NOT_FOUND,
                          std::string("operator ") + name + " is not emulated"};
        }
        launch(stream, transfer_task(*input_descriptions[0], *inputs[0], *output_descriptions[0],
                                     *outputs[0]));
    });
}

}  // extern "C"
