#include "transport/shm/shm.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "base/failpoint.h"
#include "base/log.h"
#include "transport/shm/in_link.h"
#include "transport/shm/out_link.h"
#include "transport/shm/socket.h"

namespace bluefog::transport {
namespace {

using shm::InLink;
using shm::OutLink;
using shm::Packet;
using shm::PacketKind;
using shm::ReceivedPacket;
using shm::SocketResult;

constexpr char kAddressPrefix[] = "shm1:";
// Polling memory is cheap, asking the kernel is not: whoever drives asks it every so many turns.
constexpr uint32_t kTurnsPerEventCheck = 64;

/// What an epoll event is about.
enum class Source : uint32_t { kListener, kBell, kStranger, kOut, kIn, kPidfd };

uint64_t EventKey(Source source, int index) {
  return uint64_t{static_cast<uint32_t>(source)} << 32 | static_cast<uint32_t>(index);
}

class ShmTransport final : public Transport {
 public:
  static StatusOr<std::unique_ptr<Transport>> Make(ShmOptions options, std::shared_ptr<Arena> arena,
                                                   Receiver* receiver);
  ~ShmTransport() override;

  const char* name() const override { return "shm"; }
  std::string address() const override { return kAddressPrefix + listen_name_; }
  Status SetPeers(std::vector<std::string> addresses) override;
  int64_t inline_limit() const override { return self_.inline_limit; }
  bool CanSendInPlace(std::span<const std::byte> payload) const override {
    Arena::Location ignored;
    return arena_->Find(payload.data(), static_cast<int64_t>(payload.size()), &ignored);
  }
  SendResult Send(int peer, const Header& header, std::span<const std::byte> payload,
                  uint64_t cookie) override;
  void Revoke(int peer, uint64_t cookie) override;
  void Fetch(const View& view, std::byte* destination, uint64_t cookie) override {
    fetches_.push_back({view, destination, cookie});
  }
  bool Intact(const View& view) const override {
    const InLink* in = peers_[static_cast<size_t>(view.peer)].in.get();
    return in != nullptr && in->Intact(view);
  }
  void Detach(const View& view) override {
    if (InLink* in = peers_[static_cast<size_t>(view.peer)].in.get()) in->Detach(view);
  }
  void Release(const View& view) override;
  bool Progress() override;
  int fd() const override { return epoll_.get(); }
  bool Arm() override;
  void Disarm() override {
    if (self_.epoch != 0) SetEpoch(0);
  }

 private:
  struct Peer {
    std::string address;
    std::unique_ptr<OutLink> out;
    std::unique_ptr<InLink> in;
    UniqueFd pidfd;
    bool pidfd_is_its_own = false;  ///< Made by the peer itself, not guessed from a number.
    pid_t pid = 0;
    bool active = false;   ///< In active_.
    bool failing = false;  ///< In failing_, or down already.
    bool down = false;
    Status failure;
  };
  struct PendingFetch {
    View view;
    std::byte* destination;
    uint64_t cookie;
  };
  struct Stranger {
    UniqueFd socket;
    uint32_t number = 0;
  };

  ShmTransport() = default;
  Peer& peer(int rank) { return peers_[static_cast<size_t>(rank)]; }
  std::string NameOf(int rank);
  void Watch(int fd, Source source, int index, uint32_t events = EPOLLIN);
  void Unwatch(int fd) { epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }
  void WatchProcess(int rank, UniqueFd pidfd, bool its_own);
  void Activate(int rank);
  void SetEpoch(uint32_t epoch);
  /// Gives up `rank` at the end of this or the next Progress.
  void Fail(int rank, Status status);
  void FinishFailed(int rank);
  SendResult Connect(int rank);

  bool HandleEvents();
  void HandleEvent(Source source, int index, uint32_t events);
  void AcceptAll();
  void Greet(uint32_t number);
  /// Why the hello is refused; empty if it is not.
  std::string CheckHello(const ReceivedPacket& hello, uid_t uid);
  void ReadOutSocket(int rank);
  void ReadInSocket(int rank);
  Status DoFetch(const PendingFetch& fetch);
  bool FinishDeferred();

