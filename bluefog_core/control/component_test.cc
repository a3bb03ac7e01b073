// The control plane over real sockets, with ranks as threads of this process and as processes of
// their own (this binary again, started as `… rank R SIZE PORT DEAD_MS`), through Membership and
// the component.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <thread>

#include "base/clock.h"
#include "base/sanitizer.h"
#include "base/token.h"
#include "control/socket.h"
#include "control/test_ranks.h"

extern char** environ;

namespace bluefog::control {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Control, EightRanksGetOneAddressBook) {
  Ranks ranks = JoinAll(8, *FreePort());
  for (auto& rank : ranks) {
    ASSERT_EQ(rank->membership->addresses().size(), 8u);
    for (int r = 0; r < 8; ++r) {
      EXPECT_EQ(rank->membership->addresses()[r], "address of " + std::to_string(r));
    }
  }
  InThreads(8, [&](int r) { ranks[r]->membership->Leave(); });
  for (auto& rank : ranks) EXPECT_EQ(rank->failures(), 0u);
}

TEST(Control, NothingButHeartbeatsWhileTraining) {
  Ranks ranks = JoinAll(2, *FreePort());
  const int64_t before = ranks[0]->membership->messages() + ranks[1]->membership->messages();
  ranks[1]->WaitForBeats(5);
  EXPECT_EQ(ranks[0]->membership->messages() + ranks[1]->membership->messages(), before);
  InThreads(2, [&](int r) { ranks[r]->membership->Leave(); });
}

TEST(Control, RankZeroMayComeLast) {
  const int port = *FreePort();
  Ranks ranks = MakeRanks(3);
  std::thread late([&] {
    for (int r : {1, 2}) ranks[r]->WaitForWaiting();
    ranks[0]->Join(PlaceOf(0, 3, port), TestConfig());
  });
  InThreads(2, [&](int r) { ranks[r + 1]->Join(PlaceOf(r + 1, 3, port), TestConfig()); });
  late.join();
  for (auto& rank : ranks) EXPECT_TRUE(rank->status.ok()) << rank->status;
}

