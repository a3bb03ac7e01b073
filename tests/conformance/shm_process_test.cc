// Shared memory between real processes: a stopped peer, what is left behind, forked children.
#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "processes.h"

namespace bluefog::transport::testing {
namespace {

using Message = Endpoint::Message;

TEST(ShmProcessTest, AStoppedPeerHurtsNobodyElse) {
  Job job(Kind::kShm, 3, [](Endpoint& self, const Channel& channel) {
    self.on_message = [&](const Message& message) { self.Release(message); };
    channel.Put("ready");
    while (self.down.empty()) Drive(self);
  });
  Endpoint& self = *job.self;
  const auto payload = self.Allocate(50'000);
  for (const int peer : {1, 2}) {
    ASSERT_EQ(job.channel(peer).Take(), "ready");
    ASSERT_EQ(self.Send(peer, 0, payload, static_cast<uint64_t>(peer)), SendResult::kAccepted);
  }
  ASSERT_TRUE(DriveUntil(self, [&] { return self.done.size() == 2; }));
  ASSERT_EQ(kill(job.pid(1), SIGSTOP), 0);
  int status;
  ASSERT_EQ(waitpid(job.pid(1), &status, WUNTRACED), job.pid(1));
  uint64_t cookie = 10, to_stopped = 0;
  while (self.Send(1, 0, payload, cookie) == SendResult::kAccepted) {
    ++cookie;
    ASSERT_LE(++to_stopped, uint64_t{kMaxInFlight});
  }
  for (int i = 0; i < 200; ++i) {
    ASSERT_EQ(self.Send(2, 0, payload, cookie), SendResult::kAccepted);
    ASSERT_TRUE(DriveUntil(self, [&] { return self.done.contains(cookie); }));
    ++cookie;
    ASSERT_EQ(self.Send(1, 0, payload, 9), SendResult::kBusy);
  }
  EXPECT_EQ(self.pending.size(), to_stopped);
  EXPECT_TRUE(self.down.empty());
  ASSERT_EQ(kill(job.pid(1), SIGCONT), 0);
  ASSERT_TRUE(DriveUntil(self, [&] { return self.pending.empty(); }));
  for (const auto& [each, done] : self.done) EXPECT_TRUE(done.ok());
  EXPECT_THAT(self.breaches, ::testing::IsEmpty());
}

/// Files that a process has open or mapped below /dev/shm or /tmp.
std::vector<std::string> NamedFiles(pid_t pid) {
  std::vector<std::string> found;
  const std::string proc = "/proc/" + std::to_string(pid);
  const auto note = [&found](const std::string& path) {
    if (path.find("/dev/shm") == 0 || path.find("/tmp/") == 0) found.push_back(path);
  };
  if (DIR* directory = opendir((proc + "/fd").c_str())) {
    while (const dirent* entry = readdir(directory)) {
      char target[512];
      const auto length = readlink((proc + "/fd/" + entry->d_name).c_str(), target, sizeof target);
      if (length > 0) note(std::string(target, static_cast<size_t>(length)));
    }
    closedir(directory);
  }
  std::ifstream maps(proc + "/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t path = line.find('/');
    const bool writable_and_shared = line.find("rw-s") != std::string::npos;
    if (path != std::string::npos && writable_and_shared) note(line.substr(path));
  }
  return found;
}

TEST(ShmProcessTest, NothingHasANameThatCouldStayBehind) {
  const auto before = NamedFiles(getpid());
  Job job(Kind::kShm, 2, TalkAndHold);
  const auto payload = job.self->Allocate(50'000);
  for (uint64_t i = 0; i < 10; ++i) {
    ASSERT_EQ(job.self->Send(1, i, payload, i), SendResult::kAccepted);
  }
  ASSERT_TRUE(DriveUntil(*job.self, [&] { return job.self->inbox.size() == 10; }));
  ASSERT_EQ(job.channel(1).Take(), "holding");
  EXPECT_EQ(NamedFiles(getpid()), before);
  EXPECT_EQ(NamedFiles(job.pid(1)), before);
}

TEST(ShmProcessTest, AForkedChildThatDestroysItsCopyHurtsNobody) {
  World world(Kind::kShm, 2);
  ASSERT_EQ(world[0].Send(1, 0, {}, 0), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == 1; }));
  const pid_t child = fork();
  if (child == 0) {
    world.Leave(0);
    world.Leave(1);
    _exit(0);
  }
  int status;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  world[1].Release(world[1].inbox[0]);
  ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(0); }));
  world.Settle();
  EXPECT_TRUE(world[0].down.empty() && world[1].down.empty());
}

