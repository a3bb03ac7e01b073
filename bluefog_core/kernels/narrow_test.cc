// Rounded messages: to nearest even, once, on every instruction set; and a mix that is exact where
// the ranks agree.
#include <algorithm>
#include <cmath>

#include "kernels/test_values.h"

namespace bluefog::kernels {
namespace {

class NarrowTest : public OnEachTarget {};

struct Format {
  DType type;
  int fraction_bits, bias;
  double largest;
};
constexpr Format kFloat16{DType::kFloat16, 10, 15, 65504.0};
constexpr Format kBFloat16{DType::kBFloat16, 7, 127, 0x1.fep127};

uint16_t Expected(const Format& format, double x) {
  if (std::isfinite(x)) x = std::clamp(x, -format.largest, format.largest);
  return ToFields(x, format.fraction_bits, format.bias);
}

bool SameHalf(const Format& format, uint16_t a, uint16_t b) {
  return format.type == DType::kFloat16 ? Same(Float16{a}, Float16{b})
                                        : Same(BFloat16{a}, BFloat16{b});
}

template <class T>
void ExpectNarrowed(DType dtype, const std::vector<T>& x) {
  for (const Format& format : {kFloat16, kBFloat16}) {
    std::vector<uint16_t> out(x.size() + 1, 0xabcd);
    Narrow(dtype, format.type, static_cast<int64_t>(x.size()), x.data(), out.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const uint16_t expected = Expected(format, ToDouble(x[i]));
      ASSERT_TRUE(SameHalf(format, out[i], expected))
          << NameOf(format.type) << " of " << x[i] << " (element " << i << " of " << x.size()
          << ") is " << std::hex << out[i] << ", not " << expected;
    }
    EXPECT_EQ(out.back(), 0xabcd);
  }
}

// Around every value that a 16-bit format has, and around what lies half-way between two.
template <class T>
std::vector<T> NearTies(int fraction_bits, int bias) {
  std::vector<T> x;
  for (int bits = 0; bits < 0x8000; ++bits) {
    const double value = FromFields(static_cast<uint16_t>(bits), fraction_bits, bias);
    const double next = FromFields(static_cast<uint16_t>(bits + 1), fraction_bits, bias);
    if (!std::isfinite(value)) continue;
    const double middle = std::isfinite(next) ? (value + next) / 2 : value;
    for (const double base : {value, middle}) {
      const auto y = static_cast<T>(base);
      for (const T near : {y, std::nextafter(y, T(0)), std::nextafter(y, T(1e39))}) {
        x.push_back(bits % 2 == 0 ? near : -near);
      }
    }
  }
  return x;
}

TEST_P(NarrowTest, RoundsFloatsToNearestEven) {
  for (const int64_t n : {0, 1, 3, 7, 8, 15, 16, 17, 33, 1000}) {
    ExpectNarrowed(DType::kFloat32, Values<float>(n, 7 + static_cast<uint64_t>(n)));
  }
  ExpectNarrowed(DType::kFloat32, NearTies<float>(10, 15));
  ExpectNarrowed(DType::kFloat32, NearTies<float>(7, 127));
}

TEST_P(NarrowTest, RoundsDoublesOnce) {
  for (const int64_t n : {0, 1, 3, 7, 8, 15, 16, 17, 33, 1000}) {
    ExpectNarrowed(DType::kFloat64, Values<double>(n, 9 + static_cast<uint64_t>(n)));
  }
  // By way of fp32, rounded to nearest, half of these would go the wrong way.
  ExpectNarrowed(DType::kFloat64, NearTies<double>(10, 15));
  ExpectNarrowed(DType::kFloat64, NearTies<double>(7, 127));
}

TEST_P(NarrowTest, DoublesTravelAsFloatsToo) {
  std::vector<double> x = Values<double>(1000, 3);
  x.insert(x.end(), {1e300, -1e300, INFINITY, -INFINITY, 0x1.ffffffp127});
  std::vector<float> out(x.size());
  Narrow(DType::kFloat64, DType::kFloat32, static_cast<int64_t>(x.size()), x.data(), out.data());
  constexpr float kMost = std::numeric_limits<float>::max();
  for (size_t i = 0; i < x.size(); ++i) {
    auto expected = static_cast<float>(x[i]);
    if (std::isfinite(x[i])) expected = std::clamp(expected, -kMost, kMost);
    EXPECT_TRUE(Same(out[i], expected)) << x[i] << " became " << out[i];
  }
}

TEST_P(NarrowTest, FiniteStaysFiniteAndTheRestStaysWhatItIs) {
  const std::vector<float> x = {1e5f, -1e30f, 65519.0f, 65520.0f, INFINITY, -INFINITY, NAN, -0.0f};
  std::vector<Float16> out(x.size());
  Narrow(DType::kFloat32, DType::kFloat16, static_cast<int64_t>(x.size()), x.data(), out.data());
  const std::vector<float> expected = {65504, -65504, 65504, 65504, INFINITY, -INFINITY, 0, -0.0f};
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      EXPECT_TRUE(IsNan(out[i]));
    } else {
      EXPECT_EQ(Widen(out[i]), expected[i]);
      EXPECT_EQ(std::signbit(Widen(out[i])), std::signbit(x[i]));
    }
  }
}

