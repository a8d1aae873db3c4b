// Compiled once, read by every operator's file: ATen alone takes longer to parse than the rest.
#include <ATen/ATen.h>
#include <acl/acl.h>
