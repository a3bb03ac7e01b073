// Jobs that come and go: again and again in one process, two at once, many ranks on few cores,
// ranks that end one after the other.
#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <fstream>

#include "base/sanitizer.h"
#include "ranks.h"

namespace bluefog::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

int64_t Entries(const char* folder) {
  DIR* dir = opendir(folder);
  int64_t n = 0;
  while (readdir(dir) != nullptr) ++n;
  closedir(dir);
  return n;
}

int64_t Mappings() {
  std::ifstream maps("/proc/self/maps");
  int64_t n = 0;
  for (std::string line; std::getline(maps, line);) ++n;
  return n;
}

/// What must not grow.
struct Usage {
  int64_t fds = Entries("/proc/self/fd"), threads = Entries("/proc/self/task"),
          mappings = Mappings();
  std::string ToString() const {
    return std::to_string(fds) + " descriptors, " + std::to_string(threads) + " threads, " +
           std::to_string(mappings) + " mappings";
  }
};

TEST(Lifecycle, ShutdownAndInitHundredTimesLeavesNothing) {
  Job job(2);
  const auto ranks = job.Run(
      [](Rank& me) -> Status {
        Usage early;
        for (int i = 0; i < 100; ++i) {
          auto comm = JoinRing(me);
          if (!comm.ok()) {
            return Status(comm.status().code(), "init " + std::to_string(i) + ": " +
                                                    std::string(comm.status().message()));
          }
          std::vector<float> small(10), large(100'000);
          if (Status s = Average(**comm, "s", small); !s.ok()) return s;
          // The arena's first segment takes a while.
          if (i % 20 == 0) {
            if (Status s = Average(**comm, "l", large); !s.ok()) return s;
          }
          (*comm)->Shutdown();
          comm->reset();
          if (i == 20) early = Usage();
        }
        const Usage late;
        // gRPC's pool of threads, and their stacks, come and go.
        bool grew = late.fds > early.fds + 3 || late.threads > early.threads + 8;
#if !defined(BLUEFOG_SANITIZED)  // Their allocators map what they like.
        grew = grew || late.mappings > early.mappings + 40;
#endif
        if (grew) {
          return absl::InternalError("grew from " + early.ToString() + " to " + late.ToString());
        }
        return absl::OkStatus();
      },
      80);
  for (const Outcome& rank : ranks) EXPECT_TRUE(rank.status.ok()) << rank;
}

TEST(Lifecycle, TwoJobsAtOnce) {
  Job jobs[] = {Job(2), Job(2)};
  for (Job& job : jobs) {
    const float base = &job == jobs ? 0.0f : 100.0f;
    job.Start([base](Rank& me) -> Status {
      auto comm = JoinRing(me);
      if (!comm.ok()) return comm.status();
      for (int i = 0; i < 50; ++i) {
        std::vector<float> x(1000, base + static_cast<float>(me.rank));
        auto work = SubmitAverage(**comm, "x", x);
        if (!work.ok()) return work.status();
        if (Status s = (*work)->Wait(); !s.ok()) return s;
        const float mean = static_cast<const float*>((*work)->output().data)[999];
        if (mean != base + 0.5f) return absl::InternalError(std::to_string(mean));
      }
      return absl::OkStatus();
    });
  }
  for (Job& job : jobs) {
    for (const Outcome& rank : job.Join()) EXPECT_TRUE(rank.status.ok()) << rank;
  }
}

TEST(Lifecycle, EightRanksOnTwoCores) {
  Job job(8);
  const auto ranks = job.Run([](Rank& me) -> Status {
    cpu_set_t allowed, two;
    sched_getaffinity(0, sizeof(allowed), &allowed);
    CPU_ZERO(&two);
    for (int cpu = 0; cpu < CPU_SETSIZE && CPU_COUNT(&two) < 2; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) CPU_SET(cpu, &two);
    }
    sched_setaffinity(0, sizeof(two), &two);
    auto comm = JoinRing(me);
    return comm.ok() ? Train(me, **comm, 20) : comm.status();
  });
  for (const Outcome& rank : ranks) EXPECT_TRUE(rank.status.ok()) << rank;
}

// In order of rank, which ends the control plane first, and in the opposite order.
TEST(Lifecycle, RanksEndOneAfterTheOther) {
  constexpr int kRanks = 4;
  for (const bool rising : {true, false}) {
    const std::vector<Gate> gates(kRanks);
    Job job(kRanks);
    const auto ranks = job.Run([&](Rank& me) -> Status {
      {
        auto comm = JoinRing(me);
        if (!comm.ok()) return comm.status();
        if (Status s = Train(me, **comm, 5); !s.ok()) return s;
        const int turn = rising ? me.rank : kRanks - 1 - me.rank;
        if (turn > 0) gates[me.rank].Pass();
      }
      const int next = rising ? me.rank + 1 : me.rank - 1;
      if (next >= 0 && next < kRanks) gates[next].Open();
      return absl::OkStatus();
    });
    for (const Outcome& rank : ranks) {
      EXPECT_TRUE(rank.status.ok()) << rank;
      EXPECT_EQ(rank.exit_code, 0) << rank;
      EXPECT_THAT(rank.log, Not(HasSubstr("error:")));
    }
  }
}

// A program that ends without destroying its communicator.
TEST(Lifecycle, ExitWithoutShutdown) {
  Job job(3);
  const auto ranks = job.Run([](Rank& me) -> Status {
    auto comm = JoinRing(me);
    if (!comm.ok()) return comm.status();
    ExpectLeaks();
    Communicator* leaked = comm->release();
    return Train(me, *leaked, 5);
  });
  for (const Outcome& rank : ranks) EXPECT_EQ(rank.exit_code, 0) << rank;
  const bool all = std::all_of(ranks.begin(), ranks.end(), [](const Outcome& r) {
    // Who still waits when another ends hears of it.
    return r.status.ok() || absl::IsUnavailable(r.status);
  });
  EXPECT_TRUE(all) << ranks[0] << ranks[1] << ranks[2];
}

}  // namespace
}  // namespace bluefog::testing
