// One mailbox per rank holds what happened to it, in order; Progress empties it. Everything else
// (what is in flight, what is held) is known to one side only.
#include "transport/inproc/inproc.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "transport/fence.h"
#include "transport/memfd.h"

namespace bluefog::transport {
namespace {

std::string RankName(int rank) { return "rank " + std::to_string(rank); }

/// One message, shared by both sides until it is done.
struct Parcel {
  Header header;
  const std::byte* data = nullptr;
  int64_t size = 0;
  std::vector<std::byte> copy;  ///< Small payloads; `data` points into it.
  uint64_t id = 0;              ///< The sender's.
  uint64_t cookie = 0;
  std::atomic<bool> revoked{false};
};

struct Event {
  enum Kind { kMessage, kReleased, kDown } kind;
  int peer;
  std::shared_ptr<Parcel> parcel;  ///< kMessage
  uint64_t id = 0;                 ///< kReleased
  std::string reason;              ///< kDown
  absl::StatusCode code{};         ///< kDown
};

}  // namespace

class InprocMailbox {
 public:
  explicit InprocMailbox(UniqueFd bell) : bell_(std::move(bell)) {}

  /// False if the owner is gone.
  bool Put(Event event) {
    MutexLock lock(mu_);
    if (dead_) return false;
    partners_.insert(event.peer);
    events_.push_back(std::move(event));
    if (armed_) Ring();
    return true;
  }
  void Take(std::vector<Event>* events) {
    MutexLock lock(mu_);
    events->swap(events_);
    uint64_t rings;
    if (rung_ && read(bell_.get(), &rings, sizeof rings) > 0) rung_ = false;
  }
  bool Arm() {
    MutexLock lock(mu_);
    armed_ = events_.empty();
    return armed_;
  }
  void Disarm() {
    MutexLock lock(mu_);
    armed_ = false;
  }
  void AddPartner(int peer) {
    MutexLock lock(mu_);
    partners_.insert(peer);
  }
  /// Ranks to be told; empty if it was dead already.
  std::set<int> Die() {
    MutexLock lock(mu_);
    dead_ = true;
    events_.clear();
    return std::exchange(partners_, {});
  }
  bool dead() const {
    MutexLock lock(mu_);
    return dead_;
  }
  int fd() const { return bell_.get(); }

 private:
  void Ring() REQUIRES(mu_) {
    const uint64_t one = 1;
    rung_ = write(bell_.get(), &one, sizeof one) > 0 || rung_;
  }

  const UniqueFd bell_;
  mutable Mutex mu_;
  std::vector<Event> events_ GUARDED_BY(mu_);
  std::set<int> partners_ GUARDED_BY(mu_);  ///< Whom a message went to or came from.
  bool armed_ GUARDED_BY(mu_) = false;
  bool rung_ GUARDED_BY(mu_) = false;
  bool dead_ GUARDED_BY(mu_) = false;
};

std::shared_ptr<InprocMailbox> InprocHub::Find(int rank) const {
  MutexLock lock(mu_);
  const auto it = mailboxes_.find(rank);
  return it == mailboxes_.end() ? nullptr : it->second;
}

bool InprocHub::Enter(int rank, std::shared_ptr<InprocMailbox> mailbox) {
  MutexLock lock(mu_);
  auto& entry = mailboxes_[rank];
  if (entry != nullptr && !entry->dead()) return false;
  entry = std::move(mailbox);
  return true;
}

void InprocHub::Leave(int rank, const InprocMailbox* mailbox) {
  MutexLock lock(mu_);
  const auto it = mailboxes_.find(rank);
  if (it != mailboxes_.end() && it->second.get() == mailbox) mailboxes_.erase(it);
}

namespace {

template <typename FindMailbox>
void Bury(int rank, InprocMailbox* mailbox, const std::string& reason, absl::StatusCode code,
          FindMailbox find) {
  for (const int peer : mailbox->Die()) {
    if (auto other = find(peer)) other->Put({Event::kDown, rank, nullptr, 0, reason, code});
  }
}

}  // namespace

bool InprocHub::Kill(int rank) {
  const auto mailbox = Find(rank);
  if (mailbox == nullptr) return false;
  Bury(rank, mailbox.get(), RankName(rank) + " died", absl::StatusCode::kUnavailable,
       [this](int peer) { return Find(peer); });
  return true;
}

class InprocTransport final : public Transport {
 public:
  InprocTransport(std::shared_ptr<InprocHub> hub, int rank, Receiver* receiver,
                  InprocOptions options, std::shared_ptr<InprocMailbox> mailbox)
      : hub_(std::move(hub)),
        rank_(rank),
        receiver_(receiver),
        options_(options),
        mailbox_(std::move(mailbox)) {}

