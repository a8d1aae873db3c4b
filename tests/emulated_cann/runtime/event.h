// Events: points of a stream that other streams and the host can wait for.
#pragma once
#include <memory>
#include <mutex>

#include "signal.h"
#include "stream.h"

namespace emulated {

// An event stands for its latest recording, which may belong to a capture.
class Event {
public:
    void record(Stream& stream);
    void wait(Stream& stream);
    void synchronize();
    bool is_complete();
    int64_t time_ns();  // Refusal: never recorded

private:
    std::shared_ptr<Signal> signal();  // Refusal: the recording belongs to a capture

    std::mutex mutex_;
    std::shared_ptr<Signal> signal_;  // of the latest recording; none before the first
    std::shared_ptr<Capture> capture_;
    int captured_signal_ = -1;
};

}  // namespace emulated
