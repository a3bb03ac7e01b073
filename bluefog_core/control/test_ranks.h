// Ranks of a job as objects of a test, which join in threads.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/port.h"
#include "control/membership.h"

namespace bluefog::control {

inline constexpr int kLong = 20'000;  // ms; only a hang lasts so long.

inline Place PlaceOf(int rank, int size, int port) {
  Place place;
  place.rank = place.local_rank = rank;
  place.size = place.local_size = size;
  place.job_id = "job-" + std::to_string(port);
  place.coordinator = "127.0.0.1:" + std::to_string(port);
  return place;
}

inline Config TestConfig(int64_t dead_ms = kLong) {
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
  int beats() {
    std::lock_guard lock(mu_);
    return beats_;
  }
  /// The text of `rank`'s failure; empty if none came in time.
  std::string WaitForFailure(int rank, int ms = kLong) {
    std::unique_lock lock(mu_);
    changed_.wait_for(lock, std::chrono::milliseconds(ms), [&] { return failed_.contains(rank); });
    return failed_.contains(rank) ? failed_[rank].front() : "";
  }
  bool WaitForLeft(int rank) {
    std::unique_lock lock(mu_);
    return changed_.wait_for(lock, std::chrono::milliseconds(kLong),
                             [&] { return left_.contains(rank); });
  }
  /// Until its Join waits for something.
  void WaitForWaiting() {
    std::unique_lock lock(mu_);
    changed_.wait_for(lock, std::chrono::milliseconds(kLong), [&] { return asked_ >= 3; });
  }
  void WaitForBeats(int n) {
    std::unique_lock lock(mu_);
    const int until = beats_ + n;
    changed_.wait_for(lock, std::chrono::milliseconds(kLong), [&] { return beats_ >= until; });
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
inline void InThreads(int n, const std::function<void(int)>& f) {
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r) threads.emplace_back(f, r);
  for (std::thread& t : threads) t.join();
}

inline Ranks MakeRanks(int n) {
  Ranks ranks;
  for (int r = 0; r < n; ++r) ranks.push_back(std::make_unique<Rank>());
  return ranks;
}

inline Ranks JoinAll(int n, int port, const Config& config = TestConfig(),
                     const std::string& token = "") {
  Ranks ranks = MakeRanks(n);
  InThreads(n, [&](int r) {
    Place place = PlaceOf(r, n, port);
    place.token = token;
    ranks[r]->Join(place, config, "address of " + std::to_string(r));
  });
  for (int r = 0; r < n; ++r) EXPECT_TRUE(ranks[r]->status.ok()) << r << ": " << ranks[r]->status;
  return ranks;
}

}  // namespace bluefog::control
