// Element-wise arithmetic has the bits of the scalar formula on every instruction set; sums do not
// depend on the instruction set at all.
#include <bluefog/elementwise.h>

#include <functional>
#include <limits>

#include "kernels/test_values.h"

namespace bluefog::kernels {
namespace {

template <class T>
constexpr DType kType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

class ElementwiseTest : public OnEachTarget {
 protected:
  // `run(out, x, y)` against `expected(x, y)`, for many lengths; in place over x (1) or y (2).
  template <class T>
  void Check(const char* what, const std::function<void(int64_t, T*, const T*, const T*)>& run,
             const std::function<T(T, T)>& expected) {
    for (const int64_t n : {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 100, 1025}) {
      for (const size_t offset : {0, 1, 3}) {
        for (const int in_place : {0, 1, 2}) {
          auto x = Values<T>(n + 8, 1 + static_cast<uint64_t>(n));
          auto y = Values<T>(n + 8, 2 + static_cast<uint64_t>(n));
          auto out = Values<T>(n + 8, 3);
          const auto x0 = x, y0 = y;
          auto& target = in_place == 0 ? out : in_place == 1 ? x : y;
          const auto before = target;
          run(n, target.data() + offset, x.data() + offset, y.data() + offset);
          for (size_t i = 0; i < target.size(); ++i) {
            const bool inside = i >= offset && i < offset + static_cast<size_t>(n);
            const T want = inside ? expected(x0[i], y0[i]) : before[i];
            ASSERT_TRUE(Same(target[i], want))
                << what << " element " << i << " of " << n << " offset " << offset << " in place "
                << in_place << ": " << target[i] << " instead of " << want;
          }
        }
      }
    }
  }

