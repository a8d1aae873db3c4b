// A stream: a queue of tasks and the thread that runs them in order.
#pragma once
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "task.h"
#include "timeline.h"

namespace emulated {

class Capture;
class Device;
struct TaskGroup;

class Stream {
public:
    explicit Stream(Device& device);
    ~Stream();

    // Queue the task; while the stream captures or updates a task group, keep it there instead.
    void submit(Task task);
    void synchronize();  // Refusal while it captures
    bool is_idle() const;

    void set_capture(std::shared_ptr<Capture> capture);
    std::shared_ptr<Capture> capture() const;

    void begin_update(TaskGroup& group);
    std::vector<Task> end_update(TaskGroup*& group);

    Device& device;
    const int id;

private:
    void work();

    mutable std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable idle_;
    std::deque<Task> queue_;
    bool is_busy_ = false;
    bool is_stopping_ = false;
    std::shared_ptr<Capture> capture_;
    TaskGroup* updated_group_ = nullptr;
    std::vector<Task> updates_;
    Timeline timeline_;
    std::thread worker_;
};

}  // namespace emulated
