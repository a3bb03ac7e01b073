#include "transport/shm/shm.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "base/failpoint.h"
#include "transport/shm/shm_transport.h"

namespace bluefog::transport {
namespace shm {
namespace {

// Polling memory is cheap, asking the kernel is not: whoever drives asks it every so many turns.
constexpr uint32_t kTurnsPerEventCheck = 64;

}  // namespace

StatusOr<std::unique_ptr<Transport>> ShmTransport::Make(const ShmOptions& options,
                                                        std::shared_ptr<Arena> arena,
                                                        Receiver* receiver) {
  const int64_t ring_bytes = RoundUp(options.ring_bytes, PageBytes());
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size ||
      options.max_in_flight < 1 || options.max_in_flight > static_cast<int>(kMaxSlots) ||
      options.inline_limit < 0 || options.ring_bytes < 1 || ring_bytes > kMaxRingBytes ||
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
  Self& self = t->self_;
  self.rank = options.rank;
  self.size = options.size;
  self.job_id = options.job_id;
  self.layout = {static_cast<uint32_t>(options.max_in_flight), ring_bytes};
  self.inline_limit = options.inline_limit;
  self.arena = t->arena_.get();
  self.receiver = receiver;
  self.bell = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!self.bell) return ErrnoStatus("eventfd", errno);
  self.pidfd = OpenPidfd(t->process_);
  if (!self.pidfd) return ErrnoStatus("pidfd_open (needs Linux 5.3)", errno);
  t->epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  if (!t->epoll_) return ErrnoStatus("epoll_create1", errno);
  t->spare_ = UniqueFd(dup(t->epoll_.get()));
  t->listen_name_ = "bluefog-" + std::to_string(geteuid()) + "-" + std::to_string(options.rank) +
                    "-" + RandomHex(16);
  auto listener = ListenAbstract(t->listen_name_, options.size + 64);
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
  spare_.Reset();  // For those that wait at the door of a process without descriptors.
  UniqueFd waiting;
  while (Accept(listener_.get(), &waiting) == SocketResult::kOk) leave(waiting.get());
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
    if (static_cast<int>(rank) == self_.rank || address.empty()) continue;
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

void ShmTransport::FailLink(int rank, const Status& status) {
  const char* const what = absl::IsUnavailable(status)         ? " refused the connection: "
                           : absl::IsResourceExhausted(status) ? " cannot be heard: "
                                                               : " broke the protocol: ";
  Fail(rank, Status(status.code(), NameOf(rank) + what + std::string(status.message())));
}

SendResult ShmTransport::Connect(int rank) {
  Peer& p = peer(rank);
  const auto give_up = [&](const std::string& why,
                           absl::StatusCode code = absl::StatusCode::kUnavailable) {
    p.out.reset();
    Fail(rank, Status(code, NameOf(rank) + " cannot be reached: " + why));
    return SendResult::kDown;
  };
  if (FailpointHit("shm.connect")) return give_up("failpoint shm.connect");
  if (p.address.empty()) return give_up("it has no address");
  if (p.out == nullptr) {
    auto link = OutLink::Create(&self_);
    if (!link.ok()) return give_up(std::string(link.status().message()), link.status().code());
    p.out = std::make_unique<OutLink>(*std::move(link));
  }
  switch (p.out->Connect(p.address)) {
    case SocketResult::kOk:
      break;
    case SocketResult::kAgain:
      retry_connect_ = true;
      return SendResult::kBusy;
    case SocketResult::kStarved:
      return give_up(std::string(Starved().message()), Starved().code());
    default:
      return give_up("nobody listens at '" + p.address +
                         "'; it left or died, or is on another host or in another network "
                         "namespace",
                     absl::StatusCode::kNotFound);
  }
  Watch(p.out->socket(), Source::kOut, rank);
  // Until its own pidfd comes. Should the number have been used anew meanwhile, then it is dead
  // anyway, and all that this watch can report is a death.
  uid_t uid;
  if (PeerCredentials(p.out->socket(), &p.pid, &uid)) {
    WatchProcess(rank, OpenPidfd(p.pid), /*its_own=*/false);
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
    Watch(p.out->socket(), Source::kOut, rank, EPOLLIN | EPOLLOUT);
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
      if (!out.ok()) FailLink(rank, out.status());
      moved |= out.ok() && *out;
    }
    if (p.in != nullptr && !p.failing) {
      const StatusOr<bool> in = p.in->Poll();
      if (!in.ok()) FailLink(rank, in.status());
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
  if (absl::IsResourceExhausted(p.failure)) {
    // Else it would take this for a death that nobody can explain.
    const std::string why(p.failure.message());
    if (p.out != nullptr && p.out->connected()) Refuse(p.out->socket(), why);
    if (p.in != nullptr && p.in->socket() >= 0) Refuse(p.in->socket(), why);
  }
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

bool ShmTransport::Arm() {
  check_events_ = true;
  SetEpoch(NextEpoch());
  bool news = retry_connect_ || !cancelled_.empty() || !fetches_.empty() || !failing_.empty();
  for (const int rank : active_) {
    const Peer& p = peer(rank);
    news = news || (p.out != nullptr && p.out->HasNews()) || (p.in != nullptr && p.in->HasNews());
  }
  if (news) SetEpoch(0);
  return !news;
}

}  // namespace shm

StatusOr<std::unique_ptr<Transport>> MakeShm(const ShmOptions& options,
                                             std::shared_ptr<Arena> arena, Receiver* receiver) {
  return shm::ShmTransport::Make(options, std::move(arena), receiver);
}

}  // namespace bluefog::transport
