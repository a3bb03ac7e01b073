// WeightedSum and SumDivide: one pass over memory for any number of terms, with every partial sum
// in registers. Up to four terms the loop over the terms is unrolled by the compiler; beyond, four
// vectors are carried through the list so that looking up a term is paid once for all of them.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/weighted_sum.cc"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "kernels/kernels.h"
#include "kernels/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace bluefog::kernels {
namespace HWY_NAMESPACE {

// The two sums. `factor` is the term's weight, already rounded to the accumulator's type.
template <class T>
struct Weighted {
  static T Factor(const Term& term) { return static_cast<T>(term.weight); }
  template <class D, class V>
  static HWY_INLINE V First(D d, T factor, V x) {
    return hn::Mul(hn::Set(d, factor), x);
  }
  template <class D, class V>
  static HWY_INLINE V Next(D d, V acc, T factor, V x) {
    return Fma(d, hn::Set(d, factor), x, acc);
  }
  template <class D, class V>
  HWY_INLINE V Last(D, V acc) const {
    return acc;
  }
};

template <class T>
struct Summed {
  T divisor;
  bool divide;
  static T Factor(const Term&) { return T{}; }
  template <class D, class V>
  static HWY_INLINE V First(D, T, V x) {
    return x;
  }
  template <class D, class V>
  static HWY_INLINE V Next(D, V acc, T, V x) {
    return hn::Add(acc, x);
  }
  template <class D, class V>
  HWY_INLINE V Last(D d, V acc) const {
    if constexpr (hwy::IsFloat<T>()) {
      if (divide) return hn::Div(acc, hn::Set(d, divisor));
    }
    return acc;
  }
};

// Sources and factors. With K > 0 they are copied, which lets the compiler keep them in registers
// although `out` could alias them.
template <int K, class T, class E, class Op>
struct Sources {
  Sources(const Term* terms, int64_t) {
    for (int j = 0; j < K; ++j) {
      pointers[j] = static_cast<const E*>(terms[j].data);
      factors[j] = Op::Factor(terms[j]);
    }
  }
  static constexpr int64_t size() { return K; }
  HWY_INLINE const E* pointer(int64_t j) const { return pointers[j]; }
  HWY_INLINE T factor(int64_t j) const { return factors[j]; }
  const E* pointers[K];
  T factors[K];
};
template <class T, class E, class Op>
struct Sources<0, T, E, Op> {
  Sources(const Term* t, int64_t k) : terms(t), count(k) {}
  int64_t size() const { return count; }
  HWY_INLINE const E* pointer(int64_t j) const { return static_cast<const E*>(terms[j].data); }
  HWY_INLINE T factor(int64_t j) const { return Op::Factor(terms[j]); }
  const Term* terms;
  int64_t count;
};

// out[i … i + 4 vectors), or one vector with kVectors = 1. All loads come before the first store,
// so out may be one of the sources.
template <int kVectors, bool kStream, class D, class S, class E, class Op>
HWY_INLINE void Block(D d, const S& sources, const Op& op, E* out, int64_t i) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto store = [&](hn::Vec<D> v, E* p) HWY_ATTR {
    if constexpr (kStream) {
      StreamAs(d, op.Last(d, v), p);
    } else {
      StoreAs(d, op.Last(d, v), p);
    }
  };
  const E* first = sources.pointer(0) + i;
  if constexpr (kVectors == 1) {
    auto acc = op.First(d, sources.factor(0), LoadAs(d, first));
    for (int64_t j = 1; j < sources.size(); ++j) {
      acc = op.Next(d, acc, sources.factor(j), LoadAs(d, sources.pointer(j) + i));
    }
    store(acc, out + i);
  } else {
    static_assert(kVectors == 4);
    const auto f = sources.factor(0);
    auto a0 = op.First(d, f, LoadAs(d, first));
    auto a1 = op.First(d, f, LoadAs(d, first + lanes));
    auto a2 = op.First(d, f, LoadAs(d, first + 2 * lanes));
    auto a3 = op.First(d, f, LoadAs(d, first + 3 * lanes));
    for (int64_t j = 1; j < sources.size(); ++j) {
      const E* p = sources.pointer(j) + i;
      const auto w = sources.factor(j);
      a0 = op.Next(d, a0, w, LoadAs(d, p));
      a1 = op.Next(d, a1, w, LoadAs(d, p + lanes));
      a2 = op.Next(d, a2, w, LoadAs(d, p + 2 * lanes));
      a3 = op.Next(d, a3, w, LoadAs(d, p + 3 * lanes));
    }
    store(a0, out + i);
    store(a1, out + i + lanes);
    store(a2, out + i + 2 * lanes);
    store(a3, out + i + 3 * lanes);
  }
}

template <bool kStream, class T, class S, class E, class Op>
HWY_NOINLINE void Blocks(int64_t begin, int64_t n, const S& sources_in, const Op& op, E* out) {
  const S sources = sources_in;  // A local copy, not reachable through `out`.
  const hn::ScalableTag<T> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = begin;
  for (; i + 4 * lanes <= n; i += 4 * lanes) Block<4, kStream>(d, sources, op, out, i);
  for (; i + lanes <= n; i += lanes) Block<1, kStream>(d, sources, op, out, i);
  for (; i < n; ++i) Block<1, false>(One<T>(), sources, op, out, i);
}

