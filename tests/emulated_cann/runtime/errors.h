// How a call is refused: a code for the caller, and a text that aclGetRecentErrMsg hands out.
#pragma once
#include <acl/acl.h>

#include <string>

namespace emulated {

struct Refusal {
    aclError code;
    std::string text;
};

void set_last_error(std::string text);  // of the calling thread
std::string take_last_error();

// Run the body of an API function; a Refusal becomes its return code.
template <typename Body>
aclError answer(Body&& body) {
    try {
        body();
        return ACL_SUCCESS;
    } catch (const Refusal& refusal) {
        set_last_error(refusal.text);
        return refusal.code;
    }
}

}  // namespace emulated
