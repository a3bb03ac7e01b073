// Shared memory between real processes: death, also while a forked child of the dead one lives on
// with all its descriptors; a stopped peer; what is left behind. This process is rank 0, its
// children are the other ranks; they are kept in step by bytes over a socket, never by time.
#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <iostream>

#include "harness.h"
#include "transport/shm/shm.h"

namespace bluefog::transport::testing {
namespace {

using Message = Endpoint::Message;

/// One end of a blocking channel between a test and a child.
class Channel {
 public:
  explicit Channel(int fd) : fd_(fd) {}
  ~Channel() { close(fd_); }
  void Put(const std::string& text) const {
    [[maybe_unused]] const auto ignored = send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
  }
  /// Empty if the other end is gone.
  std::string Take() const {
    char buffer[4096];
    const ssize_t got = recv(fd_, buffer, sizeof buffer, 0);
    return std::string(buffer, static_cast<size_t>(got > 0 ? got : 0));
  }

 private:
  const int fd_;
};

std::unique_ptr<Endpoint> MakeEndpoint(int rank, int size) {
  auto arena = Arena::Create(1 << 20);
  return std::make_unique<Endpoint>(rank, arena, [&](Receiver* receiver) {
    ShmOptions options;
    options.rank = rank;
    options.size = size;
    options.job_id = "processes";
    options.inline_limit = kInlineLimit;
    options.ring_bytes = kRingBytes;
    options.max_in_flight = kMaxInFlight;
    return MakeShm(options, arena, receiver);
  });
}

/// Rank 0 here, the others in children that run `body` and then wait to be killed.
class Job {
 public:
  using Body = std::function<void(Endpoint&, const Channel&)>;

  Job(int size, const Body& body) {
    for (int rank = 1; rank < size; ++rank) {
      int ends[2];
      if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) abort();
      const pid_t pid = fork();
      if (pid == 0) {
        close(ends[0]);
        channels.clear();
        const Channel channel(ends[1]);
        auto self = MakeEndpoint(rank, size);
        channel.Put(self->transport->address());
        std::vector<std::string> book;
        for (int i = 0; i < size; ++i) book.push_back(channel.Take());
        if (self->transport->SetPeers(book).ok()) body(*self, channel);
        channel.Take();  // Until the test ends, or kills us.
        _exit(0);
      }
      close(ends[1]);
      pids.push_back(pid);
      channels.push_back(std::make_unique<Channel>(ends[0]));
    }
    self = MakeEndpoint(0, size);
    std::vector<std::string> book = {self->transport->address()};
    for (const auto& channel : channels) book.push_back(channel->Take());
    for (const auto& channel : channels) {
      for (const std::string& address : book) channel->Put(address);
    }
    EXPECT_TRUE(self->transport->SetPeers(book).ok());
  }
  ~Job() {
    for (const pid_t pid : pids) {
      kill(pid, SIGKILL);
      waitpid(pid, nullptr, 0);
    }
  }
  pid_t pid(int rank) const { return pids[static_cast<size_t>(rank) - 1]; }
  const Channel& channel(int rank) const { return *channels[static_cast<size_t>(rank) - 1]; }

