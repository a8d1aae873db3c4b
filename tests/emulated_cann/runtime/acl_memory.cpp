// The acl API: memory and copies.
#include <acl/acl.h>

#include <cstdlib>
#include <cstring>

#include "device.h"
#include "errors.h"
#include "graph.h"
#include "launch.h"
#include "stream.h"

using namespace emulated;

namespace {

Task copy_task(void* to, const void* from, size_t size) {
    Task task{"copy"};
    bool is_on_device = device_of(to) && device_of(from);
    task.cost.engine = is_on_device ? Engine::kMatrix : Engine::kCopy;
    task.cost.bytes = is_on_device ? 2.0 * size : size;
    task.run = [=](Timeline&) { std::memmove(to, from, size); };
    return task;
}

bool is_pageable(const void* address) { return !device_of(address) && !is_pinned(address); }

// A copy from or to pageable host memory is not asynchronous: the call returns when it is done.
void copy_async(void* to, size_t room, const void* from, size_t size, Stream& stream) {
    if (size > room)
        throw Refusal{ACL_ERROR_RT_PARAM_INVALID,
                      "aclrtMemcpyAsync: more bytes than the target has room for"};
    bool blocks = is_pageable(to) || is_pageable(from);
    if (auto capture = blocks ? stream.capture() : nullptr) {
        capture->invalidate();
        throw Refusal{ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC,
                      "a captured copy needs pinned host memory"};
    }
    stream.submit(copy_task(to, from, size));
    if (blocks) stream.synchronize();
}

}  // namespace

extern "C" {

aclError aclrtMalloc(void** address, size_t size, aclrtMemMallocPolicy) {
    return answer([&] { *address = current_device().memory.allocate(size); });
}

aclError aclrtMallocAlign32(void** address, size_t size, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(address, size, policy);
}

aclError aclrtFree(void* address) {
    return answer([&] {
        refuse_during_capture("aclrtFree");
        Device* device = device_of(address);
        if (!device) throw Refusal{ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: not device memory"};
        device->synchronize();
        device->memory.release(address);
    });
}

aclError aclrtMallocHost(void** address, size_t size) {
    return answer([&] { *address = allocate_pinned(size); });
}

aclError aclrtMallocHostWithCfg(void** address, uint64_t size, aclrtMallocConfig*) {
    return aclrtMallocHost(address, size);
}

aclError aclrtFreeHost(void* address) {
    if (!unpin(address)) return ACL_ERROR_RT_PARAM_INVALID;
    std::free(address);
    return ACL_SUCCESS;
}

aclError aclrtHostRegister(void* address, uint64_t size, aclrtHostRegisterType,
                           void** device_address) {
    pin(address, size);
    *device_address = address;
    return ACL_SUCCESS;
}

aclError aclrtHostUnregister(void* address) {
    return unpin(address) ? ACL_SUCCESS : ACL_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* available, size_t* total) {
    return answer([&] {
        *available = current_device().memory.available();
        *total = current_device().memory.limit();
    });
}

aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
    std::memset(attributes, 0, sizeof *attributes);
    if (Device* device = device_of(address)) {
        attributes->location = {static_cast<uint32_t>(device->id), ACL_MEM_LOCATION_TYPE_DEVICE};
    } else {
        attributes->location.type =
            is_pinned(address) ? ACL_MEM_LOCATION_TYPE_HOST : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    }
    return ACL_SUCCESS;
}

aclError aclrtMemset(void* address, size_t, int32_t value, size_t size) {
    return answer([&] {
        refuse_during_capture("aclrtMemset");
        std::memset(address, value, size);
    });
}

aclError aclrtMemsetAsync(void* address, size_t, int32_t value, size_t size, aclrtStream stream) {
    return answer([&] {
        Task task{"memset"};
        task.cost.bytes = static_cast<double>(size);
        task.run = [=](Timeline&) { std::memset(address, value, size); };
        stream_of(stream).submit(std::move(task));
    });
}

aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind) {
    return answer([&] {
        refuse_during_capture("aclrtMemcpy");
        if (size > room)
            throw Refusal{ACL_ERROR_RT_PARAM_INVALID,
                          "aclrtMemcpy: more bytes than the target has room for"};
        std::memmove(to, from, size);
    });
}

aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind,
                          aclrtStream stream) {
    return answer([&] { copy_async(to, room, from, size, stream_of(stream)); });
}

aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t size,
                                       aclrtMemcpyKind kind, aclrtStream stream) {
    return aclrtMemcpyAsync(to, room, from, size, kind, stream);
}

}  // extern "C"
