#include "signal.h"

#include <chrono>

#include "device.h"
#include "settings.h"
#include "timeline.h"

namespace emulated {

void Signal::raise(Timeline& timeline) {
    timeline.catch_up();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_raised_ = true;
        time_ns_ = timeline.now_ns();
    }
    raised_.notify_all();
}

bool Signal::is_raised() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return is_raised_;
}

int64_t Signal::time_ns() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return time_ns_;
}

void Signal::wait_on_host() const {
    std::unique_lock<std::mutex> lock(mutex_);
    raised_.wait(lock, [this] { return is_raised_; });
}

void Signal::wait_on_device(Timeline& timeline, Device& device) const {
    std::unique_lock<std::mutex> lock(mutex_);
    std::chrono::duration<double> limit(settings().wait_seconds);
    if (raised_.wait_for(lock, limit, [this] { return is_raised_; })) {
        timeline.advance_to(time_ns_);
    } else {
        device.set_fault(
            "a stream waited for an event that nobody recorded (EMULATED_CANN_WAIT_S)");
    }
}

}  // namespace emulated