  shm::Self self_;
  std::shared_ptr<Arena> arena_;
  std::string listen_name_;
  UniqueFd epoll_, listener_;
  pid_t process_ = 0;
  std::vector<Peer> peers_;
  std::vector<int> active_;          ///< Ranks with a link.
  std::vector<int> failing_;         ///< Ranks to be given up.
  std::vector<Stranger> strangers_;  ///< Accepted, hello not read yet.
  uint32_t next_stranger_ = 0;
  std::vector<uint64_t> cancelled_;
  std::vector<PendingFetch> fetches_;
  uint32_t last_epoch_ = 0;
  uint32_t turns_ = 0;
  bool check_events_ = true;
  bool retry_connect_ = false;
};

StatusOr<std::unique_ptr<Transport>> ShmTransport::Make(ShmOptions options,
                                                        std::shared_ptr<Arena> arena,
                                                        Receiver* receiver) {
  const int64_t ring_bytes = RoundUp(options.ring_bytes, PageBytes());
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size ||
      options.max_in_flight < 1 || options.max_in_flight > static_cast<int>(shm::kMaxSlots) ||
      options.inline_limit < 0 || options.ring_bytes < 1 || ring_bytes > shm::kMaxRingBytes ||
      options.inline_limit > ring_bytes / 2 || options.job_id.size() >= sizeof(Packet::job)) {
    return absl::InvalidArgumentError(
        "shm: rank " + std::to_string(options.rank) + " of " + std::to_string(options.size) +
        ", max_in_flight " + std::to_string(options.max_in_flight) +
        " (1 to 65536), inline_limit " + std::to_string(options.inline_limit) +
        " (at most half of ring_bytes), ring_bytes " + std::to_string(options.ring_bytes) +
        " (at most 1 GiB), job id of " + std::to_string(options.job_id.size()) +
        " bytes (at most 127): one of them cannot work");
  }
  std::unique_ptr<ShmTransport> t(new ShmTransport);
  t->process_ = getpid();
  t->peers_.resize(static_cast<size_t>(options.size));
  t->arena_ = std::move(arena);
  shm::Self& self = t->self_;
  self.rank = options.rank;
  self.size = options.size;
  self.job_id = options.job_id;
  self.layout = {static_cast<uint32_t>(options.max_in_flight), ring_bytes};
  self.inline_limit = options.inline_limit;
  self.arena = t->arena_.get();
  self.receiver = receiver;
  self.bell = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!self.bell) return ErrnoStatus("eventfd", errno);
  self.pidfd = shm::OpenPidfd(t->process_);
  if (!self.pidfd) return ErrnoStatus("pidfd_open (needs Linux 5.3)", errno);
  t->epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  if (!t->epoll_) return ErrnoStatus("epoll_create1", errno);
  t->listen_name_ = "bluefog-" + std::to_string(geteuid()) + "-" + std::to_string(options.rank) +
                    "-" + shm::RandomHex(16);
  auto listener = shm::ListenAbstract(t->listen_name_, options.size + 64);
  if (!listener.ok()) return listener.status();
  t->listener_ = *std::move(listener);
  t->Watch(t->listener_.get(), Source::kListener, 0);
  t->Watch(self.bell.get(), Source::kBell, 0);
  return t;
}

ShmTransport::~ShmTransport() {
  if (getpid() != process_) return;  // A forked child: the links are its parent's.
  Packet farewell;
  farewell.kind = PacketKind::kFarewell;
  farewell.rank = self_.rank;
  // Not just close: a forked child may hold copies.
  const auto leave = [&farewell](int socket) {
    SendPacket(socket, farewell);
    shutdown(socket, SHUT_RDWR);
  };
  for (Peer& peer : peers_) {
    if (peer.out != nullptr) {
      peer.out->RevokeAll();
      leave(peer.out->socket());
    }
    if (peer.in != nullptr && peer.in->socket() >= 0) leave(peer.in->socket());
  }
  for (Stranger& stranger : strangers_) leave(stranger.socket.get());
  UniqueFd waiting;
  while (shm::Accept(listener_.get(), &waiting) == SocketResult::kOk) leave(waiting.get());
  shutdown(listener_.get(), SHUT_RDWR);
}

Status ShmTransport::SetPeers(std::vector<std::string> addresses) {
  if (addresses.size() != peers_.size()) {
    return absl::InvalidArgumentError("shm: an address book of " +
                                      std::to_string(addresses.size()) + " entries for " +
                                      std::to_string(peers_.size()) + " ranks");
  }
  for (size_t rank = 0; rank < addresses.size(); ++rank) {
    const std::string& address = addresses[rank];
    if (static_cast<int>(rank) == self_.rank) continue;
    if (address.rfind(kAddressPrefix, 0) != 0) {
      return absl::InvalidArgumentError("shm: the address of rank " + std::to_string(rank) +
                                        " is not one of shared memory: '" + address + "'");
    }
    peers_[rank].address = address.substr(strlen(kAddressPrefix));
  }
  return absl::OkStatus();
}

