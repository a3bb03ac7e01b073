// The transport behind MakeShm. shm.cc holds what runs per message, shm_events.cc what sockets,
// doorbell and pidfds report: connections come and go there.
#pragma once

#include <sys/epoll.h>
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transport/shm/in_link.h"
#include "transport/shm/out_link.h"
#include "transport/shm/shm.h"
#include "transport/shm/socket.h"

namespace bluefog::transport::shm {

inline constexpr char kAddressPrefix[] = "shm1:";

/// What an epoll event is about.
enum class Source : uint32_t { kListener, kBell, kStranger, kOut, kIn, kPidfd };

class ShmTransport final : public Transport {
 public:
  static StatusOr<std::unique_ptr<Transport>> Make(const ShmOptions& options,
                                                   std::shared_ptr<Arena> arena,
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
  /// Adds, or changes which events count.
  void Watch(int fd, Source source, int index, uint32_t events = EPOLLIN);
  void Unwatch(int fd) { epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }
  void WatchProcess(int rank, UniqueFd pidfd, bool its_own);
  void Activate(int rank);
  void SetEpoch(uint32_t epoch);
  uint32_t NextEpoch() { return last_epoch_ += last_epoch_ == UINT32_MAX ? 2 : 1; }
  /// Gives up `rank` at the end of this or the next Progress.
  void Fail(int rank, Status status);
  /// For what came through its memory or socket: it refuses, breaks the protocol, or could not be
  /// heard for want of descriptors here.
  void FailLink(int rank, const Status& status);
  void FinishFailed(int rank);
  SendResult Connect(int rank);

  bool HandleEvents();
  void HandleEvent(Source source, int index, uint32_t events);
  void AcceptAll();
  void Greet(uint32_t number);
  void Refuse(int socket, const std::string& why);
  /// Why the hello is refused; empty if it is not.
  std::string CheckHello(const ReceivedPacket& hello, uid_t uid);
  void ReadOutSocket(int rank);
  void ReadInSocket(int rank);
  Status DoFetch(const PendingFetch& fetch);
  bool FinishDeferred();

  Self self_;
  std::shared_ptr<Arena> arena_;
  std::string listen_name_;
  UniqueFd epoll_, listener_;
  UniqueFd spare_;  ///< Given up to refuse a connection when no other descriptor is left.
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

}  // namespace bluefog::transport::shm
