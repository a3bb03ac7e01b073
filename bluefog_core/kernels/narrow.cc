// Messages of fewer bits than the tensor: rounding to them, and the mix that keeps the mean over
// the ranks although what is sent is rounded.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/narrow.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <limits>
#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace bluefog::kernels {
namespace HWY_NAMESPACE {

template <class E>
constexpr double kLargest = std::numeric_limits<float>::max();
template <>
inline constexpr double kLargest<Float16> = 65504.0;
template <>
inline constexpr double kLargest<BFloat16> = 0x1.fep127;

// What is finite stays finite: beyond the largest value of E it is that.
template <class E, class D>
HWY_INLINE hn::Vec<D> Limit(D d, hn::Vec<D> v) {
  const auto most = hn::Set(d, static_cast<hn::TFromD<D>>(kLargest<E>));
  const auto limited = hn::Min(hn::Max(v, hn::Neg(most)), most);
  return hn::IfThenElse(hn::IsFinite(v), limited, v);
}

// Fp64 to fp32, to nearest even.
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<float, D>> ToFloat(D, hn::Vec<D> v) {
  const hn::Rebind<float, D> df;
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(df, static_cast<float>(hn::GetLane(v)));  // Its DemoteTo makes infinity finite.
#else
  return hn::DemoteTo(df, v);
#endif
}

// Fp64 to fp32 so that rounding the result again is as good as rounding once: what is not exact
// gets an odd last bit.
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<float, D>> RoundToOdd(D d, hn::Vec<D> v) {
  const hn::Rebind<float, D> df;
  const hn::Rebind<uint64_t, D> d64;
  const hn::Rebind<uint32_t, D> d32;
  const auto nearest = ToFloat(d, v);
  const auto back = hn::PromoteTo(d, nearest);
  const auto all_ones = [&](auto mask) HWY_ATTR {
    return hn::TruncateTo(d32, hn::BitCast(d64, hn::VecFromMask(d, mask)));
  };
  const auto inexact = all_ones(hn::Ne(back, v));
  const auto too_far = all_ones(hn::Gt(hn::Abs(back), hn::Abs(v)));  // All ones is -1.
  const auto bits = hn::Add(hn::BitCast(d32, nearest), too_far);
  return hn::BitCast(df, hn::Or(bits, hn::And(inexact, hn::Set(d32, 1))));
}

template <class D, class E>
HWY_INLINE void StoreNarrow(D d, hn::Vec<D> v, E* p) {
  v = Limit<E>(d, v);
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    StoreAs(d, v, p);
  } else if constexpr (std::is_same_v<E, float>) {
    hn::StoreU(ToFloat(d, v), hn::Rebind<float, D>(), p);
  } else {
    StoreAs(hn::Rebind<float, D>(), RoundToOdd(d, v), p);
  }
}

template <class D, class E>
HWY_INLINE hn::Vec<D> LoadNarrow(D d, const E* p) {
  if constexpr (sizeof(hn::TFromD<D>) == 4) {
    return LoadAs(d, p);
  } else {
    return hn::PromoteTo(d, LoadAs(hn::Rebind<float, D>(), p));
  }
}

// f(T{}, E{}): the types of the tensor and of the message. Nothing for pairs that do not go.
template <class F>
HWY_INLINE void WithTypes(DType dtype, DType message, const F& f) {
  const auto with = [&](auto t) HWY_ATTR {
    if (message == DType::kFloat16) return f(t, Float16{});
    if (message == DType::kBFloat16) return f(t, BFloat16{});
    if constexpr (sizeof(t) == 8) {
      if (message == DType::kFloat32) return f(t, float{});
    }
  };
  if (dtype == DType::kFloat32) return with(float{});
  if (dtype == DType::kFloat64) return with(double{});
}

// block(d, i) for all i < n: whole vectors, then one by one.
template <class T, class F>
HWY_INLINE void ForVectors(int64_t n, const F& block) {
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) block(d, i);
  for (; i < n; ++i) block(One<T>(), i);
}

void NarrowAny(DType dtype, DType message, int64_t n, const void* x, void* out) {
  WithTypes(dtype, message, [&](auto t, auto e) HWY_ATTR {
    using T = decltype(t);
    using E = decltype(e);
    ForVectors<T>(n, [&](auto d, int64_t i) HWY_ATTR {
      StoreNarrow(d, hn::LoadU(d, static_cast<const T*>(x) + i), static_cast<E*>(out) + i);
    });
  });
}

void MixNarrowAny(DType dtype, DType message, int64_t n, void* out, double total, const void* x,
                  const void* own, const Term* terms, int64_t k) {
  WithTypes(dtype, message, [&](auto t, auto e) HWY_ATTR {
    using T = decltype(t);
    using E = decltype(e);
    ForVectors<T>(n, [&](auto d, int64_t i) HWY_ATTR {
      const auto mine =
          own == nullptr ? hn::Zero(d) : LoadNarrow(d, static_cast<const E*>(own) + i);
      auto acc =
          hn::Mul(hn::Set(d, static_cast<T>(total)), hn::LoadU(d, static_cast<const T*>(x) + i));
      for (int64_t j = 0; j < k; ++j) {
        const auto theirs = LoadNarrow(d, static_cast<const E*>(terms[j].data) + i);
        acc = Fma(d, hn::Set(d, static_cast<T>(terms[j].weight)), hn::Sub(theirs, mine), acc);
      }
      hn::StoreU(acc, d, static_cast<T*>(out) + i);
    });
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace bluefog::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace bluefog::kernels {
namespace {
HWY_EXPORT(NarrowAny);
HWY_EXPORT(MixNarrowAny);
}  // namespace

bool CanNarrow(DType dtype, DType message) {
  return (dtype == DType::kFloat32 || dtype == DType::kFloat64) && IsFloating(message) &&
         SizeOf(message) < SizeOf(dtype);
}

void Narrow(DType dtype, DType message, int64_t n, const void* x, void* out) {
  HWY_DYNAMIC_DISPATCH(NarrowAny)(dtype, message, n, x, out);
}

void MixNarrow(DType dtype, DType message, int64_t n, void* out, double total, const void* x,
               const void* own, std::span<const Term> terms) {
  HWY_DYNAMIC_DISPATCH(MixNarrowAny)
  (dtype, message, n, out, total, x, own, terms.data(), static_cast<int64_t>(terms.size()));
}

}  // namespace bluefog::kernels
#endif  // HWY_ONCE
