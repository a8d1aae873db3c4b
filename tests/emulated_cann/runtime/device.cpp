#include "device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

#include "errors.h"
#include "settings.h"
#include "stream.h"

namespace emulated {
namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kMaxPoisoned = 64
                                << 20;  // poison makes pages resident; larger blocks start as zeros
constexpr int kPoison = 0xCB;
constexpr int kMaxStreamResources = 1984;  // of a card; captured graphs take them as well

bool block_holds(const std::map<char*, size_t>& blocks, const void* address) {
    auto* byte = static_cast<char*>(const_cast<void*>(address));
    auto after = blocks.upper_bound(byte);
    if (after == blocks.begin()) return false;
    auto block = std::prev(after);
    return byte < block->first + block->second;
}

void write_report();

// Devices live as long as the process: their workers must not outlive what they use.
std::vector<Device*>& all_devices() {
    static auto* devices = [] {
        auto* made = new std::vector<Device*>;
        for (int id = 0; id < settings().devices; ++id) made->push_back(new Device(id));
        if (!settings().report.empty()) std::atexit(write_report);
        return made;
    }();
    return *devices;
}

std::string report_of(const char* name, const EngineClock& engine) {
    EngineClock::Use use = engine.use();
    auto number = [](const char* key, int64_t value) {
        return std::string("\"") + key + "\": " + std::to_string(value);
    };
    return std::string("\"") + name + "\": {" + number("num_tasks", use.num_tasks) + ", " +
           number("busy_ns", use.busy_ns) + ", " + number("first_ns", use.first_ns) + ", " +
           number("last_ns", use.free_ns) + "}";
}

// A line of JSON for each device, in a file named after the process.
void write_report() {
    std::ofstream file(settings().report + "/" + std::to_string(getpid()) + ".jsonl");
    for (Device* device : all_devices()) {
        file << "{" << report_of("compute", device->compute_engine) << ", "
             << report_of("copy", device->copy_engine) << "}\n";
    }
}

struct Pinned {
    std::mutex mutex;
    std::map<char*, size_t> blocks;
};

Pinned& pinned() {
    static auto* all = new Pinned;
    return *all;
}

thread_local Device* current = nullptr;

}  // namespace

void* DeviceMemory::allocate(size_t size) {
    size_t rounded = (size + kAlignment) & ~(kAlignment - 1);
    std::lock_guard<std::mutex> lock(mutex_);
    if (used_ + rounded > limit_) {
        throw Refusal{ACL_ERROR_RT_MEMORY_ALLOCATION,
                      "device out of memory (EMULATED_CANN_MEM_MB)"};
    }
    void* address = mmap(nullptr, rounded, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) throw Refusal{ACL_ERROR_RT_MEMORY_ALLOCATION, "host out of memory"};
    if (settings().compute && rounded <= kMaxPoisoned) std::memset(address, kPoison, rounded);
    blocks_[static_cast<char*>(address)] = rounded;
    used_ += rounded;
    return address;
}

void DeviceMemory::release(void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto block = blocks_.find(static_cast<char*>(address));
    if (block == blocks_.end())
        throw Refusal{ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: not an allocated address"};
    munmap(address, block->second);
    used_ -= block->second;
    blocks_.erase(block);
}

bool DeviceMemory::contains(const void* address) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return block_holds(blocks_, address);
}

size_t DeviceMemory::available() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return limit_ - used_;
}

Device::Device(int device_id) : id(device_id), memory(settings().memory_bytes) {}

Stream& Device::default_stream() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!default_stream_) {
        default_stream_ = new Stream(*this);
        streams_.insert(default_stream_);
    }
    return *default_stream_;
}

Stream& Device::create_stream() {
    take_stream_resource();
    auto* stream = new Stream(*this);
    std::lock_guard<std::mutex> lock(mutex_);
    streams_.insert(stream);
    return *stream;
}

void Device::destroy_stream(Stream& stream) {
    stream.synchronize();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        streams_.erase(&stream);
    }
    delete &stream;
    return_stream_resource();
}

void Device::synchronize() {
    std::vector<Stream*> streams;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        streams.assign(streams_.begin(), streams_.end());
    }
    for (Stream* stream : streams) {
        if (!stream->capture()) stream->synchronize();
    }
}

void Device::take_stream_resource() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (num_stream_resources_ == kMaxStreamResources) {
        throw Refusal{ACL_ERROR_RT_NO_STREAM_RESOURCE,
                      "no stream resource: streams and captured graphs share " +
                          std::to_string(kMaxStreamResources)};
    }
    ++num_stream_resources_;
}

void Device::return_stream_resource() {
    std::lock_guard<std::mutex> lock(mutex_);
    --num_stream_resources_;
}

bool Device::has_fault() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return !fault_.empty();
}

void Device::set_fault(const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (fault_.empty()) fault_ = "device fault: " + text;
}

void Device::raise_fault() const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!fault_.empty()) throw Refusal{ACL_ERROR_RT_VECTOR_CORE_EXCEPTION, fault_};
}

Device& device(int id) {
    if (id < 0 || id >= static_cast<int>(all_devices().size())) {
        throw Refusal{ACL_ERROR_RT_INVALID_DEVICEID,
                      "no device " + std::to_string(id) + " (EMULATED_CANN_DEVICES)"};
    }
    return *all_devices()[id];
}

Device& current_device() {
    if (!current) throw Refusal{ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device"};
    return *current;
}

bool has_current_device() { return current != nullptr; }
void set_current_device(Device& device) { current = &device; }

void* allocate_pinned(size_t size) {
    void* address = nullptr;
    if (posix_memalign(&address, kAlignment, size ? size : kAlignment) != 0) {
        throw Refusal{ACL_ERROR_RT_MEMORY_ALLOCATION, "host out of memory"};
    }
    pin(address, size);
    return address;
}

void pin(void* address, size_t size) {
    std::lock_guard<std::mutex> lock(pinned().mutex);
    pinned().blocks[static_cast<char*>(address)] = size;
}

bool unpin(void* address) {
    std::lock_guard<std::mutex> lock(pinned().mutex);
    return pinned().blocks.erase(static_cast<char*>(address)) == 1;
}

bool is_pinned(const void* address) {
    std::lock_guard<std::mutex> lock(pinned().mutex);
    return block_holds(pinned().blocks, address);
}

Device* device_of(const void* address) {
    for (Device* device : all_devices()) {
        if (device->memory.contains(address)) return device;
    }
    return nullptr;
}

}  // namespace emulated
