#include "graph.h"

#include <utility>

#include "device.h"
#include "errors.h"
#include "figures_910b.h"
#include "signal.h"

namespace emulated {

class Graph::Replay {
public:
    explicit Replay(int num_signals) : signals(num_signals) {}
    std::vector<Signal> signals;
};

Graph::~Graph() {
    if (!sequences_.empty()) device_.return_stream_resource();
    for (size_t i = 0; i < side_streams_.size(); ++i) device_.return_stream_resource();
}

void Graph::finish(std::vector<Sequence> sequences, int num_signals) {
    device_.take_stream_resource();
    sequences_ = std::move(sequences);
    num_signals_ = num_signals;
    for (size_t i = 1; i < sequences_.size(); ++i) {
        device_.take_stream_resource();
        side_streams_.push_back(std::make_unique<Stream>(device_));
    }
}

void Graph::launch(Stream& stream) {
    if (stream.capture()) {
        throw Refusal{ACL_ERROR_RT_STREAM_CAPTURED,
                      "a graph cannot be replayed while its stream captures"};
    }
    auto replay = std::make_shared<Replay>(num_signals_);
    for (size_t i = 0; i < sequences_.size(); ++i) {
        Stream& target = i == 0 ? stream : *side_streams_[i - 1];
        Task task{"graph", /*is_marker=*/true};
        task.run = [self = shared_from_this(), replay, i](Timeline& timeline) {
            if (i == 0) timeline.advance(figures::kGraphLaunchNs);
            self->run(self->sequences_[i], *replay, timeline);
        };
        target.submit(std::move(task));
    }
}

void Graph::run(const Sequence& sequence, Replay& replay, Timeline& timeline) {
    for (const auto& node : sequence) {
        if (node->raises >= 0) {
            replay.signals[node->raises].raise(timeline);
        } else if (node->awaits >= 0) {
            replay.signals[node->awaits].wait_on_device(timeline, device_);
        } else {
            timeline.run(*task_of(*node), /*is_captured=*/true);
        }
    }
}

std::shared_ptr<const Task> Graph::task_of(const Node& node) {
    std::lock_guard<std::mutex> lock(mutex_);
    return node.task;
}

void Graph::destroy() {
    device_.synchronize();  // a replay under way would die with its streams
    // A side stream that still drops its last task would be the graph's last owner, and end itself.
    for (const auto& stream : side_streams_) stream->synchronize();
    owner.reset();
}

TaskGroup* Graph::add_group(std::vector<std::shared_ptr<Node>> nodes) {
    groups_.push_back(std::make_unique<TaskGroup>(TaskGroup{this, std::move(nodes)}));
    return groups_.back().get();
}

void Graph::update(Stream& stream, TaskGroup& group, std::vector<Task> tasks) {
    if (tasks.size() != group.nodes.size()) {
        throw Refusal{ACL_ERROR_RT_MODEL_UPDATE_FAILED,
                      "task group update: " + std::to_string(tasks.size()) +
                          " tasks for a group of " + std::to_string(group.nodes.size())};
    }
    for (size_t i = 0; i < tasks.size(); ++i) {
        const std::string& captured = task_of(*group.nodes[i])->name;
        if (tasks[i].name != captured) {
            throw Refusal{ACL_ERROR_RT_FEATURE_NOT_SUPPORT_UPDATE_OP,
                          "task group update: " + tasks[i].name + " in the place of " + captured};
        }
    }
    auto nodes = group.nodes;
    Task replace{"task group update", /*is_marker=*/true};
    replace.run = [self = shared_from_this(), nodes, tasks = std::move(tasks)](Timeline&) {
        std::lock_guard<std::mutex> lock(self->mutex_);
        for (size_t i = 0; i < nodes.size(); ++i)
            nodes[i]->task = std::make_shared<const Task>(tasks[i]);
    };
    stream.submit(std::move(replace));
}

}  // namespace emulated
