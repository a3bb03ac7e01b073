// The one thing callers wait on: a flag that the engine sets once per use, and the place to sleep
// on it.
#pragma once

#include <atomic>
#include <chrono>

#include "base/mutex.h"

namespace bluefog {

class Completion {
 public:
  bool done() const { return done_.load(std::memory_order_acquire); }
  void Set() {
    done_.store(true, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      MutexLock lock(mu_);
      cv_.NotifyAll();
    }
  }
  void Reset() { done_.store(false, std::memory_order_release); }
  /// Sleeps until done or `deadline`; returns done().
  bool Sleep(std::chrono::steady_clock::time_point deadline) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    {
      MutexLock lock(mu_);
      while (!done_.load(std::memory_order_seq_cst) && cv_.WaitUntil(mu_, deadline)) {
      }
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return done();
  }

 private:
  std::atomic<bool> done_{false};
  std::atomic<int> sleepers_{0};
  Mutex mu_;
  CondVar cv_;
};

}  // namespace bluefog
