// Operations whose turn may have come, so that a turn of the loop need not look at all that are
// under way. The oldest first; which of the entries still hold is for the owner to know.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "engine/operation.h"

namespace bluefog {

class TurnQueue {
 public:
  bool empty() const { return heap_.empty(); }
  void Push(Operation* op) {
    heap_.push_back({op->order, op});
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  }
  /// Null if there is none. What has ended since is left out.
  Operation* Top() {
    while (!heap_.empty()) {
      const auto [order, op] = heap_.front();
      if (op->active && op->order == order) return op;
      Drop();
    }
    return nullptr;
  }
  Operation* Pop() {
    Operation* const op = Top();
    if (op != nullptr) Drop();
    return op;
  }

 private:
  struct Turn {
    uint64_t order;
    Operation* op;
    friend bool operator>(const Turn& a, const Turn& b) { return a.order > b.order; }
  };
  void Drop() {
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    heap_.pop_back();
  }

  std::vector<Turn> heap_;
};

}  // namespace bluefog
