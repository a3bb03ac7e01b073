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

#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/port.h"
#include "base/sanitizer.h"
#include "control/membership.h"
#include "control/socket.h"

extern char** environ;

namespace bluefog::control {
namespace {

using std::chrono::milliseconds;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kLong = 20'000;  // ms; only a hang lasts so long.

Place PlaceOf(int rank, int size, int port) {
  Place place;
  place.rank = place.local_rank = rank;
  place.size = place.local_size = size;
  place.job_id = "job-" + std::to_string(port);
  place.coordinator = "127.0.0.1:" + std::to_string(port);
  return place;
}

Config TestConfig(int64_t dead_ms = kLong) {
  Config config;
  config.component_dir = BLUEFOG_TEST_COMPONENT_DIR;
  config.join_timeout_ms = kLong;
  config.heartbeat_ms = 100;
  config.suspect_ms = dead_ms / 2;
  config.dead_ms = dead_ms;
  return config;
}

/// A rank in this process.
class Rank {
 public:
  MembershipEvents events() {
    MembershipEvents e;
    e.rank_failed = [this](int rank, const std::string& text) {
      std::lock_guard lock(mu_);
      failed_[rank].push_back(text);
      changed_.notify_all();
    };
    e.rank_left = [this](int rank) {
      std::lock_guard lock(mu_);
      ++left_[rank];
      changed_.notify_all();
    };
    e.progress = [this] {
      std::lock_guard lock(mu_);
      ++beats_;
      changed_.notify_all();
      return int64_t{7};
    };
    e.interrupted = [this] {
      std::lock_guard lock(mu_);
      ++asked_;
      changed_.notify_all();
      return interrupt.load();
    };
    return e;
  }
  void Join(const Place& place, const Config& config, const std::string& address = "address") {
    auto joined = Membership::Join(place, config, address, events());
    status = joined.status();
    if (joined.ok()) membership = *std::move(joined);
  }
  /// The text of `rank`'s failure; empty if none came in time.
  std::string WaitForFailure(int rank, int ms = kLong) {
    std::unique_lock lock(mu_);
    changed_.wait_for(lock, milliseconds(ms), [&] { return failed_.contains(rank); });
    return failed_.contains(rank) ? failed_[rank].front() : "";
  }
  bool WaitForLeft(int rank) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, milliseconds(kLong), [&] { return left_.contains(rank); });
  }
  /// Until its Join waits for something.
  void WaitForWaiting() {
    std::unique_lock lock(mu_);
    changed_.wait_for(lock, milliseconds(kLong), [&] { return asked_ >= 3; });
  }
  void WaitForBeats(int n) {
    std::unique_lock lock(mu_);
    const int until = beats_ + n;
    changed_.wait_for(lock, milliseconds(kLong), [&] { return beats_ >= until; });
  }
  size_t failures() {
    std::lock_guard lock(mu_);
    size_t n = 0;
    for (const auto& [rank, texts] : failed_) n += texts.size();
    return n;
  }

  Status status;
  std::atomic<bool> interrupt{false};

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  std::map<int, std::vector<std::string>> failed_;
  std::map<int, int> left_;
  int beats_ = 0, asked_ = 0;

 public:
  std::unique_ptr<Membership> membership;  ///< Destroyed first: its events write to what is above.
};

using Ranks = std::vector<std::unique_ptr<Rank>>;

/// Runs f(r) for r = 0 … n−1, each in a thread, to the end.
void InThreads(int n, const std::function<void(int)>& f) {
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r) threads.emplace_back(f, r);
  for (std::thread& t : threads) t.join();
}

Ranks MakeRanks(int n) {
  Ranks ranks;
  for (int r = 0; r < n; ++r) ranks.push_back(std::make_unique<Rank>());
  return ranks;
}

Ranks JoinAll(int n, int port, const Config& config = TestConfig()) {
  Ranks ranks = MakeRanks(n);
  InThreads(n, [&](int r) {
    ranks[r]->Join(PlaceOf(r, n, port), config, "address of " + std::to_string(r));
  });
  for (int r = 0; r < n; ++r) EXPECT_TRUE(ranks[r]->status.ok()) << r << ": " << ranks[r]->status;
  return ranks;
}

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
  size_t fds = 0, threads = 0;
  [[maybe_unused]] size_t mappings = 0;
  for (int round = 0; round < 100; ++round) {
    if (round == 20) {
      fds = CountEntries("/proc/self/fd");
      threads = CountEntries("/proc/self/task");
      mappings = CountMappings();
    }
    Ranks ranks = JoinAll(3, port);
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
  EXPECT_GE(ms, kDead - 200);
  EXPECT_LE(ms, kDead + 500);
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
  EXPECT_LE((NowNs() - start) / 1'000'000, kDead + 500);
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