  std::unique_ptr<Endpoint> self;
  std::vector<pid_t> pids;
  std::vector<std::unique_ptr<Channel>> channels;
};

/// Lets others run when there is nothing to do: there may be fewer cores than ranks.
void Drive(Endpoint& self) {
  if (!self.Progress()) sched_yield();
}

bool DriveUntil(Endpoint& self, const std::function<bool()>& condition) {
  const int64_t deadline = NowMs() + 30'000;
  while (!condition()) {
    if (NowMs() > deadline) return false;
    Drive(self);
  }
  return true;
}

/// As an engine that has nothing to do: blocked in poll.
bool BlockUntil(Endpoint& self, const std::function<bool()>& condition) {
  const int64_t deadline = NowMs() + 30'000;
  while (!condition()) {
    if (self.Progress() || !self.transport->Arm()) continue;
    pollfd entry{self.transport->fd(), POLLIN, 0};
    if (poll(&entry, 1, static_cast<int>(std::max(int64_t{0}, deadline - NowMs()))) != 1) {
      return false;
    }
    self.transport->Disarm();
  }
  return true;
}

/// Sends ten messages to rank 0, takes what comes, releases nothing.
void TalkAndHold(Endpoint& self, const Channel& channel) {
  const auto payload = self.Allocate(50'000);
  Fill(payload, 11);
  for (uint64_t i = 0; i < 10; ++i) {
    if (self.Send(0, i, payload.first(i % 2 ? 50'000 : 500), i) != SendResult::kAccepted) return;
  }
  if (DriveUntil(self, [&] { return self.inbox.size() == 10; })) channel.Put("holding");
}

/// Kills rank 1, which holds ten of ours while we hold ten of it, and looks at what follows. If
/// there is a bystander, waits for a word of it first.
void KillInMidTransfer(Job& job, const char* what, const Channel* bystander = nullptr) {
  Endpoint& self = *job.self;
  const auto payload = self.Allocate(50'000);
  for (uint64_t i = 0; i < 10; ++i) {
    ASSERT_EQ(self.Send(1, i, payload.first(i % 2 ? 50'000 : 500), i), SendResult::kAccepted);
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
  EXPECT_LT(took, 1000);
  EXPECT_TRUE(absl::IsUnavailable(self.down[1])) << self.down[1];
  EXPECT_THAT(std::string(self.down[1].message()),
              ::testing::HasSubstr("rank 1 (process " + std::to_string(job.pid(1))));
  EXPECT_EQ(self.done.size(), 10u);
  for (const auto& [cookie, status] : self.done) EXPECT_TRUE(absl::IsUnavailable(status));
  // What had arrived is whole and stays readable.
  for (const Message& message : self.inbox) {
    EXPECT_EQ(FirstWrong(self.Read(message), 11), -1);
    EXPECT_TRUE(self.transport->Intact(message.view));
    self.Release(message);
  }
  EXPECT_EQ(self.Send(1, 0, {}, 99), SendResult::kDown);
  for (int i = 0; i < 200; ++i) self.Progress();
  EXPECT_EQ(self.down.size(), 1u);
  EXPECT_THAT(self.breaches, ::testing::IsEmpty());
}

TEST(ShmProcessTest, APeerKilledInMidTransfer) {
  Job job(2, TalkAndHold);
  KillInMidTransfer(job, "alone");
}

TEST(ShmProcessTest, ManyPeersThatDieAtOnce) {
  constexpr int kSize = 24;  // Three descriptors each: more than one look takes.
  Job job(kSize, TalkAndHold);
  Endpoint& self = *job.self;
  for (int peer = 1; peer < kSize; ++peer) {
    for (uint64_t i = 0; i < 10; ++i) {
      ASSERT_EQ(self.Send(peer, i, {}, static_cast<uint64_t>(peer) * 10 + i),
                SendResult::kAccepted);
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

/// A forked child of rank 1 that inherits all its descriptors and outlives it.
class Bystander {
 public:
  Bystander() {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) abort();
    ours_ = ends[0];
    theirs_ = ends[1];
  }
  /// In rank 1.
  void Fork() {
    close(ours_);
    if (fork() != 0) return;
    const Channel end(theirs_);
    end.Put("alive");
    end.Take();  // Until the test closes its end.
    _exit(0);
  }
  /// In the test, after the job was started.
  std::unique_ptr<Channel> Keep() {
    close(theirs_);
    return std::make_unique<Channel>(ours_);
  }

 private:
  int ours_ = -1, theirs_ = -1;
};

TEST(ShmProcessTest, APeerKilledWhileAForkedChildOfItLives) {
  Bystander bystander;
  Job job(2, [&](Endpoint& self, const Channel& channel) {
    TalkAndHold(self, channel);
    bystander.Fork();
  });
  const auto end = bystander.Keep();
  KillInMidTransfer(job, "a forked child of it lives", end.get());
}

TEST(ShmProcessTest, APeerKilledBeforeItAcceptedWhileAForkedChildOfItLives) {
  Bystander bystander;
  Job job(2, [&](Endpoint&, const Channel&) { bystander.Fork(); });
  const auto end = bystander.Keep();
  ASSERT_EQ(end->Take(), "alive");
  Endpoint& self = *job.self;
  ASSERT_EQ(self.Send(1, 0, {}, 0), SendResult::kAccepted);
  ASSERT_EQ(kill(job.pid(1), SIGKILL), 0);
  EXPECT_TRUE(BlockUntil(self, [&] { return self.down.contains(1); }));
  EXPECT_TRUE(absl::IsUnavailable(self.done[0]));
  EXPECT_THAT(self.breaches, ::testing::IsEmpty());
}

TEST(ShmProcessTest, KilledAtAnyMomentNothingIsLostOrDoubled) {
  for (uint64_t after = 1; after < 400; after += 37) {
    Job job(3, [](Endpoint& self, const Channel&) {
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

TEST(ShmProcessTest, AStoppedPeerHurtsNobodyElse) {
  Job job(3, [](Endpoint& self, const Channel& channel) {
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
  Job job(2, TalkAndHold);
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
