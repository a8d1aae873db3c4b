// Devices: their memory, their streams, and the fault after which they run nothing more.
#pragma once
#include <acl/acl.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "timeline.h"

namespace emulated {

class Stream;

// Device memory is host memory with a limit. What was never written is poison.
class DeviceMemory {
public:
    explicit DeviceMemory(size_t limit) : limit_(limit) {}
    void* allocate(size_t size);
    void release(void* address);
    bool contains(const void* address) const;
    size_t limit() const { return limit_; }
    size_t available() const;

private:
    const size_t limit_;
    size_t used_ = 0;
    mutable std::mutex mutex_;
    std::map<char*, size_t> blocks_;
};

class Device {
public:
    explicit Device(int id);

    const int id;
    DeviceMemory memory;
    EngineClock compute_engine;
    EngineClock copy_engine;

    Stream& default_stream();
    Stream& create_stream();
    void destroy_stream(Stream& stream);
    void synchronize();
    void take_stream_resource();
    void return_stream_resource();

    bool has_fault() const;
    void set_fault(const std::string& text);  // the first one stays
    void raise_fault() const;                 // throws a Refusal once the device has failed

private:
    mutable std::mutex mutex_;
    std::set<Stream*> streams_;
    Stream* default_stream_ = nullptr;
    int num_stream_resources_ = 0;
    std::string fault_;
};

Device& device(int id);    // Refusal: no such device
Device& current_device();  // of the calling thread; Refusal: none is set
bool has_current_device();
void set_current_device(Device& device);

// Host memory that a copy engine can reach. Everything else is pageable.
void* allocate_pinned(size_t size);
void pin(void* address, size_t size);
bool unpin(void* address);
bool is_pinned(const void* address);

// The device whose memory holds the address, or none.
Device* device_of(const void* address);

}  // namespace emulated
