// Numbers that break careless kernels, and comparison by bits. For tests.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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

// Conversions written apart from the kernels': through exact double arithmetic.
inline double ToDouble(float x) { return x; }
inline double ToDouble(double x) { return x; }
inline double FromFields(uint16_t bits, int fraction_bits, int bias) {
  const int exponent_mask = (1 << (15 - fraction_bits)) - 1;
  const int exponent = (bits >> fraction_bits) & exponent_mask;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == exponent_mask) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  const int significand = exponent != 0 ? fraction + (1 << fraction_bits) : fraction;
  return sign * std::ldexp(significand, std::max(exponent, 1) - bias - fraction_bits);
}
inline double ToDouble(Float16 x) { return FromFields(x.bits, 10, 15); }
inline double ToDouble(BFloat16 x) { return FromFields(x.bits, 7, 127); }

inline uint16_t ToFields(double x, int fraction_bits, int bias) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const int infinity = ((1 << (15 - fraction_bits)) - 1) << fraction_bits;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1);
  if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
  if (x == 0.0) return sign;
  int exponent = 0;
  std::frexp(x, &exponent);
  const int lowest = std::max(exponent - 1, 1 - bias);  // Exponent of the leading bit kept.
  // nearbyint rounds ties to even. A carry into the next exponent comes out right by itself.
  const auto units =
      static_cast<int>(std::nearbyint(std::ldexp(std::abs(x), fraction_bits - lowest)));
  const int bits = ((lowest + bias - 1) << fraction_bits) + units;
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
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
