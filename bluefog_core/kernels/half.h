// fp16 and bf16 as storage formats, with scalar conversions for machines that have none in
// hardware.
#pragma once

#include <bit>
#include <cstdint>

namespace bluefog::kernels {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

/// Exact.
inline float Widen(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const uint32_t mantissa = h.bits & 0x3ffu;
  uint32_t magnitude;
  if (exponent == 0x1f) {
    magnitude = 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    magnitude = ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    magnitude = std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f);
  }
  return std::bit_cast<float>(sign | magnitude);
}

/// Round to nearest, ties to even; overflow gives infinity.
inline Float16 NarrowToFloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts the last bit kept, 2^-24, at the end of the significand.
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return Float16{static_cast<uint16_t>(sign | half)};
}

}  // namespace bluefog::kernels
