#include "engine/slot_pool.h"

namespace bluefog {

StatusOr<std::shared_ptr<std::byte>> SlotPool::Acquire(int64_t held, int64_t guarantee) {
  if (!free_.empty()) {
    std::shared_ptr<std::byte> slot = std::move(free_.back());
    free_.pop_back();
    return slot;
  }
  if (made_ >= base_slots_ && held >= guarantee) return std::shared_ptr<std::byte>();
  StatusOr<std::shared_ptr<std::byte>> slot = arena_->Allocate(slot_bytes_);
  if (slot.ok()) ++made_;
  return slot;
}

void SlotPool::Release(std::shared_ptr<std::byte> slot) {
  ++releases_;
  if (made_ > base_slots_) {
    --made_;  // An overflow slot goes back to the arena.
    return;
  }
  free_.push_back(std::move(slot));
}

}  // namespace bluefog
