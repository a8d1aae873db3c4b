#include "event.h"

#include "device.h"
#include "errors.h"
#include "graph.h"

namespace emulated {
namespace {

Task marker(const char* name, std::function<void(Timeline&)> run) {
    Task task{name, /*is_marker=*/true};
    task.run = std::move(run);
    return task;
}

}  // namespace

void Event::record(Stream& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (auto capture = stream.capture()) {
        captured_signal_ = capture->record(stream);
        capture_ = std::move(capture);
        return;
    }
    capture_ = nullptr;
    signal_ = std::make_shared<Signal>();
    stream.submit(marker("event record",
                         [signal = signal_](Timeline& timeline) { signal->raise(timeline); }));
}

void Event::wait(Stream& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (capture_) {
        if (!capture_->is_active())
            throw Refusal{ACL_ERROR_RT_EVENT_CAPTURED,
                          "the event was recorded in a capture that has ended"};
        return capture_->wait(stream, captured_signal_);
    }
    if (!signal_) return;
    if (auto capture = stream.capture()) {
        capture->invalidate();
        throw Refusal{ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                      "a capturing stream waits for an event from outside the capture"};
    }
    Device& device = stream.device;
    stream.submit(marker("event wait", [signal = signal_, &device](Timeline& timeline) {
        signal->wait_on_device(timeline, device);
    }));
}

void Event::synchronize() {
    if (auto latest = signal()) latest->wait_on_host();
}

bool Event::is_complete() {
    auto latest = signal();
    return !latest || latest->is_raised();
}

int64_t Event::time_ns() {
    auto latest = signal();
    if (!latest)
        throw Refusal{ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "the event was never recorded"};
    latest->wait_on_host();
    return latest->time_ns();
}

std::shared_ptr<Signal> Event::signal() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (capture_) {
        capture_->invalidate();
        throw Refusal{ACL_ERROR_RT_EVENT_CAPTURED,
                      "the host cannot ask for an event that was recorded in a capture"};
    }
    return signal_;
}

}  // namespace emulated
