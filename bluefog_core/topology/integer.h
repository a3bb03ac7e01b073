// Integer arithmetic for powers: a floating logarithm misses 243 = 3^5 and 1000 = 10^3.
#pragma once

#include <cstdint>

namespace bluefog::topology {

/// True for value = base^k, k >= 0; base >= 2.
constexpr bool IsPowerOf(int64_t value, int64_t base) {
  if (value < 1) return false;
  while (value % base == 0) value /= base;
  return value == 1;
}

/// The smallest k with 2^k >= value; value >= 1.
constexpr int CeilLog2(int64_t value) {
  int k = 0;
  while ((int64_t{1} << k) < value) ++k;
  return k;
}

}  // namespace bluefog::topology
