#include "transport/arena.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "transport/memfd.h"

namespace bluefog::transport {
namespace {

constexpr int64_t kSegment = 1 << 20;

TEST(ArenaTest, BlocksAreAlignedAndDoNotOverlap) {
  auto arena = Arena::Create(kSegment);
  std::mt19937 random(1);
  struct Block {
    std::shared_ptr<std::byte> data;
    size_t bytes;
    std::byte mark;
  };
  std::vector<Block> blocks;
  for (int i = 0; i < 3000; ++i) {
    if (blocks.size() > 40) {
      const size_t pick = random() % blocks.size();
      const Block& block = blocks[pick];
      for (size_t k = 0; k < block.bytes; ++k) ASSERT_EQ(block.data.get()[k], block.mark);
      blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(pick));
    }
    const size_t bytes = random() % 40'000;
    auto data = arena->Allocate(static_cast<int64_t>(bytes));
    ASSERT_TRUE(data.ok());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data->get()) % 64, 0u);
    blocks.push_back({*data, bytes, std::byte(i)});
    memset(data->get(), i & 0xff, bytes);
  }
  EXPECT_LE(arena->bytes_reserved(), 4 * kSegment) << "freed blocks must be used again";
  EXPECT_GT(arena->bytes_used(), 0);
  blocks.clear();
  EXPECT_EQ(arena->bytes_used(), 0);
}

TEST(MemfdTest, FilesThatACgroupHasReadCountAsAvailable) {
  const std::string folder = ::testing::TempDir() + "cgroup" + std::to_string(getpid());
  ASSERT_EQ(mkdir(folder.c_str(), 0700), 0);
  const auto write = [&](const std::string& name, const std::string& text) {
    std::ofstream(folder + "/" + name) << text;
    return folder + "/" + name;
  };
  const std::string meminfo = write("meminfo", "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n");
  EXPECT_EQ(AvailableBytes(folder + "/none", folder), INT64_MAX);
  EXPECT_EQ(AvailableBytes(meminfo, folder), 4000 * 1024);
  write("memory.max", "max\n");
  write("memory.current", "999000\n");
  EXPECT_EQ(AvailableBytes(meminfo, folder), 4000 * 1024);
  write("memory.max", "1000000\n");
  EXPECT_EQ(AvailableBytes(meminfo, folder), 1000);
  write("memory.stat", "anon 50\nfile 900000\ninactive_file 500000\nactive_file 300000\nshmem 7\n");
  EXPECT_EQ(AvailableBytes(meminfo, folder), 801000);
  EXPECT_EQ(AvailableBytes(write("meminfo", "MemAvailable: 1 kB\n"), folder), 1024);
  std::filesystem::remove_all(folder);
}

TEST(ArenaTest, FreedNeighboursMergeInEveryOrder) {
  for (int order = 0; order < 6; ++order) {
    auto arena = Arena::Create(kSegment);
    std::vector<std::shared_ptr<std::byte>> blocks;
    for (int i = 0; i < 3; ++i) blocks.push_back(*arena->Allocate(kSegment / 4));
    blocks.push_back(*arena->Allocate(kSegment / 4));
    std::vector<int> turns = {0, 1, 2};
    for (int i = 0; i < order; ++i) std::next_permutation(turns.begin(), turns.end());
    for (const int i : turns) blocks[static_cast<size_t>(i)].reset();
    auto all = arena->Allocate(kSegment / 4 * 3);
    ASSERT_TRUE(all.ok());
    EXPECT_EQ(arena->bytes_reserved(), kSegment) << "order " << order;
  }
}

TEST(ArenaTest, FindKnowsWhatLiesInside) {
  auto arena = Arena::Create(kSegment);
  const auto a = *arena->Allocate(1000);
  const auto b = *arena->Allocate(2 * kSegment);
  Arena::Location at_a, at_b, at;
  ASSERT_TRUE(arena->Find(a.get(), 1000, &at_a));
  ASSERT_TRUE(arena->Find(b.get() + 5, 2 * kSegment - 5, &at_b));
  EXPECT_NE(at_a.segment, at_b.segment);
  EXPECT_EQ(at_b.offset, 5);
  EXPECT_FALSE(arena->Find(b.get() + 5, 2 * kSegment, &at)) << "reaches behind the end";
  int local;
  EXPECT_FALSE(arena->Find(&local, sizeof local, &at));
  EXPECT_FALSE(arena->Find(a.get(), INT64_MAX, &at));
  EXPECT_FALSE(arena->Find(nullptr, 0, &at));
}

