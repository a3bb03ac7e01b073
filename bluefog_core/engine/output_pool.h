// Fresh outputs come from here: a new 64 MiB block costs more in page faults than the average
// itself. Blocks are kept by size class and handed out again once the last reference is gone.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include <bluefog/status.h>

#include "base/mutex.h"

namespace bluefog {

/// Thread-safe. Blocks outlive the pool.
class OutputPool : public std::enable_shared_from_this<OutputPool> {
 public:
  /// At most `keep_bytes` lie idle in the pool.
  static std::shared_ptr<OutputPool> Create(int64_t keep_bytes);
  /// 64-byte aligned, contents undefined. ResourceExhausted if there is no memory.
  StatusOr<std::shared_ptr<std::byte>> Allocate(int64_t bytes);

 private:
  explicit OutputPool(int64_t keep_bytes) : keep_bytes_(keep_bytes) {}
  void Return(std::byte* block, int64_t size);
  static void Free(std::byte* block);

 public:
  ~OutputPool();

 private:
  const int64_t keep_bytes_;
  Mutex mu_;
  int64_t idle_bytes_ GUARDED_BY(mu_) = 0;
  std::map<int64_t, std::vector<std::byte*>> idle_ GUARDED_BY(mu_);
};

}  // namespace bluefog
