// The sending half of a link, A's end of A→B: frames into the ring, segments over the socket,
// completions out of the peer's release log.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include <bluefog/status.h>

#include "transport/arena.h"
#include "transport/memfd.h"
#include "transport/shm/layout.h"
#include "transport/shm/socket.h"
#include "transport/transport.h"

namespace bluefog::transport::shm {

/// What every link needs to know of its own rank.
struct Self {
  int rank = 0;
  int size = 1;
  std::string job_id;
  Layout layout;
  int64_t inline_limit = 0;
  Arena* arena = nullptr;
  Receiver* receiver = nullptr;
  UniqueFd bell;       ///< eventfd that peers ring.
  UniqueFd pidfd;      ///< Of this process, for peers to watch.
  uint32_t epoch = 0;  ///< Current value of the armed words; 0: not armed.
};

/// Rings the peer's doorbell if it sleeps, once per value of its armed word. The caller's own store
/// before it is seq_cst, as is the peer's store of the word before it looks a last time.
class Doorbell {
 public:
  void Set(UniqueFd bell) { bell_ = std::move(bell); }
  void RingIfArmed(const std::atomic<uint32_t>& armed);

 private:
  UniqueFd bell_;
  uint32_t rung_ = 0;
};

class OutLink {
 public:
  static StatusOr<OutLink> Create(const Self* self);

  /// `*problem` is set when the peer must be given up; the result then is kDown.
  SendResult Send(const Header& header, std::span<const std::byte> payload, uint64_t cookie,
                  Status* problem);
  /// False if the cookie is not in flight.
  bool Revoke(uint64_t cookie);
  void RevokeAll();

  /// Upcalls SendDone for what the peer has released. Not ok: the peer broke the protocol.
  StatusOr<bool> Poll();
  /// Whether Poll would find anything. For Arm.
  bool HasNews() const;
  void Arm(uint32_t epoch) { tx_head().armed.store(epoch, std::memory_order_seq_cst); }
  /// SendDone(status) for everything in flight.
  void FailAll(const Status& status);

  /// Connects and says hello. kAgain: try again later.
  SocketResult Connect(const std::string& name);
  bool connected() const { return static_cast<bool>(socket_); }
  /// The peer's answer: its rx memory, doorbell.
  Status Welcome(ReceivedPacket* received);
  int socket() const { return socket_.get(); }
  /// The socket had no room for a descriptor: wait until it is writable.
  bool socket_full() const { return socket_full_; }
  void clear_socket_full() { socket_full_ = false; }

 private:
  struct InFlight {
    enum State : uint8_t { kFree, kLive, kRevoked } state = kFree;
    uint64_t sequence = 0;
    uint64_t cookie = 0;
  };

  explicit OutLink(const Self* self) : self_(self) {}
  TxHead& tx_head() { return *reinterpret_cast<TxHead*>(tx_.data()); }
  const RxHead* rx_head() const { return reinterpret_cast<const RxHead*>(rx_.data()); }
  bool UpdateTail();
  bool HasRoom(int64_t bytes, Status* problem);
  void Publish(const Frame& frame, std::span<const std::byte> payload);
  SendResult PassSegment(uint32_t segment);
  void ForgetSegments();

  const Self* self_;
  UniqueFd socket_;
  SealedMemory tx_, rx_;  ///< rx_ is empty until the peer has answered.
  Doorbell bell_;
  uint64_t head_ = 0, tail_ = 0;
  uint64_t sequence_ = 0;
  uint64_t releases_ = 0;
  bool blocked_ = false;  ///< wants_room is set.
  bool socket_full_ = false;
  std::vector<InFlight> in_flight_;  ///< By slot.
  std::vector<uint32_t> free_slots_;
  std::unordered_set<uint32_t> passed_;  ///< Segments the peer has.
};

}  // namespace bluefog::transport::shm
