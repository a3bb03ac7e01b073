#include "engine/block_pool.h"

#include <bit>
#include <cstdlib>
#include <string>
#include <utility>

namespace bluefog {
namespace {

// Powers of two up to 1 MiB, then multiples of 1 MiB: at most 1 MiB is wasted on a large block.
int64_t SizeClass(int64_t bytes) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  if (bytes <= 64) return 64;
  if (bytes <= kMiB) return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes)));
  return (bytes + kMiB - 1) / kMiB * kMiB;
}

constexpr size_t kAlignment = 64;  // Divides every size class.

}  // namespace

std::shared_ptr<BlockPool> BlockPool::Create(int64_t keep_bytes,
                                             std::shared_ptr<transport::Arena> arena) {
  return std::shared_ptr<BlockPool>(new BlockPool(keep_bytes, std::move(arena)));
}

StatusOr<BlockPool::Block> BlockPool::Make(int64_t size) const {
  if (arena_ != nullptr) return arena_->Allocate(size);
  auto* data = static_cast<std::byte*>(std::aligned_alloc(kAlignment, static_cast<size_t>(size)));
  if (data == nullptr) {
    return absl::ResourceExhaustedError("no memory for a block of " + std::to_string(size) +
                                        " bytes");
  }
  return Block(data, [](std::byte* p) { std::free(p); });
}

StatusOr<std::shared_ptr<std::byte>> BlockPool::Allocate(int64_t bytes) {
  const int64_t size = SizeClass(bytes);
  Block block;
  {
    MutexLock lock(mu_);
    std::vector<Block>& blocks = idle_[size];
    if (!blocks.empty()) {
      block = std::move(blocks.back());
      blocks.pop_back();
      idle_bytes_ -= size;
    }
  }
  if (block == nullptr) {
    StatusOr<Block> made = Make(size);
    if (!made.ok()) return made;
    block = *std::move(made);
  }
  std::byte* data = block.get();
  const auto give_back = [pool = weak_from_this(), size,
                          block = std::move(block)](std::byte*) mutable {
    if (const std::shared_ptr<BlockPool> alive = pool.lock()) {
      alive->Return(std::move(block), size);
    }
  };
  return Block(data, give_back, RecyclingAllocator<std::byte>(handles_));
}

void BlockPool::Return(Block block, int64_t size) {
  MutexLock lock(mu_);
  if (idle_bytes_ + size > keep_bytes_) return;
  idle_[size].push_back(std::move(block));
  idle_bytes_ += size;
}

}  // namespace bluefog
