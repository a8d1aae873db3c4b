// The acl API: options of the compiler and of kernels. They are kept, and change nothing here.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr char kNoJitCompile[] = "disable";

struct Options {
    std::mutex mutex;
    std::map<int, int64_t> values;
};

Options& options() {
    static auto* all = new Options;
    return *all;
}

}  // namespace

extern "C" {

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    std::lock_guard<std::mutex> lock(options().mutex);
    options().values[option] = value;
    return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
    std::lock_guard<std::mutex> lock(options().mutex);
    *value = options().values[option];
    return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    return aclrtSetSysParamOpt(option, value);
}

aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return sizeof kNoJitCompile; }

aclError aclGetCompileopt(aclCompileOpt, char* value, size_t size) {
    std::strncpy(value, kNoJitCompile, size);
    return ACL_SUCCESS;
}

}  // extern "C"