std::string ShmTransport::NameOf(int rank) {
  const pid_t pid = peer(rank).pid;
  return "rank " + std::to_string(rank) +
         (pid > 0 ? " (process " + std::to_string(pid) + ")" : std::string());
}

void ShmTransport::Watch(int fd, Source source, int index, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = EventKey(source, index);
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

void ShmTransport::Activate(int rank) {
  if (std::exchange(peer(rank).active, true)) return;
  active_.push_back(rank);
}

void ShmTransport::SetEpoch(uint32_t epoch) {
  self_.epoch = epoch;
  for (const int rank : active_) {
    Peer& p = peer(rank);
    if (p.down) continue;
    if (p.out != nullptr) p.out->Arm(epoch);
    if (p.in != nullptr) p.in->Arm(epoch);
  }
}

void ShmTransport::Fail(int rank, Status status) {
  Peer& p = peer(rank);
  if (std::exchange(p.failing, true)) return;
  p.failure = std::move(status);
  failing_.push_back(rank);
}

SendResult ShmTransport::Connect(int rank) {
  Peer& p = peer(rank);
  const auto give_up = [&](const std::string& why) {
    p.out.reset();
    Fail(rank, absl::UnavailableError(NameOf(rank) + " cannot be reached: " + why));
    return SendResult::kDown;
  };
  if (FailpointHit("shm.connect")) return give_up("failpoint shm.connect");
  if (p.address.empty()) return give_up("it has no address");
  if (p.out == nullptr) {
    auto link = OutLink::Create(&self_);
    if (!link.ok()) return give_up(std::string(link.status().message()));
    p.out = std::make_unique<OutLink>(*std::move(link));
  }
  switch (p.out->Connect(p.address)) {
    case SocketResult::kOk:
      break;
    case SocketResult::kAgain:
      retry_connect_ = true;
      return SendResult::kBusy;
    default:
      return give_up("nobody listens at '" + p.address +
                     "'; it died, or is on another host or in another network namespace");
  }
  Watch(p.out->socket(), Source::kOut, rank);
  // Until its own pidfd comes. Should the number have been used anew meanwhile, then it is dead
  // anyway, and all that this watch can report is a death.
  uid_t uid;
  if (shm::PeerCredentials(p.out->socket(), &p.pid, &uid)) {
    WatchProcess(rank, shm::OpenPidfd(p.pid), /*its_own=*/false);
  }
  Activate(rank);
  return SendResult::kAccepted;
}

SendResult ShmTransport::Send(int rank, const Header& header, std::span<const std::byte> payload,
                              uint64_t cookie) {
  if (rank < 0 || rank >= self_.size || rank == self_.rank) return SendResult::kDown;
  Peer& p = peer(rank);
  if (p.failing) return SendResult::kDown;
  if (p.out == nullptr || !p.out->connected()) {
    const SendResult connected = Connect(rank);
    if (connected != SendResult::kAccepted) return connected;
  }
  Status problem;
  const SendResult result = p.out->Send(header, payload, cookie, &problem);
  if (!problem.ok()) {
    Fail(rank, Status(problem.code(), NameOf(rank) + ": " + std::string(problem.message())));
  }
  if (result == SendResult::kBusy && p.out->socket_full()) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLOUT;
    event.data.u64 = EventKey(Source::kOut, rank);
    epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, p.out->socket(), &event);
    check_events_ = true;
  }
  return result;
}

void ShmTransport::Revoke(int rank, uint64_t cookie) {
  if (rank < 0 || rank >= self_.size) return;
  OutLink* out = peer(rank).out.get();
  if (out != nullptr && out->Revoke(cookie)) cancelled_.push_back(cookie);
}

void ShmTransport::Release(const View& view) {
  Peer& p = peer(view.peer);
  if (p.in == nullptr) return;
  p.in->Release(view);
  if (p.down && p.in->held() == 0) p.in.reset();
}

