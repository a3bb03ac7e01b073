// The operations' names of a trace: looked up without locks or allocation, kept for the life of the
// trace, ready for JSON.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace bluefog {

/// `text` as the inside of a JSON string: quotes, backslashes and control characters escaped, bytes
/// that are not UTF-8 replaced by "?".
std::string EscapeJson(std::string_view text);

/// A hash set that only grows. Thread-safe.
class TraceNames {
 public:
  TraceNames() = default;
  ~TraceNames();
  TraceNames(const TraceNames&) = delete;
  TraceNames& operator=(const TraceNames&) = delete;

  /// The escaped form of `name`, cut to kMaxLength bytes; valid as long as this object. Allocates
  /// the first time a name is seen only. When there is no more room: "(more names)".
  const std::string* Intern(std::string_view name);

  static constexpr size_t kMaxLength = 256;

 private:
  struct Entry {
    std::string name, escaped;
  };
  static constexpr size_t kSlots = 1 << 14, kMaxProbes = 64;
  std::atomic<const Entry*> slots_[kSlots] = {};
};

}  // namespace bluefog
