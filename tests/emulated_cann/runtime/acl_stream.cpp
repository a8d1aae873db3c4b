// The acl API: streams, events, host callbacks.
#include <acl/acl.h>

#include "device.h"
#include "errors.h"
#include "event.h"
#include "launch.h"
#include "stream.h"

using namespace emulated;

namespace emulated {

Stream& stream_of(aclrtStream handle) {
    return handle ? *static_cast<Stream*>(handle) : current_device().default_stream();
}

void launch(aclrtStream stream, Task task) { stream_of(stream).submit(std::move(task)); }

}  // namespace emulated

namespace {

Event& event_of(aclrtEvent handle) { return *static_cast<Event*>(handle); }

void call_on_stream(aclrtStream stream, void (*function)(void*), void* argument) {
    Task task{"host callback", /*is_marker=*/true};
    task.run = [=](Timeline& timeline) {
        timeline.catch_up();
        function(argument);
    };
    launch(stream, std::move(task));
}

}  // namespace

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
    return answer([&] { *stream = &current_device().create_stream(); });
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
    return aclrtCreateStream(stream);
}

aclError aclrtDestroyStream(aclrtStream handle) {
    return answer([&] {
        Stream& stream = stream_of(handle);
        stream.device.destroy_stream(stream);
    });
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtSynchronizeStream(aclrtStream handle) {
    return answer([&] {
        Stream& stream = stream_of(handle);
        stream.synchronize();
        stream.device.raise_fault();
    });
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) {
    return aclrtSynchronizeStream(stream);
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
    return answer([&] {
        *status =
            stream_of(stream).is_idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
    });
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
    return answer([&] { *id = stream_of(stream).id; });
}

aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) {
    return ACL_SUCCESS;
}

aclError aclrtCreateEvent(aclrtEvent* event) {
    *event = new Event;
    return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) { return aclrtCreateEvent(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) { return aclrtCreateEvent(event); }

aclError aclrtDestroyEvent(aclrtEvent event) {
    delete &event_of(event);
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    return answer([&] { event_of(event).record(stream_of(stream)); });
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
    return answer([&] { event_of(event).wait(stream_of(stream)); });
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
    return answer([&] {
        event_of(event).synchronize();
        current_device().raise_fault();
    });
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
    return answer([&] {
        *status = event_of(event).is_complete() ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                                : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    });
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
    return answer(
        [&] { *milliseconds = (event_of(end).time_ns() - event_of(start).time_ns()) * 1e-6f; });
}

aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
    return answer([&] { *microseconds = static_cast<uint64_t>(event_of(event).time_ns() / 1000); });
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
    return answer([&] { call_on_stream(stream, function, argument); });
}

// A real card hands callbacks to a thread that polls aclrtProcessReport. Here the stream's thread
// calls them; the order is the same.
aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType,
                             aclrtStream stream) {
    return answer([&] { call_on_stream(stream, function, argument); });
}

aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtProcessReport(int32_t) { return ACL_ERROR_RT_REPORT_TIMEOUT; }

}  // extern "C"
