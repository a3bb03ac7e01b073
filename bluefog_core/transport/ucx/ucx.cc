// The transport: connections, events of UCX, who leaves and who is silent. What concerns one peer
// is in link.cc.
#include "transport/ucx/ucx.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/component.h"
#include "base/log.h"
#include "base/token.h"
#include "transport/memfd.h"
#include "transport/ucx/link.h"

namespace bluefog::transport {
namespace ucx {
namespace {

constexpr char kAddressPrefix[] = "ucx2:";
// Turns of UCX between two looks at what came of them.
constexpr int kTurns = 16;
// How long the end of this rank waits until its peers know.
constexpr int64_t kFarewellNs = 100 * kMillisecond;
// A peer that owes something is asked so many times within the time of silence.
constexpr int64_t kPings = 4;

/// UCX is configured by its environment: some of it counts when its library is loaded (it would
/// patch mmap and install signal handlers), some when a worker is made. What the user has set
/// stays, but for what must be equal on all ranks.
class UcxEnvironment {
 public:
  explicit UcxEnvironment(const UcxOptions& options) {
    const std::string segment = std::to_string(options.segment_bytes);
    Set("UCX_TCP_TX_SEG_SIZE", segment, true);
    Set("UCX_TCP_RX_SEG_SIZE", segment, true);
    for (const auto& [name, value] : kDefaults) Set(name, value, false);
    // Of TCP: networks of other kinds have devices of other names.
    if (!options.default_devices.empty() && std::getenv("UCX_TLS") == nullptr) {
      Set("UCX_NET_DEVICES", options.default_devices, false);
    }
  }
  ~UcxEnvironment() {
    for (const auto& [name, before] : before_) {
      before ? setenv(name, before->c_str(), 1) : unsetenv(name);
    }
  }
  UcxEnvironment(const UcxEnvironment&) = delete;
  UcxEnvironment& operator=(const UcxEnvironment&) = delete;

 private:
  void Set(const char* name, const std::string& value, bool overwrite) {
    const char* before = std::getenv(name);
    if (before != nullptr && !overwrite) return;
    before_.emplace_back(name,
                         before == nullptr ? std::nullopt : std::optional<std::string>(before));
    setenv(name, value.c_str(), 1);
  }

  // A connection must not make its caller wait; what goes wrong is in the status and need not be
  // printed; versions know different options.
  static constexpr std::pair<const char*, const char*> kDefaults[] = {
      {"UCX_MEM_EVENTS", "n"},           {"UCX_HANDLE_ERRORS", "none"},
      {"UCX_DEBUG_SIGNO", "0"},          {"UCX_LOG_LEVEL", "fatal"},
      {"UCX_WARN_UNUSED_ENV_VARS", "n"}, {"UCX_TCP_CONN_NB", "y"},
      {"UCX_KEEPALIVE_INTERVAL", "2s"},  {"UCX_TCP_KEEPIDLE", "2s"},
      {"UCX_TCP_KEEPINTVL", "1s"},       {"UCX_TCP_KEEPCNT", "3"},
      {"UCX_TCP_USER_TIMEOUT", "5s"},
  };
  std::vector<std::pair<const char*, std::optional<std::string>>> before_;
};

class UcxTransport final : public Transport {
 public:
  static StatusOr<std::unique_ptr<Transport>> Make(const UcxOptions& options, Receiver* receiver);
  ~UcxTransport() override;

  const char* name() const override { return "ucx"; }
  std::string address() const override { return Prefix() + nonce_ + address_; }
  Status SetPeers(std::vector<std::string> addresses) override;
  int64_t inline_limit() const override { return self_.options.inline_limit; }
  bool CanSendInPlace(std::span<const std::byte>) const override { return true; }
  SendResult Send(int rank, const Header& header, std::span<const std::byte> payload,
                  uint64_t cookie) override;
  void Revoke(int rank, uint64_t cookie) override {
    if (Peer* p = Known(rank)) p->link.Revoke(cookie);
  }
  void Fetch(const View& view, std::byte* destination, uint64_t cookie) override {
    if (Peer* p = Known(view.peer)) p->link.Fetch(view, destination, cookie);
  }
  bool Intact(const View& view) const override {
    const Peer* p = Known(view.peer);
    return p != nullptr && p->link.Intact(view);
  }
  void Detach(const View& view) override {
    if (Peer* p = Known(view.peer)) p->link.Detach(view);
  }
  void Release(const View& view) override {
    if (Peer* p = Known(view.peer)) p->link.Release(view);
  }
  bool Progress() override;
  int fd() const override { return epoll_.get(); }
  void Flush() override { FlushAll(); }
  bool Arm() override;
  void Disarm() override { Listen(false); }

