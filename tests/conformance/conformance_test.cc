// The contract of transport.h, for every transport alike. Ranks are driven by hand in one thread,
// so that each test is the same run every time; threads_test.cc and shm_process_test.cc add threads
// and processes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <random>

#include "harness.h"

namespace bluefog::transport::testing {
namespace {

using Message = Endpoint::Message;

class TransportTest : public ::testing::TestWithParam<Kind> {
 protected:
  void CheckNoBreach(World& world) { EXPECT_EQ(world.Breaches(), ""); }
};

bool Readable(int fd) {
  pollfd entry{fd, POLLIN, 0};
  return poll(&entry, 1, 0) == 1;
}

/// A network may have something of its own to do first.
bool ArmsSoon(Endpoint& rank) {
  for (int i = 0; i < 20; ++i) {
    if (rank.transport->Arm()) return true;
    rank.Progress();
  }
  return false;
}

/// Also of what comes through the kernel's network.
bool Rings(int fd) {
  pollfd entry{fd, POLLIN, 0};
  return poll(&entry, 1, 5000) == 1;
}

TEST_P(TransportTest, BytesArriveWhateverTheirNumber) {
  World world(GetParam(), 2);
  const std::vector<int64_t> sizes = {
      0, 1, 63, 64, 65, 1001, 1023, kInlineLimit, kInlineLimit + 1, 4097, (1 << 20) - 1, 64 << 20};
  uint64_t cookie = 0;
  for (const int64_t size : sizes) {
    SCOPED_TRACE(size);
    const auto payload = world[0].Allocate(size);
    Fill(payload, cookie);
    ASSERT_EQ(world[0].Send(1, cookie, payload, cookie), SendResult::kAccepted);
    ASSERT_TRUE(world.DriveUntil([&] { return !world[1].inbox.empty(); }));
    const Message message = world[1].inbox.front();
    world[1].inbox.clear();
    EXPECT_EQ(message.number, cookie);
    ASSERT_EQ(message.view.size, size);
    EXPECT_EQ(message.view.readable(), !Fetches(GetParam()) || size <= kInlineLimit);
    EXPECT_EQ(FirstWrong(world[1].Read(message), cookie), -1);
    EXPECT_TRUE(world[1].transport->Intact(message.view));
    world.Settle();
    EXPECT_FALSE(world[0].done.contains(cookie)) << "done before the release";
    world[1].Release(message);
    ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(cookie); }));
    EXPECT_TRUE(world[0].done[cookie].ok());
    ++cookie;
  }
  CheckNoBreach(world);
}