template <class T, class E>
void ExpectMixed(DType dtype, DType message, const std::vector<T>& x,
                 const std::vector<std::vector<T>>& others) {
  const auto n = static_cast<int64_t>(x.size());
  const auto narrow = [&](const std::vector<T>& v) {
    std::vector<E> out(v.size());
    Narrow(dtype, message, n, v.data(), out.data());
    return out;
  };
  const std::vector<E> own = narrow(x);
  std::vector<std::vector<E>> sent;
  std::vector<Term> terms;
  for (const auto& other : others) sent.push_back(narrow(other));
  double weight = 0.1;
  for (const auto& s : sent) terms.push_back({s.data(), weight += 0.05});
  std::vector<T> out(x);
  MixNarrow(dtype, message, n, out.data(), 0.9, out.data(), own.data(), terms);  // In place.
  for (size_t i = 0; i < x.size(); ++i) {
    T expected = static_cast<T>(0.9) * x[i];
    for (size_t j = 0; j < sent.size(); ++j) {
      const T difference = static_cast<T>(ToDouble(sent[j][i])) - static_cast<T>(ToDouble(own[i]));
      expected = std::fma(static_cast<T>(terms[j].weight), difference, expected);
    }
    ASSERT_TRUE(Same(out[i], expected)) << out[i] << " instead of " << expected << ", " << i;
  }
}

TEST_P(NarrowTest, MixesDifferencesInOrder) {
  for (const int64_t n : {0, 1, 5, 16, 31, 200}) {
    for (const uint64_t k : {0, 1, 2, 5}) {
      std::vector<std::vector<float>> floats;
      std::vector<std::vector<double>> doubles;
      for (uint64_t j = 0; j < k; ++j) floats.push_back(Values<float>(n, 50 + j));
      for (uint64_t j = 0; j < k; ++j) doubles.push_back(Values<double>(n, 60 + j));
      const auto x = Values<float>(n, 1);
      const auto y = Values<double>(n, 2);
      ExpectMixed<float, Float16>(DType::kFloat32, DType::kFloat16, x, floats);
      ExpectMixed<float, BFloat16>(DType::kFloat32, DType::kBFloat16, x, floats);
      ExpectMixed<double, Float16>(DType::kFloat64, DType::kFloat16, y, doubles);
      ExpectMixed<double, BFloat16>(DType::kFloat64, DType::kBFloat16, y, doubles);
      ExpectMixed<double, float>(DType::kFloat64, DType::kFloat32, y, doubles);
    }
  }
}

// Ranks with equal models keep them to the bit, though rounding loses most of their digits.
TEST_P(NarrowTest, ConsensusIsAFixedPoint) {
  std::vector<float> x(77);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i)) * 3.7f;
  std::vector<BFloat16> own(x.size());
  const auto n = static_cast<int64_t>(x.size());
  Narrow(DType::kFloat32, DType::kBFloat16, n, x.data(), own.data());
  std::vector<float> out(x.size());
  const std::vector<Term> terms = {{own.data(), 1.0 / 3}, {own.data(), 1.0 / 3}};
  MixNarrow(DType::kFloat32, DType::kBFloat16, n, out.data(), 1.0, x.data(), own.data(), terms);
  EXPECT_EQ(out, x);
}

TEST(CanNarrow, OnlyToFewerBitsOfAFloatingType) {
  EXPECT_TRUE(CanNarrow(DType::kFloat32, DType::kBFloat16));
  EXPECT_TRUE(CanNarrow(DType::kFloat64, DType::kFloat32));
  EXPECT_FALSE(CanNarrow(DType::kFloat32, DType::kFloat32));
  EXPECT_FALSE(CanNarrow(DType::kFloat32, DType::kFloat64));
  EXPECT_FALSE(CanNarrow(DType::kFloat16, DType::kBFloat16));
  EXPECT_FALSE(CanNarrow(DType::kFloat32, DType::kInt16));
  EXPECT_FALSE(CanNarrow(DType::kInt32, DType::kFloat16));
}

INSTANTIATE_TEST_SUITE_P(Targets, NarrowTest, EachTarget(), TargetOf);

}  // namespace
}  // namespace bluefog::kernels
