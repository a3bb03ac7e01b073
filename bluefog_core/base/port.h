// A free TCP port on 127.0.0.1, for a job that starts now.
#pragma once

#include <bluefog/status.h>

namespace bluefog {

/// At random below the ports that the kernel gives to outgoing connections. It may be taken before
/// it is used. ResourceExhausted: none was found.
StatusOr<int> FreePort();

}  // namespace bluefog
