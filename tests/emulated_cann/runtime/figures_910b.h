// What one Atlas A2 card (Ascend 910B3) can do, for the clock.
//
// This is a model, not a measurement: a task takes the longer of its memory time and its arithmetic
// time, plus a gap. No real card was at hand. It shows where host time, launches and bubbles go; it
// does not predict tokens per second.
//
// Peaks and shares (390 TFLOPS, 0.68 and 0.60 of it; 1600 GB/s, 0.58 and 0.38 of it) are those of
// xLLM's roofline for the 910B (xllm/core, perf_model). The rest is estimated as said beside it.
#pragma once

namespace emulated::figures {

constexpr double kHbmBytesPerSecond = 1600e9 * 0.58;        // matrix products, vector operators
constexpr double kAttentionBytesPerSecond = 1600e9 * 0.38;  // paged reads
constexpr double kCubeHalfFlops = 390e12 * 0.68;            // float16, bfloat16
constexpr double kAttentionFlops = 390e12 * 0.60;
constexpr double kCubeFloatFlops = kCubeHalfFlops / 4;  // float32: a quarter of half precision
constexpr double kVectorFlops = 40 * 1.8e9 * 64;        // 40 vector cores, 256 bytes a cycle
constexpr double kPcieBytesPerSecond = 24e9;            // PCIe 4.0 x16, what copies reach
constexpr long kCopyNs = 6000;                          // start of a DMA between host and device

// Between two tasks of a stream. Eager: the task scheduler fetches each task from the host's queue.
// Captured: the tasks are on the device already. Reports name 5 to 50 us for a whole launch, most
// of it host time, which the host really spends here and which is therefore not part of these
// figures.
constexpr long kEagerGapNs = 3000;
constexpr long kCapturedGapNs = 800;
constexpr long kGraphLaunchNs = 15000;  // once for each replay

}  // namespace emulated::figures
