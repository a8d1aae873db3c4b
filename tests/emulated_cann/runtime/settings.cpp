#include "settings.h"

#include <cstdlib>

namespace emulated {
namespace {

std::string text(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value ? value : otherwise;
}

long long number(const char* name, long long otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atoll(value) : otherwise;
}

}  // namespace

const Settings& settings() {
    static const Settings once{
        static_cast<int>(number("EMULATED_CANN_DEVICES", 1)),
        static_cast<size_t>(number("EMULATED_CANN_MEM_MB", 1024)) << 20,
        static_cast<int>(number("EMULATED_CANN_DELAY_US", 0)),
        std::atof(text("EMULATED_CANN_WAIT_S", "20").c_str()),
        text("EMULATED_CANN_SOC", "Ascend910B3"),
        text("EMULATED_CANN_VERSION", "8.5.0"),
        number("EMULATED_CANN_CLOCK", 0) != 0,
        number("EMULATED_CANN_COMPUTE", 1) != 0,
        text("EMULATED_CANN_REPORT", ""),
        number("EMULATED_CANN_ALLOW_FLOAT32", 0) != 0,
    };
    return once;
}

}  // namespace emulated
