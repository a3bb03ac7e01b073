// What the conformance suite needs of every transport: ranks of one process that are driven by
// hand, and a receiver that records all upcalls and notes every breach of the contract that needs
// no knowledge of what was sent.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include <bluefog/status.h>

#include "transport/arena.h"
#include "transport/inproc/inproc.h"
#include "transport/transport.h"

namespace bluefog::transport::testing {

inline constexpr int64_t kInlineLimit = 1024;
inline constexpr int64_t kRingBytes = 16 << 10;
inline constexpr int kMaxInFlight = 64;

enum class Kind { kInproc, kInprocFetch, kShm, kUcx };
std::string NameOf(Kind kind);
/// Those of this build.
std::vector<Kind> AllKinds();
/// Large payloads must be fetched.
inline bool Fetches(Kind kind) { return kind == Kind::kInprocFetch || kind == Kind::kUcx; }

/// One rank. Calls go through it, so that an upcall from anywhere but Progress is noticed.
class Endpoint final : public Receiver {
 public:
  struct Message {
    int peer;
    uint64_t number;  ///< What the sender put in the header.
    View view;
  };

  /// `make` is given this as the receiver.
  Endpoint(int rank, std::shared_ptr<Arena> arena,
           const std::function<StatusOr<std::unique_ptr<Transport>>(Receiver*)>& make);

  SendResult Send(int peer, uint64_t number, std::span<const std::byte> payload, uint64_t cookie);
  bool Progress();
  void Detach(const Message& message);
  void Release(const Message& message);
  /// Bytes of a message; fetched if need be. Empty if the fetch failed.
  std::vector<std::byte> Read(const Message& message);
  /// Arena memory that lives as long as this endpoint.
  std::span<std::byte> Allocate(int64_t bytes);

  // Receiver.
  void Incoming(int peer, const Header& header, const View& view) override;
  void SendDone(uint64_t cookie, const Status& status) override;
  void FetchDone(uint64_t cookie, const Status& status) override;
  void PeerDown(int peer, const Status& status) override;

  int rank;
  std::shared_ptr<Arena> arena;
  std::unique_ptr<Transport> transport;
  std::vector<Message> inbox;
  std::map<uint64_t, Status> done;  ///< By cookie.
  std::map<uint64_t, Status> fetched;
  std::map<int, Status> down;
  std::set<uint64_t> pending;  ///< Cookies accepted and not done.
  /// Runs inside the upcall, instead of filing the message in `inbox`.
  std::function<void(const Message&)> on_message;
  std::function<void(uint64_t cookie, const Status&)> on_done;
  /// Drives the other ranks, too: over a network a fetch needs them.
  std::function<void()> drive_all;
  /// Breaches of the contract, in words.
  std::vector<std::string> breaches;

 private:
  void CheckInside(const char* upcall);

  bool in_progress_ = false;
  uint64_t next_fetch_ = 1;
  std::vector<std::shared_ptr<std::byte>> blocks_;
};

/// A rank of its own process. Not for inproc.
std::unique_ptr<Endpoint> MakeEndpoint(Kind kind, int rank, int size);

/// The ranks of one process.
class World {
 public:
  World(Kind kind, int size);
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  Endpoint& operator[](int rank) { return *ranks_[static_cast<size_t>(rank)]; }
  int size() const { return static_cast<int>(ranks_.size()); }
  /// Destroys the rank's transport, as in an orderly shutdown.
  void Leave(int rank) { ranks_[static_cast<size_t>(rank)]->transport.reset(); }
  /// Drives all ranks in turn until `condition`; false after half a minute.
  bool DriveUntil(const std::function<bool()>& condition);
  /// Drives until nothing moves any more.
  void Settle();
  InprocHub& hub() { return *hub_; }
  /// All breaches of all ranks, and sends that were accepted and never done.
  std::string Breaches() const;

 private:
  void DriveAll();

  const Kind kind_;
  std::shared_ptr<InprocHub> hub_;
  std::vector<std::unique_ptr<Endpoint>> ranks_;
};

/// Bytes that differ from one position, and one seed, to the next.
void Fill(std::span<std::byte> bytes, uint64_t seed);
/// Position of the first byte that is not Fill's, -1 if all are.
int64_t FirstWrong(std::span<const std::byte> bytes, uint64_t seed);

int64_t NowMs();

}  // namespace bluefog::transport::testing