TEST(ShmProcessTest, LeavingIsSeenAlthoughAForkedChildHoldsTheSockets) {
  World world(Kind::kShm, 2);
  ASSERT_EQ(world[0].Send(1, 0, {}, 0), SendResult::kAccepted);
  ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == 1; }));
  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    close(ends[0]);
    Channel(ends[1]).Take();
    _exit(0);
  }
  close(ends[1]);
  world.Leave(1);
  EXPECT_TRUE(world.DriveUntil([&] { return world[0].down.contains(1); }));
  close(ends[0]);
  waitpid(child, nullptr, 0);
}

size_t Count(const char* directory) {
  size_t count = 0;
  DIR* stream = opendir(directory);
  while (readdir(stream) != nullptr) ++count;
  closedir(stream);
  return count;
}

size_t SharedMappings() {
  size_t count = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    count += line.find("memfd:") != std::string::npos;
  return count;
}

TEST(ShmProcessTest, AHundredLivesLeakNothing) {
  size_t descriptors = 0, mappings = 0;
  for (int life = 0; life < 101; ++life) {
    {
      World world(Kind::kShm, 3);
      const auto payload = world[0].Allocate(50'000);
      ASSERT_EQ(world[0].Send(1, 0, payload, 0), SendResult::kAccepted);
      ASSERT_EQ(world[1].Send(0, 0, {}, 0), SendResult::kAccepted);
      ASSERT_EQ(world[2].Send(1, 0, {}, 0), SendResult::kAccepted);
      ASSERT_TRUE(world.DriveUntil(
          [&] { return world[1].inbox.size() == 2 && world[0].inbox.size() == 1; }));
      // Some lives end in order, some with everything in the air.
      if (life % 2 == 0) world.Leave(1), world.Settle();
    }
    if (life == 0) descriptors = Count("/proc/self/fd"), mappings = SharedMappings();
  }
  EXPECT_EQ(Count("/proc/self/fd"), descriptors);
  EXPECT_EQ(SharedMappings(), mappings);
}

TEST(ShmProcessTest, SegmentsThatAreGoneAreUnmappedByPeersToo) {
  World world(Kind::kShm, 2);
  size_t most = 0;
  for (uint64_t i = 0; i < 20; ++i) {
    auto block = world[0].arena->Allocate(3 << 20);  // Larger than a segment: has one of its own.
    ASSERT_TRUE(block.ok());
    const std::span<std::byte> payload(block->get(), 3 << 20);
    Fill(payload, i);
    ASSERT_EQ(world[0].Send(1, i, payload, i), SendResult::kAccepted);
    ASSERT_TRUE(world.DriveUntil([&] { return world[1].inbox.size() == 1; }));
    EXPECT_EQ(FirstWrong(world[1].Read(world[1].inbox[0]), i), -1);
    world[1].Release(world[1].inbox[0]);
    world[1].inbox.clear();
    ASSERT_TRUE(world.DriveUntil([&] { return world[0].done.contains(i); }));
    if (i == 3) most = SharedMappings();
  }
  EXPECT_LE(SharedMappings(), most);
}

}  // namespace
}  // namespace bluefog::transport::testing
