// Facts about a tensor that do not need its elements: is it dense, does it look the same on two
// ranks, how is it written in an error message.
#include <bluefog/tensor.h>

#include <algorithm>

#include "base/hash.h"

namespace bluefog {
namespace {

std::string Join(const std::array<int64_t, kMaxDims>& values, int n) {
  std::string out;
  for (int i = 0; i < n; ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(values[i]);
  }
  return out;
}

/// The stride of a dimension of size 1 (and any stride of an empty tensor) addresses nothing, and
/// frameworks fill it in as they like: only the others tell the memory order.
bool StrideMatters(const TensorView& t, int dim) { return t.count > 0 && t.shape[dim] != 1; }

}  // namespace

const char* NameOf(DType dtype) {
  constexpr std::array<const char*, kDTypeCount> kNames = {
      "float32", "float64", "float16", "bfloat16", "int8",
      "uint8",   "int16",   "int32",   "int64",    "bool"};
  const auto i = static_cast<size_t>(dtype);
  return i < kNames.size() ? kNames[i] : "unknown dtype";
}

TensorView TensorView::Of(void* data, int64_t count, DType dtype) {
  TensorView view;
  view.data = data;
  view.count = count;
  view.dtype = dtype;
  view.ndim = 1;
  view.shape[0] = count;
  view.strides[0] = 1;
  return view;
}

Status TensorView::CheckDense() const {
  if (static_cast<size_t>(dtype) >= kDTypeCount) {
    return absl::InvalidArgumentError("tensor with unknown dtype number " +
                                      std::to_string(static_cast<int>(dtype)));
  }
  if (ndim < 0 || ndim > kMaxDims) {
    return absl::InvalidArgumentError("tensor with " + std::to_string(ndim) + " dimensions; 0 to " +
                                      std::to_string(kMaxDims) + " are possible");
  }
  int64_t product = 1;
  bool too_large = false;
  for (int i = 0; i < ndim; ++i) {
    if (shape[i] < 0)
      return absl::InvalidArgumentError("tensor with a negative size: " + ToString());
    too_large |= __builtin_mul_overflow(product, shape[i], &product);
  }
  if (std::find(shape.begin(), shape.begin() + ndim, 0) != shape.begin() + ndim) {
    product = 0;
    too_large = false;
  }
  if (too_large || product != count) {
    return absl::InvalidArgumentError("tensor " + ToString() + " cannot have " +
                                      std::to_string(count) + " elements");
  }

  // From the innermost dimension outwards: one with exactly the stride that leaves no gap.
  std::array<bool, kMaxDims> placed{};
  int left = 0;
  for (int i = 0; i < ndim; ++i) {
    placed[i] = !StrideMatters(*this, i);
    left += placed[i] ? 0 : 1;
  }
  for (int64_t expected = 1; left > 0; --left) {
    int next = 0;
    while (next < ndim && (placed[next] || strides[next] != expected)) ++next;
    if (next == ndim) {
      return absl::InvalidArgumentError(
          "tensor " + ToString() +
          " is not dense in memory (a slice, an expanded or a flipped view?); pass a contiguous "
          "copy");
    }
    placed[next] = true;
    expected *= shape[next];
  }
  return absl::OkStatus();
}

bool TensorView::IsContiguous() const {
  int64_t expected = 1;
  for (int i = std::clamp<int>(ndim, 0, kMaxDims) - 1; i >= 0; --i) {
    if (StrideMatters(*this, i) && strides[i] != expected) return false;
    if (__builtin_mul_overflow(expected, shape[i], &expected)) return false;
  }
  return true;
}

uint32_t TensorView::LayoutHash() const {
  StableHash hash;
  hash.Add(dtype).Add(ndim);
  for (int i = 0; i < ndim; ++i) {
    hash.Add(shape[i]).Add(StrideMatters(*this, i) ? strides[i] : int64_t{0});
  }
  const uint64_t value = hash.value();
  const auto folded = static_cast<uint32_t>(value ^ (value >> 32));
  return folded == 0 ? 1 : folded;
}

std::string TensorView::ToString() const {
  const int dims = std::clamp<int>(ndim, 0, kMaxDims);
  std::string out = std::string(NameOf(dtype)) + "[" + Join(shape, dims) + "]";
  if (!IsContiguous()) out += " strides (" + Join(strides, dims) + ")";
  return out;
}

}  // namespace bluefog