 private:
  struct Peer {
    Peer(Self* self, int rank, std::string address, const Tag& out, const Tag& in)
        : link(self, rank, std::move(address), out, in) {}
    Link link;
    bool active = false;   ///< In active_.
    bool failing = false;  ///< In failing_, or down already.
    bool said_farewell = false;
    bool met = false;      ///< Something came from it.
    int64_t heard_ns = 0;  ///< Or when it was first asked for something.
    int64_t asked_ns = 0;  ///< The last ping.
    int64_t pings = 0;     ///< Unanswered.
    Status failure;
  };
  struct Event {
    enum Kind { kJoined, kLarge, kDone, kDown } kind = kDone;
    int rank = -1;  ///< Where no request says it.
    LargePacket packet{};
    uint32_t buffer = 0;
    void* arrival = nullptr;
    int64_t bytes = 0;
    Request request{};
    bool ok = false;
    Status status;
  };

  UcxTransport() = default;
  Peer* Known(int rank) const {
    return rank < 0 || rank >= static_cast<int>(peers_.size())
               ? nullptr
               : peers_[static_cast<size_t>(rank)].get();
  }
  std::string NameOf(int rank) const { return "rank " + std::to_string(rank); }
  std::string Prefix() const {
    return kAddressPrefix + std::to_string(self_.options.segment_bytes) + ":";
  }
  Status Connect(Peer* peer);
  /// Gives up `peer` at the end of this or the next Progress.
  void Fail(Peer* peer, const Status& status);
  void FinishFailed(Peer* peer);
  void OnMessage(const void* header, int64_t header_bytes, const void* data, int64_t bytes,
                 void* arrival);
  void Handle(const Event& event);
  void HandlePacket(const Event& event);
  bool HandleEvents();
  bool TellDeferred();
  bool FlushAll();
  void CheckSilence();
  void Listen(bool on);

  Self self_;
  std::string address_, nonce_;
  int64_t refused_ = 0;  ///< Messages of strangers.
  pid_t process_ = 0;
  UniqueFd epoll_;
  bool listening_ = false;
  std::vector<std::unique_ptr<Peer>> peers_;  ///< Null where there is no way.
  std::vector<Peer*> active_, failing_;
  std::vector<Event> events_, handled_;
  int64_t next_check_ns_ = 0;
  bool leaving_ = false;
};

StatusOr<std::unique_ptr<Transport>> UcxTransport::Make(const UcxOptions& options,
                                                        Receiver* receiver) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size ||
      options.max_in_flight < 1 || options.inline_limit < 0 ||
      options.inline_window < options.inline_limit || options.fetch_window < 1 ||
      options.fetch_window_max < options.fetch_window || options.segment_bytes < 4096 ||
      options.silence_ms < 1) {
    return absl::InvalidArgumentError(
        "ucx: rank " + std::to_string(options.rank) + " of " + std::to_string(options.size) +
        ", max_in_flight " + std::to_string(options.max_in_flight) + ", inline_limit " +
        std::to_string(options.inline_limit) + ", inline_window " +
        std::to_string(options.inline_window) + ", fetch_window " +
        std::to_string(options.fetch_window) + " to " + std::to_string(options.fetch_window_max) +
        ", segment_bytes " + std::to_string(options.segment_bytes) + ": one of them cannot work");
  }
  const UcxEnvironment environment(options);
  StatusOr<void*> symbol = LoadComponentSymbol("ucx", "bluefog_ucx_factory", options.component_dir);
  if (!symbol.ok()) return symbol.status();
  const auto* api = reinterpret_cast<decltype(&bluefog_ucx_factory)>(*symbol)();
  if (api->abi_version != BLUEFOG_UCX_ABI_VERSION || api->struct_size != sizeof *api) {
    return absl::FailedPreconditionError("component 'ucx' belongs to another version of bluefog");
  }
  std::unique_ptr<UcxTransport> t(new UcxTransport);
  t->process_ = getpid();
  t->self_.api = api;
  t->self_.receiver = receiver;
  t->self_.options = options;
  StatusOr<std::string> nonce = RandomBytes(kNonceBytes);
  if (!nonce.ok()) return nonce.status();
  t->nonce_ = *std::move(nonce);
  t->peers_.resize(static_cast<size_t>(options.size));

