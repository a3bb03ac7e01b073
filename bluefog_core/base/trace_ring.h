// A bounded queue for many producers and one consumer, without locks: each slot carries the ticket
// it is ready for (the scheme of D. Vyukov's bounded MPMC queue). A full queue refuses instead of
// waiting.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace bluefog {

template <typename T, uint64_t kCapacity>
class TraceRing {
  static_assert((kCapacity & (kCapacity - 1)) == 0);

 public:
  TraceRing() : slots_(std::make_unique<Slot[]>(kCapacity)) {
    for (uint64_t i = 0; i < kCapacity; ++i)
      slots_[i].ready_for.store(i, std::memory_order_relaxed);
  }

  /// Any thread. False if full.
  bool Push(const T& value) {
    uint64_t ticket = tail_.load(std::memory_order_relaxed);
    while (true) {
      Slot& slot = slots_[ticket % kCapacity];
      const uint64_t ready_for = slot.ready_for.load(std::memory_order_acquire);
      if (ready_for < ticket) return false;  // Not yet read since the last lap.
      if (ready_for == ticket &&
          tail_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_relaxed)) {
        slot.value = value;
        // seq_cst, as Empty(): whoever sleeps after seeing the ring empty is seen asleep by the
        // producer of the next value, if both sides' flag is seq_cst too.
        slot.ready_for.store(ticket + 1, std::memory_order_seq_cst);
        return true;
      }
      if (ready_for != ticket) ticket = tail_.load(std::memory_order_relaxed);
    }
  }

  /// The consumer only. False if empty, or if the oldest value is still being written.
  bool Pop(T* value) {
    Slot& slot = slots_[head_ % kCapacity];
    if (slot.ready_for.load(std::memory_order_acquire) != head_ + 1) return false;
    *value = slot.value;
    slot.ready_for.store(head_ + kCapacity, std::memory_order_release);
    ++head_;
    return true;
  }
  bool Empty() const {
    return slots_[head_ % kCapacity].ready_for.load(std::memory_order_seq_cst) != head_ + 1;
  }

 private:
  struct Slot {
    std::atomic<uint64_t> ready_for;
    T value;
  };
  std::unique_ptr<Slot[]> slots_;
  alignas(64) std::atomic<uint64_t> tail_{0};
  alignas(64) uint64_t head_ = 0;
};

}  // namespace bluefog
