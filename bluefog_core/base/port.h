// A free TCP port, for a job that starts now.
#pragma once

#include <bluefog/status.h>

namespace bluefog {

/// On all addresses, at random below the ports that the kernel gives to outgoing connections. It
/// may be taken before it is used. ResourceExhausted: none was found.
StatusOr<int> FreePort();

}  // namespace bluefog
