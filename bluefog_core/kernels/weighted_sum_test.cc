// The promise of kernels.h: the same bits on every instruction set, for any length, alignment,
// number of terms and special value, also in place and past the caches.
#include <algorithm>
#include <numeric>

#include "kernels/test_values.h"

namespace bluefog::kernels {
namespace {

template <class E>
struct Format;
template <>
struct Format<float> {
  using Acc = float;
  static constexpr DType kType = DType::kFloat32;
  static float Round(float x) { return x; }
};
template <>
struct Format<double> {
  using Acc = double;
  static constexpr DType kType = DType::kFloat64;
  static double Round(double x) { return x; }
};
template <>
struct Format<Float16> {
  using Acc = float;
  static constexpr DType kType = DType::kFloat16;
  static Float16 Round(float x) { return Float16{ToFields(x, 10, 15)}; }
};
template <>
struct Format<BFloat16> {
  using Acc = float;
  static constexpr DType kType = DType::kBFloat16;
  static BFloat16 Round(float x) { return BFloat16{ToFields(x, 7, 127)}; }
};
template <>
struct Format<int32_t> {
  static constexpr DType kType = DType::kInt32;
};
template <>
struct Format<int64_t> {
  static constexpr DType kType = DType::kInt64;
};

template <class E>
E WeightedReference(const std::vector<const E*>& x, const std::vector<double>& w, size_t i) {
  using Acc = typename Format<E>::Acc;
  Acc acc = 0;
  for (size_t j = 0; j < x.size(); ++j) {
    const auto weight = static_cast<Acc>(w[j]);
    const auto value = static_cast<Acc>(ToDouble(x[j][i]));
    acc = j == 0 ? weight * value : std::fma(weight, value, acc);
  }
  return Format<E>::Round(acc);
}

template <class E>
E MeanReference(const std::vector<const E*>& x, double divisor, size_t i) {
  if constexpr (std::is_integral_v<E>) {
    std::make_unsigned_t<E> acc = 0;  // Sums wrap.
    for (const E* p : x) acc += static_cast<std::make_unsigned_t<E>>(p[i]);
    return static_cast<E>(acc);
  } else {
    using Acc = typename Format<E>::Acc;
    Acc acc = 0;
    for (size_t j = 0; j < x.size(); ++j) {
      const auto value = static_cast<Acc>(ToDouble(x[j][i]));
      acc = j == 0 ? value : acc + value;
    }
    return Format<E>::Round(divisor == 1.0 ? acc : acc / static_cast<Acc>(divisor));
  }
}

struct Shape {
  size_t n;
  size_t k;
  size_t
      offset;  // Of the output, in elements past an aligned address; term j lies j + offset past.
  bool streaming;
  int in_place;  // Index of the term that is the output, or -1.
};

// Calls `check(shape, terms, sources, out)` for many shapes; `run` in it fills out. Elements before
// and after the output must survive.
template <class E, class Check>
void ForShapes(const Check& check) {
  for (const size_t n : {0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 300, 1027}) {
    for (const size_t k : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17}) {
      for (const size_t offset : {0, 1, 5}) {
        for (const bool streaming : {false, true}) {
          for (const int in_place : {-1, 0, static_cast<int>(k) - 1}) {
            if (in_place >= static_cast<int>(k)) continue;
            const Shape shape{n, k, offset, streaming, in_place};
            check(shape);
            if (::testing::Test::HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

// One call on fresh buffers: `run(out, terms)` against `expected(sources, weights, i)`.
template <class E, class Run, class Expected>
void CheckShape(const Shape& shape, const Run& run, const Expected& expected) {
  constexpr size_t kGuard = 64;
  std::vector<std::vector<E>> buffers;
  std::vector<const E*> originals, sources;
  std::vector<double> weights;
  for (size_t j = 0; j < shape.k; ++j) {
    buffers.push_back(Values<E>(static_cast<int64_t>(shape.n + j + 8), 1000 * shape.n + j));
    weights.push_back(j == 0 ? 0.1 : 1.0 / static_cast<double>(3 + j));
    originals.push_back(buffers.back().data() + (j + shape.offset) % 8);
    sources.push_back(originals.back());
  }
  auto out_buffer = Values<E>(static_cast<int64_t>(shape.n + 2 * kGuard + 64), 7);
  const auto misaligned = reinterpret_cast<uintptr_t>(out_buffer.data() + kGuard) % 64 / sizeof(E);
  E* const out =
      out_buffer.data() + kGuard + (64 / sizeof(E) - misaligned) % (64 / sizeof(E)) + shape.offset;
  if (shape.in_place >= 0) {
    std::copy_n(originals[static_cast<size_t>(shape.in_place)], shape.n, out);
    sources[static_cast<size_t>(shape.in_place)] = out;
  }
  std::vector<Term> terms;
  for (size_t j = 0; j < shape.k; ++j) terms.push_back({sources[j], weights[j]});
  const std::vector<E> before = out_buffer;
  const Status status = run(static_cast<void*>(out), terms);
  ASSERT_TRUE(status.ok()) << status;
  const std::string where = " n=" + std::to_string(shape.n) + " k=" + std::to_string(shape.k) +
                            " offset=" + std::to_string(shape.offset) +
                            " streaming=" + std::to_string(shape.streaming) +
                            " in_place=" + std::to_string(shape.in_place);
  const auto begin = static_cast<size_t>(out - out_buffer.data());
  for (size_t i = 0; i < out_buffer.size(); ++i) {
    const bool inside = i >= begin && i < begin + shape.n;
    const E want = inside ? expected(originals, weights, i - begin) : before[i];
    ASSERT_TRUE(Same(out_buffer[i], want))
        << "element " << static_cast<int64_t>(i - begin) << where << ": bits " << std::hex
        << Bits(out_buffer[i]) << " instead of " << Bits(want);
  }
}

class WeightedSumTest : public OnEachTarget {
 protected:
  template <class E>
  void CheckWeighted() {
    ForShapes<E>([](const Shape& shape) {
      CheckShape<E>(
          shape,
          [&](void* out, const std::vector<Term>& terms) {
            return WeightedSum(Format<E>::kType, static_cast<int64_t>(shape.n), out, terms,
                               shape.streaming);
          },
          WeightedReference<E>);
    });
  }
  template <class E>
  void CheckMean(double divisor) {
    ForShapes<E>([divisor](const Shape& shape) {
      CheckShape<E>(
          shape,
          [&](void* out, const std::vector<Term>& terms) {
            return SumDivide(Format<E>::kType, static_cast<int64_t>(shape.n), out, terms, divisor,
                             shape.streaming);
          },
          [&](const auto& x, const auto&, size_t i) { return MeanReference<E>(x, divisor, i); });
    });
  }
};

TEST_P(WeightedSumTest, Float32HasTheBitsOfScalarFma) { CheckWeighted<float>(); }
TEST_P(WeightedSumTest, Float64HasTheBitsOfScalarFma) { CheckWeighted<double>(); }
TEST_P(WeightedSumTest, Float16RoundsOnce) { CheckWeighted<Float16>(); }
TEST_P(WeightedSumTest, BFloat16RoundsOnce) { CheckWeighted<BFloat16>(); }

TEST_P(WeightedSumTest, MeanIsASumAndOneDivision) {
  CheckMean<float>(3.0);
  CheckMean<double>(3.0);
  CheckMean<Float16>(3.0);
  CheckMean<BFloat16>(3.0);
}
TEST_P(WeightedSumTest, SumWithoutDivision) {
  CheckMean<float>(1.0);
  CheckMean<Float16>(1.0);
  CheckMean<int32_t>(1.0);
  CheckMean<int64_t>(1.0);
}

// Every half-precision number survives a copy with weight 1: conversions are exact both ways.
TEST_P(WeightedSumTest, AllHalvesPassThrough) {
  std::vector<uint16_t> all(65536), out(65536);
  std::iota(all.begin(), all.end(), uint16_t{0});
  const std::vector<Term> terms = {{all.data(), 1.0}};
  ASSERT_TRUE(WeightedSum(DType::kFloat16, 65536, out.data(), terms).ok());
  for (size_t i = 0; i < all.size(); ++i) {
    ASSERT_TRUE(Same(Float16{all[i]}, Float16{out[i]})) << std::hex << i;
  }
  ASSERT_TRUE(WeightedSum(DType::kBFloat16, 65536, out.data(), terms).ok());
  for (size_t i = 0; i < all.size(); ++i) {
    ASSERT_TRUE(Same(BFloat16{all[i]}, BFloat16{out[i]})) << std::hex << i;
  }
}

// Halfway cases: with weights 1 and 2^-11 (2^-8) the exact sum of two halves lies on ties often.
TEST_P(WeightedSumTest, TiesOfHalvesGoToEven) {
  std::vector<uint16_t> all(65536), next(65536), out(65536);
  std::iota(all.begin(), all.end(), uint16_t{0});
  for (size_t i = 0; i < all.size(); ++i) next[i] = static_cast<uint16_t>(i & 0xfc00u);
  std::vector<const Float16*> x = {reinterpret_cast<const Float16*>(all.data()),
                                   reinterpret_cast<const Float16*>(next.data())};
  const std::vector<double> weights = {1.0, 0x1p-11};
  const std::vector<Term> terms = {{x[0], weights[0]}, {x[1], weights[1]}};
  ASSERT_TRUE(WeightedSum(DType::kFloat16, 65536, out.data(), terms).ok());
  for (size_t i = 0; i < all.size(); ++i) {
    ASSERT_TRUE(Same(Float16{out[i]}, WeightedReference(x, weights, i))) << std::hex << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, WeightedSumTest, EachTarget(), TargetOf);

// Uniform weights in fp64: 2^-256 times the count must come back exactly.
TEST(SumDivideTest, TinyMeansAreExact) {
  const double x = 0x1p-256;
  const std::vector<Term> terms = {{&x, 0.0}, {&x, 0.0}, {&x, 0.0}};
  double out = 0;
  ASSERT_TRUE(SumDivide(DType::kFloat64, 1, &out, terms, 3.0).ok());
  EXPECT_EQ(out, x);
}

TEST(SumDivideTest, RefusesWhatHasNoMeaning) {
  int32_t x = 1, out = 5;
  const std::vector<Term> terms = {{&x, 1.0}};
  const Status weighted = WeightedSum(DType::kInt32, 1, &out, terms);
  EXPECT_EQ(weighted.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(weighted.message().find("int32"), std::string::npos) << weighted;
  const Status mean = SumDivide(DType::kInt32, 1, &out, terms, 2.0);
  EXPECT_EQ(mean.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(mean.message().find("int32"), std::string::npos) << mean;
  const Status boolean = SumDivide(DType::kBool, 1, &out, terms, 1.0);
  EXPECT_EQ(boolean.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(boolean.message().find("bool"), std::string::npos) << boolean;
  EXPECT_EQ(out, 5);
}

TEST(DispatchTest, NamesAndSwitches) {
  ASSERT_FALSE(SupportedTargets().empty());
  EXPECT_FALSE(ForceTarget("no such thing"));
  ASSERT_TRUE(ForceTarget(SupportedTargets().back()));
  EXPECT_STREQ(ActiveTarget(), SupportedTargets().back());
  ASSERT_TRUE(ForceTarget(nullptr));
  EXPECT_STREQ(ActiveTarget(), SupportedTargets().front());
}

}  // namespace
}  // namespace bluefog::kernels
