// One peer: what is in flight to it, and what came from it and is not released.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <string>
#include <vector>

#include <bluefog/status.h>

#include "transport/ucx/packet.h"
#include "transport/ucx/ucx.h"
#include "transport/ucx/ucx_abi.h"

namespace bluefog::transport::ucx {

class Link;

/// What UCX is given with a send or a receive, and gives back when it is done.
struct Request {
  enum class Kind { kJoined, kLarge, kFetch } kind;
  Link* link;
  uint32_t index;
};

/// A joined packet that came, kept until nobody reads its payloads any more.
struct Buffer {
  std::vector<std::byte> bytes;
  int users = 0;
};

/// What all links of a rank share.
struct Self {
  const bluefog_ucx_api* api = nullptr;
  bluefog_ucx* ucx = nullptr;
  Receiver* receiver = nullptr;
  UcxOptions options;
  std::deque<Buffer> buffers;
  std::vector<uint32_t> free_buffers;
  // To be told in the next Progress.
  std::vector<uint64_t> cancelled;
  struct Fetched {
    uint64_t cookie;
    Status status;
  };
  std::vector<Fetched> fetched;

  uint32_t TakeBuffer(std::span<const std::byte> bytes);
  void Unuse(uint32_t buffer);
};

/// What rank `from` shows to rank `to`; `nonces`: that of `from`, then that of `to`.
Tag MakeTag(const UcxOptions& options, int from, int to, const std::string& nonces);

class Link {
 public:
  /// `out` is put into what is sent, `in` expected of what comes.
  Link(Self* self, int rank, std::string address, const Tag& out, const Tag& in)
      : self_(self),
        rank_(rank),
        address_(std::move(address)),
        out_tag_(out),
        in_tag_(in),
        fetch_window_(self->options.fetch_window) {}
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  int rank() const { return rank_; }
  bool Recognizes(const Tag& tag) const;
  bool connected() const { return peer_ != nullptr; }
  Status Connect();
  /// Ends the connection; nothing of this rank is read by the network afterwards.
  void Disconnect();

  // ---- Out
  /// kDown: `*problem` says why.
  SendResult Send(const Header& header, std::span<const std::byte> payload, uint64_t cookie,
                  Status* problem);
  void Revoke(uint64_t cookie);
  /// Sends what has been held back; false if the network takes no more just now.
  StatusOr<bool> Flush(uint16_t flags = 0);
  /// A send that UCX had kept.
  void Sent(const Request& request);
  /// Completes all that is in flight.
  void FailAll(const Status& status);
  bool all_sent() const { return free_joined_.size() == joined_.size(); }
  /// Somebody here waits for this peer.
  bool owed() const { return in_flight_ > 0 || fetching_bytes_ > 0; }

  // ---- In
  /// What came; upcalls from inside. InvalidArgument: the peer breaks the protocol.
  Status OnJoined(const PacketHead& head, uint32_t buffer);
  Status OnLarge(const LargePacket& packet, int64_t bytes, void* arrival);
  void Fetch(const View& view, std::byte* destination, uint64_t cookie);
  void Received(const Request& request, bool ok);
  /// Starts the fetches for which there is room.
  void StartFetches();
  void Detach(const View& view);
  void Release(const View& view);
  bool Intact(const View& view) const;
  /// The peer left: its sends are its own again.
  void RevokeAllHeld();

 private:
  struct Joined {
    Request request;
    PacketHead head;
    std::vector<std::byte> bytes;
  };
  struct Flight {
    Request request;
    LargePacket packet;
    uint64_t cookie = 0;
    int64_t inline_bytes = 0;
    bool used = false;
    bool revoked = false;
    bool on_wire = false;   ///< Large: UCX may still read the payload.
    bool released = false;  ///< By the peer, while it was on the wire.
  };
  struct Held {
    Request request;
    View view;
    uint32_t generation = 0;
    uint32_t buffer = 0;
    void* arrival = nullptr;  ///< Large and neither fetched nor dropped.
    bool used = false, large = false, detached = false, revoked = false;
    std::byte* destination = nullptr;
    uint64_t cookie = 0;
    int64_t begin_ns = 0;  ///< Of the fetch.
  };

  SendResult SendLarge(const Header& header, std::span<const std::byte> payload, uint64_t cookie,
                       Status* problem);
  uint32_t NewFlight(const Header& header, int64_t bytes, uint64_t cookie);
  void EndFlight(Flight* flight);
  void OnReleased(Flight* flight);
  PacketHead NextHead(uint16_t flags);
  Status Problem(int32_t result) const;
  Held* Find(const View& view);
  const Held* Find(const View& view) const;
  Status Hold(const Frame& frame, bool large, Held** held);
  Status Frames(const PacketHead& head, uint32_t buffer, size_t at);
  void Take(Held* held);
  void AdaptWindow(int64_t bytes, int64_t took_ns);

  Self* const self_;
  const int rank_;
  const std::string address_;
  const Tag out_tag_, in_tag_;
  bluefog_ucx_peer* peer_ = nullptr;

  // Out. Deques: UCX keeps pointers into them.
  std::deque<Flight> flights_;
  std::vector<uint32_t> free_flights_;
  int in_flight_ = 0;
  int64_t inline_out_ = 0, told_inline_ = 0;  ///< Small bytes sent, and of them taken.
  std::vector<std::byte> frames_;             ///< Of the next joined packet.
  uint32_t frame_count_ = 0;
  std::vector<uint32_t> releases_, revocations_;
  std::deque<Joined> joined_;
  std::vector<uint32_t> free_joined_;
  uint64_t sent_packets_ = 0;

  // In.
  std::deque<Held> held_;  ///< By the peer's slot.
  uint64_t seen_packets_ = 0;
  int64_t taken_ = 0, told_taken_ = 0;
  std::deque<uint32_t> fetch_waiting_;
  int64_t fetching_bytes_ = 0;
  int64_t fetch_window_, least_fetch_ns_ = INT64_MAX;
};

}  // namespace bluefog::transport::ucx
