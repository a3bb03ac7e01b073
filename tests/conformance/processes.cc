#include "processes.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <algorithm>
#include <cstdlib>

namespace bluefog::transport::testing {

void Channel::Put(const std::string& text) const {
  [[maybe_unused]] const auto ignored = send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
}

std::string Channel::Take() const {
  char buffer[4096];
  const ssize_t got = recv(fd_, buffer, sizeof buffer, 0);
  return std::string(buffer, static_cast<size_t>(got > 0 ? got : 0));
}

Job::Job(Kind kind, int size, const Body& body) {
  for (int rank = 1; rank < size; ++rank) {
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) abort();
    const pid_t pid = fork();
    if (pid == 0) {
      close(ends[0]);
      channels.clear();
      const Channel channel(ends[1]);
      auto self = MakeEndpoint(kind, rank, size);
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
  self = MakeEndpoint(kind, 0, size);
  std::vector<std::string> book = {self->transport->address()};
  for (const auto& channel : channels) book.push_back(channel->Take());
  for (const auto& channel : channels) {
    for (const std::string& address : book) channel->Put(address);
  }
  EXPECT_TRUE(self->transport->SetPeers(book).ok());
}

Job::~Job() {
  for (const pid_t pid : pids) {
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
  }
}

Bystander::Bystander() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) abort();
  ours_ = ends[0];
  theirs_ = ends[1];
}

void Bystander::Fork() {
  close(ours_);
  if (fork() != 0) return;
  const Channel end(theirs_);
  end.Put("alive");
  end.Take();  // Until the test closes its end.
  _exit(0);
}

std::unique_ptr<Channel> Bystander::Keep() {
  close(theirs_);
  return std::make_unique<Channel>(ours_);
}

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

bool BlockUntil(Endpoint& self, const std::function<bool()>& condition) {
  const int64_t deadline = NowMs() + 30'000;
  while (!condition()) {
    if (self.Progress() || !self.transport->Arm()) continue;
    pollfd entry{self.transport->fd(), POLLIN, 0};
    // As an engine with operations under way, which looks at its clock.
    poll(&entry, 1, 50);
    if (NowMs() > deadline) return false;
    self.transport->Disarm();
  }
  return true;
}

bool SendSoon(Endpoint& self, int peer, uint64_t number, std::span<const std::byte> payload,
              uint64_t cookie) {
  SendResult result = SendResult::kBusy;
  return DriveUntil(self,
                    [&] {
                      if (result == SendResult::kBusy)
                        result = self.Send(peer, number, payload, cookie);
                      return result != SendResult::kBusy;
                    }) &&
         result == SendResult::kAccepted;
}

void TalkAndHold(Endpoint& self, const Channel& channel) {
  const auto payload = self.Allocate(50'000);
  Fill(payload, 11);
  for (uint64_t i = 0; i < 10; ++i) {
    if (!SendSoon(self, 0, i, payload.first(i % 2 ? 50'000 : 500), i)) return;
  }
  if (DriveUntil(self, [&] { return self.inbox.size() == 10; })) channel.Put("holding");
}

}  // namespace bluefog::transport::testing