  ~InprocTransport() override {
    // A killed rank leaves its sends as they are; one that leaves takes its bytes with it.
    if (!mailbox_->dead()) {
      for (auto& [rank, peer] : peers_) {
        for (auto& [id, parcel] : peer.in_flight) parcel->revoked.store(true);
      }
    }
    Bury(rank_, mailbox_.get(), RankName(rank_) + " left", absl::StatusCode::kCancelled,
         [this](int peer) { return hub_->Find(peer); });
    hub_->Leave(rank_, mailbox_.get());
  }

  const char* name() const override { return "inproc"; }
  std::string address() const override { return "inproc:" + std::to_string(rank_); }
  Status SetPeers(std::vector<std::string>) override { return absl::OkStatus(); }
  int64_t inline_limit() const override { return options_.inline_limit; }
  bool CanSendInPlace(std::span<const std::byte>) const override { return true; }

  SendResult Send(int to, const Header& header, std::span<const std::byte> payload,
                  uint64_t cookie) override {
    if (to == rank_ || mailbox_->dead()) return SendResult::kDown;
    Peer& peer = peers_[to];
    if (peer.down) return SendResult::kDown;
    if (static_cast<int64_t>(peer.in_flight.size()) >= options_.max_in_flight) {
      return SendResult::kBusy;
    }
    if (peer.mailbox == nullptr) peer.mailbox = hub_->Find(to);
    if (peer.mailbox == nullptr) return Gone(to);
    auto parcel = std::make_shared<Parcel>();
    parcel->header = header;
    parcel->size = static_cast<int64_t>(payload.size());
    parcel->data = payload.data();
    if (parcel->size <= options_.inline_limit) {
      parcel->copy.assign(payload.begin(), payload.end());
      parcel->data = parcel->copy.data();
    }
    parcel->id = ++last_id_;
    parcel->cookie = cookie;
    mailbox_->AddPartner(to);
    if (!peer.mailbox->Put({Event::kMessage, rank_, parcel, 0, {}})) return Gone(to);
    peer.in_flight.emplace(parcel->id, std::move(parcel));
    return SendResult::kAccepted;
  }

  void Revoke(int to, uint64_t cookie) override {
    for (auto& [id, parcel] : peers_[to].in_flight) {
      if (parcel->cookie != cookie || parcel->revoked.load(std::memory_order_relaxed)) continue;
      parcel->revoked.store(true, std::memory_order_release);
      FenceBeforeOverwrite();
      cancelled_.push_back(cookie);
      return;
    }
  }

  void Fetch(const View& view, std::byte* destination, uint64_t cookie) override {
    fetches_.push_back({view, destination, cookie});
  }

  bool Intact(const View& view) const override {
    FenceAfterRead();
    const auto it = held_.find(view.token);
    return it != held_.end() && !it->second->revoked.load(std::memory_order_acquire);
  }

  void Detach(const View& view) override {
    const auto it = held_.find(view.token);
    if (it == held_.end()) return;
    it->second->data = nullptr;
    std::vector<std::byte>().swap(it->second->copy);  // A sanitizer sees who reads on.
  }

  void Release(const View& view) override {
    const auto it = held_.find(view.token);
    if (it == held_.end()) return;
    const uint64_t id = it->second->id;
    held_.erase(it);
    if (mailbox_->dead()) return;
    if (auto sender = peers_[view.peer].mailbox) {
      sender->Put({Event::kReleased, rank_, nullptr, id, {}});
    }
  }

  bool Progress() override {
    if (mailbox_->dead()) return false;
    bool moved = false;
    std::vector<uint64_t> cancelled = std::exchange(cancelled_, {});
    for (const uint64_t cookie : cancelled) {
      receiver_->SendDone(cookie, absl::CancelledError("the send was given up"));
      moved = true;
    }
    std::vector<Pending> fetches = std::exchange(fetches_, {});
    for (const Pending& fetch : fetches) {
      receiver_->FetchDone(fetch.cookie, DoFetch(fetch));
      moved = true;
    }
    std::vector<Event> events;
    mailbox_->Take(&events);
    for (Event& event : events) {
      if (mailbox_->dead()) return moved;  // Killed in mid-flight.
      Handle(event);
      moved = true;
    }
    return moved;
  }
  int fd() const override { return mailbox_->fd(); }
  bool Arm() override { return cancelled_.empty() && fetches_.empty() && mailbox_->Arm(); }
  void Disarm() override { mailbox_->Disarm(); }

