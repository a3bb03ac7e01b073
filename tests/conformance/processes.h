// Ranks in processes of their own. The test is rank 0, its children are the other ranks; they are
// kept in step by bytes over a socket, never by time.
#pragma once

#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "harness.h"

namespace bluefog::transport::testing {

/// One end of a blocking channel between a test and a child.
class Channel {
 public:
  explicit Channel(int fd) : fd_(fd) {}
  ~Channel() { close(fd_); }
  void Put(const std::string& text) const;
  /// Empty if the other end is gone.
  std::string Take() const;

 private:
  const int fd_;
};

/// Rank 0 here, the others in children that run `body` and then wait to be killed.
class Job {
 public:
  using Body = std::function<void(Endpoint&, const Channel&)>;

  Job(Kind kind, int size, const Body& body);
  ~Job();
  pid_t pid(int rank) const { return pids[static_cast<size_t>(rank) - 1]; }
  const Channel& channel(int rank) const { return *channels[static_cast<size_t>(rank) - 1]; }

  std::unique_ptr<Endpoint> self;
  std::vector<pid_t> pids;
  std::vector<std::unique_ptr<Channel>> channels;
};

/// A forked child of rank 1 that inherits all its descriptors and outlives it.
class Bystander {
 public:
  Bystander();
  /// In rank 1.
  void Fork();
  /// In the test, after the job was started.
  std::unique_ptr<Channel> Keep();

 private:
  int ours_ = -1, theirs_ = -1;
};

/// Lets others run when there is nothing to do: there may be fewer cores than ranks.
void Drive(Endpoint& self);
bool DriveUntil(Endpoint& self, const std::function<bool()>& condition);
/// As an engine that has nothing to do: blocked in poll, but for the time-outs of a network.
bool BlockUntil(Endpoint& self, const std::function<bool()>& condition);
/// Sends, as soon as there is room: before a connection stands, there may be little.
bool SendSoon(Endpoint& self, int peer, uint64_t number, std::span<const std::byte> payload,
              uint64_t cookie);
/// Sends ten messages to rank 0, takes what comes, releases nothing.
void TalkAndHold(Endpoint& self, const Channel& channel);

}  // namespace bluefog::transport::testing