TEST_P(TransportTest, SmallPayloadsMayLieAnywhereAndChangeAtOnce) {
  World world(GetParam(), 2);
  std::vector<std::byte> stack(static_cast<size_t>(kInlineLimit));
  Fill(stack, 1);
  ASSERT_EQ(world[0].Send(1, 1, stack, 1), SendResult::kAccepted);
  Fill(stack, 2);
  ASSERT_TRUE(world.DriveUntil([&] { return !world[1].inbox.empty(); }));
  EXPECT_EQ(FirstWrong(world[1].Read(world[1].inbox[0]), 1), -1);
  world[1].Release(world[1].inbox[0]);
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, CanSendInPlaceTellsTheTruth) {
  World world(GetParam(), 2);
  const auto inside = world[0].Allocate(100'000);
  std::vector<std::byte> outside(100'000);
  EXPECT_TRUE(world[0].transport->CanSendInPlace(inside));
  EXPECT_EQ(world[0].transport->CanSendInPlace(outside), GetParam() != Kind::kShm);
}

TEST_P(TransportTest, MessagesOfAPeerKeepTheirOrder) {
  World world(GetParam(), 3);
  std::mt19937 random(7);
  constexpr uint64_t kCount = 400;
  uint64_t next[3] = {0, 0, 0}, seen[3] = {0, 0, 0};
  const auto big =
      std::array{world[0].Allocate(1), world[1].Allocate(9000), world[2].Allocate(9000)};
  world[0].on_message = [&](const Message& message) {
    EXPECT_EQ(message.number, seen[message.peer]++);
    world[0].Release(message);
  };
  ASSERT_TRUE(world.DriveUntil([&] {
    for (const int rank : {1, 2}) {
      // Small, in place and empty ones mixed: they must not overtake each other.
      const auto size = random() % 3 == 0 ? random() % 9000 : random() % 200;
      const auto payload = big[static_cast<size_t>(rank)].first(size);
      if (next[rank] < kCount &&
          world[rank].Send(0, next[rank], payload, next[rank]) == SendResult::kAccepted) {
        ++next[rank];
      }
    }
    return seen[1] == kCount && seen[2] == kCount;
  }));
  world.Settle();
  EXPECT_EQ(world[1].done.size(), kCount);
  CheckNoBreach(world);
}

TEST_P(TransportTest, BackPressureIsAReturnValueThatEnds) {
  World world(GetParam(), 3);
  const std::vector<std::byte> payload(static_cast<size_t>(kInlineLimit));
  uint64_t accepted = 0;
  // The receiver does not listen.
  while (world[0].Send(1, accepted, payload, accepted) == SendResult::kAccepted) {
    ASSERT_LE(++accepted, uint64_t{kMaxInFlight});
  }
  EXPECT_GE(accepted, 4u);
  for (int i = 0; i < 200; ++i) world[0].Progress();
  EXPECT_EQ(world[0].Send(1, accepted, payload, accepted), SendResult::kBusy);
  // Others are not hurt.
  EXPECT_EQ(world[0].Send(2, 0, payload, 1000), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return !world[2].inbox.empty(); }));
  world[2].Release(world[2].inbox[0]);
  // Views that are held keep the pressure up; released ones let it go.
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == accepted; }));
  world.Settle();
  EXPECT_EQ(world[0].Send(1, accepted, payload, accepted), SendResult::kBusy);
  for (const Message& message : world[1].inbox) world[1].Release(message);
  ASSERT_TRUE(world.DriveUntil(
      [&] { return world[0].Send(1, accepted, payload, accepted) == SendResult::kAccepted; }));
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == accepted + 1; }));
  world[1].Release(world[1].inbox.back());
  world.Settle();
  EXPECT_EQ(world[0].done.size(), accepted + 2) << "kBusy must take nothing";
  CheckNoBreach(world);
}