  bluefog_ucx_options raw{};
  raw.struct_size = sizeof raw;
  raw.transports = options.transports.empty() ? nullptr : options.transports.c_str();
  raw.devices = options.devices.empty() ? nullptr : options.devices.c_str();
  raw.events.user = t.get();
  raw.events.message = [](void* user, const void* header, int64_t header_bytes, const void* data,
                          int64_t bytes, void* arrival) {
    static_cast<UcxTransport*>(user)->OnMessage(header, header_bytes, data, bytes, arrival);
  };
  const auto done = [](void* user, void* request, int32_t result) {
    Event event;
    event.kind = Event::kDone;
    event.request = *static_cast<Request*>(request);
    event.ok = result == BLUEFOG_UCX_DONE;
    static_cast<UcxTransport*>(user)->events_.push_back(std::move(event));
  };
  raw.events.sent = done;
  raw.events.received = done;
  raw.events.peer_down = [](void* user, void* peer_user, int32_t, const char* text) {
    Event event;
    event.kind = Event::kDown;
    event.rank = static_cast<Link*>(peer_user)->rank();
    event.status = absl::UnavailableError(text);
    static_cast<UcxTransport*>(user)->events_.push_back(std::move(event));
  };
  char text[256] = "";
  bluefog_ucx_error error{0, text, sizeof text};
  t->self_.ucx = api->open(&raw, &error);
  if (t->self_.ucx == nullptr) return absl::UnavailableError(std::string("ucx: ") + text);
  int64_t address_bytes = 0;
  const void* address = api->address(t->self_.ucx, &address_bytes);
  t->address_.assign(static_cast<const char*>(address), static_cast<size_t>(address_bytes));
  t->epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  if (!t->epoll_) return ErrnoStatus("epoll_create1", errno);
  epoll_event event{};
  epoll_ctl(t->epoll_.get(), EPOLL_CTL_ADD, api->fd(t->self_.ucx), &event);
  return t;
}

UcxTransport::~UcxTransport() {
  if (getpid() != process_) return;  // A forked child: the connections are its parent's.
  if (self_.ucx == nullptr) return;
  leaving_ = true;
  // What was sent before arrives, if the peers listen; they are told, and answer.
  const int64_t until = NowNs() + kFarewellNs;
  for (;;) {
    bool waits = false;
    for (Peer* p : active_) {
      if (p->failing) continue;
      if (!p->said_farewell) {
        const StatusOr<bool> said = p->link.Flush(kFarewell);
        p->said_farewell = !said.ok() || *said;
      }
      waits = true;
    }
    if (!waits || NowNs() >= until) break;
    if (self_.api->progress(self_.ucx) == 0) sched_yield();
    HandleEvents();
    for (Peer* p : std::exchange(failing_, {})) std::erase(active_, p);
  }
  for (const auto& p : peers_) {
    if (p != nullptr) p->link.Disconnect();
  }
  self_.api->close(self_.ucx);
}

Status UcxTransport::SetPeers(std::vector<std::string> addresses) {
  if (addresses.size() != peers_.size()) {
    return absl::InvalidArgumentError("ucx: an address book of " +
                                      std::to_string(addresses.size()) + " entries for " +
                                      std::to_string(peers_.size()) + " ranks");
  }
  const std::string prefix = Prefix();
  for (int rank = 0; rank < self_.options.size; ++rank) {
    const std::string& address = addresses[static_cast<size_t>(rank)];
    if (rank == self_.options.rank || address.empty()) continue;
    if (address.rfind(prefix, 0) != 0 || address.size() < prefix.size() + kNonceBytes) {
      return absl::InvalidArgumentError(
          "ucx: the address of " + NameOf(rank) + " does not begin with '" + prefix +
          "': it is not one of UCX, or the size of segments differs, which must be equal on all "
          "ranks");
    }
    const std::string nonce = address.substr(prefix.size(), kNonceBytes);
    const int self = self_.options.rank;
    peers_[static_cast<size_t>(rank)] =
        std::make_unique<Peer>(&self_, rank, address.substr(prefix.size() + kNonceBytes),
                               MakeTag(self_.options, self, rank, nonce_ + nonce),
                               MakeTag(self_.options, rank, self, nonce + nonce_));
  }
  return absl::OkStatus();
}

Status UcxTransport::Connect(Peer* peer) {
  if (!peer->link.connected()) {
    if (Status s = peer->link.Connect(); !s.ok()) return s;
  }
  if (!std::exchange(peer->active, true)) {
    active_.push_back(peer);
    peer->heard_ns = NowNs();
  }
  return absl::OkStatus();
}

void UcxTransport::Fail(Peer* peer, const Status& status) {
  if (std::exchange(peer->failing, true)) return;
  peer->failure =
      Status(status.code(), NameOf(peer->link.rank()) + ": " + std::string(status.message()));
  failing_.push_back(peer);
}

SendResult UcxTransport::Send(int rank, const Header& header, std::span<const std::byte> payload,
                              uint64_t cookie) {
  Peer* p = rank == self_.options.rank ? nullptr : Known(rank);
  if (p == nullptr || p->failing) return SendResult::kDown;
  Status problem = Connect(p);
  if (problem.ok()) {
    // Nobody is asked while nothing is owed: the time of silence begins here.
    if (!p->link.owed()) p->heard_ns = NowNs();
    const SendResult result = p->link.Send(header, payload, cookie, &problem);
    if (problem.ok()) return result;
  }
  Fail(p, problem);
  return SendResult::kDown;
}

void UcxTransport::OnMessage(const void* header, int64_t header_bytes, const void* data,
                             int64_t bytes, void* arrival) {
  Event event;
  event.kind = arrival == nullptr ? Event::kJoined : Event::kLarge;
  const auto expected = arrival == nullptr ? sizeof(PacketHead) : sizeof(LargePacket);
  event.arrival = arrival;
  event.bytes = bytes;
  if (header_bytes == static_cast<int64_t>(expected)) {
    std::memcpy(&event.packet, header, expected);
  }
  const PacketHead& head = event.packet.head;
  if (header_bytes != static_cast<int64_t>(expected) || head.magic != kMagic || head.abi != kAbi ||
      Known(head.rank) == nullptr || !Known(head.rank)->link.Recognizes(head.tag) ||
      ((head.flags & kLarge) != 0) != (arrival != nullptr)) {
    // A stranger must not fill the log either.
    if (std::has_single_bit(static_cast<uint64_t>(++refused_))) {
      BLUEFOG_LOG(kWarning) << "ucx: a message of " << bytes
                            << " bytes is not of this job; dropped (" << refused_ << " so far)";
    }
    event.packet.head.rank = -1;
    if (arrival == nullptr) return;
  }
  if (arrival == nullptr) {
    event.buffer =
        self_.TakeBuffer({static_cast<const std::byte*>(data), static_cast<size_t>(bytes)});
  }
  events_.push_back(std::move(event));
}

void UcxTransport::HandlePacket(const Event& event) {
  const PacketHead& head = event.packet.head;
  Peer* p = Known(head.rank);
  if (p == nullptr || p->failing || (leaving_ && (head.flags & kFarewell) == 0)) {
    if (event.arrival != nullptr) self_.api->drop(self_.ucx, event.arrival);
    return;
  }
  if (Status s = Connect(p); !s.ok()) return Fail(p, s);
  p->heard_ns = NowNs();
  p->pings = 0;
  p->met = true;
  if (leaving_) return Fail(p, absl::CancelledError("left"));  // It knows now.
  Status status = event.arrival == nullptr
                      ? p->link.OnJoined(head, event.buffer)
                      : p->link.OnLarge(event.packet, event.bytes, event.arrival);
  if (!status.ok()) {
    return Fail(p,
                Status(status.code(), "it broke the protocol: " + std::string(status.message())));
  }
  if ((head.flags & kPing) != 0) (void)p->link.Flush(kPong);
  if ((head.flags & kFarewell) != 0) {
    (void)p->link.Flush(kFarewell);
    p->link.RevokeAllHeld();
    Fail(p, absl::CancelledError("it left the job"));
  }
}

void UcxTransport::Handle(const Event& event) {
  switch (event.kind) {
    case Event::kJoined:
      HandlePacket(event);
      self_.Unuse(event.buffer);
      return;
    case Event::kLarge:
      return HandlePacket(event);
    case Event::kDone:
      if (event.request.kind == Request::Kind::kFetch) {
        event.request.link->Received(event.request, event.ok);
      } else {
        event.request.link->Sent(event.request);
      }
      return;
    case Event::kDown: {
      Peer* p = Known(event.rank);
      Fail(p, p->met
                  ? absl::UnavailableError("the connection broke: " +
                                           std::string(event.status.message()))
                  : absl::NotFoundError("nobody answers: " + std::string(event.status.message())));
      return;
    }
  }
}

bool UcxTransport::HandleEvents() {
  const bool any = !events_.empty();
  std::swap(events_, handled_);
  for (const Event& event : handled_) Handle(event);
  handled_.clear();
  return any;
}

bool UcxTransport::TellDeferred() {
  const bool any = !self_.cancelled.empty() || !self_.fetched.empty();
  for (const uint64_t cookie : std::exchange(self_.cancelled, {})) {
    self_.receiver->SendDone(cookie, absl::CancelledError("the send was given up"));
  }
  for (const Self::Fetched& f : std::exchange(self_.fetched, {})) {
    self_.receiver->FetchDone(f.cookie, f.status);
  }
  return any;
}

bool UcxTransport::FlushAll() {
  bool all = true;
  for (Peer* p : active_) {
    if (p->failing) continue;
    const StatusOr<bool> flushed = p->link.Flush();
    if (!flushed.ok()) Fail(p, flushed.status());
    all = all && flushed.ok() && *flushed;
  }
  return all;
}

void UcxTransport::CheckSilence() {
  const int64_t now = NowNs();
  if (now < next_check_ns_) return;
  const int64_t silence = self_.options.silence_ms * kMillisecond;
  const int64_t interval = silence / kPings;
  next_check_ns_ = now + interval / 4;
  for (Peer* p : active_) {
    if (p->failing || !p->link.owed()) continue;
    const int64_t silent = now - p->heard_ns;
    // By the number of questions, too: this process may have been stopped itself.
    if (silent >= silence && p->pings >= kPings - 1) {
      Fail(p, absl::UnavailableError("it has not answered for " +
                                     std::to_string(silent / kMillisecond) + " ms"));
    } else if (silent >= interval && now - p->asked_ns >= interval) {
      ++p->pings;
      p->asked_ns = now;
      if (const StatusOr<bool> asked = p->link.Flush(kPing); !asked.ok()) Fail(p, asked.status());
    }
  }
}

bool UcxTransport::Progress() {
  bool moved = false;
  for (int turn = 0; turn < kTurns && self_.api->progress(self_.ucx) != 0; ++turn) moved = true;
  moved |= HandleEvents();
  for (Peer* p : active_) {
    if (!p->failing) p->link.StartFetches();
  }
  moved |= TellDeferred();
  CheckSilence();
  FlushAll();
  while (!failing_.empty()) {
    Peer* const p = failing_.back();
    failing_.pop_back();
    FinishFailed(p);
    moved = true;
  }
  return moved;
}

void UcxTransport::FinishFailed(Peer* peer) {
  peer->link.Disconnect();
  HandleEvents();  // What was pending has ended.
  std::erase(active_, peer);
  self_.receiver->PeerDown(peer->link.rank(), peer->failure);
  peer->link.FailAll(peer->failure);
  peer->link.StartFetches();  // They fail.
  TellDeferred();
}

void UcxTransport::Listen(bool on) {
  if (on == listening_) return;
  listening_ = on;
  epoll_event event{};
  if (on) event.events = EPOLLIN;
  epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, self_.api->fd(self_.ucx), &event);
}

bool UcxTransport::Arm() {
  // What does not leave now is sent when UCX has room, which wakes as well.
  FlushAll();
  Listen(true);
  const bool news = !events_.empty() || !self_.cancelled.empty() || !self_.fetched.empty() ||
                    !failing_.empty() || self_.api->progress(self_.ucx) != 0 ||
                    self_.api->arm(self_.ucx) == 0;
  if (news) Listen(false);
  return !news;
}

}  // namespace
}  // namespace ucx

StatusOr<std::unique_ptr<Transport>> MakeUcx(const UcxOptions& options, Receiver* receiver) {
  return ucx::UcxTransport::Make(options, receiver);
}

}  // namespace bluefog::transport
