#include <errno.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <string>
#include <utility>

#include "base/failpoint.h"
#include "base/log.h"
#include "transport/shm/shm_transport.h"

namespace bluefog::transport::shm {

void ShmTransport::Watch(int fd, Source source, int index, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = uint64_t{static_cast<uint32_t>(source)} << 32 | static_cast<uint32_t>(index);
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0 && errno == EEXIST) {
    epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
  }
}

void ShmTransport::WatchProcess(int rank, UniqueFd pidfd, bool its_own) {
  Peer& p = peer(rank);
  if (!pidfd || p.pidfd_is_its_own) return;
  if (p.pidfd) Unwatch(p.pidfd.get());
  p.pidfd = std::move(pidfd);
  p.pidfd_is_its_own = its_own;
  Watch(p.pidfd.get(), Source::kPidfd, rank);
}

bool ShmTransport::HandleEvents() {
  std::array<epoll_event, 32> events;
  const int count = epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; ++i) {
    const epoll_event& event = events[static_cast<size_t>(i)];
    HandleEvent(static_cast<Source>(event.data.u64 >> 32),
                static_cast<int>(event.data.u64 & 0xffffffff), event.events);
  }
  // The rest comes next time: descriptors of lost peers stay ready until they are taken off the
  // list, which happens between two looks.
  check_events_ = check_events_ || count == static_cast<int>(events.size());
  return count > 0;
}

void ShmTransport::HandleEvent(Source source, int index, uint32_t events) {
  switch (source) {
    case Source::kListener:
      return AcceptAll();
    case Source::kBell: {
      uint64_t rings;
      if (read(self_.bell.get(), &rings, sizeof rings) < 0) return;
      // Whoever rang will not ring again for this epoch.
      if (self_.epoch != 0) SetEpoch(NextEpoch());
      return;
    }
    case Source::kStranger:
      return Greet(static_cast<uint32_t>(index));
    case Source::kOut:
      if ((events & EPOLLOUT) != 0 && peer(index).out != nullptr) {
        peer(index).out->clear_socket_full();
        Watch(peer(index).out->socket(), Source::kOut, index);
      }
      return ReadOutSocket(index);
    case Source::kIn:
      return ReadInSocket(index);
    case Source::kPidfd:
      return Fail(index, absl::UnavailableError(NameOf(index) + " died"));
  }
}

void ShmTransport::ReadOutSocket(int rank) {
  Peer& p = peer(rank);
  while (p.out != nullptr && !p.failing) {
    ReceivedPacket received;
    const SocketResult result = ReceivePacket(p.out->socket(), &received);
    if (result == SocketResult::kAgain) return;
    if (result == SocketResult::kClosed) {
      return Fail(rank,
                  absl::UnavailableError(NameOf(rank) + " is gone: it closed its connection"));
    }
    Status status;
    if (result == SocketResult::kMalformed) {
      status = absl::InvalidArgumentError("a malformed packet");
    } else if (result == SocketResult::kStarved) {
      status = Starved();
    } else if (received.packet.kind == PacketKind::kFarewell) {
      return Fail(rank, absl::CancelledError(NameOf(rank) + " left"));
    } else if (received.packet.kind == PacketKind::kRefused) {
      status = absl::UnavailableError(received.packet.text);
    } else if (received.packet.kind == PacketKind::kWelcome) {
      UniqueFd pidfd = std::move(received.fds[2]);
      status = p.out->Welcome(&received);
      if (status.ok()) WatchProcess(rank, std::move(pidfd), /*its_own=*/true);
    } else {
      status = absl::InvalidArgumentError("a packet of unknown kind");
    }
    if (!status.ok()) return FailLink(rank, status);
  }
}

void ShmTransport::ReadInSocket(int rank) {
  Peer& p = peer(rank);
  if (p.in == nullptr || p.failing) return;
  Status problem;
  const SocketResult result = p.in->ReadSocket(&problem);
  if (!problem.ok()) {
    FailLink(rank, problem);
  } else if (p.in->farewell()) {
    Fail(rank, absl::CancelledError(NameOf(rank) + " left"));
  } else if (result == SocketResult::kClosed) {
    Fail(rank, absl::UnavailableError(NameOf(rank) + " is gone: it closed its connection"));
  }
}