TEST_P(TransportTest, TicketsRunOutAndComeBack) {
  World world(GetParam(), 2);
  uint64_t accepted = 0;
  // Empty messages need almost no room: it is their number that is limited.
  while (world[0].Send(1, accepted, {}, accepted) == SendResult::kAccepted) {
    ASSERT_LE(++accepted, uint64_t{kMaxInFlight});
  }
  EXPECT_EQ(accepted, uint64_t{kMaxInFlight});
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == accepted; }));
  // Out of order, and only one: that one's place is free again.
  world[1].Release(world[1].inbox[17]);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(17); }));
  EXPECT_EQ(world[0].done.size(), 1u);
  EXPECT_EQ(world[0].Send(1, accepted, {}, accepted), SendResult::kAccepted);
  EXPECT_EQ(world[0].Send(1, accepted, {}, 9999), SendResult::kBusy);
  for (const Message& message : world[1].inbox) {
    if (message.number != 17) world[1].Release(message);
  }
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == accepted + 1; }));
  world[1].Release(world[1].inbox.back());
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, TheSenderOverwritesOnlyAfterTheRelease) {
  World world(GetParam(), 2);
  constexpr int kBuffers = 4;
  constexpr int64_t kBytes = 50'000;
  std::vector<std::span<std::byte>> buffers;
  for (int i = 0; i < kBuffers; ++i) buffers.push_back(world[0].Allocate(kBytes));
  uint64_t next = 0;
  const auto send = [&](size_t buffer) {
    Fill(buffers[buffer], next);
    ASSERT_EQ(world[0].Send(1, next, buffers[buffer], buffer), SendResult::kAccepted);
    ++next;
  };
  // As soon as a send is done its bytes are written over, in the upcall itself.
  world[0].on_done = [&](uint64_t cookie, const Status&) { send(cookie); };
  for (size_t i = 0; i < kBuffers; ++i) send(i);
  std::mt19937 random(3);
  for (int round = 0; round < 60; ++round) {
    ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == kBuffers; }));
    const size_t pick = random() % kBuffers;
    const Message message = world[1].inbox[pick];
    EXPECT_EQ(FirstWrong(world[1].Read(message), message.number), -1);
    EXPECT_TRUE(world[1].transport->Intact(message.view));
    world[1].inbox.erase(world[1].inbox.begin() + static_cast<std::ptrdiff_t>(pick));
    world[1].Release(message);
  }
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == kBuffers; }));
  world[0].on_done = nullptr;
  for (const Message& message : world[1].inbox) world[1].Release(message);
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, DetachFreesRoomButDoesNotComplete) {
  World world(GetParam(), 2);
  const std::vector<std::byte> payload(static_cast<size_t>(kInlineLimit));
  // More bytes than the transport has room for; only tickets limit the number.
  uint64_t sent = 0;
  ASSERT_TRUE(world.DriveUntil([&] {
    if (sent < 40 && world[0].Send(1, sent, payload, sent) == SendResult::kAccepted) ++sent;
    for (const Message& message : world[1].inbox) world[1].Detach(message);
    return world[1].inbox.size() == 40;
  }));
  world.Settle();
  EXPECT_TRUE(world[0].done.empty());
  for (const Message& message : world[1].inbox) world[1].Release(message);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.size() == 40; }));
  CheckNoBreach(world);
}

TEST_P(TransportTest, AMessageHeldLongDoesNotStopTheOthers) {
  World world(GetParam(), 2);
  const std::vector<std::byte> payload(200);
  ASSERT_EQ(world[0].Send(1, 0, payload, 0), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return !world[1].inbox.empty(); }));
  world[1].Detach(world[1].inbox[0]);
  uint64_t sent = 1, seen = 1;
  world[1].on_message = [&](const Message& message) {
    EXPECT_EQ(message.number, seen++);
    world[1].Release(message);
  };
  ASSERT_TRUE(world.DriveUntil([&] {
    if (sent < 1000 && world[0].Send(1, sent, payload, sent) == SendResult::kAccepted) ++sent;
    return seen == 1000;
  }));
  world[1].Release(world[1].inbox[0]);
  world.Settle();
  EXPECT_EQ(world[0].done.size(), 1000u);
  CheckNoBreach(world);
}

TEST_P(TransportTest, BothSidesConnectAtTheSameTime) {
  World world(GetParam(), 2);
  const std::vector<std::byte> payload(100);
  ASSERT_EQ(world[0].Send(1, 5, payload, 1), SendResult::kAccepted);
  ASSERT_EQ(world[1].Send(0, 6, payload, 1), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return !world[0].inbox.empty() && !world[1].inbox.empty(); }));
  EXPECT_EQ(world[0].inbox[0].number, 6u);
  EXPECT_EQ(world[1].inbox[0].number, 5u);
  for (const int rank : {0, 1}) world[rank].Release(world[rank].inbox[0]);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.size() + world[1].done.size() == 2; }));
  CheckNoBreach(world);
}

