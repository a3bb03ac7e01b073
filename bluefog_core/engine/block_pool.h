// Memory that an operation needs for as long as it runs, or that its caller keeps: fresh outputs
// and scratch. A new 64 MiB block costs more in page faults than the average itself, so blocks are
// kept by size class and handed out again once the last reference is gone.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include <bluefog/status.h>

#include "base/mutex.h"
#include "base/recycler.h"
#include "transport/arena.h"

namespace bluefog {

/// Thread-safe. Blocks outlive the pool.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  /// From `arena`, or from the heap without one. At most `keep_bytes` lie idle in the pool.
  static std::shared_ptr<BlockPool> Create(int64_t keep_bytes,
                                           std::shared_ptr<transport::Arena> arena = nullptr);
  /// 64-byte aligned, contents undefined. ResourceExhausted if there is no memory.
  StatusOr<std::shared_ptr<std::byte>> Allocate(int64_t bytes);

 private:
  using Block = std::shared_ptr<std::byte>;

  BlockPool(int64_t keep_bytes, std::shared_ptr<transport::Arena> arena)
      : keep_bytes_(keep_bytes), arena_(std::move(arena)) {}
  StatusOr<Block> Make(int64_t size) const;
  void Return(Block block, int64_t size);

  const int64_t keep_bytes_;
  const std::shared_ptr<transport::Arena> arena_;
  const std::shared_ptr<Recycler> handles_ = std::make_shared<Recycler>(128);
  Mutex mu_;
  int64_t idle_bytes_ GUARDED_BY(mu_) = 0;
  std::map<int64_t, std::vector<Block>> idle_ GUARDED_BY(mu_);
};

}  // namespace bluefog
