#include "engine/output_pool.h"

#include <bit>
#include <cstdlib>
#include <string>

namespace bluefog {
namespace {

// Powers of two up to 1 MiB, then multiples of 1 MiB: at most 1 MiB is wasted on a large output.
int64_t SizeClass(int64_t bytes) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  if (bytes <= 64) return 64;
  if (bytes <= kMiB) return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes)));
  return (bytes + kMiB - 1) / kMiB * kMiB;
}

constexpr size_t kAlignment = 64;  // Divides every size class.

}  // namespace

std::shared_ptr<OutputPool> OutputPool::Create(int64_t keep_bytes) {
  return std::shared_ptr<OutputPool>(new OutputPool(keep_bytes));
}

OutputPool::~OutputPool() {
  for (auto& [size, blocks] : idle_) {
    for (std::byte* block : blocks) Free(block);
  }
}

void OutputPool::Free(std::byte* block) { std::free(block); }

StatusOr<std::shared_ptr<std::byte>> OutputPool::Allocate(int64_t bytes) {
  const int64_t size = SizeClass(bytes);
  std::byte* block = nullptr;
  {
    MutexLock lock(mu_);
    std::vector<std::byte*>& blocks = idle_[size];
    if (!blocks.empty()) {
      block = blocks.back();
      blocks.pop_back();
      idle_bytes_ -= size;
    }
  }
  if (block == nullptr) {
    block = static_cast<std::byte*>(std::aligned_alloc(kAlignment, static_cast<size_t>(size)));
    if (block == nullptr) {
      return absl::ResourceExhaustedError("no memory for an output of " + std::to_string(bytes) +
                                          " bytes");
    }
  }
  return std::shared_ptr<std::byte>(block, [pool = weak_from_this(), size](std::byte* p) {
    if (std::shared_ptr<OutputPool> alive = pool.lock()) {
      alive->Return(p, size);
    } else {
      Free(p);
    }
  });
}

void OutputPool::Return(std::byte* block, int64_t size) {
  {
    MutexLock lock(mu_);
    if (idle_bytes_ + size <= keep_bytes_) {
      idle_[size].push_back(block);
      idle_bytes_ += size;
      return;
    }
  }
  Free(block);
}

}  // namespace bluefog