Status ShmTransport::DoFetch(const PendingFetch& fetch) {
  const InLink* in = peer(fetch.view.peer).in.get();
  const std::byte* data = in == nullptr ? nullptr : in->Data(fetch.view);
  if (fetch.view.size > 0) {
    if (data == nullptr) {
      return absl::FailedPreconditionError("fetch of a view that is released or detached");
    }
    std::memcpy(fetch.destination, data, static_cast<size_t>(fetch.view.size));
  }
  if (!Intact(fetch.view)) return absl::CancelledError("the sender gave up the message");
  return absl::OkStatus();
}

bool ShmTransport::FinishDeferred() {
  bool moved = std::exchange(retry_connect_, false);
  if (!cancelled_.empty()) {
    moved = true;
    for (const uint64_t cookie : std::exchange(cancelled_, {})) {
      self_.receiver->SendDone(cookie, absl::CancelledError("the send was given up"));
    }
  }
  if (!fetches_.empty()) {
    moved = true;
    for (const PendingFetch& fetch : std::exchange(fetches_, {})) {
      self_.receiver->FetchDone(fetch.cookie, DoFetch(fetch));
    }
  }
  return moved;
}

bool ShmTransport::Progress() {
  bool moved = false;
  if (std::exchange(check_events_, false) || ++turns_ % kTurnsPerEventCheck == 0) {
    moved = HandleEvents();
  }
  moved |= FinishDeferred();
  // By index: an upcall may send to somebody new.
  for (size_t i = 0; i < active_.size(); ++i) {
    const int rank = active_[i];
    Peer& p = peer(rank);
    if (p.failing) continue;
    if (p.out != nullptr) {
      const StatusOr<bool> out = p.out->Poll();
      if (!out.ok())
        Fail(rank, absl::InvalidArgumentError(NameOf(rank) + " broke the protocol: " +
                                              std::string(out.status().message())));
      moved |= out.ok() && *out;
    }
    if (p.in != nullptr && !p.failing) {
      const StatusOr<bool> in = p.in->Poll();
      if (!in.ok())
        Fail(rank, absl::InvalidArgumentError(NameOf(rank) + " broke the protocol: " +
                                              std::string(in.status().message())));
      moved |= in.ok() && *in;
    }
  }
  while (!failing_.empty()) {
    const int rank = failing_.back();
    failing_.pop_back();
    FinishFailed(rank);
    moved = true;
  }
  return moved;
}

void ShmTransport::FinishFailed(int rank) {
  Peer& p = peer(rank);
  // What it had released or published before it went still counts.
  if (!absl::IsInvalidArgument(p.failure)) {
    if (p.out != nullptr) (void)p.out->Poll();
    if (p.in != nullptr) (void)p.in->Poll();
  }
  p.down = true;
  if (p.pidfd) Unwatch(p.pidfd.get());
  p.pidfd.Reset();
  if (p.in != nullptr && p.in->socket() >= 0) {
    Unwatch(p.in->socket());
    p.in->Close();
  }
  std::unique_ptr<OutLink> out = std::move(p.out);
  if (out != nullptr && out->connected()) Unwatch(out->socket());
  std::erase(active_, rank);
  self_.receiver->PeerDown(rank, p.failure);
  if (out != nullptr) out->FailAll(p.failure);
  if (p.in != nullptr && p.in->held() == 0) p.in.reset();
}

bool ShmTransport::HandleEvents() {
  std::array<epoll_event, 32> events;
  bool moved = false;
  while (true) {
    const int count = epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), 0);
    for (int i = 0; i < count; ++i) {
      const epoll_event& event = events[static_cast<size_t>(i)];
      HandleEvent(static_cast<Source>(event.data.u64 >> 32),
                  static_cast<int>(event.data.u64 & 0xffffffff), event.events);
      moved = true;
    }
    if (count < static_cast<int>(events.size())) return moved;
  }
}

