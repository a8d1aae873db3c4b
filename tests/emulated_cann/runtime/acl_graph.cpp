// The acl API: capture and replay of graphs (aclmdlRI), and the update of their task groups.
#include <acl/acl.h>

#include "errors.h"
#include "graph.h"
#include "launch.h"

using namespace emulated;

namespace {

Graph& graph_of(aclmdlRI handle) { return *static_cast<Graph*>(handle); }

std::shared_ptr<Capture> capture_of(aclrtStream stream) {
    auto capture = stream_of(stream).capture();
    if (!capture) throw Refusal{ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream does not capture"};
    return capture;
}

}  // namespace

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
    return answer([&] { Capture::begin(stream_of(stream), mode); });
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status,
                                aclmdlRI* graph) {
    return answer([&] {
        auto capture = stream_of(stream).capture();
        *status = !capture              ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
                  : capture->is_valid() ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE
                                        : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
        *graph = capture ? &capture->graph() : nullptr;
    });
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI* handle) {
    *handle = nullptr;
    return answer([&] {
        Graph* graph = nullptr;
        Capture::end(stream_of(stream), graph);
        *handle = graph;
    });
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
    *mode = exchange_capture_mode(*mode);
    return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI graph, aclrtStream stream) {
    return answer([&] { graph_of(graph).launch(stream_of(stream)); });
}

aclError aclmdlRIDestroy(aclmdlRI graph) {
    return answer([&] { graph_of(graph).destroy(); });
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
    return answer([&] { capture_of(stream)->begin_group(stream_of(stream)); });
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp* group) {
    return answer([&] { *group = capture_of(stream)->end_group(stream_of(stream)); });
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp group) {
    return answer([&] { stream_of(stream).begin_update(*static_cast<TaskGroup*>(group)); });
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
    return answer([&] {
        TaskGroup* group = nullptr;
        std::vector<Task> tasks = stream_of(stream).end_update(group);
        group->graph->update(stream_of(stream), *group, std::move(tasks));
    });
}

aclError aclmdlRIDebugPrint(aclmdlRI) { return ACL_SUCCESS; }
aclError aclmdlRIDebugJsonPrint(aclmdlRI, const char*, uint32_t) { return ACL_SUCCESS; }

}  // extern "C"
