// How the tool writes numbers for people.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include <fmt/format.h>

namespace bluefog::tools {

/// "512 KiB", "1.5 MiB", "17 B": binary units, at most three significant decimals.
inline std::string FormatBytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  size_t unit = 0;
  for (; bytes >= 1024.0 && unit + 1 < std::size(kUnits); ++unit) bytes /= 1024.0;
  return fmt::format("{:.4g} {}", bytes, kUnits[unit]);
}

/// "5/12" where the number is a fraction with a denominator up to 256, else six digits.
inline std::string FormatWeight(double weight) {
  for (int q = 1; q <= 256; ++q) {
    const double p = std::round(weight * q);
    if (std::abs(p / q - weight) > 1e-15) continue;
    return q == 1 ? fmt::format("{:g}", p) : fmt::format("{:g}/{}", p, q);
  }
  return fmt::format("{:.6g}", weight);
}

/// Columns on the screen: UTF-8 continuation bytes take none.
inline size_t Width(const std::string& text) {
  size_t width = 0;
  for (const char c : text) width += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return width;
}
inline std::string Pad(const std::string& text, size_t width) {
  return text + std::string(width > Width(text) ? width - Width(text) : 0, ' ');
}
inline std::string PadLeft(const std::string& text, size_t width) {
  return std::string(width > Width(text) ? width - Width(text) : 0, ' ') + text;
}

}  // namespace bluefog::tools
