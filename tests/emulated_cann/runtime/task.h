// A unit of work of a stream, and what it costs on a real card.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace emulated {

class Timeline;

enum class Engine { kMatrix, kAttention, kCopy };

struct Cost {
    double bytes = 0;
    double half_flops = 0;   // on the cube units
    double float_flops = 0;  // on the cube units, in float32
    double vector_flops = 0;
    Engine engine = Engine::kMatrix;
};

// A kernel or copy takes time; a marker (event, host callback) only orders other tasks.
struct Task {
    std::string name;
    bool is_marker = false;
    Cost cost = {};
    std::function<void(Timeline&)> run = {};
    int64_t submitted_ns = 0;
};

}  // namespace emulated
