// What a capture records, and what it refuses.
#include <algorithm>
#include <set>
#include <utility>

#include "errors.h"
#include "graph.h"

namespace emulated {
namespace {

struct Captures {
    std::mutex mutex;
    std::set<Capture*> active;
};

Captures& captures() {
    static auto* all = new Captures;
    return *all;
}

thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

}  // namespace

Capture::Capture(Stream& origin, aclmdlRICaptureMode mode)
    : origin_(origin),
      mode_(mode),
      thread_(std::this_thread::get_id()),
      graph_(std::make_shared<Graph>(origin.device)) {
    sequence_of(origin);
}

std::shared_ptr<Capture> Capture::begin(Stream& origin, aclmdlRICaptureMode mode) {
    if (origin.capture())
        throw Refusal{ACL_ERROR_RT_STREAM_CAPTURED, "the stream captures already"};
    std::shared_ptr<Capture> capture(new Capture(origin, mode));
    origin.set_capture(capture);
    std::lock_guard<std::mutex> lock(captures().mutex);
    captures().active.insert(capture.get());
    return capture;
}

void Capture::end(Stream& origin, Graph*& graph) {
    auto capture = origin.capture();
    if (!capture) throw Refusal{ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream does not capture"};
    if (&capture->origin_ != &origin) {
        throw Refusal{ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED,
                      "a capture ends on the stream that began it"};
    }
    capture->close();
    if (!capture->is_valid_) {
        throw Refusal{ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED,
                      "the capture was invalidated by a refused call"};
    }
    if (!capture->open_groups_.empty()) {
        throw Refusal{ACL_ERROR_STREAM_TASK_GROUP_INTR, "the capture ended inside a task group"};
    }
    if (!capture->all_streams_joined()) {
        throw Refusal{ACL_ERROR_RT_STREAM_UNJOINED,
                      "a stream that joined the capture was not joined back to its origin"};
    }
    capture->graph_->finish(std::move(capture->sequences_), capture->num_signals_);
    graph = capture->graph_.get();
    graph->owner = std::move(capture->graph_);
}

void Capture::close() {
    for (auto& [stream, index] : streams_) stream->set_capture(nullptr);
    is_active_ = false;
    std::lock_guard<std::mutex> lock(captures().mutex);
    captures().active.erase(this);
}

Sequence& Capture::sequence_of(Stream& stream) {
    auto [entry, is_new] = streams_.try_emplace(&stream, sequences_.size());
    if (is_new) sequences_.emplace_back();
    return sequences_[entry->second];
}

void Capture::append(Stream& stream, Task task) {
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    auto node = std::make_shared<Node>();
    node->task = std::make_shared<const Task>(std::move(task));
    sequence_of(stream).push_back(std::move(node));
}

int Capture::record(Stream& stream) {
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    auto node = std::make_shared<Node>();
    node->raises = num_signals_++;
    sequence_of(stream).push_back(node);
    return node->raises;
}

void Capture::wait(Stream& stream, int signal) {
    auto current = stream.capture();
    if (current && current.get() != this) {
        throw Refusal{ACL_ERROR_STREAM_CAPTURE_CONFLICT,
                      "the stream takes part in another capture"};
    }
    if (!current) stream.set_capture(shared_from_this());
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    auto node = std::make_shared<Node>();
    node->awaits = signal;
    sequence_of(stream).push_back(std::move(node));
}

void Capture::begin_group(Stream& stream) {
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (!open_groups_.emplace(&stream, sequence_of(stream).size()).second) {
        throw Refusal{ACL_ERROR_STREAM_TASK_GROUP_STATUS,
                      "the stream is inside a task group already"};
    }
}

TaskGroup* Capture::end_group(Stream& stream) {
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    auto open = open_groups_.find(&stream);
    if (open == open_groups_.end())
        throw Refusal{ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no task group was begun"};
    Sequence& sequence = sequence_of(stream);
    std::vector<std::shared_ptr<Node>> nodes(sequence.begin() + open->second, sequence.end());
    open_groups_.erase(open);
    bool has_events =
        std::any_of(nodes.begin(), nodes.end(), [](const auto& node) { return !node->task; });
    if (has_events)
        throw Refusal{ACL_ERROR_STREAM_TASK_GROUP_INTR,
                      "a task group holds operators only, no events"};
    return graph_->add_group(std::move(nodes));
}

void Capture::invalidate() { is_valid_ = false; }

bool Capture::forbids_blocking_calls() const {
    if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
    if (mode_ == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL) return true;
    return mode_ == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL && thread_ == std::this_thread::get_id();
}

bool Capture::all_streams_joined() const {
    for (size_t i = 1; i < sequences_.size(); ++i) {
        const Sequence& sequence = sequences_[i];
        size_t last = sequence.size();
        while (last > 0 && !sequence[last - 1]->task) --last;
        if (!reaches_origin(i, last)) return false;
    }
    return true;
}

// Whether the origin waits, directly or through other streams, for an event behind this position.
bool Capture::reaches_origin(size_t index, size_t position) const {
    if (index == 0) return true;
    const Sequence& sequence = sequences_[index];
    for (size_t i = position; i < sequence.size(); ++i) {
        if (sequence[i]->raises < 0) continue;
        for (size_t other = 0; other < sequences_.size(); ++other) {
            for (size_t j = 0; other != index && j < sequences_[other].size(); ++j) {
                if (sequences_[other][j]->awaits == sequence[i]->raises &&
                    reaches_origin(other, j + 1))
                    return true;
            }
        }
    }
    return false;
}

void refuse_during_capture(const char* call) {
    std::lock_guard<std::mutex> lock(captures().mutex);
    for (Capture* capture : captures().active) {
        if (!capture->forbids_blocking_calls()) continue;
        capture->invalidate();
        throw Refusal{ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
                      std::string(call) + " is not permitted while a stream captures"};
    }
}

aclmdlRICaptureMode exchange_capture_mode(aclmdlRICaptureMode mode) {
    return std::exchange(thread_mode, mode);
}

}  // namespace emulated
