// A rank is killed, or meets an error, at each failpoint in the middle of a run: every other rank
// is told so within two seconds, also those that are no neighbours of it, and nothing hangs or
// stays.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>

#include "base/failpoint.h"
#include "ranks.h"

namespace bluefog::testing {
namespace {

using ::testing::HasSubstr;

constexpr int kRanks = 4;
constexpr int kRounds = 100'000;  // Never reached.
constexpr double kPatience = 2.0;
// A living rank must not be silent for so long, with all of them under a sanitizer on two cores.
constexpr int kSuspectMs = 1000, kDeadMs = 3000;

/// Late enough that all ranks are in mid-run.
std::string Count(const std::string& failpoint) {
  if (failpoint == "control.join") return "1";
  if (failpoint == "shm.connect" || failpoint == "shm.accept") return "2";
#if defined(BLUEFOG_SANITIZED)
  if (failpoint == "control.heartbeat") return "10";  // Some ranks take a second to join.
#else
  if (failpoint == "control.heartbeat") return "3";
#endif
  return "30";
}

Status Body(Rank& me) {
  auto comm = JoinRing(me);
  if (!comm.ok()) {
    me.Mark();
    return comm.status();
  }
  const Status status = Train(me, **comm, kRounds);
  // From now on every call says at once what happened.
  std::vector<float> x(10);
  if (Status again = Average(**comm, "after", x); again.ok()) {
    return absl::InternalError("an operation succeeded after " + status.ToString());
  }
  return status;
}

Job::Tweak Arm(int victim, const std::string& failpoint, const std::string& action) {
  return [=](int rank, Config& config) {
    // Who never asked to join is missed, which takes the time to join.
    if (failpoint == "control.join") config.join_timeout_ms = 2'000;
    if (rank == victim) config.failpoints = failpoint + "=" + action + "@" + Count(failpoint);
  };
}

class Failpoints : public ::testing::TestWithParam<std::string> {};

/// Returns after how many seconds the last of the others was told.
double KillOnce(int victim, const std::string& failpoint) {
  double last = 0.0;
  Job job(kRanks, Arm(victim, failpoint, "kill"));
  const std::vector<std::string> before = FilesLeft(job.id());
  const std::vector<Outcome> ranks = job.Run(Body);
  EXPECT_EQ(FilesLeft(job.id()), before);
  const Outcome& dead = ranks[victim];
  EXPECT_EQ(dead.exit_code, 128 + SIGKILL) << dead;
  EXPECT_THAT(dead.status.ToString(), HasSubstr("ended early")) << dead;
  for (int r = 0; r < kRanks; ++r) {
    if (r == victim) continue;
    SCOPED_TRACE("rank " + std::to_string(r));
    EXPECT_EQ(ranks[r].exit_code, 0) << ranks[r];
    const std::string text(ranks[r].status.message());
    if (failpoint == "control.join") {
      EXPECT_THAT(text, HasSubstr("did not join in time: " + std::to_string(victim))) << ranks[r];
      continue;
    }
    EXPECT_THAT(text, HasSubstr("rank " + std::to_string(victim))) << ranks[r];
    EXPECT_TRUE(absl::IsUnavailable(ranks[r].status)) << ranks[r];
    last = std::max(last, static_cast<double>(ranks[r].marked_ns - dead.ended_ns) * 1e-9);
  }
  return last;
}

void Kill(int victim, const std::string& failpoint) {
  // The machine may be busy; what would fail takes too long every time.
  double told = kPatience;
  for (int attempt = 0; attempt < 3 && told >= kPatience && !::testing::Test::HasFailure();
       ++attempt) {
    told = KillOnce(victim, failpoint);
  }
  EXPECT_LT(told, kPatience);
  ::testing::Test::RecordProperty("told_ms", std::to_string(told * 1e3));
}

TEST_P(Failpoints, KillOfRank1IsToldToAll) { Kill(1, GetParam()); }

TEST(FailpointsOfRank0, KillIsToldToAllAlthoughItServesTheControlPlane) {
  for (const char* failpoint : {"engine.before_consume", "shm.accept"}) {
    SCOPED_TRACE(failpoint);
    Kill(0, failpoint);
  }
}

TEST(FailpointsOfRank0, ARankThatStopsIsDeadAfterAWhile) {
  Job job(kRanks, [](int rank, Config& config) {
    config.suspect_ms = kSuspectMs;
    config.dead_ms = kDeadMs;
    if (rank == 1) config.failpoints = "engine.before_consume=stop@10";
  });
  const std::vector<Outcome> ranks = job.Run([](Rank& me) {
    const Status status = Body(me);
    if (me.rank == 2) kill(me.pid(1), SIGKILL);
    return status;
  });
  for (const int r : {0, 2, 3}) {
    EXPECT_TRUE(absl::IsUnavailable(ranks[r].status)) << ranks[r];
    EXPECT_THAT(std::string(ranks[r].status.message()), HasSubstr("rank 1")) << ranks[r];
  }
}

// The child, a data loader's worker say, holds all descriptors of the dead rank open.
TEST(FailpointsOfRank1, KillIsToldToAllWhileAForkedChildLivesOn) {
  const Gate over;
  Job job(kRanks, Arm(1, "engine.before_consume", "kill"));
  const std::vector<Outcome> ranks = job.Run([&](Rank& me) {
    auto comm = JoinRing(me);
    if (!comm.ok()) return comm.status();
    std::vector<float> x(10);
    if (Status s = Average(**comm, "connected", x); !s.ok()) return s;
    if (me.rank == 1 && fork() == 0) {
      over.Pass();
      _exit(0);
    }
    const Status status = Train(me, **comm, kRounds);
    if (me.rank == 0) over.Open();
    return status;
  });
  ASSERT_EQ(ranks[1].exit_code, 128 + SIGKILL) << ranks[1];
  for (const int r : {0, 2, 3}) {
    EXPECT_TRUE(absl::IsUnavailable(ranks[r].status)) << ranks[r];
    EXPECT_THAT(std::string(ranks[r].status.message()), HasSubstr("rank 1")) << ranks[r];
    EXPECT_LT(static_cast<double>(ranks[r].marked_ns - ranks[1].ended_ns) * 1e-9, kPatience);
  }
}

TEST(FailpointsOfRank1, ASlowRankIsNotDead) {
  Job job(kRanks, [](int rank, Config& config) {
    config.suspect_ms = kSuspectMs;
    config.dead_ms = kDeadMs;
    if (rank == 1)
      config.failpoints = "engine.before_combine=sleep:" + std::to_string(kDeadMs * 3 / 2) + "@5";
  });
  const std::vector<Outcome> ranks = job.Run([](Rank& me) {
    auto comm = JoinRing(me);
    return comm.ok() ? Train(me, **comm, 10) : comm.status();
  });
  for (const Outcome& rank : ranks) EXPECT_TRUE(rank.status.ok()) << rank;
}

// Ranks that see the death first end their programs. Whoever then meets them for the first time
// must be told of the death, not that its neighbour has left.
TEST(FailpointsOfRank1, KillIsTheReasonAlsoForNeighboursOfThoseWhoLeave) {
  for (int round = 0; round < 8; ++round) {
    Job job(kRanks);
    const std::vector<Outcome> ranks = job.Run([](Rank& me) {
      auto comm = JoinRing(me);
      if (!comm.ok()) return comm.status();
      std::vector<float> x(200'000);
      // Every rank is running, and few are connected.
      OpSpec barrier;
      barrier.op = Op::kBarrier;
      auto all = (*comm)->Submit(std::move(barrier));
      if (!all.ok()) return all.status();
      Status status = (*all)->Wait();
      if (me.rank == 1) kill(getpid(), SIGKILL);
      while (status.ok()) status = Average(**comm, "x", x);
      me.Mark();
      return status;
    });
    for (const int r : {0, 2, 3}) {
      EXPECT_TRUE(absl::IsUnavailable(ranks[r].status)) << ranks[r];
      EXPECT_THAT(std::string(ranks[r].status.message()),
                  ::testing::AllOf(HasSubstr("': "), HasSubstr("rank 1")))
          << ranks[r];
      EXPECT_LT(static_cast<double>(ranks[r].marked_ns - ranks[1].ended_ns) * 1e-9, kPatience);
    }
  }
}

TEST_P(Failpoints, ErrorOfRank1EndsAll) {
  Job job(kRanks, Arm(1, GetParam(), "error"));
  const std::vector<Outcome> ranks = job.Run([](Rank& me) {
    auto comm = JoinRing(me);
    if (!comm.ok()) {
      me.Mark();
      return comm.status();
    }
    return Train(me, **comm, kRounds);
  });
  if (GetParam().starts_with("shm.")) {
    // A connection that fails is a failure of the peer for both of them.
    EXPECT_TRUE(absl::IsUnavailable(ranks[1].status)) << ranks[1];
  } else {
    EXPECT_THAT(ranks[1].status.ToString(), HasSubstr("failpoint " + GetParam())) << ranks[1];
  }
  for (int r = 0; r < kRanks; ++r) {
    SCOPED_TRACE("rank " + std::to_string(r));
    EXPECT_EQ(ranks[r].exit_code, 0) << ranks[r];
    EXPECT_FALSE(ranks[r].status.ok());
    EXPECT_THAT(std::string(ranks[r].status.message()),
                ::testing::AnyOf(HasSubstr("rank "), HasSubstr("failpoint")))
        << ranks[r];
    if (GetParam() == "control.join") continue;
    EXPECT_LT(static_cast<double>(ranks[r].marked_ns - ranks[1].marked_ns) * 1e-9, kPatience)
        << ranks[r];
  }
}

INSTANTIATE_TEST_SUITE_P(All, Failpoints, ::testing::ValuesIn(FailpointNames()),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) c = c == '.' ? '_' : c;
                           return name;
                         });

}  // namespace
}  // namespace bluefog::testing