template <int K, class T, class E, class Op>
void Sum(int64_t n, E* out, const Term* terms, int64_t k, const Op& op, bool streaming) {
  const Sources<K, T, E, Op> sources(terms, k);
  const auto address = reinterpret_cast<uintptr_t>(out);
  constexpr uintptr_t kVectorBytes = hn::MaxLanes(hn::ScalableTag<T>()) * sizeof(E);
  if (!streaming || address % sizeof(E) != 0) {
    Blocks<false, T>(0, n, sources, op, out);
    return;
  }
  // Stores past the caches want whole, aligned vectors: elements up to the first boundary go one by
  // one.
  const auto gap = static_cast<int64_t>((0 - address) % kVectorBytes / sizeof(E));
  const int64_t head = std::min(n, gap);
  for (int64_t i = 0; i < head; ++i) Block<1, false>(One<T>(), sources, op, out, i);
  Blocks<true, T>(head, n, sources, op, out);
  hwy::FlushStream();
}

template <class T, class E, class Op>
void SumOf(int64_t n, void* out_bytes, const Term* terms, int64_t k, const Op& op, bool streaming) {
  E* out = static_cast<E*>(out_bytes);
  if constexpr (std::is_floating_point_v<E>) {  // Each copy of the loop costs time to build.
    switch (k) {
      case 1:
        return Sum<1, T>(n, out, terms, k, op, streaming);
      case 2:
        return Sum<2, T>(n, out, terms, k, op, streaming);
      case 3:
        return Sum<3, T>(n, out, terms, k, op, streaming);
      case 4:
        return Sum<4, T>(n, out, terms, k, op, streaming);
      default:
        break;
    }
  }
  Sum<0, T>(n, out, terms, k, op, streaming);
}

// k >= 1; the caller has checked the type.
void WeightedSumAny(DType dtype, int64_t n, void* out, const Term* terms, int64_t k,
                    bool streaming) {
  switch (dtype) {
    case DType::kFloat32:
      return SumOf<float, float>(n, out, terms, k, Weighted<float>{}, streaming);
    case DType::kFloat64:
      return SumOf<double, double>(n, out, terms, k, Weighted<double>{}, streaming);
    case DType::kFloat16:
      return SumOf<float, Float16>(n, out, terms, k, Weighted<float>{}, streaming);
    case DType::kBFloat16:
      return SumOf<float, BFloat16>(n, out, terms, k, Weighted<float>{}, streaming);
    default:
      return;
  }
}

template <class T, class E>
void SumDivideOf(int64_t n, void* out, const Term* terms, int64_t k, double divisor,
                 bool streaming) {
  const Summed<T> op{static_cast<T>(divisor), divisor != 1.0};
  SumOf<T, E>(n, out, terms, k, op, streaming);
}

void SumDivideAny(DType dtype, int64_t n, void* out, const Term* terms, int64_t k, double divisor,
                  bool streaming) {
  switch (dtype) {
    case DType::kFloat32:
      return SumDivideOf<float, float>(n, out, terms, k, divisor, streaming);
    case DType::kFloat64:
      return SumDivideOf<double, double>(n, out, terms, k, divisor, streaming);
    case DType::kFloat16:
      return SumDivideOf<float, Float16>(n, out, terms, k, divisor, streaming);
    case DType::kBFloat16:
      return SumDivideOf<float, BFloat16>(n, out, terms, k, divisor, streaming);
    case DType::kInt32:
      return SumDivideOf<int32_t, int32_t>(n, out, terms, k, divisor, streaming);
    case DType::kInt64:
      return SumDivideOf<int64_t, int64_t>(n, out, terms, k, divisor, streaming);
    default:
      return;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace bluefog::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace bluefog::kernels {
namespace {

HWY_EXPORT(WeightedSumAny);
HWY_EXPORT(SumDivideAny);

void Zero(DType dtype, int64_t n, void* out) {
  if (n > 0) std::memset(out, 0, static_cast<size_t>(n * SizeOf(dtype)));
}

}  // namespace

Status WeightedSum(DType dtype, int64_t n, void* out, std::span<const Term> terms, bool streaming) {
  if (!IsFloating(dtype)) {
    return absl::InvalidArgumentError(std::string("no weighted sum of ") + NameOf(dtype) +
                                      " tensors: convert to float16, bfloat16, float32 or float64");
  }
  const auto k = static_cast<int64_t>(terms.size());
  if (k == 0) {
    Zero(dtype, n, out);
  } else {
    HWY_DYNAMIC_DISPATCH(WeightedSumAny)(dtype, n, out, terms.data(), k, streaming);
  }
  return absl::OkStatus();
}

Status SumDivide(DType dtype, int64_t n, void* out, std::span<const Term> terms, double divisor,
                 bool streaming) {
  if (!IsFloating(dtype)) {
    if (dtype != DType::kInt32 && dtype != DType::kInt64) {
      return absl::InvalidArgumentError(
          std::string("no sum of ") + NameOf(dtype) +
          " tensors: convert to int32, int64, float16, bfloat16, float32 or float64");
    }
    if (divisor != 1.0) {
      return absl::InvalidArgumentError(std::string("no mean of ") + NameOf(dtype) +
                                        " tensors (divisor " + std::to_string(divisor) +
                                        "): ask for the sum, or convert to a floating type");
    }
  }
  const auto k = static_cast<int64_t>(terms.size());
  if (k == 0) {
    Zero(dtype, n, out);
  } else {
    HWY_DYNAMIC_DISPATCH(SumDivideAny)(dtype, n, out, terms.data(), k, divisor, streaming);
  }
  return absl::OkStatus();
}

}  // namespace bluefog::kernels
#endif  // HWY_ONCE
