// What the executor's files share.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "base/guarded.h"
#include "base/hash.h"
#include "engine/operation.h"

namespace bluefog {

/// Names an operation, one of its publishes (or a receive to fetch) and the target. Without an
/// operation it is the number of a refusal, or 0 for control messages that nobody waits for.
struct Cookie {
  uint32_t index;   ///< Of the operation, 22 bits.
  int32_t ordinal;  ///< 26 bits.
  int32_t target;   ///< 14 bits.
  uint64_t Pack() const {
    return (uint64_t{index} + 1) << 40 | static_cast<uint64_t>(ordinal) << 14 |
           static_cast<uint64_t>(target);
  }
  static bool IsControl(uint64_t bits) { return bits >> 40 == 0; }
  static Cookie Unpack(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 40) - 1,
            static_cast<int32_t>(bits >> 14 & ((1 << 26) - 1)),
            static_cast<int32_t>(bits & ((1 << 14) - 1))};
  }
};

/// Of an arrow, the same on both ranks; with from = to of the operation itself.
inline uint64_t TraceId(const Key& key, int from, int to, uint32_t message) {
  return StableHash().Add(key.name_hash).Add(key.use).Add(from).Add(to).Add(message).value();
}

/// Roles of a kPost, in its code.
inline constexpr uint8_t kReceivesFromYou = 0, kSendsToYou = 1;

template <typename Fn>
auto Guarded(const Operation& op, Fn fn) {
  return bluefog::Guarded([&op] { return op.ToString(); }, std::move(fn));
}

inline Status About(const Operation& op, const Status& status) {
  return Status(status.code(), op.ToString() + ": " + std::string(status.message()));
}

/// The same for what went wrong on this rank only: its neighbours are told too.
inline Status About(const Operation& op, int rank, const Status& status) {
  return Status(status.code(), op.ToString() + ": rank " + std::to_string(rank) + ": " +
                                   std::string(status.message()));
}

}  // namespace bluefog