void ShmTransport::HandleEvent(Source source, int index, uint32_t events) {
  switch (source) {
    case Source::kListener:
      return AcceptAll();
    case Source::kBell: {
      uint64_t rings;
      if (read(self_.bell.get(), &rings, sizeof rings) < 0) return;
      // Whoever rang will not ring again for this epoch.
      if (self_.epoch != 0) SetEpoch(last_epoch_ = last_epoch_ + 1 == 0 ? 1 : last_epoch_ + 1);
      return;
    }
    case Source::kStranger:
      return Greet(static_cast<uint32_t>(index));
    case Source::kOut:
      if ((events & EPOLLOUT) != 0 && peer(index).out != nullptr) {
        peer(index).out->clear_socket_full();
        epoll_event event{};
        event.events = EPOLLIN;
        event.data.u64 = EventKey(Source::kOut, index);
        epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, peer(index).out->socket(), &event);
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
    } else if (received.packet.kind == PacketKind::kFarewell) {
      return Fail(rank, absl::CancelledError(NameOf(rank) + " left"));
    } else if (received.packet.kind == PacketKind::kRefused) {
      return Fail(rank, absl::UnavailableError(NameOf(rank) +
                                               " refused the connection: " + received.packet.text));
    } else if (received.packet.kind == PacketKind::kWelcome) {
      UniqueFd pidfd = std::move(received.fds[2]);
      status = p.out->Welcome(&received);
      if (status.ok()) WatchProcess(rank, std::move(pidfd), /*its_own=*/true);
    } else {
      status = absl::InvalidArgumentError("a packet of unknown kind");
    }
    if (!status.ok()) {
      return Fail(rank, absl::InvalidArgumentError(NameOf(rank) + " broke the protocol: " +
                                                   std::string(status.message())));
    }
  }
}

void ShmTransport::ReadInSocket(int rank) {
  Peer& p = peer(rank);
  if (p.in == nullptr || p.failing) return;
  Status problem;
  const SocketResult result = p.in->ReadSocket(&problem);
  if (!problem.ok()) {
    Fail(rank, absl::InvalidArgumentError(
                   NameOf(rank) + " broke the protocol: " + std::string(problem.message())));
  } else if (p.in->farewell()) {
    Fail(rank, absl::CancelledError(NameOf(rank) + " left"));
  } else if (result == SocketResult::kClosed) {
    Fail(rank, absl::UnavailableError(NameOf(rank) + " is gone: it closed its connection"));
  }
}

void ShmTransport::AcceptAll() {
  UniqueFd socket;
  while (shm::Accept(listener_.get(), &socket) == SocketResult::kOk) {
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
  if (packet.slots < 1 || packet.slots > shm::kMaxSlots || packet.ring_bytes < PageBytes() ||
      packet.ring_bytes > shm::kMaxRingBytes || packet.ring_bytes % PageBytes() != 0) {
    return "its ring has " + std::to_string(packet.ring_bytes) + " bytes and " +
           std::to_string(packet.slots) + " slots";
  }
  const Peer& p = peer(packet.rank);
  if (p.in != nullptr || p.failing) {
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
  if (!shm::PeerCredentials(socket.get(), &pid, &uid)) {
    refusal = "nothing is known of it";
  } else if (result == SocketResult::kMalformed) {
    refusal = "its hello is not one of this version";
  } else {
    refusal = CheckHello(hello, uid);
  }
  const int rank = hello.packet.rank;
  if (refusal.empty()) {
    UniqueFd pidfd = std::move(hello.fds[2]);
    auto link = InLink::Create(&self_, &hello);
    Status status = link.status();
    if (status.ok()) status = link->SendWelcome(&socket);
    if (status.ok()) {
      Peer& p = peer(rank);
      p.in = std::make_unique<InLink>(*std::move(link));
      p.pid = pid;
      Watch(p.in->socket(), Source::kIn, rank);
      WatchProcess(rank, std::move(pidfd), /*its_own=*/true);
      Activate(rank);
      return;
    }
    refusal = std::string(status.message());
  }
  BLUEFOG_LOG(kWarning) << "refused a connection of process " << pid << ": " << refusal;
  Packet packet;
  packet.kind = PacketKind::kRefused;
  packet.rank = self_.rank;
  refusal.copy(packet.text, sizeof packet.text - 1);
  SendPacket(socket.get(), packet);
}

bool ShmTransport::Arm() {
  check_events_ = true;
  SetEpoch(last_epoch_ = last_epoch_ + 1 == 0 ? 1 : last_epoch_ + 1);
  bool news = retry_connect_ || !cancelled_.empty() || !fetches_.empty() || !failing_.empty();
  for (const int rank : active_) {
    const Peer& p = peer(rank);
    news = news || (p.out != nullptr && p.out->HasNews()) || (p.in != nullptr && p.in->HasNews());
  }
  if (news) SetEpoch(0);
  return !news;
}

}  // namespace

StatusOr<std::unique_ptr<Transport>> MakeShm(ShmOptions options, std::shared_ptr<Arena> arena,
                                             Receiver* receiver) {
  return ShmTransport::Make(std::move(options), std::move(arena), receiver);
}

}  // namespace bluefog::transport