TEST_P(TransportTest, ManyPeersTalkToAll) {
  constexpr int kRanks = 8;
  constexpr uint64_t kRounds = 20;
  World world(GetParam(), kRanks);
  std::vector<std::vector<uint64_t>> next(kRanks, std::vector<uint64_t>(kRanks));
  uint64_t received = 0;
  std::vector<std::span<std::byte>> payloads;
  for (int rank = 0; rank < kRanks; ++rank) {
    payloads.push_back(world[rank].Allocate(3000));
    Fill(payloads.back(), static_cast<uint64_t>(rank));
    world[rank].on_message = [&, rank](const Message& message) {
      if (message.view.readable()) {
        const std::span<const std::byte> bytes(message.view.data,
                                               static_cast<size_t>(message.view.size));
        EXPECT_EQ(FirstWrong(bytes, static_cast<uint64_t>(message.peer)), -1);
      }
      world[rank].Release(message);
      ++received;
    };
  }
  ASSERT_TRUE(world.DriveUntil([&] {
    for (int from = 0; from < kRanks; ++from) {
      for (int to = 0; to < kRanks; ++to) {
        uint64_t& number = next[static_cast<size_t>(from)][static_cast<size_t>(to)];
        if (from == to || number == kRounds) continue;
        const auto payload = payloads[static_cast<size_t>(from)].first(number % 2 ? 3000 : 300);
        const uint64_t cookie = static_cast<uint64_t>(to) * 1000 + number;
        if (world[from].Send(to, number, payload, cookie) == SendResult::kAccepted) ++number;
      }
    }
    return received == kRanks * (kRanks - 1) * kRounds;
  }));
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, UpcallsMaySendAndRelease) {
  World world(GetParam(), 2);
  uint64_t bounces = 0;
  for (const int rank : {0, 1}) {
    world[rank].on_message = [&, rank](const Message& message) {
      world[rank].Release(message);
      if (++bounces < 500) {
        ASSERT_EQ(world[rank].Send(message.peer, bounces, {}, bounces), SendResult::kAccepted);
      }
    };
  }
  ASSERT_EQ(world[0].Send(1, 0, {}, 0), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return bounces == 500; }));
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, FetchWorksOnEveryView) {
  World world(GetParam(), 2);
  for (const int64_t size : {int64_t{0}, int64_t{7}, kInlineLimit, int64_t{100'000}}) {
    const auto payload = world[0].Allocate(size);
    Fill(payload, 4);
    ASSERT_EQ(world[0].Send(1, 0, payload, static_cast<uint64_t>(size)), SendResult::kAccepted);
    ASSERT_TRUE(world.DriveUntil([&] { return !world[1].inbox.empty(); }));
    const Message message = world[1].inbox[0];
    std::vector<std::byte> bytes(static_cast<size_t>(size));
    const auto cookie = 1000 + static_cast<uint64_t>(size);
    world[1].transport->Fetch(message.view, bytes.data(), cookie);
    EXPECT_FALSE(world[1].fetched.contains(cookie)) << "inline";
    ASSERT_TRUE(world.DriveUntil([&] { return world[1].fetched.contains(cookie); }));
    EXPECT_TRUE(world[1].fetched[cookie].ok());
    EXPECT_EQ(FirstWrong(bytes, 4), -1);
    world[1].Release(message);
    world[1].inbox.clear();
  }
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, RevokeGivesTheBytesBackAndIsSeen) {
  World world(GetParam(), 2);
  const auto payload = world[0].Allocate(50'000);
  for (uint64_t cookie : {1, 2, 3}) {
    ASSERT_EQ(world[0].Send(1, cookie, payload, cookie), SendResult::kAccepted);
  }
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == 3; }));
  world[0].transport->Revoke(1, 2);
  world[0].transport->Revoke(1, 2);   // Once more changes nothing,
  world[0].transport->Revoke(1, 77);  // nor does what was never sent.
  EXPECT_TRUE(world[0].done.empty()) << "inline";
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(2); }));
  EXPECT_TRUE(absl::IsCancelled(world[0].done[2]));
  EXPECT_TRUE(world[1].transport->Intact(world[1].inbox[0].view));
  EXPECT_FALSE(world[1].transport->Intact(world[1].inbox[1].view));
  EXPECT_TRUE(world[1].transport->Intact(world[1].inbox[2].view));
  std::vector<std::byte> bytes(50'000);
  world[1].transport->Fetch(world[1].inbox[1].view, bytes.data(), 5);
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].fetched.contains(5); }));
  EXPECT_TRUE(absl::IsCancelled(world[1].fetched[5]));
  for (const Message& message : world[1].inbox) world[1].Release(message);
  world.Settle();
  EXPECT_TRUE(world[0].done[1].ok() && world[0].done[3].ok());
  world[0].transport->Revoke(1, 1);  // Done already.
  world.Settle();
  // The place of the revoked one serves again, and its successor is whole.
  world[1].inbox.clear();
  for (uint64_t cookie = 10; cookie < 10 + kMaxInFlight; ++cookie) {
    ASSERT_EQ(world[0].Send(1, cookie, payload, cookie), SendResult::kAccepted);
  }
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == kMaxInFlight; }));
  for (const Message& message : world[1].inbox) {
    EXPECT_TRUE(world[1].transport->Intact(message.view));
    world[1].Release(message);
  }
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, ARevokedMessageThatWasNeverReadIsReadAsRevoked) {
  World world(GetParam(), 2);
  const auto payload = world[0].Allocate(50'000);
  ASSERT_EQ(world[0].Send(1, 1, payload, 1), SendResult::kAccepted);
  world[0].transport->Revoke(1, 1);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(1); }));
  EXPECT_TRUE(absl::IsCancelled(world[0].done[1]));
  ASSERT_TRUE(world.DriveUntil([&] { return !world[1].inbox.empty(); }));
  EXPECT_FALSE(world[1].transport->Intact(world[1].inbox[0].view));
  world[1].Release(world[1].inbox[0]);
  world.Settle();
  CheckNoBreach(world);
}

