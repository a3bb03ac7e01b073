// What the core sees of a tensor: pointer, element count, dtype, shape, strides, device, stream.
// No framework is known here; bindings translate through DLPack.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include <bluefog/status.h>

namespace bluefog {

enum class DType : uint8_t {
  kFloat32 = 0,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt8,
  kUInt8,
  kInt16,
  kInt32,
  kInt64,
  kBool,
};
inline constexpr int kDTypeCount = 10;

/// Bytes of one element.
constexpr int64_t SizeOf(DType dtype) {
  constexpr std::array<int64_t, kDTypeCount> kSizes = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1};
  return kSizes[static_cast<size_t>(dtype)];
}
constexpr bool IsFloating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 ||
         dtype == DType::kBFloat16;
}
/// "float32", "bfloat16", … as NumPy and PyTorch print them.
const char* NameOf(DType dtype);

enum class DeviceType : uint8_t { kCpu = 0, kCuda = 1 };
struct Device {
  DeviceType type = DeviceType::kCpu;
  int16_t index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxDims = 8;

/// A borrowed, dense tensor. `count` elements lie without gaps at `data`; the order of the
/// dimensions in memory is given by the strides (in elements), so a channels_last tensor is fine
/// and is told apart from a contiguous one. Frameworks with more than eight dimensions merge the
/// last.
struct TensorView {
  void* data = nullptr;
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  Device device;
  void* stream = nullptr;  ///< The producer's stream on a GPU; null on the CPU.
  int8_t ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  ///< In elements.

  int64_t bytes() const { return count * SizeOf(dtype); }

  /// A one-dimensional view.
  static TensorView Of(void* data, int64_t count, DType dtype);
  static TensorView Of(float* data, int64_t count) { return Of(data, count, DType::kFloat32); }
  static TensorView Of(double* data, int64_t count) { return Of(data, count, DType::kFloat64); }

  /// Ok if the elements are dense in memory: the strides are a permutation of contiguous ones.
  Status CheckDense() const;
  /// True if it is dense in row-major order.
  bool IsContiguous() const;
  /// Equal on two ranks if shape, dtype and memory order are. Never 0.
  uint32_t LayoutHash() const;
  /// "float32[64, 3, 7, 7]", with the strides appended where they are not the contiguous ones.
  std::string ToString() const;
};

}  // namespace bluefog