  template <class T>
  void CheckAll() {
    namespace ew = elementwise;
    const double a = 0.1;  // Not representable: rounded to T first.
    const T t = static_cast<T>(a);
    Check<T>(
        "Copy", [](auto n, T* o, auto x, auto) { ew::Copy(kType<T>, n, o, x); },
        [](T x, T) { return x; });
    Check<T>(
        "Fill", [&](auto n, T* o, auto, auto) { ew::Fill(kType<T>, n, o, a); },
        [&](T, T) { return t; });
    Check<T>(
        "MulAdd", [&](auto n, T* o, auto x, auto y) { ew::MulAdd(kType<T>, n, o, a, x, y); },
        [&](T x, T y) { return std::fma(t, x, y); });
    Check<T>(
        "ScaleAdd", [&](auto n, T* o, auto x, auto y) { ew::ScaleAdd(kType<T>, n, o, a, x, y); },
        [&](T x, T y) {
          const volatile T product = t * x;  // Rounded for certain.
          return product + y;
        });
    Check<T>(
        "Scale", [&](auto n, T* o, auto x, auto) { ew::Scale(kType<T>, n, o, a, x); },
        [&](T x, T) { return t * x; });
    Check<T>(
        "Add", [](auto n, T* o, auto x, auto y) { ew::Add(kType<T>, n, o, x, y); },
        [](T x, T y) { return x + y; });
    Check<T>(
        "Sub", [](auto n, T* o, auto x, auto y) { ew::Sub(kType<T>, n, o, x, y); },
        [](T x, T y) { return x - y; });
  }
};

TEST_P(ElementwiseTest, Float32HasTheBitsOfTheFormula) { CheckAll<float>(); }
TEST_P(ElementwiseTest, Float64HasTheBitsOfTheFormula) { CheckAll<double>(); }

template <class T>
void CheckHeavyBall() {
  const T beta = static_cast<T>(0.9);
  for (const int64_t n : {0, 1, 3, 8, 15, 16, 33, 1025}) {
    const auto x0 = Values<T>(n, 1), v0 = Values<T>(n, 2), target = Values<T>(n, 3);
    auto x = x0, v = v0;
    elementwise::HeavyBall(kType<T>, n, x.data(), v.data(), 0.9, target.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const T velocity = std::fma(beta, v0[i], x0[i] - target[i]);
      ASSERT_TRUE(Same(v[i], velocity)) << i << " of " << n;
      ASSERT_TRUE(Same(x[i], x0[i] - velocity)) << i << " of " << n;
    }
  }
}

TEST_P(ElementwiseTest, HeavyBallHasTheBitsOfTheFormula) {
  CheckHeavyBall<float>();
  CheckHeavyBall<double>();
}

template <class T>
std::vector<T> Finite(int64_t n) {
  auto x = Values<T>(n, static_cast<uint64_t>(n));
  for (T& v : x) {
    if (!(std::abs(v) < T{1e6})) v = T{0.3f};
  }
  return x;
}

// Against the scalar fallback, bit for bit, and against a sum in extended precision.
template <class T>
void CheckSumOfSquares(const char* target) {
  for (const int64_t n : {0, 1, 5, 31, 32, 33, 63, 64, 100, 4096, 10007}) {
    const auto x = Finite<T>(n + 1);
    for (const int64_t offset : {0, 1}) {
      const T* p = x.data() + offset;
      ASSERT_TRUE(ForceTarget(target));
      const double sum = elementwise::SumOfSquares(kType<T>, n, p);
      ASSERT_TRUE(ForceTarget(SupportedTargets().back()));
      EXPECT_EQ(Bits(sum), Bits(elementwise::SumOfSquares(kType<T>, n, p))) << n;
      long double exact = 0;
      for (int64_t i = 0; i < n; ++i) exact += static_cast<long double>(p[i]) * p[i];
      EXPECT_NEAR(sum, static_cast<double>(exact), 1e-13 * static_cast<double>(exact)) << n;
    }
  }
}

TEST_P(ElementwiseTest, SumOfSquaresDependsOnTheNumbersOnly) {
  CheckSumOfSquares<float>(GetParam());
  CheckSumOfSquares<double>(GetParam());
}

template <class T>
void CheckCountNonFinite() {
  for (const int64_t n : {0, 1, 16, 17, 1000}) {
    auto x = Values<T>(n, 11);
    if (n > 2) x[static_cast<size_t>(n - 2)] = -std::numeric_limits<T>::infinity();
    int64_t expected = 0;
    for (const T v : x) expected += std::isfinite(v) ? 0 : 1;
    EXPECT_EQ(elementwise::CountNonFinite(kType<T>, n, x.data()), expected) << n;
  }
  std::vector<T> bad(100, std::numeric_limits<T>::quiet_NaN());
  EXPECT_EQ(elementwise::CountNonFinite(kType<T>, 100, bad.data()), 100);
  const std::vector<T> largest(100, std::numeric_limits<T>::max());
  EXPECT_EQ(elementwise::CountNonFinite(kType<T>, 100, largest.data()), 0);
}

TEST_P(ElementwiseTest, CountsNanAndInfinity) {
  CheckCountNonFinite<float>();
  CheckCountNonFinite<double>();
}

INSTANTIATE_TEST_SUITE_P(Targets, ElementwiseTest, EachTarget(), TargetOf);

TEST(ElementwiseTypesTest, OtherTypesAreRefusedAndUntouched) {
  EXPECT_TRUE(elementwise::CheckDType(DType::kFloat32).ok());
  EXPECT_TRUE(elementwise::CheckDType(DType::kFloat64).ok());
  const Status status = elementwise::CheckDType(DType::kFloat16);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("float16"), std::string::npos) << status;
  uint16_t x[3] = {1, 2, 3}, out[3] = {7, 7, 7};
  elementwise::MulAdd(DType::kFloat16, 3, out, 1.0, x, x);
  EXPECT_EQ(out[0], 7);
  elementwise::Copy(DType::kFloat16, 3, out, x);
  EXPECT_EQ(out[2], 3);
}

}  // namespace
}  // namespace bluefog::kernels
