// Numbers that break careless kernels, and comparison by bits. For tests.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/half.h"
#include "kernels/kernels.h"

namespace bluefog::kernels {

/// Runs every test of a suite once per instruction set and goes back to the best one afterwards.
class OnEachTarget : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    ASSERT_TRUE(ForceTarget(GetParam()));
    ASSERT_STREQ(ActiveTarget(), GetParam());
  }
  void TearDown() override { ForceTarget(nullptr); }
};
inline auto EachTarget() {
  return ::testing::ValuesIn(SupportedTargets().begin(), SupportedTargets().end());
}
inline std::string TargetOf(const ::testing::TestParamInfo<const char*>& info) {
  return info.param;
}

template <class E>
using BitsOf = std::conditional_t<sizeof(E) == 8, uint64_t,
                                  std::conditional_t<sizeof(E) == 4, uint32_t, uint16_t>>;
template <class E>
BitsOf<E> Bits(E x) {
  return std::bit_cast<BitsOf<E>>(x);
}

// Exponent and fraction widths of each format.
template <class E>
constexpr int kFractionBits = 0;
template <>
inline constexpr int kFractionBits<double> = 52;
template <>
inline constexpr int kFractionBits<float> = 23;
template <>
inline constexpr int kFractionBits<Float16> = 10;
template <>
inline constexpr int kFractionBits<BFloat16> = 7;

template <class E>
bool IsNan(E x) {
  if constexpr (kFractionBits<E> == 0) {
    return false;
  } else {
    const auto all = static_cast<BitsOf<E>>(~BitsOf<E>{0});
    const auto magnitude = static_cast<BitsOf<E>>(Bits(x) & (all >> 1));
    const auto infinity =
        static_cast<BitsOf<E>>((all >> 1) & ~((BitsOf<E>{1} << kFractionBits<E>)-1u));
    return magnitude > infinity;
  }
}

/// Equal bits, or both NaN: which NaN comes out of two is the hardware's choice.
template <class E>
bool Same(E a, E b) {
  return Bits(a) == Bits(b) || (IsNan(a) && IsNan(b));
}

/// Any bit pattern (denormals, infinities, NaNs, both zeros), half of the time; else moderate
/// numbers, whose sums need rounding.
template <class E>
std::vector<E> Values(int64_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<E> values(static_cast<size_t>(n));
  for (E& value : values) {
    const uint64_t r = random();
    if constexpr (kFractionBits<E> == 0) {
      value = static_cast<E>(r);
    } else {
      auto bits = static_cast<BitsOf<E>>(r);
      if ((r >> 63) != 0) {  // Exponent of 1 … 8, any sign and fraction.
        constexpr int kSpan = 8 * static_cast<int>(sizeof(E)) - 1 - kFractionBits<E>;
        constexpr uint64_t kBias = (uint64_t{1} << (kSpan - 1)) - 1;
        const uint64_t exponent = kBias + ((r >> 60) & 3);
        const uint64_t keep = ~(((uint64_t{1} << kSpan) - 1) << kFractionBits<E>);
        bits = static_cast<BitsOf<E>>((bits & keep) | (exponent << kFractionBits<E>));
      }
      value = std::bit_cast<E>(bits);
    }
  }
  return values;
}

}  // namespace bluefog::kernels
