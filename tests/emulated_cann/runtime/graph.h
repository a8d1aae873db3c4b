// Captured graphs (aclmdlRI, torch's NPUGraph): capture across streams, replay, task-group update.
#pragma once
#include <acl/acl.h>

#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "stream.h"

namespace emulated {

class Graph;

// One step of a captured stream: a task, or one end of an event between captured streams.
struct Node {
    std::shared_ptr<const Task> task;
    int raises = -1;  // index of the graph's signals
    int awaits = -1;
};

using Sequence = std::vector<std::shared_ptr<Node>>;

// Nodes whose arguments may be replaced between replays.
struct TaskGroup {
    Graph* graph;
    std::vector<std::shared_ptr<Node>> nodes;
};

class Graph : public std::enable_shared_from_this<Graph> {
public:
    explicit Graph(Device& device) : device_(device) {}
    ~Graph();

    void finish(std::vector<Sequence> sequences, int num_signals);
    void launch(Stream& stream);
    TaskGroup* add_group(std::vector<std::shared_ptr<Node>> nodes);
    // Queue the replacement of the group's tasks on the stream. Refusal: other operators or counts.
    void update(Stream& stream, TaskGroup& group, std::vector<Task> tasks);

    void destroy();  // ends the caller's ownership

    std::shared_ptr<Graph> owner;  // the caller's handle, until destroy()

private:
    class Replay;
    void run(const Sequence& sequence, Replay& replay, Timeline& timeline);
    std::shared_ptr<const Task> task_of(const Node& node);

    Device& device_;
    std::vector<Sequence> sequences_;  // [0]: the stream that began the capture
    std::vector<std::unique_ptr<Stream>> side_streams_;
    std::vector<std::unique_ptr<TaskGroup>> groups_;
    int num_signals_ = 0;
    std::mutex mutex_;  // guards the tasks of the nodes
};

// A capture under way. A stream joins it when it waits for an event that was recorded in it.
class Capture : public std::enable_shared_from_this<Capture> {
public:
    static std::shared_ptr<Capture> begin(Stream& origin, aclmdlRICaptureMode mode);
    static void end(Stream& origin, Graph*& graph);

    void append(Stream& stream, Task task);  // the stream is locked
    int record(Stream& stream);
    void wait(Stream& stream, int signal);
    void begin_group(Stream& stream);
    TaskGroup* end_group(Stream& stream);
    void invalidate();

    Graph& graph() const { return *graph_; }
    bool is_active() const { return is_active_; }
    bool is_valid() const { return is_valid_; }
    bool forbids_blocking_calls() const;

private:
    Capture(Stream& origin, aclmdlRICaptureMode mode);
    Sequence& sequence_of(Stream& stream);
    void close();
    bool all_streams_joined() const;
    bool reaches_origin(size_t sequence, size_t position) const;

    Stream& origin_;
    const aclmdlRICaptureMode mode_;
    const std::thread::id thread_;
    std::shared_ptr<Graph> graph_;
    mutable std::recursive_mutex mutex_;
    std::map<Stream*, size_t> streams_;
    std::vector<Sequence> sequences_;
    std::map<Stream*, size_t> open_groups_;  // where each stream's group began
    int num_signals_ = 0;
    bool is_active_ = true;
    bool is_valid_ = true;
};

// Refusal (and the end of the capture) where a blocking call would break a capture under way.
void refuse_during_capture(const char* call);
aclmdlRICaptureMode exchange_capture_mode(aclmdlRICaptureMode mode);  // of the calling thread

}  // namespace emulated
