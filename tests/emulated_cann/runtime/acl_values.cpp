// The acl API: words of device memory that one stream writes and another waits for. torch_npu's
// ExternalEvent is made of them: a captured wait finds its word written or not at each replay.
#include <acl/acl.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>

#include "device.h"
#include "errors.h"
#include "launch.h"
#include "settings.h"
#include "stream.h"

using namespace emulated;

namespace {

struct Words {
    std::mutex mutex;
    std::condition_variable changed;
    std::map<uint64_t*, int64_t> written_ns;
};

Words& words() {
    static auto* all = new Words;
    return *all;
}

bool holds(uint64_t found, uint64_t value, uint32_t comparison) {
    return comparison == ACL_STREAM_WAIT_VALUE_EQ ? found == value : found >= value;
}

void write(uint64_t* word, uint64_t value, Timeline& timeline) {
    timeline.catch_up();
    {
        std::lock_guard<std::mutex> lock(words().mutex);
        *word = value;
        words().written_ns[word] = timeline.now_ns();
    }
    words().changed.notify_all();
}

void wait(uint64_t* word, uint64_t value, uint32_t comparison, Timeline& timeline, Device& device) {
    std::unique_lock<std::mutex> lock(words().mutex);
    std::chrono::duration<double> limit(settings().wait_seconds);
    if (words().changed.wait_for(lock, limit, [&] { return holds(*word, value, comparison); })) {
        timeline.advance_to(words().written_ns[word]);
    } else {
        device.set_fault(
            "a stream waited for an external event that nobody recorded (EMULATED_CANN_WAIT_S)");
    }
}

}  // namespace

extern "C" {

aclError aclrtValueWrite(void* address, uint64_t value, uint32_t, aclrtStream stream) {
    return answer([&] {
        Task task{"value write", /*is_marker=*/true};
        task.run = [=](Timeline& timeline) {
            write(static_cast<uint64_t*>(address), value, timeline);
        };
        launch(stream, std::move(task));
    });
}

aclError aclrtValueWait(void* address, uint64_t value, uint32_t comparison, aclrtStream stream) {
    return answer([&] {
        if (comparison != ACL_STREAM_WAIT_VALUE_EQ && comparison != ACL_STREAM_WAIT_VALUE_GEQ) {
            throw Refusal{ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                          "aclrtValueWait: only == and >= are emulated"};
        }
        Task task{"value wait", /*is_marker=*/true};
        Device& device = stream_of(stream).device;
        task.run = [=, &device](Timeline& timeline) {
            wait(static_cast<uint64_t*>(address), value, comparison, timeline, device);
        };
        launch(stream, std::move(task));
    });
}

}  // extern "C"
