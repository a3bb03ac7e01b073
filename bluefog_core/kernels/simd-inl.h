// What the kernels share, compiled once per instruction set: a fused multiply-add that has one
// rounding everywhere, and loads and stores that convert half-precision formats (round to nearest
// even). Include inside a foreach_target file after hwy/highway.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include <hwy/highway.h>

#include "kernels/half.h"

#if defined(BLUEFOG_KERNELS_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef BLUEFOG_KERNELS_SIMD_INL_H_
#undef BLUEFOG_KERNELS_SIMD_INL_H_
#else
#define BLUEFOG_KERNELS_SIMD_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace bluefog::kernels {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// One element of whatever vector type the target has: heads and tails run the same code as bodies.
template <class T>
using One = hn::CappedTag<T, 1>;

/// a*b + c with one rounding, also where the hardware has no such instruction.
template <class D, class V>
HWY_INLINE V Fma(D d, V a, V b, V c) {
#if HWY_NATIVE_FMA
  (void)d;
  return hn::MulAdd(a, b, c);
#else
  using T = hn::TFromD<D>;
  HWY_ALIGN T la[hn::MaxLanes(D())], lb[hn::MaxLanes(D())], lc[hn::MaxLanes(D())];
  hn::Store(a, d, la);
  hn::Store(b, d, lb);
  hn::Store(c, d, lc);
  for (size_t i = 0; i < hn::MaxLanes(D()); ++i) la[i] = std::fma(la[i], lb[i], lc[i]);
  return hn::Load(d, la);
#endif
}

// Loads and stores of elements E as vectors of T = TFromD<D>. E is T itself, Float16 or BFloat16.
template <class D>
HWY_INLINE hn::Vec<D> LoadAs(D d, const hn::TFromD<D>* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE void StoreAs(D d, hn::Vec<D> v, hn::TFromD<D>* p) {
  hn::StoreU(v, d, p);
}
template <class D>
HWY_INLINE void StreamAs(D d, hn::Vec<D> v, hn::TFromD<D>* p) {
  hn::Stream(v, d, p);
}

template <class D>
HWY_INLINE hn::Vec<D> LoadAs(D d, const BFloat16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<uint32_t, D> d32;
  const auto bits = hn::LoadU(d16, &p->bits);
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, D>> ToBFloat16(hn::Vec<D> v) {
  const hn::Rebind<uint32_t, D> d32;
  const hn::Rebind<int32_t, D> i32;
  const hn::Rebind<uint16_t, D> d16;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff)));
  const auto is_nan = hn::RebindMask(d32, hn::IsNaN(v));
  const auto quiet = hn::Or(bits, hn::Set(d32, 0x400000));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(is_nan, quiet, rounded));
  return hn::DemoteTo(d16, hn::BitCast(i32, high));  // Fits in 16 bits: nothing saturates.
}
template <class D>
HWY_INLINE void StoreAs(D, hn::Vec<D> v, BFloat16* p) {
  hn::StoreU(ToBFloat16<D>(v), hn::Rebind<uint16_t, D>(), &p->bits);
}
template <class D>
HWY_INLINE void StreamAs(D, hn::Vec<D> v, BFloat16* p) {
  hn::Stream(ToBFloat16<D>(v), hn::Rebind<uint16_t, D>(), &p->bits);
}

#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
template <class D>
HWY_INLINE hn::Vec<D> LoadAs(D d, const Float16* p) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<hwy::float16_t, D> df16;
  return hn::PromoteTo(d, hn::BitCast(df16, hn::LoadU(d16, &p->bits)));
}
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, D>> ToFloat16(hn::Vec<D> v) {
  const hn::Rebind<uint16_t, D> d16;
  const hn::Rebind<hwy::float16_t, D> df16;
  return hn::BitCast(d16, hn::DemoteTo(df16, v));
}
#else
template <class D>
HWY_INLINE hn::Vec<D> LoadAs(D d, const Float16* p) {
  HWY_ALIGN float lanes[hn::MaxLanes(D())];
  for (size_t i = 0; i < hn::MaxLanes(D()); ++i) lanes[i] = Widen(p[i]);
  return hn::Load(d, lanes);
}
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<uint16_t, D>> ToFloat16(hn::Vec<D> v) {
  HWY_ALIGN float lanes[hn::MaxLanes(D())];
  HWY_ALIGN uint16_t halves[hn::MaxLanes(D())];
  hn::Store(v, D(), lanes);
  for (size_t i = 0; i < hn::MaxLanes(D()); ++i) halves[i] = NarrowToFloat16(lanes[i]).bits;
  return hn::Load(hn::Rebind<uint16_t, D>(), halves);
}
#endif
template <class D>
HWY_INLINE void StoreAs(D, hn::Vec<D> v, Float16* p) {
  hn::StoreU(ToFloat16<D>(v), hn::Rebind<uint16_t, D>(), &p->bits);
}
template <class D>
HWY_INLINE void StreamAs(D, hn::Vec<D> v, Float16* p) {
  hn::Stream(ToFloat16<D>(v), hn::Rebind<uint16_t, D>(), &p->bits);
}

}  // namespace HWY_NAMESPACE
}  // namespace bluefog::kernels
HWY_AFTER_NAMESPACE();

#endif  // include guard, per target
