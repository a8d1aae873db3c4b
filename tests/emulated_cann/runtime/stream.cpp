#include "stream.h"

#include <sys/prctl.h>

#include <atomic>
#include <utility>

#include "device.h"
#include "errors.h"
#include "graph.h"

namespace emulated {
namespace {

int next_id() {
    static std::atomic<int> ids{0};
    return ids++;
}

}  // namespace

Stream::Stream(Device& own_device) : device(own_device), id(next_id()), timeline_(own_device) {
    worker_ = std::thread([this] { work(); });
}

Stream::~Stream() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_stopping_ = true;
    }
    wake_.notify_one();
    worker_.join();
}

void Stream::submit(Task task) {
    task.submitted_ns = host_ns();
    {
        std::lock_guard<std::mutex> lock(mutex_);
        if (updated_group_) return updates_.push_back(std::move(task));
        if (capture_) return capture_->append(*this, std::move(task));
        queue_.push_back(std::move(task));
    }
    wake_.notify_one();
}

void Stream::synchronize() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (capture_) {
        capture_->invalidate();
        throw Refusal{ACL_ERROR_RT_STREAM_CAPTURED,
                      "a stream cannot be synchronized while it captures"};
    }
    idle_.wait(lock, [this] { return queue_.empty() && !is_busy_; });
}

bool Stream::is_idle() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue_.empty() && !is_busy_;
}

void Stream::set_capture(std::shared_ptr<Capture> capture) {
    std::lock_guard<std::mutex> lock(mutex_);
    capture_ = std::move(capture);
}

std::shared_ptr<Capture> Stream::capture() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return capture_;
}

void Stream::begin_update(TaskGroup& group) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (capture_ || updated_group_) {
        throw Refusal{ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                      "the stream captures or updates a task group already"};
    }
    updated_group_ = &group;
}

std::vector<Task> Stream::end_update(TaskGroup*& group) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!updated_group_)
        throw Refusal{ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no task group update was begun"};
    group = std::exchange(updated_group_, nullptr);
    return std::exchange(updates_, {});
}

void Stream::work() {
    prctl(PR_SET_TIMERSLACK, 1);
    set_current_device(device);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        if (queue_.empty()) {  // the host must not see the end of the last task before its time
            lock.unlock();
            timeline_.catch_up();
            lock.lock();
        }
        if (queue_.empty()) {
            is_busy_ = false;
            idle_.notify_all();
        }
        wake_.wait(lock, [this] { return is_stopping_ || !queue_.empty(); });
        if (queue_.empty()) return;
        is_busy_ = true;
        {
            Task task = std::move(queue_.front());
            queue_.pop_front();
            lock.unlock();
            timeline_.run(task, /*is_captured=*/false);
        }
        lock.lock();
    }
}

}  // namespace emulated
