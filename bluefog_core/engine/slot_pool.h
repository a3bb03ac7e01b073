// Chunk-sized arena memory for staging private tensors (sending) and for fetched views (receiving).
// Nothing an operation can do makes another wait for ever: beyond the free slots, an operation that
// holds fewer than its guarantee gets an overflow slot, so each operation can always move on by
// itself.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include <bluefog/status.h>

#include "transport/arena.h"

namespace bluefog {

/// Used under the progress lock only.
class SlotPool {
 public:
  SlotPool(std::shared_ptr<transport::Arena> arena, int64_t slot_bytes, int64_t total_bytes)
      : arena_(std::move(arena)),
        slot_bytes_(slot_bytes),
        base_slots_(std::max<int64_t>(2, total_bytes / slot_bytes)) {}

  /// Null if none is free and the caller already holds `guarantee`; an error if memory is
  /// exhausted.
  StatusOr<std::shared_ptr<std::byte>> Acquire(int64_t held, int64_t guarantee);
  void Release(std::shared_ptr<std::byte> slot);
  /// How many there were.
  int64_t releases() const { return releases_; }

 private:
  std::shared_ptr<transport::Arena> arena_;
  int64_t slot_bytes_;
  int64_t base_slots_;
  int64_t made_ = 0, releases_ = 0;
  std::vector<std::shared_ptr<std::byte>> free_;
};

}  // namespace bluefog
