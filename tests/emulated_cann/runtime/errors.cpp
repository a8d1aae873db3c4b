#include "errors.h"

#include <utility>

namespace emulated {
namespace {
thread_local std::string last_text;
}

void set_last_error(std::string text) { last_text = "[emulated CANN] " + std::move(text); }
std::string take_last_error() { return std::exchange(last_text, {}); }

}  // namespace emulated
