// Reliable, ordered active messages between ranks (decision 9 of DESIGN.md). A transport knows
// nothing of tensors, names or matching: it moves an opaque header and a span of bytes.
//
// Words. *Send* hands over a header and a payload that stays the sender's property. The peer's
// *Incoming* upcall gets the header and a *View* of the payload. *Release* of the view is what
// completes the send: `SendDone` fires after it, and only then may the sender overwrite the bytes.
//
// Threads. All calls are made by whoever holds the engine's progress lock, one at a time; all
// upcalls are made from inside Progress(), never from Send or Release.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <bluefog/status.h>

namespace bluefog::transport {

inline constexpr size_t kHeaderBytes = 80;
/// Sends to one peer that it has not released, unless a transport was asked for another number.
inline constexpr int kMaxInFlight = 8192;
/// Opaque to transports; engine/match.h says what lies in it.
struct Header {
  alignas(8) std::array<std::byte, kHeaderBytes> bytes;
};

/// A received payload. Valid until Release; the bytes do not change meanwhile, unless the sender
/// gave up (see Intact).
struct View {
  int peer = -1;
  uint64_t token = 0;               ///< The transport's own.
  const std::byte* data = nullptr;  ///< Null while size > 0: must be fetched first.
  int64_t size = 0;
  bool readable() const { return data != nullptr || size == 0; }
};

/// Upcalls, all from inside Progress().
class Receiver {
 public:
  virtual ~Receiver() = default;
  /// Messages of one peer arrive in the order in which it sent them. Every view must be released
  /// once.
  virtual void Incoming(int peer, const Header& header, const View& view) = 0;
  /// Exactly once per accepted Send: Ok after the peer's release, Cancelled after Revoke, the
  /// status of PeerDown if the peer is gone.
  virtual void SendDone(uint64_t cookie, const Status& status) = 0;
  /// Exactly once per accepted Fetch; the bytes are in place if Ok.
  virtual void FetchDone(uint64_t cookie, const Status& status) = 0;
  /// At most once per peer: Unavailable if it died, Cancelled if it left in good order (its
  /// transport was destroyed), NotFound if it was gone before the first contact, ResourceExhausted
  /// if it is this process that lacks memory or descriptors to talk with it. Afterwards every
  /// outstanding send to it completes with `status`; views already delivered stay readable until
  /// released.
  virtual void PeerDown(int peer, const Status& status) = 0;
};

enum class SendResult {
  kAccepted,
  kBusy,  ///< Back-pressure: nothing was taken; try again after Progress() has moved something.
  kDown,  ///< The peer is dead or was never there; nothing was taken. PeerDown comes or came.
};

class Transport {
 public:
  virtual ~Transport() = default;

  virtual const char* name() const = 0;
  /// What peers need in order to reach this rank; opaque bytes for the address book.
  virtual std::string address() const = 0;
  /// Address book by rank. Call once, before the first Send. Connections are made at the first
  /// Send.
  virtual Status SetPeers(std::vector<std::string> addresses) = 0;

  /// Payloads up to this many bytes may lie anywhere and are copied before Send returns.
  virtual int64_t inline_limit() const = 0;
  /// True if `payload` can be sent without a copy: it lies in the Arena (shm), or anywhere
  /// (inproc).
  virtual bool CanSendInPlace(std::span<const std::byte> payload) const = 0;
  /// Sends to `peer` (not self). `payload` is at most inline_limit() bytes or CanSendInPlace, and
  /// is not changed until SendDone(cookie). Never blocks, never calls back.
  virtual SendResult Send(int peer, const Header& header, std::span<const std::byte> payload,
                          uint64_t cookie) = 0;
  /// Gives up a send: SendDone(cookie, Cancelled) follows, as soon as no network reads the bytes;
  /// they are the sender's again, and the peer's Intact() turns false. No effect on a cookie
  /// already done.
  virtual void Revoke(int peer, uint64_t cookie) = 0;

  /// Copies a view's bytes to `destination` (view.size bytes); FetchDone(cookie) follows. Works on
  /// every view, also on readable ones.
  virtual void Fetch(const View& view, std::byte* destination, uint64_t cookie) = 0;
  /// False if the sender revoked the view or may have overwritten it: check after the last read.
  virtual bool Intact(const View& view) const = 0;
  /// The bytes are no longer needed, but the send is not complete yet: room in the transport's own
  /// buffers comes free, `view.data` must not be read any more. Release is still owed.
  virtual void Detach(const View& view) = 0;
  virtual void Release(const View& view) = 0;

  /// Moves everything that can move without waiting; returns whether anything did. Cheap when idle.
  virtual bool Progress() = 0;
  /// Sends what Send and Release held back to join it with more. Called at the end of each turn.
  virtual void Flush() {}
  /// One descriptor that polls readable when there is work, for the engine's epoll.
  virtual int fd() const = 0;
  /// Asks peers to ring fd() from now on. False if something came in meanwhile: call Progress again
  /// instead of sleeping. Disarm ends it: whoever drives by polling spares the peers the ring.
  virtual bool Arm() = 0;
  virtual void Disarm() = 0;
};

}  // namespace bluefog::transport