 private:
  struct Peer {
    std::shared_ptr<InprocMailbox> mailbox;
    std::map<uint64_t, std::shared_ptr<Parcel>> in_flight;  ///< By id, that is: in order.
    bool down = false;
  };
  struct Pending {
    View view;
    std::byte* destination;
    uint64_t cookie;
  };

  // It has told us, or had never heard of us: then we tell ourselves.
  SendResult Gone(int peer) {
    mailbox_->Put(
        {Event::kDown, peer, nullptr, 0, RankName(peer) + " is gone", absl::StatusCode::kNotFound});
    return SendResult::kDown;
  }

  Status DoFetch(const Pending& fetch) {
    const auto it = held_.find(fetch.view.token);
    if (it == held_.end() || (it->second->data == nullptr && it->second->size > 0)) {
      return absl::FailedPreconditionError("fetch of a view that is released or detached");
    }
    if (options_.fetch_views && peers_[fetch.view.peer].down) {
      return absl::UnavailableError(RankName(fetch.view.peer) + " is gone");
    }
    const Parcel& parcel = *it->second;
    const auto cancelled = absl::CancelledError("the sender gave up the message");
    if (parcel.revoked.load(std::memory_order_acquire)) return cancelled;
    if (parcel.size > 0) {
      std::memcpy(fetch.destination, parcel.data, static_cast<size_t>(parcel.size));
    }
    return Intact(fetch.view) ? absl::OkStatus() : cancelled;
  }

  void Handle(Event& event) {
    Peer& peer = peers_[event.peer];
    if (peer.down) return;
    switch (event.kind) {
      case Event::kMessage: {
        if (peer.mailbox == nullptr) peer.mailbox = hub_->Find(event.peer);
        View view;
        view.peer = event.peer;
        view.token = ++last_token_;
        view.size = event.parcel->size;
        const bool fetch = options_.fetch_views && view.size > options_.inline_limit;
        if (!fetch && view.size > 0) view.data = event.parcel->data;
        const auto parcel = event.parcel;
        held_.emplace(view.token, parcel);
        receiver_->Incoming(event.peer, parcel->header, view);
        return;
      }
      case Event::kReleased: {
        const auto it = peer.in_flight.find(event.id);
        if (it == peer.in_flight.end()) return;
        const auto parcel = std::move(it->second);
        peer.in_flight.erase(it);
        if (!parcel->revoked.load()) receiver_->SendDone(parcel->cookie, absl::OkStatus());
        return;
      }
      case Event::kDown: {
        peer.down = true;
        const Status status(event.code, event.reason);
        receiver_->PeerDown(event.peer, status);
        for (const auto& [id, parcel] : std::exchange(peer.in_flight, {})) {
          if (!parcel->revoked.load()) receiver_->SendDone(parcel->cookie, status);
        }
        return;
      }
    }
  }

  const std::shared_ptr<InprocHub> hub_;
  const int rank_;
  Receiver* const receiver_;
  const InprocOptions options_;
  const std::shared_ptr<InprocMailbox> mailbox_;
  std::map<int, Peer> peers_;
  std::unordered_map<uint64_t, std::shared_ptr<Parcel>> held_;  ///< Delivered, by view token.
  std::vector<uint64_t> cancelled_;
  std::vector<Pending> fetches_;
  uint64_t last_id_ = 0;
  uint64_t last_token_ = 0;
};

StatusOr<std::unique_ptr<Transport>> MakeInproc(std::shared_ptr<InprocHub> hub, int rank,
                                                Receiver* receiver, InprocOptions options) {
  if (options.max_in_flight < 1 || options.inline_limit < 0) {
    return absl::InvalidArgumentError("inproc needs max_in_flight >= 1 and inline_limit >= 0");
  }
  UniqueFd bell(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!bell) return ErrnoStatus("eventfd", errno);
  auto mailbox = std::make_shared<InprocMailbox>(std::move(bell));
  if (!hub->Enter(rank, mailbox)) {
    return absl::AlreadyExistsError(RankName(rank) + " is in this hub already");
  }
  return std::make_unique<InprocTransport>(std::move(hub), rank, receiver, options,
                                           std::move(mailbox));
}

}  // namespace bluefog::transport
