// What events are made of: one moment of a stream, that has come or not.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace emulated {

class Device;
class Timeline;

class Signal {
public:
    void raise(Timeline& timeline);  // not before the host's clock has reached the timeline
    bool is_raised() const;
    int64_t time_ns() const;

    void wait_on_host() const;
    // A wait that nobody ends (EMULATED_CANN_WAIT_S) is a fault of the device, as on a real card.
    void wait_on_device(Timeline& timeline, Device& device) const;

private:
    mutable std::mutex mutex_;
    mutable std::condition_variable raised_;
    bool is_raised_ = false;
    int64_t time_ns_ = 0;
};

}  // namespace emulated