void ShmTransport::AcceptAll() {
  while (true) {
    UniqueFd socket;
    SocketResult result = Accept(listener_.get(), &socket);
    if (result == SocketResult::kStarved) {
      // The spare one is just enough to say so: whoever waits at the door learns whose fault it is.
      spare_.Reset();
      if (Accept(listener_.get(), &socket) == SocketResult::kOk) {
        Refuse(socket.get(), std::string(Starved().message()));
      }
      socket.Reset();
      spare_ = UniqueFd(dup(epoll_.get()));
      return;
    }
    if (result != SocketResult::kOk) return;
    // Whoever says nothing makes room for the next.
    if (strangers_.size() >= peers_.size() + 64) {
      Unwatch(strangers_.front().socket.get());
      strangers_.erase(strangers_.begin());
    }
    const uint32_t number = next_stranger_++;
    Watch(socket.get(), Source::kStranger, static_cast<int>(number));
    strangers_.push_back({std::move(socket), number});
    Greet(number);
  }
}

std::string ShmTransport::CheckHello(const ReceivedPacket& hello, uid_t uid) {
  const Packet& packet = hello.packet;
  if (uid != geteuid()) {
    return "it belongs to user " + std::to_string(uid) + ", not " + std::to_string(geteuid());
  }
  if (packet.kind != PacketKind::kHello || hello.fd_count != 3) return "it did not say hello";
  if (self_.job_id != packet.job) {
    return "it belongs to job '" + std::string(packet.job) + "', not '" + self_.job_id + "'";
  }
  if (packet.size != self_.size || packet.rank < 0 || packet.rank >= self_.size ||
      packet.rank == self_.rank) {
    return "it calls itself rank " + std::to_string(packet.rank) + " of " +
           std::to_string(packet.size) + " at rank " + std::to_string(self_.rank) + " of " +
           std::to_string(self_.size);
  }
  if (packet.slots < 1 || packet.slots > kMaxSlots || packet.ring_bytes < PageBytes() ||
      packet.ring_bytes > kMaxRingBytes || packet.ring_bytes % PageBytes() != 0) {
    return "its ring has " + std::to_string(packet.ring_bytes) + " bytes and " +
           std::to_string(packet.slots) + " slots";
  }
  const Peer& p = peer(packet.rank);
  if (p.failing) return std::string(p.failure.message());
  if (p.in != nullptr) {
    return "rank " + std::to_string(packet.rank) + " was connected before";
  }
  if (FailpointHit("shm.accept")) return "failpoint shm.accept";
  return {};
}

void ShmTransport::Greet(uint32_t number) {
  size_t i = 0;
  while (i < strangers_.size() && strangers_[i].number != number) ++i;
  if (i == strangers_.size()) return;
  ReceivedPacket hello;
  const SocketResult result = ReceivePacket(strangers_[i].socket.get(), &hello);
  if (result == SocketResult::kAgain) return;
  UniqueFd socket = std::move(strangers_[i].socket);
  strangers_.erase(strangers_.begin() + static_cast<std::ptrdiff_t>(i));
  Unwatch(socket.get());
  if (result == SocketResult::kClosed) return;

  pid_t pid = 0;
  uid_t uid = 0;
  std::string refusal;
  if (!PeerCredentials(socket.get(), &pid, &uid)) {
    refusal = "nothing is known of it";
  } else if (result == SocketResult::kStarved) {
    refusal = std::string(Starved().message());
  } else if (result == SocketResult::kMalformed) {
    refusal = "its hello is not one of this version";
  } else {
    refusal = CheckHello(hello, uid);
  }
  const int rank = hello.packet.rank;
  if (refusal.empty()) {
    UniqueFd pidfd = std::move(hello.fds[2]);
    auto link = InLink::Create(&self_, &hello);
    if (link.ok()) {
      if (!link->SendWelcome(&socket)) return;  // It has gone again.
      Peer& p = peer(rank);
      p.in = std::make_unique<InLink>(*std::move(link));
      p.pid = pid;
      Watch(p.in->socket(), Source::kIn, rank);
      WatchProcess(rank, std::move(pidfd), /*its_own=*/true);
      Activate(rank);
      return;
    }
    refusal = std::string(link.status().message());
  }
  BLUEFOG_LOG(kWarning) << "refused a connection of process " << pid << ": " << refusal;
  Refuse(socket.get(), refusal);
}

void ShmTransport::Refuse(int socket, const std::string& why) {
  Packet packet;
  packet.kind = PacketKind::kRefused;
  packet.rank = self_.rank;
  why.copy(packet.text, sizeof packet.text - 1);
  SendPacket(socket, packet);
}

}  // namespace bluefog::transport::shm
