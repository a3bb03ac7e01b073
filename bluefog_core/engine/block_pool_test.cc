#include "engine/block_pool.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>

namespace bluefog {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

std::shared_ptr<std::byte> Get(BlockPool& pool, int64_t bytes) {
  StatusOr<std::shared_ptr<std::byte>> block = pool.Allocate(bytes);
  EXPECT_TRUE(block.ok()) << block.status();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(block->get()) % 64, 0U);
  return *block;
}

TEST(BlockPool, HandsOutAgainWhatWasDropped) {
  const auto pool = BlockPool::Create(64 * kMiB);
  for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{5000}, 3 * kMiB + 1}) {
    std::byte* const first = Get(*pool, bytes).get();
    const auto again = Get(*pool, bytes);
    EXPECT_EQ(again.get(), first) << bytes;
    EXPECT_NE(Get(*pool, bytes).get(), first) << bytes << ": still in use";
  }
}

TEST(BlockPool, KeepsNoMoreThanItMay) {
  const auto arena = transport::Arena::Create(kMiB);
  const auto pool = BlockPool::Create(2 * kMiB, arena);
  auto a = Get(*pool, 2 * kMiB), b = Get(*pool, 2 * kMiB);
  EXPECT_EQ(arena->bytes_used(), 4 * kMiB);
  a.reset();
  b.reset();
  EXPECT_EQ(arena->bytes_used(), 2 * kMiB);
}

TEST(BlockPool, OfAnArenaCanBeSentInPlace) {
  const auto arena = transport::Arena::Create(kMiB);
  const auto pool = BlockPool::Create(4 * kMiB, arena);
  const auto block = Get(*pool, 3 * kMiB);
  transport::Arena::Location location;
  EXPECT_TRUE(arena->Find(block.get(), 3 * kMiB, &location));
}

TEST(BlockPool, BlocksOutliveIt) {
  auto pool = BlockPool::Create(kMiB);
  const auto block = Get(*pool, 4096);
  Get(*pool, 4096);  // Lies idle in the pool when that goes.
  pool.reset();
  std::memset(block.get(), 1, 4096);
}

}  // namespace
}  // namespace bluefog
