// How the tool writes numbers for people, and reads theirs.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <fmt/format.h>

namespace bluefog::tools {

/// "64M" → 67108864, binary units; -1 if it is not a size.
inline int64_t ParseSize(std::string_view text) {
  int shift = 0;
  if (!text.empty()) {
    const size_t unit = std::string_view("KMGTkmgt").find(text.back());
    if (unit != std::string_view::npos) shift = 10 * static_cast<int>(unit % 4 + 1);
    if (shift > 0) text.remove_suffix(1);
  }
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return -1;
  return value > INT64_MAX >> shift ? -1 : value << shift;
}

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

/// As a shell takes it for one word.
inline std::string ShellWord(const std::string& word) {
  const size_t strange = word.find_first_not_of(
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789%+,-./:=@_");
  if (!word.empty() && strange == std::string::npos) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

/// Columns on the screen: UTF-8 continuation bytes take none.
inline size_t Width(const std::string& text) {
  size_t width = 0;
  for (const char c : text) width += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
  return width;
}
/// "0, 1, 3–6" of ascending numbers; "–" if there are none.
inline std::string FormatRanks(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    if (last < i + 2) last = i;
    text += (text.empty() ? "" : ", ") + std::to_string(ranks[i]);
    if (last > i) text += fmt::format("–{}", ranks[last]);
    i = last + 1;
  }
  return text.empty() ? "–" : text;
}
inline std::string Pad(const std::string& text, size_t width) {
  return text + std::string(width > Width(text) ? width - Width(text) : 0, ' ');
}
inline std::string PadLeft(const std::string& text, size_t width) {
  return std::string(width > Width(text) ? width - Width(text) : 0, ' ') + text;
}

}  // namespace bluefog::tools
