// Ranks in processes of their own, for every transport between processes: death, also while a
// forked child of the dead one lives on with all its descriptors.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <iostream>

#include "processes.h"

namespace bluefog::transport::testing {
namespace {

using Message = Endpoint::Message;

class ProcessTest : public ::testing::TestWithParam<Kind> {};

/// Kills rank 1, which holds ten of ours while we hold ten of it, and looks at what follows. If
/// there is a bystander, waits for a word of it first.
void KillInMidTransfer(Kind kind, Job& job, const char* what, const Channel* bystander = nullptr) {
  Endpoint& self = *job.self;
  const auto payload = self.Allocate(50'000);
  for (uint64_t i = 0; i < 10; ++i) {
    ASSERT_TRUE(SendSoon(self, 1, i, payload.first(i % 2 ? 50'000 : 500), i));
  }
  ASSERT_TRUE(DriveUntil(self, [&] { return self.inbox.size() == 10; }));
  ASSERT_EQ(job.channel(1).Take(), "holding");
  if (bystander != nullptr) {
    ASSERT_EQ(bystander->Take(), "alive");
  }
  for (int i = 0; i < 200; ++i) self.Progress();
  ASSERT_TRUE(self.done.empty());

  const int64_t start = NowMs();
  ASSERT_EQ(kill(job.pid(1), SIGKILL), 0);
  ASSERT_TRUE(BlockUntil(self, [&] { return self.down.contains(1); }));
  const int64_t took = NowMs() - start;
  std::cout << "a killed peer (" << what << ") was noticed after " << took << " ms\n";
  // While a forked child keeps its connections open only its silence tells (1.5 s).
  EXPECT_LT(took, Fetches(kind) && bystander != nullptr ? 2000 : 1000);
  EXPECT_TRUE(absl::IsUnavailable(self.down[1])) << self.down[1];
  EXPECT_THAT(std::string(self.down[1].message()),
              ::testing::HasSubstr(
                  kind == Kind::kShm ? "rank 1 (process " + std::to_string(job.pid(1)) : "rank 1"));
  EXPECT_EQ(self.done.size(), 10u);
  for (const auto& [cookie, status] : self.done) EXPECT_TRUE(absl::IsUnavailable(status));
  // What had arrived is whole and stays readable; what still lay with the dead one is gone.
  for (const Message& message : self.inbox) {
    if (!message.view.readable()) {
      EXPECT_TRUE(self.Read(message).empty());
    } else {
      EXPECT_EQ(FirstWrong(self.Read(message), 11), -1);
    }
    EXPECT_TRUE(self.transport->Intact(message.view));
    self.Release(message);
  }
  EXPECT_EQ(self.Send(1, 0, {}, 99), SendResult::kDown);
  for (int i = 0; i < 200; ++i) self.Progress();
  EXPECT_EQ(self.down.size(), 1u);
  EXPECT_THAT(self.breaches, ::testing::IsEmpty());
}

TEST_P(ProcessTest, APeerKilledInMidTransfer) {
  Job job(GetParam(), 2, TalkAndHold);
  KillInMidTransfer(GetParam(), job, "alone");
}

TEST_P(ProcessTest, ManyPeersThatDieAtOnce) {
  constexpr int kSize = 24;  // Three descriptors each: more than one look takes.
  Job job(GetParam(), kSize, TalkAndHold);
  Endpoint& self = *job.self;
  for (int peer = 1; peer < kSize; ++peer) {
    for (uint64_t i = 0; i < 10; ++i) {
      ASSERT_TRUE(SendSoon(self, peer, i, {}, static_cast<uint64_t>(peer) * 10 + i));
    }
  }
  ASSERT_TRUE(DriveUntil(self, [&] { return self.inbox.size() == 10 * (kSize - 1); }));
  for (int peer = 1; peer < kSize; ++peer) ASSERT_EQ(job.channel(peer).Take(), "holding");
  for (const pid_t pid : job.pids) ASSERT_EQ(kill(pid, SIGKILL), 0);
  for (const pid_t pid : job.pids) {
    siginfo_t info;
    ASSERT_EQ(waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOWAIT), 0);
  }
  EXPECT_TRUE(BlockUntil(self, [&] { return self.down.size() == kSize - 1; }));
  EXPECT_EQ(self.done.size(), 10u * (kSize - 1));
  EXPECT_THAT(self.breaches, ::testing::IsEmpty());
}

TEST_P(ProcessTest, APeerKilledWhileAForkedChildOfItLives) {
  Bystander bystander;
  Job job(GetParam(), 2, [&](Endpoint& self, const Channel& channel) {
    TalkAndHold(self, channel);
    bystander.Fork();
  });
  const auto end = bystander.Keep();
  KillInMidTransfer(GetParam(), job, "a forked child of it lives", end.get());
}

TEST_P(ProcessTest, APeerKilledBeforeItAcceptedWhileAForkedChildOfItLives) {
  Bystander bystander;
  Job job(GetParam(), 2, [&](Endpoint&, const Channel&) { bystander.Fork(); });
  const auto end = bystander.Keep();
  ASSERT_EQ(end->Take(), "alive");
  Endpoint& self = *job.self;
  ASSERT_EQ(self.Send(1, 0, {}, 0), SendResult::kAccepted);
  ASSERT_EQ(kill(job.pid(1), SIGKILL), 0);
  EXPECT_TRUE(BlockUntil(self, [&] { return self.down.contains(1); }));
  EXPECT_TRUE(absl::IsUnavailable(self.done[0]));
  EXPECT_THAT(self.breaches, ::testing::IsEmpty());
}

TEST_P(ProcessTest, KilledAtAnyMomentNothingIsLostOrDoubled) {
  for (uint64_t after = 1; after < 400; after += 37) {
    Job job(GetParam(), 3, [](Endpoint& self, const Channel&) {
      const auto payload = self.Allocate(50'000);
      self.on_message = [&](const Message& message) { self.Release(message); };
      for (uint64_t i = 0; self.down.empty(); ++i) {
        const auto bytes = payload.first(i % 3 == 0 ? 50'000 : i % 1000);
        while (self.Send(0, i, bytes, i) == SendResult::kBusy) Drive(self);
        self.Progress();
      }
    });
    Endpoint& self = *job.self;
    const auto payload = self.Allocate(50'000);
    uint64_t received[3] = {0, 0, 0}, sent = 0;
    self.on_message = [&](const Message& message) {
      if (message.number != received[message.peer]++) self.breaches.push_back("order");
      self.Release(message);
    };
    const auto drive = [&](const std::function<bool()>& condition) {
      return DriveUntil(self, [&] {
        for (const int peer : {1, 2}) {
          if (self.Send(peer, 0, payload, sent) == SendResult::kAccepted) ++sent;
        }
        return condition();
      });
    };
    ASSERT_TRUE(drive([&] { return received[1] >= after && received[2] > 0; }));
    ASSERT_EQ(kill(job.pid(1), SIGKILL), 0);
    ASSERT_TRUE(drive([&] { return self.down.contains(1); }));
    const uint64_t then = received[2];
    ASSERT_TRUE(drive([&] { return received[2] > then + 10; })) << "the survivor must go on";
    ASSERT_TRUE(DriveUntil(self, [&] { return self.pending.empty(); }));
    EXPECT_EQ(self.done.size(), sent);
    EXPECT_EQ(self.down.size(), 1u);
    EXPECT_THAT(self.breaches, ::testing::IsEmpty());
  }
}

std::vector<Kind> BetweenProcesses() {
  std::vector<Kind> kinds = AllKinds();
  std::erase_if(kinds, [](Kind kind) { return kind != Kind::kShm && kind != Kind::kUcx; });
  return kinds;
}

INSTANTIATE_TEST_SUITE_P(All, ProcessTest, ::testing::ValuesIn(BetweenProcesses()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace bluefog::transport::testing
