// The public element-wise arithmetic of plugins. Tiles lie in cache when it is called, so the loops
// are plain; the order of every reduction is fixed by n alone.
#include <bluefog/elementwise.h>

#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/elementwise.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstring>
#include <string>

#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace bluefog::elementwise {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using namespace kernels::HWY_NAMESPACE;  // NOLINT: simd-inl.h of this target

// f(T{}) with the element type; nothing, and zero, for a type that has no arithmetic here.
template <class F>
HWY_INLINE auto WithType(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    default:
      return decltype(f(float{}))();
  }
}

// out[i] = f(d, in0[i], in1[i], …), vectors first, then the tail one by one.
template <class T, class F, class... In>
HWY_INLINE void Map(int64_t n, void* out_bytes, const F& f, const In*... in) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  T* out = static_cast<T*>(out_bytes);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(f(d, hn::LoadU(d, static_cast<const T*>(in) + i)...), d, out + i);
  }
  const One<T> one;
  for (; i < n; ++i) {
    hn::StoreU(f(one, hn::LoadU(one, static_cast<const T*>(in) + i)...), one, out + i);
  }
}

void Fill(DType dtype, int64_t n, void* out, double value) {
  WithType(dtype, [&](auto t) HWY_ATTR {
    const auto s = static_cast<decltype(t)>(value);
    Map<decltype(t)>(n, out, [s](auto d) HWY_ATTR { return hn::Set(d, s); });
  });
}

void MulAdd(DType dtype, int64_t n, void* out, double a, const void* x, const void* y) {
  WithType(dtype, [&](auto t) HWY_ATTR {
    const auto s = static_cast<decltype(t)>(a);
    const auto f = [s](auto d, auto u, auto v) HWY_ATTR { return Fma(d, hn::Set(d, s), u, v); };
    Map<decltype(t)>(n, out, f, x, y);
  });
}

void ScaleAdd(DType dtype, int64_t n, void* out, double a, const void* x, const void* y) {
  WithType(dtype, [&](auto t) HWY_ATTR {
    const auto s = static_cast<decltype(t)>(a);
    const auto f = [s](auto d, auto u, auto v)
                       HWY_ATTR { return hn::Add(hn::Mul(hn::Set(d, s), u), v); };
    Map<decltype(t)>(n, out, f, x, y);
  });
}

void Scale(DType dtype, int64_t n, void* out, double a, const void* x) {
  WithType(dtype, [&](auto t) HWY_ATTR {
    const auto s = static_cast<decltype(t)>(a);
    const auto f = [s](auto d, auto u) HWY_ATTR { return hn::Mul(hn::Set(d, s), u); };
    Map<decltype(t)>(n, out, f, x);
  });
}

void Add(DType dtype, int64_t n, void* out, const void* x, const void* y) {
  WithType(dtype, [&](auto t) HWY_ATTR {
    const auto f = [](auto, auto u, auto v) HWY_ATTR { return hn::Add(u, v); };
    Map<decltype(t)>(n, out, f, x, y);
  });
}

void Sub(DType dtype, int64_t n, void* out, const void* x, const void* y) {
  WithType(dtype, [&](auto t) HWY_ATTR {
    const auto f = [](auto, auto u, auto v) HWY_ATTR { return hn::Sub(u, v); };
    Map<decltype(t)>(n, out, f, x, y);
  });
}

void HeavyBall(DType dtype, int64_t n, void* x, void* v, double beta, const void* target) {
  WithType(dtype, [&](auto t) HWY_ATTR {
    using T = decltype(t);
    const auto s = static_cast<T>(beta);
    const auto move = [&](auto d, int64_t i) HWY_ATTR {
      T* px = static_cast<T*>(x) + i;
      T* pv = static_cast<T*>(v) + i;
      const auto old = hn::LoadU(d, px);
      const auto step = hn::Sub(old, hn::LoadU(d, static_cast<const T*>(target) + i));
      const auto velocity = Fma(d, hn::Set(d, s), hn::LoadU(d, pv), step);
      hn::StoreU(velocity, d, pv);
      hn::StoreU(hn::Sub(old, velocity), d, px);
    };
    const hn::ScalableTag<T> d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) move(d, i);
    for (; i < n; ++i) move(One<T>(), i);
  });
}