TEST(ArenaTest, PeersCanReadASegmentAndNeverWriteOrShrinkIt) {
  auto arena = Arena::Create(kSegment);
  const auto block = *arena->Allocate(100);
  Arena::Location location;
  ASSERT_TRUE(arena->Find(block.get(), 100, &location));
  int64_t bytes = 0;
  const int fd = arena->SegmentFd(location.segment, &bytes);
  ASSERT_GE(fd, 0);
  EXPECT_EQ(bytes, kSegment);
  auto peer = SealedMemory::Map(UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 0)), bytes);
  ASSERT_TRUE(peer.ok()) << peer.status();
  memset(block.get(), 42, 100);
  EXPECT_EQ(peer->data()[location.offset + 99], std::byte{42});
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_NE(ftruncate(fd, 4096), 0);
  EXPECT_NE(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
}

TEST(ArenaTest, BlocksOutliveTheArena) {
  auto arena = Arena::Create(kSegment);
  auto block = *arena->Allocate(1000);
  arena.reset();
  memset(block.get(), 1, 1000);
  EXPECT_EQ(block.get()[999], std::byte{1});
}

TEST(ArenaTest, LargeBlocksGiveTheirMemoryBack) {
  auto arena = Arena::Create(kSegment);
  const auto small = *arena->Allocate(10);
  auto large = *arena->Allocate(5 * kSegment + 1);
  EXPECT_GT(arena->bytes_reserved(), 6 * kSegment);
  Arena::Location location;
  ASSERT_TRUE(arena->Find(large.get(), 1, &location));
  large.reset();
  EXPECT_EQ(arena->bytes_reserved(), kSegment);
  int64_t bytes;
  EXPECT_EQ(arena->SegmentFd(location.segment, &bytes), -1);
  const auto next = *arena->Allocate(5 * kSegment);
  Arena::Location later;
  ASSERT_TRUE(arena->Find(next.get(), 1, &later));
  EXPECT_NE(later.segment, location.segment) << "numbers are never used again";
}

TEST(ArenaTest, NonsenseAndTooMuchAreErrors) {
  auto arena = Arena::Create(kSegment);
  EXPECT_TRUE(absl::IsInvalidArgument(arena->Allocate(-1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(arena->Allocate(INT64_MAX).status()));
  // More than any machine has: refused at once, not by the OOM killer.
  const Status huge = arena->Allocate(int64_t{1} << 46).status();
  EXPECT_TRUE(absl::IsResourceExhausted(huge)) << huge;
  EXPECT_TRUE(arena->Allocate(0).ok());
  // A limit on file sizes holds for memfds as well, and is refused at reservation.
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit tight{2 * kSegment, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &tight), 0);
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  const auto too_much = arena->Allocate(4 * kSegment);
  signal(SIGXFSZ, handler);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_TRUE(absl::IsResourceExhausted(too_much.status())) << too_much.status();
  EXPECT_TRUE(arena->Allocate(4 * kSegment).ok());
}

// Tried, it would take all memory there is, and the kernel would kill processes.
TEST(ArenaTest, MoreThanTheMachineHasIsRefusedBeforeItIsTried) {
  auto arena = Arena::Create(kSegment);
  const auto too_much = arena->Allocate(int64_t{1} << 44);
  ASSERT_TRUE(absl::IsResourceExhausted(too_much.status())) << too_much.status();
  EXPECT_THAT(std::string(too_much.status().message()),
              testing::HasSubstr("17592186044416 bytes are wanted and"));
}

TEST(ArenaTest, ThreadsAllocateAndFreeAtTheSameTime) {
  auto arena = Arena::Create(kSegment);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&arena, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int i = 0; i < 500; ++i) {
        const auto bytes = static_cast<int64_t>(random() % 300'000);
        const auto block = *arena->Allocate(bytes);
        memset(block.get(), t, static_cast<size_t>(bytes));
        Arena::Location location;
        EXPECT_TRUE(arena->Find(block.get(), bytes, &location));
        for (int64_t k = 0; k < bytes; k += 997) EXPECT_EQ(block.get()[k], std::byte(t));
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(arena->bytes_used(), 0);
}

}  // namespace
}  // namespace bluefog::transport
