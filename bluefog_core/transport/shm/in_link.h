// The receiving half of a link, B's end of A→B: reads frames out of A's ring, hands out views,
// writes the release log. Trusts nothing that A wrote.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include <bluefog/status.h>

#include "transport/memfd.h"
#include "transport/shm/layout.h"
#include "transport/shm/out_link.h"
#include "transport/shm/socket.h"
#include "transport/transport.h"

namespace bluefog::transport::shm {

class InLink {
 public:
  /// From a checked hello, whose descriptors it takes.
  static StatusOr<InLink> Create(const Self* self, ReceivedPacket* hello);
  /// Answers over `socket`, which is then the link's.
  bool SendWelcome(UniqueFd* socket);

  /// Upcalls Incoming for what is in the ring. Not ok: the peer broke the protocol.
  StatusOr<bool> Poll();
  /// Whether Poll would find anything. For Arm.
  bool HasNews() const { return tx_head().head.load(std::memory_order_seq_cst) != consumed_; }
  void Arm(uint32_t epoch) { rx_head().armed.store(epoch, std::memory_order_seq_cst); }

  const std::byte* Data(const View& view) const;
  bool Intact(const View& view) const;
  void Detach(const View& view);
  void Release(const View& view);
  int64_t held() const { return held_; }

  /// Takes a descriptor that came over the socket.
  Status AddSegment(ReceivedPacket* received);
  bool farewell() const { return farewell_; }
  /// Reads the socket until it is empty. kClosed at its end; `*problem` for what breaks the
  /// protocol.
  SocketResult ReadSocket(Status* problem);
  int socket() const { return socket_.get(); }
  void Close() { socket_.Reset(); }

 private:
  struct Mapping {
    SealedMemory memory;
    int64_t views = 0;
    bool forgotten = false;
  };
  struct Held {
    uint64_t sequence = 0;  ///< 0: slot not in use.
    const std::byte* data = nullptr;
    int64_t span = -1;     ///< Number of its bytes in the ring, -1: none any more.
    uint32_t segment = 0;  ///< 0: payload was inline.
  };
  /// A piece of the ring that was read and may or may not be free again.
  struct Span {
    uint64_t end = 0;
    bool free = false;
  };

  explicit InLink(const Self* self) : self_(self) {}
  const TxHead& tx_head() const { return *reinterpret_cast<const TxHead*>(tx_.data()); }
  RxHead& rx_head() { return *reinterpret_cast<RxHead*>(rx_.data()); }
  const Held* Find(const View& view) const;
  Status Deliver(const Frame& frame, const std::byte* payload);
  Span& span(int64_t number) { return spans_[static_cast<size_t>(number) % spans_.size()]; }
  void PublishTail();
  void Forget(uint32_t segment);

  const Self* self_;
  int peer_ = -1;
  Layout layout_{};
  UniqueFd socket_;
  SealedMemory tx_, rx_;
  Doorbell bell_;
  bool farewell_ = false;
  uint64_t consumed_ = 0, tail_ = 0;
  uint64_t sequence_ = 0;
  uint64_t releases_ = 0;
  int64_t held_ = 0;
  std::vector<Held> by_slot_;
  std::vector<Span> spans_;  ///< Circular; numbers first_span_ … last_span_-1 are in use.
  int64_t first_span_ = 0, last_span_ = 0;
  std::unordered_map<uint32_t, Mapping> segments_;
};

}  // namespace bluefog::transport::shm
