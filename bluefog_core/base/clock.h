// One clock for everything: CLOCK_MONOTONIC, the same for all processes of a host.
#pragma once

#include <time.h>

#include <cstdint>
#include <cstdio>
#include <string>

namespace bluefog {

inline constexpr int64_t kMicrosecond = 1'000, kMillisecond = 1'000'000;  ///< In nanoseconds.

inline int64_t NowNs() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return int64_t{ts.tv_sec} * 1'000'000'000 + ts.tv_nsec;
}

/// "1.5 s", for messages.
inline std::string Seconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", static_cast<double>(ns) * 1e-9);
  return text;
}

}  // namespace bluefog