TEST_P(TransportTest, TheDoorbellRingsOnlyWhenAsked) {
  World world(GetParam(), 2);
  ASSERT_EQ(world[0].Send(1, 0, {}, 0), SendResult::kAccepted);  // Connects.
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == 1; }));
  world.Settle();
  ASSERT_TRUE(ArmsSoon(world[1]));
  EXPECT_FALSE(Readable(world[1].transport->fd()));
  ASSERT_EQ(world[0].Send(1, 1, {}, 1), SendResult::kAccepted);
  EXPECT_TRUE(Rings(world[1].transport->fd()));
  EXPECT_FALSE(world[1].transport->Arm()) << "a message is waiting";
  EXPECT_TRUE(world[1].Progress());
  EXPECT_EQ(world[1].inbox.size(), 2u);
  EXPECT_FALSE(Readable(world[1].transport->fd()));
  world[1].transport->Disarm();
  ASSERT_EQ(world[0].Send(1, 2, {}, 2), SendResult::kAccepted);
  EXPECT_FALSE(Readable(world[1].transport->fd())) << "a ring that nobody asked for";
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == 3; }));

  // A release rings too.
  world.Settle();
  ASSERT_TRUE(ArmsSoon(world[0]));
  world[1].Release(world[1].inbox[0]);
  EXPECT_TRUE(Rings(world[0].transport->fd()));
  EXPECT_TRUE(world[0].Progress());
  EXPECT_TRUE(world[0].done.contains(0));
  // Still armed, and the next one rings again although nobody armed anew.
  world[1].Release(world[1].inbox[1]);
  EXPECT_TRUE(Rings(world[0].transport->fd()));
  world[0].transport->Disarm();
  world[1].Release(world[1].inbox[2]);
  world.Settle();
  CheckNoBreach(world);
}

// Only shared memory has a ring that can be full while tickets are left.
TEST(ShmTransportTest, RoomThatComesFreeWakesWhoWaitsForIt) {
  World world(Kind::kShm, 2);
  const std::vector<std::byte> payload(static_cast<size_t>(kInlineLimit));
  uint64_t accepted = 0;
  ASSERT_TRUE(world.DriveUntil([&] {
    if (world[0].Send(1, accepted, payload, accepted) == SendResult::kAccepted) return !++accepted;
    return world[1].inbox.size() == accepted;
  }));
  world.Settle();
  ASSERT_LT(accepted, uint64_t{kMaxInFlight});
  ASSERT_EQ(world[0].Send(1, 0, payload, 999), SendResult::kBusy);
  ASSERT_TRUE(ArmsSoon(world[0]));
  world[1].Detach(world[1].inbox[0]);
  EXPECT_TRUE(Rings(world[0].transport->fd()));
  EXPECT_TRUE(world[0].Progress()) << "room counts as progress";
  EXPECT_EQ(world[0].Send(1, accepted, payload, accepted), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == accepted + 1; }));
  for (const Message& message : world[1].inbox) world[1].Release(message);
  world.Settle();
  EXPECT_EQ(world.Breaches(), "");
}

