// The time axis of one stream.
//
// Without the clock it is the host's monotonic clock. With it, tasks are laid one behind the other
// by their cost, and the worker sleeps so that no task is seen to end before its time.
#pragma once
#include <cstdint>
#include <mutex>

#include "task.h"

namespace emulated {

class Device;

int64_t host_ns();

// Kernels of all streams share the cores and the memory, so a device runs one at a time; each cost
// assumes the whole card.
class EngineClock {
public:
    struct Use {
        int64_t num_tasks = 0;
        int64_t busy_ns = 0;
        int64_t first_ns = 0;  // start of the first task
        int64_t free_ns = 0;   // end of the last one
    };

    int64_t reserve(int64_t earliest_ns, int64_t duration_ns);  // returns the start
    Use use() const;

private:
    mutable std::mutex mutex_;
    Use use_;
};

class Timeline {
public:
    explicit Timeline(Device& device) : device_(device) {}

    void run(const Task& task, bool is_captured);
    void advance(int64_t ns);
    void advance_to(int64_t time_ns);
    int64_t now_ns() const;
    void catch_up();  // sleep until the host's clock is at now_ns()

private:
    void spend(const Task& task, bool is_captured);
    void sleep_until(int64_t time_ns);

    Device& device_;
    int64_t now_ns_ = 0;
};

}  // namespace emulated
