// The emulator's knobs: environment variables, read once.
#pragma once
#include <cstddef>
#include <string>

namespace emulated {

struct Settings {
    int devices;          // EMULATED_CANN_DEVICES
    size_t memory_bytes;  // EMULATED_CANN_MEM_MB, of each device
    int delay_us;         // EMULATED_CANN_DELAY_US: every kernel and copy takes this much longer
    double wait_seconds;  // EMULATED_CANN_WAIT_S: a wait on the device that lasts longer is a fault
    std::string soc;      // EMULATED_CANN_SOC
    std::string version;  // EMULATED_CANN_VERSION
    bool clock;           // EMULATED_CANN_CLOCK: tasks take the time that a 910B would need
    bool compute;         // EMULATED_CANN_COMPUTE: 0 skips the arithmetic
    std::string report;   // EMULATED_CANN_REPORT: folder for what the clock counted, at exit
    bool allow_float32;   // EMULATED_CANN_ALLOW_FLOAT32: fused attention takes float32 as well
};

const Settings& settings();

}  // namespace emulated
