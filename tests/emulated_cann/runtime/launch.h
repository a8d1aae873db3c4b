// What the operators need of the runtime.
#pragma once
#include <acl/acl.h>

#include "task.h"

namespace emulated {

class Stream;

Stream& stream_of(aclrtStream handle);  // the current device's default stream for none
void launch(aclrtStream stream, Task task);

}  // namespace emulated