TEST_P(TransportTest, WhoLeavesIsReportedOnce) {
  World world(GetParam(), 3);
  const auto payload = world[1].Allocate(50'000);
  const auto ours = world[0].Allocate(50'000);
  ASSERT_EQ(world[1].Send(0, 1, payload, 1), SendResult::kAccepted);
  ASSERT_EQ(world[0].Send(1, 1, ours, 1), SendResult::kAccepted);
  ASSERT_EQ(world[0].Send(2, 1, ours, 2), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return !world[0].inbox.empty() && !world[2].inbox.empty(); }));
  world.Leave(1);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].down.contains(1); }));
  EXPECT_THAT(std::string(world[0].down[1].message()), ::testing::HasSubstr("left"));
  EXPECT_TRUE(absl::IsCancelled(world[0].down[1]));
  EXPECT_TRUE(absl::IsCancelled(world[0].done[1]));
  EXPECT_FALSE(world[0].done.contains(2)) << "rank 2 lives";
  EXPECT_EQ(world[0].Send(1, 2, {}, 3), SendResult::kDown);
  // Its bytes may be overwritten from now on, but they can still be read.
  const Message held = world[0].inbox[0];
  EXPECT_FALSE(world[0].transport->Intact(held.view));
  if (held.view.readable()) {
    EXPECT_EQ(world[0].Read(held).size(), payload.size());
  }
  world[0].Release(held);
  world[2].Release(world[2].inbox[0]);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(2); }));
  world.Settle();
  EXPECT_TRUE(world[2].down.empty()) << "rank 2 never met rank 1";
  CheckNoBreach(world);
}

TEST_P(TransportTest, WhatWasSentBeforeLeavingStillArrives) {
  World world(GetParam(), 2);
  const std::vector<std::byte> payload(100);
  for (uint64_t i = 0; i < 10; ++i) {
    ASSERT_EQ(world[1].Send(0, i, payload, i), SendResult::kAccepted);
  }
  // Rank 0 has met rank 1, but has not read the later ones.
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].inbox.size() == 10; }));
  ASSERT_EQ(world[1].Send(0, 10, payload, 10), SendResult::kAccepted);
  world.Leave(1);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].down.contains(1); }));
  EXPECT_EQ(world[0].inbox.size(), 11u);
  for (const Message& message : world[0].inbox) world[0].Release(message);
}

TEST_P(TransportTest, NobodyThere) {
  World world(GetParam(), 2);
  world.Leave(1);
  // A network has to ask first.
  const SendResult result = world[0].Send(1, 0, {}, 0);
  EXPECT_TRUE(result == SendResult::kDown || GetParam() == Kind::kUcx);
  EXPECT_EQ(world[0].Send(0, 0, {}, 99), SendResult::kDown) << "self";
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].down.contains(1); }));
  world.Settle();
  EXPECT_TRUE(absl::IsNotFound(world[0].down[1])) << world[0].down[1];
  EXPECT_EQ(world[0].Send(1, 0, {}, 0), SendResult::kDown);
  world.Settle();
  CheckNoBreach(world);
}

INSTANTIATE_TEST_SUITE_P(All, TransportTest, ::testing::ValuesIn(AllKinds()),
                         [](const auto& info) { return NameOf(info.param); });

// A rank of one process can only be killed where the hub plays the operating system.
class InprocKillTest : public ::testing::TestWithParam<Kind> {};