template <class D>
HWY_INLINE hn::Vec<D> LoadDouble(D d, const double* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadDouble(D d, const float* p) {
  return hn::PromoteTo(d, hn::LoadU(hn::Rebind<float, D>(), p));
}

// 32 running sums, element i into sum i mod 32, then a tree over the sums: the same additions in
// the same order whatever the vector length.
template <class T>
double SumOfSquaresOf(int64_t n, const T* x) {
  constexpr int64_t kSums = 32;
  const hn::ScalableTag<double> d;
  constexpr int64_t kLanes = hn::MaxLanes(hn::ScalableTag<double>());
  constexpr int64_t kVectors = kSums / kLanes;
  HWY_ALIGN double sums[kSums];
  hn::Vec<decltype(d)> acc[kVectors];
  for (auto& v : acc) v = hn::Zero(d);
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int64_t j = 0; j < kVectors; ++j) {
      const auto v = LoadDouble(d, x + i + j * kLanes);
      acc[j] = Fma(d, v, v, acc[j]);
    }
  }
  for (int64_t j = 0; j < kVectors; ++j) hn::Store(acc[j], d, sums + j * kLanes);
  for (int64_t j = 0; i < n; ++i, ++j) {
    const double v = static_cast<double>(x[i]);
    sums[j] = std::fma(v, v, sums[j]);
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

double SumOfSquares(DType dtype, int64_t n, const void* x) {
  return WithType(dtype, [&](auto t) HWY_ATTR {
    return SumOfSquaresOf(n, static_cast<const decltype(t)*>(x));
  });
}

int64_t CountNonFinite(DType dtype, int64_t n, const void* x) {
  return WithType(dtype, [&](auto t) HWY_ATTR {
    using T = decltype(t);
    const T* p = static_cast<const T*>(x);
    const hn::ScalableTag<T> d;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    int64_t finite = 0;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      finite += static_cast<int64_t>(hn::CountTrue(d, hn::IsFinite(hn::LoadU(d, p + i))));
    }
    for (; i < n; ++i) finite += std::isfinite(p[i]) ? 1 : 0;
    return n - finite;
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace bluefog::elementwise
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace bluefog::elementwise {
namespace {
HWY_EXPORT(Fill);
HWY_EXPORT(MulAdd);
HWY_EXPORT(ScaleAdd);
HWY_EXPORT(Scale);
HWY_EXPORT(Add);
HWY_EXPORT(Sub);
HWY_EXPORT(HeavyBall);
HWY_EXPORT(SumOfSquares);
HWY_EXPORT(CountNonFinite);
}  // namespace

Status CheckDType(DType dtype) {
  if (dtype == DType::kFloat32 || dtype == DType::kFloat64) return absl::OkStatus();
  return absl::InvalidArgumentError(
      std::string("element-wise arithmetic works on float32 and float64, not on ") + NameOf(dtype));
}

void Copy(DType dtype, int64_t n, void* out, const void* x) {
  if (n > 0 && out != x) std::memcpy(out, x, static_cast<size_t>(n * SizeOf(dtype)));
}
void Fill(DType dtype, int64_t n, void* out, double value) {
  HWY_DYNAMIC_DISPATCH(Fill)(dtype, n, out, value);
}
void MulAdd(DType dtype, int64_t n, void* out, double a, const void* x, const void* y) {
  HWY_DYNAMIC_DISPATCH(MulAdd)(dtype, n, out, a, x, y);
}
void ScaleAdd(DType dtype, int64_t n, void* out, double a, const void* x, const void* y) {
  HWY_DYNAMIC_DISPATCH(ScaleAdd)(dtype, n, out, a, x, y);
}
void Scale(DType dtype, int64_t n, void* out, double a, const void* x) {
  HWY_DYNAMIC_DISPATCH(Scale)(dtype, n, out, a, x);
}
void Add(DType dtype, int64_t n, void* out, const void* x, const void* y) {
  HWY_DYNAMIC_DISPATCH(Add)(dtype, n, out, x, y);
}
void Sub(DType dtype, int64_t n, void* out, const void* x, const void* y) {
  HWY_DYNAMIC_DISPATCH(Sub)(dtype, n, out, x, y);
}
void HeavyBall(DType dtype, int64_t n, void* x, void* v, double beta, const void* target) {
  HWY_DYNAMIC_DISPATCH(HeavyBall)(dtype, n, x, v, beta, target);
}
double SumOfSquares(DType dtype, int64_t n, const void* x) {
  return HWY_DYNAMIC_DISPATCH(SumOfSquares)(dtype, n, x);
}
int64_t CountNonFinite(DType dtype, int64_t n, const void* x) {
  return HWY_DYNAMIC_DISPATCH(CountNonFinite)(dtype, n, x);
}

}  // namespace bluefog::elementwise
#endif  // HWY_ONCE
