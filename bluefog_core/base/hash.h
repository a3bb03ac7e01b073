// A hash that is the same on every rank and in every build (unlike absl::Hash, which is seeded):
// FNV-1a over bytes with a final mix. Not for hostile input.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace bluefog {

class StableHash {
 public:
  StableHash& Bytes(const void* data, size_t size) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ p[i]) * 0x100000001b3ULL;
    return *this;
  }
  template <typename T>
  requires std::is_arithmetic_v<T> || std::is_enum_v<T> StableHash& Add(T value) {
    return Bytes(&value, sizeof(value));
  }
  StableHash& Add(std::string_view text) {
    return Add(text.size()).Bytes(text.data(), text.size());
  }
  /// Never 0.
  uint64_t value() const {
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    x ^= x >> 31;
    return x == 0 ? 1 : x;
  }

 private:
  uint64_t state_ = 0xcbf29ce484222325ULL;
};

}  // namespace bluefog