TEST_P(InprocKillTest, AKilledRankCompletesWhatWasSentToIt) {
  World world(GetParam(), 3);
  const auto payload = world[0].Allocate(50'000);
  const auto theirs = world[1].Allocate(500);
  Fill(theirs, 9);
  ASSERT_EQ(world[0].Send(1, 0, payload, 1), SendResult::kAccepted);
  ASSERT_EQ(world[0].Send(1, 0, payload, 2), SendResult::kAccepted);
  ASSERT_EQ(world[1].Send(0, 0, theirs, 1), SendResult::kAccepted);
  ASSERT_EQ(world[0].Send(2, 0, payload, 3), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return !world[0].inbox.empty() && !world[2].inbox.empty(); }));
  ASSERT_TRUE(world.hub().Kill(1));
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.size() == 2; }));
  EXPECT_TRUE(absl::IsUnavailable(world[0].done[1]));
  EXPECT_TRUE(absl::IsUnavailable(world[0].done[2]));
  EXPECT_EQ(world[0].down.size(), 1u);
  EXPECT_EQ(FirstWrong(world[0].Read(world[0].inbox[0]), 9), -1);
  EXPECT_TRUE(world[0].transport->Intact(world[0].inbox[0].view));
  world[0].Release(world[0].inbox[0]);
  EXPECT_EQ(world[1].Send(0, 0, {}, 5), SendResult::kDown);
  EXPECT_FALSE(world[1].Progress());
  world[2].Release(world[2].inbox[0]);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(3); }));
  EXPECT_TRUE(world[0].done[3].ok());
  EXPECT_FALSE(world.hub().Kill(7));
}

INSTANTIATE_TEST_SUITE_P(All, InprocKillTest, ::testing::Values(Kind::kInproc, Kind::kInprocFetch),
                         [](const auto& info) { return NameOf(info.param); });

// The probe itself: a transport that breaks the contract must not pass.
class BadTransport final : public Transport {
 public:
  enum Fault { kInline, kDropped, kTwice };
  BadTransport(Receiver* receiver, Fault fault) : receiver_(receiver), fault_(fault) {}
  const char* name() const override { return "bad"; }
  std::string address() const override { return ""; }
  Status SetPeers(std::vector<std::string>) override { return absl::OkStatus(); }
  int64_t inline_limit() const override { return 0; }
  bool CanSendInPlace(std::span<const std::byte>) const override { return true; }
  SendResult Send(int, const Header&, std::span<const std::byte>, uint64_t cookie) override {
    if (fault_ == kInline) receiver_->SendDone(cookie, absl::OkStatus());
    if (fault_ == kTwice) cookie_ = cookie;
    return SendResult::kAccepted;
  }
  void Revoke(int, uint64_t) override {}
  void Fetch(const View&, std::byte*, uint64_t) override {}
  bool Intact(const View&) const override { return true; }
  void Detach(const View&) override {}
  void Release(const View&) override {}
  bool Progress() override {
    for (int i = 0; i < 2 && fault_ == kTwice; ++i) receiver_->SendDone(cookie_, absl::OkStatus());
    return false;
  }
  int fd() const override { return -1; }
  bool Arm() override { return true; }
  void Disarm() override {}

 private:
  Receiver* const receiver_;
  const Fault fault_;
  uint64_t cookie_ = 0;
};

TEST(ProbeTest, NoticesCallbacksThatAreInlineDroppedOrDoubled) {
  for (const auto fault : {BadTransport::kInline, BadTransport::kDropped, BadTransport::kTwice}) {
    Endpoint endpoint(0, Arena::Create(), [&](Receiver* receiver) {
      return StatusOr<std::unique_ptr<Transport>>(std::make_unique<BadTransport>(receiver, fault));
    });
    ASSERT_EQ(endpoint.Send(1, 0, {}, 1), SendResult::kAccepted);
    endpoint.Progress();
    EXPECT_TRUE(!endpoint.breaches.empty() || !endpoint.pending.empty()) << "fault " << fault;
  }
}

}  // namespace
}  // namespace bluefog::transport::testing