TEST(Control, OrderlyLeaveInAnyOrder) {
  for (const std::vector<int>& order :
       {std::vector<int>{0, 1, 2}, std::vector<int>{2, 1, 0}, std::vector<int>{1, 0, 2}}) {
    Ranks ranks = JoinAll(3, *FreePort());
    std::vector<bool> gone(3);
    for (int leaver : order) {
      const int64_t start = NowNs();
      ranks[leaver]->membership->Leave();
      EXPECT_LT(NowNs() - start, 1'000'000'000);
      for (int r = 0; r < 3; ++r) {
        // Without rank 0 there is nobody left who could tell.
        if (r != leaver && !gone[r] && !gone[0]) {
          EXPECT_TRUE(ranks[r]->WaitForLeft(leaver));
        }
      }
      ranks[leaver]->membership.reset();
      gone[leaver] = true;
    }
    for (auto& rank : ranks) EXPECT_EQ(rank->failures(), 0u);
  }
}

TEST(Control, ReportedFailureReachesAll) {
  Ranks ranks = JoinAll(3, *FreePort());
  ranks[1]->membership->ReportFailure(2, "its process ended");
  for (int r : {0, 1}) {
    EXPECT_THAT(ranks[r]->WaitForFailure(2),
                AllOf(HasSubstr("its process ended"), HasSubstr("seen by rank 1")));
  }
  // The rank itself learns that the others go on without it.
  EXPECT_THAT(ranks[2]->WaitForFailure(2), HasSubstr("its process ended"));
  ranks[0]->membership->ReportFailure(2, "again");
  InThreads(3, [&](int r) { ranks[r]->membership->Leave(); });
  for (auto& rank : ranks) EXPECT_EQ(rank->failures(), 1u);
}

TEST(Control, ALauncherReportsADeath) {
  const int port = *FreePort();
  Ranks ranks = JoinAll(3, port);
  const Place place = PlaceOf(0, 3, port);
  const int64_t start = NowNs();
  ASSERT_TRUE(ReportDeath(place, TestConfig(), 2, "killed by SIGKILL").ok());
  for (auto& rank : ranks) {
    EXPECT_THAT(rank->WaitForFailure(2),
                AllOf(HasSubstr("rank 2 died: killed by SIGKILL"), HasSubstr("process"),
                      HasSubstr(std::to_string(getpid())), HasSubstr(" on ")));
  }
  EXPECT_LT(NowNs() - start, 500'000'000);
  EXPECT_TRUE(ReportDeath(place, TestConfig(), 2, "again").ok());
  for (int rank : {-1, 3}) {
    EXPECT_EQ(ReportDeath(place, TestConfig(), rank, "x").code(),
              absl::StatusCode::kInvalidArgument);
  }
  Place other = place;
  other.job_id = "another";
  EXPECT_THAT(std::string(ReportDeath(other, TestConfig(), 1, "x").message()),
              HasSubstr("'another'"));
  ranks[1]->membership->Leave();
  EXPECT_TRUE(ReportDeath(place, TestConfig(), 1, "too late").ok());
  EXPECT_TRUE(ranks[0]->WaitForLeft(1));
  ranks[0]->membership->Leave();
  for (auto& rank : ranks) EXPECT_EQ(rank->failures(), 1u);
  ranks.clear();
  EXPECT_EQ(ReportDeath(place, TestConfig(), 1, "x").code(), absl::StatusCode::kUnavailable);
}

TEST(Control, ADeathBeforeTheJoinEndsTheWait) {
  const int port = *FreePort();
  Rank zero;
  std::thread joining([&] { zero.Join(PlaceOf(0, 3, port), TestConfig()); });
  zero.WaitForWaiting();
  EXPECT_TRUE(ReportDeath(PlaceOf(0, 3, port), TestConfig(), 2, "exit code 1").ok());
  joining.join();
  EXPECT_EQ(zero.status.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(zero.status.message()),
              HasSubstr("rank 2 died: exit code 1 before it joined"));
}

// The launcher's reason and the end of the connection come in any order.
TEST(Control, TheLauncherKnowsBetterThanAClosedConnection) {
  const int port = *FreePort();
  Ranks ranks = MakeRanks(3);
  InThreads(3, [&](int r) {
    Place place = PlaceOf(r, 3, port);
    place.launched_by = "bluefog run";
    ranks[r]->Join(place, TestConfig());
  });
  ranks[2]->membership.reset();
  ASSERT_TRUE(ReportDeath(PlaceOf(0, 3, port), TestConfig(), 2, "killed by SIGKILL").ok());
  for (int r : {0, 1}) {
    EXPECT_THAT(ranks[r]->WaitForFailure(2), HasSubstr("killed by SIGKILL"));
  }
  // Without its word nobody waits long for it.
  const int64_t start = NowNs();
  ranks[1]->membership.reset();
  EXPECT_THAT(ranks[0]->WaitForFailure(1), HasSubstr("rank 1 ended without leaving"));
  EXPECT_LT(NowNs() - start, 500'000'000);
}

TEST(Control, ATokenIsAskedOfEveryCaller) {
  const int port = *FreePort();
  const std::string token = RandomBytes(kTokenBytes).value();
  Place places[3];
  for (int r = 0; r < 3; ++r) {
    places[r] = PlaceOf(r, 3, port);
    places[r].token = token;
  }
  Ranks ranks = MakeRanks(3);
  std::thread zero([&] { ranks[0]->Join(places[0], TestConfig()); });
  for (const std::string& wrong : {std::string(), RandomBytes(kTokenBytes).value()}) {
    Place place = places[1];
    place.token = wrong;
    Rank stranger;
    stranger.Join(place, TestConfig());
    EXPECT_EQ(stranger.status.code(), absl::StatusCode::kUnauthenticated) << stranger.status;
    EXPECT_THAT(std::string(stranger.status.message()),
                AllOf(HasSubstr(kTokenRefused), HasSubstr("rank 1 cannot join")));
    EXPECT_EQ(ReportDeath(place, TestConfig(), 0, "x").code(), absl::StatusCode::kUnauthenticated);
  }
  // It did not harm those who have it.
  InThreads(2, [&](int r) { ranks[r + 1]->Join(places[r + 1], TestConfig()); });
  zero.join();
  for (auto& rank : ranks) EXPECT_TRUE(rank->status.ok()) << rank->status;
  EXPECT_TRUE(ReportDeath(places[0], TestConfig(), 2, "killed by SIGKILL").ok());
  EXPECT_THAT(ranks[0]->WaitForFailure(2), HasSubstr("SIGKILL"));
}

TEST(Control, WhoCameWithTheWrongTokenIsNamedAtTheTimeOut) {
  const int port = *FreePort();
  Config config = TestConfig();
  config.join_timeout_ms = 1'000;
  Ranks ranks = MakeRanks(2);
  Place place = PlaceOf(0, 2, port);
  std::thread zero([&] { ranks[0]->Join(place, config); });  // Without a token itself.
  Place other = PlaceOf(1, 2, port);
  other.token = RandomBytes(kTokenBytes).value();
  ranks[1]->Join(other, config);
  zero.join();
  EXPECT_EQ(ranks[1]->status.code(), absl::StatusCode::kUnauthenticated) << ranks[1]->status;
  EXPECT_THAT(std::string(ranks[0]->status.message()),
              AllOf(HasSubstr("did not join in time: 1"),
                    HasSubstr("a process at 127.0.0.1 came as rank 1"), HasSubstr("token")));
}

TEST(Control, OverIpv6) {
  Ranks ranks = MakeRanks(3);
  const int port = *FreePort();
  InThreads(3, [&](int r) {
    Place place = PlaceOf(r, 3, port);
    place.coordinator = "[::1]:" + std::to_string(port);
    ranks[r]->Join(place, TestConfig());
  });
  for (auto& rank : ranks) EXPECT_TRUE(rank->status.ok()) << rank->status;
}

// Whoever listens there may be reached by strangers.
TEST(Control, OutsideLoopbackATokenIsNeeded) {
  for (const char* host : {"192.0.2.1", "[2001:db8::1]", "[::ffff:192.0.2.1]"}) {
    for (int r : {0, 1}) {
      Place place = PlaceOf(r, 2, 1);
      place.coordinator = std::string(host) + ":4242";
      Rank rank;
      const int64_t start = NowNs();
      rank.Join(place, TestConfig());
      EXPECT_LT(NowNs() - start, 2'000'000'000);
      EXPECT_EQ(rank.status.code(), absl::StatusCode::kInvalidArgument) << rank.status;
      EXPECT_THAT(std::string(rank.status.message()),
                  AllOf(HasSubstr(place.coordinator), HasSubstr("BLUEFOG_TOKEN_FILE"),
                        HasSubstr("/dev/urandom")));
    }
  }
  for (const char* host : {"127.0.0.1", "127.1.2.3", "[::1]", "[::ffff:127.0.0.1]", "localhost"}) {
    const std::string text = std::string(host) + ":4242";
    EXPECT_TRUE(CheckExposure(ResolveEndpoint(text).value(), text, false).ok()) << text;
  }
}

TEST(Control, WhatListensThereIsNoControlPlane) {
  const int port = *FreePort();
  StatusOr<int> other = ListenAt(*ResolveEndpoint("127.0.0.1:" + std::to_string(port)), "test");
  ASSERT_TRUE(other.ok());
  std::thread answers([&] {
    pollfd ready = {*other, POLLIN, 0};
    poll(&ready, 1, kLong);
    const int fd = AcceptFrom(*other);
    const std::string text = "HTTP/1.1 400 Bad Request\r\n\r\n";
    EXPECT_EQ(write(fd, text.data(), text.size()), static_cast<ssize_t>(text.size()));
    char byte;
    ready = {fd, POLLIN, 0};
    while (poll(&ready, 1, kLong) == 1 && read(fd, &byte, 1) == 1) {
    }
    close(fd);
  });
  Rank rank;
  rank.Join(PlaceOf(1, 2, port), TestConfig());
  answers.join();
  close(*other);
  EXPECT_EQ(rank.status.code(), absl::StatusCode::kFailedPrecondition) << rank.status;
  EXPECT_THAT(std::string(rank.status.message()),
              AllOf(HasSubstr("127.0.0.1:" + std::to_string(port)), HasSubstr("same version")));
}

TEST(Control, DestroyWithoutLeaveIsAFailure) {
  Ranks ranks = JoinAll(3, *FreePort());
  ranks[2]->membership.reset();
  EXPECT_THAT(ranks[0]->WaitForFailure(2), HasSubstr("rank 2 ended without leaving"));
  EXPECT_THAT(ranks[1]->WaitForFailure(2), HasSubstr("rank 2 ended without leaving"));
  ranks[0]->membership.reset();
  EXPECT_THAT(ranks[1]->WaitForFailure(0), HasSubstr("rank 0 ended without leaving"));
  const int64_t start = NowNs();
  ranks[1]->membership->Leave();
  ranks[1]->membership.reset();
  EXPECT_LT(NowNs() - start, 1'000'000'000);
}

// Joins `places`, the last when the others wait for it; returns the statuses.
std::vector<Status> JoinLast(const std::vector<std::pair<Place, Config>>& places) {
  const int n = static_cast<int>(places.size());
  Ranks ranks = MakeRanks(n);
  InThreads(n, [&](int i) {
    for (int waiting = 0; i == n - 1 && waiting < i; ++waiting) {
      // Heartbeats begin when a rank is accepted; the one that serves sends none.
      if (places[waiting].first.rank == 0) {
        ranks[waiting]->WaitForWaiting();
      } else {
        ranks[waiting]->WaitForBeats(1);
      }
    }
    ranks[i]->Join(places[i].first, places[i].second);
  });
  std::vector<Status> statuses;
  for (auto& rank : ranks) statuses.push_back(rank->status);
  return statuses;
}

TEST(Control, DuplicateRankIsToldToAll) {
  const int port = *FreePort();
  for (const Status& s : JoinLast({{PlaceOf(0, 4, port), TestConfig()},
                                   {PlaceOf(1, 4, port), TestConfig()},
                                   {PlaceOf(1, 4, port), TestConfig()}})) {
    EXPECT_EQ(s.code(), absl::StatusCode::kAlreadyExists) << s;
    EXPECT_THAT(std::string(s.message()), AllOf(HasSubstr("two processes joined as rank 1"),
                                                HasSubstr(std::to_string(getpid()))));
  }
}

TEST(Control, DifferentSizeIsToldToAll) {
  const int port = *FreePort();
  for (const Status& s : JoinLast({{PlaceOf(0, 3, port), TestConfig()},
                                   {PlaceOf(1, 3, port), TestConfig()},
                                   {PlaceOf(2, 4, port), TestConfig()}})) {
    EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument) << s;
    EXPECT_THAT(std::string(s.message()), AllOf(HasSubstr("rank 2"), HasSubstr("4 ranks"),
                                                HasSubstr("rank 0"), HasSubstr("3")));
  }
}

TEST(Control, DifferentFingerprintIsToldToAllWithBothTexts) {
  const int port = *FreePort();
  Config other = TestConfig();
  other.chunk_bytes *= 2;
  for (const Status& s :
       JoinLast({{PlaceOf(0, 3, port), TestConfig()}, {PlaceOf(1, 3, port), other}})) {
    EXPECT_EQ(s.code(), absl::StatusCode::kFailedPrecondition) << s;
    EXPECT_THAT(std::string(s.message()),
                AllOf(HasSubstr("rank 0"), HasSubstr("rank 1"), HasSubstr(other.FingerprintText()),
                      HasSubstr(TestConfig().FingerprintText())));
  }
}

TEST(Control, AStrangerOfAnotherJobIsTurnedAwayAlone) {
  const int port = *FreePort();
  Ranks ranks = MakeRanks(2);
  std::thread zero([&] { ranks[0]->Join(PlaceOf(0, 2, port), TestConfig()); });
  Place stranger = PlaceOf(1, 2, port);
  stranger.job_id = "another";
  Rank other;
  other.Join(stranger, TestConfig());
  EXPECT_THAT(std::string(other.status.message()), AllOf(HasSubstr("another"), HasSubstr("job-")));
  ranks[1]->Join(PlaceOf(1, 2, port), TestConfig());
  zero.join();
  EXPECT_TRUE(ranks[0]->status.ok()) << ranks[0]->status;
  EXPECT_TRUE(ranks[1]->status.ok()) << ranks[1]->status;
}

TEST(Control, MissingRanksAreNamed) {
  const int port = *FreePort();
  Config config = TestConfig();
  config.join_timeout_ms = 500;
  for (const Status& s : JoinLast({{PlaceOf(0, 4, port), config}, {PlaceOf(2, 4, port), config}})) {
    EXPECT_EQ(s.code(), absl::StatusCode::kDeadlineExceeded) << s;
    EXPECT_THAT(std::string(s.message()), HasSubstr("did not join in time: 1, 3"));
  }
}

TEST(Control, NobodyServes) {
  Config config = TestConfig();
  config.join_timeout_ms = 300;
  Rank rank;
  rank.Join(PlaceOf(1, 2, *FreePort()), config);
  EXPECT_EQ(rank.status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(rank.status.message()), HasSubstr("nobody served the control plane"));
}

TEST(Control, JoinCanBeInterrupted) {
  Ranks ranks = MakeRanks(2);
  const int port = *FreePort();
  // One waits for rank 2, the other for a server.
  std::thread zero([&] { ranks[0]->Join(PlaceOf(0, 3, port), TestConfig()); });
  std::thread one([&] { ranks[1]->Join(PlaceOf(1, 3, *FreePort()), TestConfig()); });
  for (auto& rank : ranks) rank->WaitForWaiting();
  const int64_t start = NowNs();
  ranks[0]->interrupt = ranks[1]->interrupt = true;
  zero.join();
  one.join();
  EXPECT_LT(NowNs() - start, 1'500'000'000);
  EXPECT_EQ(ranks[0]->status.code(), absl::StatusCode::kCancelled) << ranks[0]->status;
  EXPECT_EQ(ranks[1]->status.code(), absl::StatusCode::kCancelled) << ranks[1]->status;
}

TEST(Control, PortTakenNamesItAndTheSetting) {
  const int port = *FreePort();
  StatusOr<int> taken = ListenAt(*ResolveEndpoint("127.0.0.1:" + std::to_string(port)), "test");
  ASSERT_TRUE(taken.ok());
  Rank rank;
  rank.Join(PlaceOf(0, 2, port), TestConfig());
  close(*taken);
  EXPECT_EQ(rank.status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(rank.status.message()),
              AllOf(HasSubstr("127.0.0.1:" + std::to_string(port)), HasSubstr("taken"),
                    HasSubstr("BLUEFOG_COORDINATOR")));
}

TEST(Control, CoordinatorsThatCannotBe) {
  for (const char* text : {"127.0.0.1", "127.0.0.1:0", ":123", "127.0.0.1:99999", "0.0.0.0:123",
                           "[::]:123", "no.such.host.invalid:123"}) {
    Place place = PlaceOf(0, 2, 1);
    place.coordinator = text;
    Rank rank;
    rank.Join(place, TestConfig());
    EXPECT_EQ(rank.status.code(), absl::StatusCode::kInvalidArgument) << text << rank.status;
    EXPECT_THAT(std::string(rank.status.message()), HasSubstr("BLUEFOG_COORDINATOR"));
  }
}

size_t CountEntries(const char* directory) {
  size_t n = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++n;
  return n;
}
size_t CountMappings() {
  std::ifstream maps("/proc/self/maps");
  size_t n = 0;
  for (std::string line; std::getline(maps, line);) ++n;
  return n;
}

TEST(Control, AHundredRoundsOnOnePortLeakNothing) {
  const int port = *FreePort();
  const std::string token = RandomBytes(kTokenBytes).value();
  size_t fds = 0, threads = 0;
  [[maybe_unused]] size_t mappings = 0;
  for (int round = 0; round < 100; ++round) {
    if (round == 20) {
      fds = CountEntries("/proc/self/fd");
      threads = CountEntries("/proc/self/task");
      mappings = CountMappings();
    }
    Ranks ranks = JoinAll(3, port, TestConfig(), round % 2 == 0 ? token : "");
    InThreads(3, [&](int r) {
      ranks[r]->membership->Leave();
      ranks[r]->membership.reset();
    });
    for (auto& rank : ranks) ASSERT_EQ(rank->failures(), 0u);
  }
  // Threads of gRPC end by themselves, after the last channel.
  const int64_t until = NowNs() + 10'000'000'000;
  while (CountEntries("/proc/self/task") > threads && NowNs() < until) usleep(10'000);
  EXPECT_LE(CountEntries("/proc/self/fd"), fds);
  EXPECT_LE(CountEntries("/proc/self/task"), threads);
#if !defined(BLUEFOG_SANITIZED)               // Their allocators map what they like.
  EXPECT_LE(CountMappings(), mappings + 20);  // Arenas of the allocator come and go.
#endif
}

TEST(Control, ARankThatComesBackEarlyWaitsForTheNextServer) {
  const int port = *FreePort();
  Ranks ranks = JoinAll(2, port);
  ranks[1]->membership->Leave();
  Rank again;
  std::thread one([&] { again.Join(PlaceOf(1, 2, port), TestConfig()); });
  EXPECT_TRUE(ranks[0]->WaitForLeft(1));
  ranks[0]->membership->Leave();
  ranks[0]->membership.reset();
  Rank zero;
  zero.Join(PlaceOf(0, 2, port), TestConfig());
  one.join();
  EXPECT_TRUE(zero.status.ok()) << zero.status;
  EXPECT_TRUE(again.status.ok()) << again.status;
}

// ---- Ranks as processes.

constexpr int kLateMs = 1000;  // For a process of this test to be scheduled.

/// A rank in a process of its own, which prints what happens to it and obeys single letters.
class RankProcess {
 public:
  RankProcess(int rank, int size, int port, int dead_ms) {
    int in[2], out[2];
    EXPECT_EQ(pipe2(in, O_CLOEXEC), 0);
    EXPECT_EQ(pipe2(out, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    std::vector<std::string> args = {"control_component_test", "rank",
                                     std::to_string(rank),     std::to_string(size),
                                     std::to_string(port),     std::to_string(dead_ms)};
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    in_ = in[1];
    out_ = out[0];
  }
  ~RankProcess() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    close(in_);
    close(out_);
  }
  pid_t pid() const { return pid_; }
  void Tell(char letter) { EXPECT_EQ(write(in_, &letter, 1), 1); }
  /// The next line; empty at the end or after `ms`.
  std::string ReadLine(int ms = kLong) {
    const int64_t until = NowNs() + int64_t{ms} * 1'000'000;
    while (true) {
      if (const size_t end = buffer_.find('\n'); end != std::string::npos) {
        std::string line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return line;
      }
      pollfd ready = {out_, POLLIN, 0};
      const int64_t left = (until - NowNs()) / 1'000'000;
      char bytes[4096];
      if (left <= 0 || poll(&ready, 1, static_cast<int>(left)) != 1) return "";
      const ssize_t n = read(out_, bytes, sizeof(bytes));
      if (n <= 0) return "";
      buffer_.append(bytes, static_cast<size_t>(n));
    }
  }

 private:
  pid_t pid_ = -1;
  int in_ = -1, out_ = -1;
  std::string buffer_;
};

using Processes = std::vector<std::unique_ptr<RankProcess>>;

Processes StartAll(int size, int port, int dead_ms) {
  Processes all;
  for (int r = 0; r < size; ++r) {
    all.push_back(std::make_unique<RankProcess>(r, size, port, dead_ms));
  }
  for (auto& process : all) {
    std::string line = process->ReadLine();
    if (line == "beat") line = process->ReadLine();
    EXPECT_EQ(line, "joined");
  }
  return all;
}

TEST(ControlProcesses, AKilledRankIsToldToAllWithinASecond) {
  Processes ranks = StartAll(4, *FreePort(), kLong);
  const int64_t start = NowNs();
  kill(ranks[2]->pid(), SIGKILL);
  for (int r : {0, 1, 3}) {
    EXPECT_THAT(ranks[r]->ReadLine(), HasSubstr("failed 2: rank 2 ended without leaving"));
  }
  EXPECT_LT(NowNs() - start, 1'000'000'000);
}

TEST(ControlProcesses, AForkedChildDoesNotHideTheDeath) {
  Processes ranks = StartAll(3, *FreePort(), kLong);
  for (int r : {0, 1}) {
    ranks[r]->Tell('f');  // A child that only lives, as a DataLoader's worker would.
    EXPECT_EQ(ranks[r]->ReadLine(), "forked");
  }
  const int64_t start = NowNs();
  kill(ranks[1]->pid(), SIGKILL);
  EXPECT_THAT(ranks[0]->ReadLine(), HasSubstr("failed 1"));
  EXPECT_THAT(ranks[2]->ReadLine(), HasSubstr("failed 1"));
  kill(ranks[0]->pid(), SIGKILL);
  EXPECT_THAT(ranks[2]->ReadLine(), HasSubstr("failed 0"));
  EXPECT_LT(NowNs() - start, 2'000'000'000);
}

TEST(ControlProcesses, AForkedChildExitsWithoutTouchingAnything) {
  Processes ranks = StartAll(2, *FreePort(), kLong);
  for (int r : {0, 1}) {
    ranks[r]->Tell('e');  // The child calls everything, then exit().
    EXPECT_EQ(ranks[r]->ReadLine(), "child ended with 0");
  }
  for (int r : {1, 0}) {
    ranks[r]->Tell('l');
    std::string line = ranks[r]->ReadLine();
    if (line == "left 1") line = ranks[r]->ReadLine();
    EXPECT_EQ(line, "gone");
  }
}

TEST(ControlProcesses, AStoppedRankIsToldToAllInTime) {
  constexpr int kDead = 1500;
  Processes ranks = StartAll(3, *FreePort(), kDead);
  const int64_t start = NowNs();
  kill(ranks[1]->pid(), SIGSTOP);
  for (int r : {0, 2}) {
    EXPECT_THAT(ranks[r]->ReadLine(),
                AllOf(HasSubstr("failed 1: rank 1 was silent for"), HasSubstr("BLUEFOG_DEAD_MS")));
  }
  const int64_t ms = (NowNs() - start) / 1'000'000;
  // Silence is counted from the last heartbeat, which may be late on a busy machine.
  EXPECT_GE(ms, kDead / 2);
  EXPECT_LE(ms, kDead + kLateMs);
  // It wakes up and learns that the others went on.
  kill(ranks[1]->pid(), SIGCONT);
  EXPECT_THAT(ranks[1]->ReadLine(), HasSubstr("failed 1: rank 1 was silent"));
}

TEST(ControlProcesses, AStoppedRankZeroIsToldToAllInTime) {
  constexpr int kDead = 1500;
  Processes ranks = StartAll(3, *FreePort(), kDead);
  const int64_t start = NowNs();
  kill(ranks[0]->pid(), SIGSTOP);
  for (int r : {1, 2}) EXPECT_THAT(ranks[r]->ReadLine(), HasSubstr("failed 0: rank 0 was silent"));
  EXPECT_LE((NowNs() - start) / 1'000'000, kDead + kLateMs);
}

TEST(ControlProcesses, AKilledRankZeroIsNamed) {
  Processes ranks = StartAll(3, *FreePort(), kLong);
  const int64_t start = NowNs();
  kill(ranks[0]->pid(), SIGKILL);
  for (int r : {1, 2}) {
    EXPECT_THAT(ranks[r]->ReadLine(), HasSubstr("failed 0: rank 0 ended without leaving"));
  }
  EXPECT_LT(NowNs() - start, 1'000'000'000);
  for (int r : {1, 2}) {
    ranks[r]->Tell('l');
    EXPECT_EQ(ranks[r]->ReadLine(), "gone");
  }
}

TEST(ControlProcesses, ADeathDuringTheJoinIsToldToTheWaiting) {
  const int port = *FreePort();
  Rank zero;
  std::thread joining([&] { zero.Join(PlaceOf(0, 3, port), TestConfig()); });
  RankProcess one(1, 3, port, kLong);
  EXPECT_EQ(one.ReadLine(), "beat");  // It was accepted.
  kill(one.pid(), SIGKILL);
  joining.join();
  EXPECT_EQ(zero.status.code(), absl::StatusCode::kAborted) << zero.status;
  EXPECT_THAT(std::string(zero.status.message()),
              AllOf(HasSubstr("rank 1 ended"), HasSubstr("while the ranks were joining")));
}

TEST(ControlProcesses, ADeathOfRankZeroDuringTheJoinIsToldToTheWaiting) {
  const int port = *FreePort();
  Rank one;
  std::thread joining([&] { one.Join(PlaceOf(1, 3, port), TestConfig()); });
  RankProcess zero(0, 3, port, kLong);
  one.WaitForBeats(1);
  kill(zero.pid(), SIGKILL);
  joining.join();
  EXPECT_EQ(one.status.code(), absl::StatusCode::kUnavailable) << one.status;
  EXPECT_THAT(std::string(one.status.message()), HasSubstr("rank 0, which serves"));
}

int RankMain(char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
  MembershipEvents events;
  events.rank_failed = [](int rank, const std::string& text) {
    printf("failed %d: %s\n", rank, text.c_str());
  };
  events.rank_left = [](int rank) { printf("left %d\n", rank); };
  static std::atomic<bool> quiet{false};
  events.progress = [] {
    if (!quiet.exchange(true)) printf("beat\n");  // Accepted, and others are waited for.
    return int64_t{0};
  };
  auto membership = Membership::Join(PlaceOf(atoi(argv[2]), atoi(argv[3]), atoi(argv[4])),
                                     TestConfig(atoi(argv[5])), "", std::move(events));
  if (!membership.ok()) {
    printf("error %s\n", std::string(membership.status().message()).c_str());
    return 1;
  }
  quiet = true;
  printf("joined\n");
  for (char letter; read(0, &letter, 1) == 1;) {
    if (letter == 'f') {
      if (fork() == 0) {
        while (read(0, &letter, 1) == 1) {
        }
        _exit(0);  // The test has ended.
      }
      printf("forked\n");
    } else if (letter == 'e') {
      const pid_t child = fork();
      if (child == 0) {
        alarm(10);
        ExpectLeaks();
        (*membership)->ReportFailure(0, "from a child");
        (*membership)->Leave();
        membership->reset();
        exit(0);
      }
      int status = -1;
      waitpid(child, &status, 0);
      printf("child ended with %d\n", status);
    } else if (letter == 'l') {
      (*membership)->Leave();
      printf("gone\n");
      return 0;
    }
  }
  _exit(0);
}

}  // namespace
}  // namespace bluefog::control

int main(int argc, char** argv) {
  if (argc == 6 && std::string(argv[1]) == "rank") return bluefog::control::RankMain(argv);
  testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
