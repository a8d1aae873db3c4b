// The acl API: devices, contexts, versions, errors.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <cstring>
#include <string>

#include "device.h"
#include "errors.h"
#include "settings.h"
#include "stream.h"
#include "graph.h"

using namespace emulated;

namespace {

constexpr int64_t kNumCubeCores = 20;  // of an Ascend 910B3

}  // namespace

extern "C" {

// A text is handed out once.
const char* aclGetRecentErrMsg() {
    thread_local std::string handed_out;
    handed_out = take_last_error();
    return handed_out.c_str();
}

aclError aclInit(const char*) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }
void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}
const char* aclrtGetSocName() { return settings().soc.c_str(); }

aclError aclrtGetDeviceCount(uint32_t* count) {
    *count = static_cast<uint32_t>(settings().devices);
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t id) {
    return answer([&] { set_current_device(device(id)); });
}

aclError aclrtGetDevice(int32_t* id) {
    return answer([&] { *id = current_device().id; });
}

aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }

aclError aclrtGetCurrentContext(aclrtContext* context) {
    return answer([&] { *context = &current_device(); });
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    set_current_device(*static_cast<Device*>(context));
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeDevice() {
    return answer([] {
        refuse_during_capture("aclrtSynchronizeDevice");
        current_device().synchronize();
        current_device().raise_fault();
    });
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t* value) {
    *value = kNumCubeCores;
    return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
    *value = kNumCubeCores;
    return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
    std::memset(version, 0, sizeof *version);
    std::strncpy(version->version, settings().version.c_str(), sizeof version->version - 1);
    return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char*, char* version) {
    std::strcpy(version, settings().version.c_str());
    return ACL_SUCCESS;
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
    *list = nullptr;
    *count = 0;
    return ACL_SUCCESS;
}

// Settings of a real card that change nothing here.
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclmdlInitDump() { return ACL_SUCCESS; }
aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }

}  // extern "C"
