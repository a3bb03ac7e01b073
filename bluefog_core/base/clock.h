// One clock for everything: CLOCK_MONOTONIC, the same for all processes of a host.
#pragma once

#include <time.h>

#include <cstdint>

namespace bluefog {

inline constexpr int64_t kMicrosecond = 1'000, kMillisecond = 1'000'000;  ///< In nanoseconds.

inline int64_t NowNs() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return int64_t{ts.tv_sec} * 1'000'000'000 + ts.tv_nsec;
}

}  // namespace bluefog
