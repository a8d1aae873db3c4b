#include "timeline.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <exception>

#include "device.h"
#include "figures_910b.h"
#include "settings.h"

namespace emulated {
namespace {

constexpr int64_t kMaxLeadNs =
    200'000;  // a worker ahead of its time would reserve engines unfairly

int64_t duration_ns(const Cost& cost) {
    using namespace figures;
    double seconds = 0;
    switch (cost.engine) {
        case Engine::kMatrix:
            seconds = std::max(cost.bytes / kHbmBytesPerSecond, cost.half_flops / kCubeHalfFlops);
            break;
        case Engine::kAttention:
            seconds =
                std::max(cost.bytes / kAttentionBytesPerSecond, cost.half_flops / kAttentionFlops);
            break;
        case Engine::kCopy: seconds = cost.bytes / kPcieBytesPerSecond + kCopyNs * 1e-9; break;
    }
    seconds = std::max(seconds, cost.float_flops / kCubeFloatFlops);
    seconds = std::max(seconds, cost.vector_flops / kVectorFlops);
    return static_cast<int64_t>(seconds * 1e9);
}

}  // namespace

int64_t host_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

int64_t EngineClock::reserve(int64_t earliest_ns, int64_t duration_ns) {
    std::lock_guard<std::mutex> lock(mutex_);
    int64_t start = std::max(earliest_ns, use_.free_ns);
    if (use_.num_tasks == 0) use_.first_ns = start;
    use_.free_ns = start + duration_ns;
    use_.busy_ns += duration_ns;
    use_.num_tasks += 1;
    return start;
}

EngineClock::Use EngineClock::use() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return use_;
}

// Run one task in its place. A failed kernel is a fault of the device, which then runs no more.
void Timeline::run(const Task& task, bool is_captured) {
    if (settings().clock) {
        if (!is_captured) now_ns_ = std::max(now_ns_, task.submitted_ns);
        if (!task.is_marker) spend(task, is_captured);
    }
    if (task.is_marker) return task.run(*this);
    if (settings().delay_us) usleep(settings().delay_us);
    if (device_.has_fault()) return;
    try {
        task.run(*this);
    } catch (const std::exception& error) {
        device_.set_fault(task.name + ": " + error.what());
    }
}

void Timeline::spend(const Task& task, bool is_captured) {
    EngineClock& engine =
        task.cost.engine == Engine::kCopy ? device_.copy_engine : device_.compute_engine;
    int64_t gap = is_captured ? figures::kCapturedGapNs : figures::kEagerGapNs;
    int64_t duration = duration_ns(task.cost);
    now_ns_ = engine.reserve(now_ns_ + gap, duration) + duration;
    if (now_ns_ > host_ns() + kMaxLeadNs) sleep_until(now_ns_ - kMaxLeadNs / 2);
}

void Timeline::advance(int64_t ns) { now_ns_ += ns; }
void Timeline::advance_to(int64_t time_ns) { now_ns_ = std::max(now_ns_, time_ns); }
int64_t Timeline::now_ns() const { return settings().clock ? now_ns_ : host_ns(); }

void Timeline::catch_up() {
    if (settings().clock) sleep_until(now_ns_);
}

void Timeline::sleep_until(int64_t time_ns) {
    timespec until{time_ns / 1'000'000'000, time_ns % 1'000'000'000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) != 0) {
    }
}

}  // namespace emulated
