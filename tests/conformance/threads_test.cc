// Every transport with each rank on a thread of its own: what a race or a lost wake-up would break.
// Built for ThreadSanitizer as well.
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "harness.h"

namespace bluefog::transport::testing {
namespace {

using Message = Endpoint::Message;
constexpr int64_t kPatienceMs = 40'000;

class ThreadsTest : public ::testing::TestWithParam<Kind> {};

/// Sends `count` messages of random sizes to `peer` and takes as many from it, holding some views
/// for a while and releasing them out of order.
void Chat(Endpoint& self, int peer, uint64_t count, int* wrong) {
  self.drive_all = nullptr;  // The other one has a thread of its own.
  std::mt19937 random(static_cast<unsigned>(self.rank) + 1);
  constexpr size_t kBuffers = 6;
  constexpr size_t kBufferBytes = 5000;
  std::vector<std::span<std::byte>> buffers;
  std::vector<size_t> idle;
  for (size_t i = 0; i < kBuffers; ++i) {
    buffers.push_back(self.Allocate(kBufferBytes));
    idle.push_back(i);
  }
  uint64_t sent = 0, received = 0, done = 0, next_small = kBuffers;
  self.on_done = [&](uint64_t cookie, const Status& status) {
    if (!status.ok()) ++*wrong;
    if (cookie < kBuffers) idle.push_back(cookie);
    ++done;
  };
  std::vector<Message> held;
  const auto check = [&](const Message& message) {
    const uint64_t seed = message.number * 31 + static_cast<uint64_t>(message.peer);
    if (FirstWrong(self.Read(message), seed) != -1) ++*wrong;
    if (!self.transport->Intact(message.view)) ++*wrong;
    self.Release(message);
  };
  self.on_message = [&](const Message& message) {
    if (message.number != received++) ++*wrong;
    if (random() % 4 == 0)
      self.Detach(message), self.Release(message);
    else
      held.push_back(message);
  };
  const int64_t deadline = NowMs() + kPatienceMs;
  std::vector<std::byte> small(static_cast<size_t>(kInlineLimit));
  while (done < count || received < count || !held.empty()) {
    if (NowMs() > deadline) {
      self.breaches.push_back("stuck: sent " + std::to_string(sent) + " done " +
                              std::to_string(done) + " received " + std::to_string(received));
      return;
    }
    bool moved = self.Progress();
    while (!held.empty() && (held.size() > 8 || random() % 4 == 0 || received == count)) {
      const auto pick = static_cast<std::ptrdiff_t>(random() % held.size());
      const Message message = held[static_cast<size_t>(pick)];
      held.erase(held.begin() + pick);
      check(message);
      moved = true;
    }
    if (sent < count) {
      const uint64_t seed = sent * 31 + static_cast<uint64_t>(self.rank);
      SendResult result = SendResult::kBusy;
      if (random() % 3 != 0) {
        const auto payload = std::span(small).first(random() % (small.size() + 1));
        Fill(payload, seed);
        result = self.Send(peer, sent, payload, next_small);
        if (result == SendResult::kAccepted) ++next_small;
      } else if (!idle.empty()) {
        const size_t buffer = idle.back();
        const auto payload = buffers[buffer].first(random() % kBufferBytes);
        Fill(payload, seed);
        result = self.Send(peer, sent, payload, buffer);
        if (result == SendResult::kAccepted) idle.pop_back();
      }
      if (result == SendResult::kDown) self.breaches.push_back("down");
      if (result == SendResult::kAccepted) ++sent, moved = true;
    }
    if (!moved) sched_yield();
  }
}

TEST_P(ThreadsTest, RandomSizesWrapTheRingManyTimes) {
  World world(GetParam(), 2);
  constexpr uint64_t kCount = 5000;  // About 100 times the ring.
  int wrong[2] = {0, 0};
  std::thread other([&] { Chat(world[1], 0, kCount, &wrong[1]); });
  Chat(world[0], 1, kCount, &wrong[0]);
  other.join();
  EXPECT_EQ(wrong[0], 0);
  EXPECT_EQ(wrong[1], 0);
  EXPECT_EQ(world.Breaches(), "");
}

/// Waits for `condition` without polling: a wake-up that is lost ends in the deadline.
bool WaitBlocking(Endpoint& self, const std::function<bool()>& condition) {
  const int64_t deadline = NowMs() + kPatienceMs;
  while (!condition()) {
    if (self.Progress()) continue;
    if (!self.transport->Arm()) continue;
    pollfd entry{self.transport->fd(), POLLIN, 0};
    const int64_t left = deadline - NowMs();
    if (left <= 0 || poll(&entry, 1, static_cast<int>(left)) <= 0) return false;
    self.transport->Disarm();
  }
  return true;
}

TEST_P(ThreadsTest, NoWakeUpIsLost) {
  World world(GetParam(), 2);
  constexpr uint64_t kTurns = 3000;
  const auto play = [&](int rank) {
    Endpoint& self = world[rank];
    uint64_t received = 0;
    self.on_message = [&](const Message& message) {
      ++received;
      self.Release(message);
    };
    for (uint64_t turn = 0; turn < kTurns; ++turn) {
      if (rank == 0 && self.Send(1, turn, {}, turn) != SendResult::kAccepted) return;
      if (!WaitBlocking(self, [&] { return received > turn; })) {
        self.breaches.push_back("asleep at turn " + std::to_string(turn));
        return;
      }
      if (rank == 1 && self.Send(0, turn, {}, turn) != SendResult::kAccepted) return;
    }
    if (!WaitBlocking(self, [&] { return self.pending.empty(); })) {
      self.breaches.push_back("asleep before the last release");
    }
    self.on_message = nullptr;
  };
  std::thread other(play, 1);
  play(0);
  other.join();
  EXPECT_EQ(world.Breaches(), "");
}

TEST_P(ThreadsTest, WhoWaitsForRoomIsWoken) {
  World world(GetParam(), 2);
  constexpr uint64_t kCount = 3000;
  std::thread receiver([&] {
    Endpoint& self = world[1];
    uint64_t received = 0;
    std::vector<Message> held;
    self.on_message = [&](const Message& message) {
      ++received;
      // Frees its room now and completes it later: the sender waits for both in turn.
      self.Detach(message);
      held.push_back(message);
      if (held.size() >= kMaxInFlight / 2 || received == kCount) {
        for (const Message& each : held) self.Release(each);
        held.clear();
      }
    };
    if (!WaitBlocking(self, [&] { return received == kCount; })) {
      self.breaches.push_back("asleep after " + std::to_string(received));
    }
    self.on_message = nullptr;
  });
  Endpoint& self = world[0];
  const std::vector<std::byte> payload(static_cast<size_t>(kInlineLimit));
  uint64_t sent = 0;
  const bool all = WaitBlocking(self, [&] {
    while (sent < kCount && self.Send(1, sent, payload, sent) == SendResult::kAccepted) ++sent;
    return sent == kCount && self.pending.empty();
  });
  receiver.join();
  EXPECT_TRUE(all) << "asleep after " << sent;
  EXPECT_EQ(world.Breaches(), "");
}

INSTANTIATE_TEST_SUITE_P(All, ThreadsTest, ::testing::ValuesIn(AllKinds()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace bluefog::transport::testing
