// What two processes share. A half-link A→B has two memories, each written by one side only and
// mapped read-only by the other:
//
//   tx (written by A):  TxHead · revoked[slots] · ring of frames (mirrored behind its end)
//   rx (written by B):  RxHead · released[slots]
//
// Everything a peer wrote is checked before use. Changing any of this means a new kAbi.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "transport/memfd.h"
#include "transport/transport.h"

namespace bluefog::transport::shm {

inline constexpr uint64_t kMagic = 0x676f666575'6c6201;
inline constexpr uint32_t kAbi = 1;
inline constexpr int64_t kFrameUnit = 64;  ///< Frames start on a cache line.
inline constexpr uint32_t kMaxSlots = 1 << 16;
inline constexpr int64_t kMaxRingBytes = int64_t{1} << 30;
inline constexpr size_t kMaxSegments = 4096;

static_assert(std::atomic<uint64_t>::is_always_lock_free &&
              std::atomic<uint32_t>::is_always_lock_free);

struct TxHead {
  alignas(64) std::atomic<uint64_t> head;   ///< Bytes of frames published so far.
  alignas(64) std::atomic<uint32_t> armed;  ///< Not 0: ring A's doorbell, once per value.
  std::atomic<uint32_t> wants_room;         ///< A found the ring full and waits for `tail` to move.
};

struct RxHead {
  alignas(64) std::atomic<uint64_t> tail;      ///< Bytes of the ring that B no longer needs.
  alignas(64) std::atomic<uint64_t> releases;  ///< Entries written to released[], modulo slots.
  alignas(64) std::atomic<uint32_t> armed;     ///< Not 0: ring B's doorbell, once per value.
};

enum class FrameKind : uint32_t {
  kInline = 0x0b10f001,  ///< `bytes` of payload follow, padded to kFrameUnit.
  kInPlace,              ///< The payload is [offset, offset+bytes) of segment `segment`.
  kForget,               ///< Segment `segment` is gone at the sender. Takes no slot.
};

struct Frame {
  FrameKind kind;
  uint32_t slot;      ///< Which of the sends in flight: index of revoked[], entry of released[].
  uint64_t sequence;  ///< 1, 2, 3, …; the value of revoked[slot] that means this one.
  int64_t bytes;
  int64_t offset;
  uint32_t segment;
  uint32_t reserved[3];
  Header header;
};
static_assert(sizeof(Frame) == 128 && sizeof(Frame) % kFrameUnit == 0);

inline int64_t FrameBytes(FrameKind kind, int64_t payload) {
  return static_cast<int64_t>(sizeof(Frame)) +
         (kind == FrameKind::kInline ? RoundUp(payload, kFrameUnit) : 0);
}

/// Where things lie in tx and rx.
struct Layout {
  uint32_t slots;
  int64_t ring_bytes;  ///< Multiple of the page size.

  int64_t ring_offset() const {
    return RoundUp(static_cast<int64_t>(sizeof(TxHead) + slots * sizeof(uint64_t)), PageBytes());
  }
  int64_t tx_bytes() const { return ring_offset() + ring_bytes; }
  int64_t rx_bytes() const {
    return RoundUp(static_cast<int64_t>(sizeof(RxHead) + slots * sizeof(uint32_t)), PageBytes());
  }
};

inline std::atomic<uint64_t>* RevokedWords(std::byte* tx) {
  return reinterpret_cast<std::atomic<uint64_t>*>(tx + sizeof(TxHead));
}
inline std::atomic<uint32_t>* ReleasedWords(std::byte* rx) {
  return reinterpret_cast<std::atomic<uint32_t>*>(rx + sizeof(RxHead));
}

enum class PacketKind : uint32_t {
  kHello = 1,  ///< A→B, first; with A's tx, doorbell, pidfd.
  kWelcome,    ///< B→A, answer; with B's rx, doorbell, pidfd.
  kRefused,    ///< B→A, answer: `text` says why.
  kSegment,    ///< A→B: descriptor of arena segment `segment`, `bytes` long.
  kFarewell,   ///< Either way: the sender leaves in good order.
};

/// What goes over the socket of a half-link; one packet, one message.
struct Packet {
  uint64_t magic = kMagic;
  uint32_t abi = kAbi;
  PacketKind kind = PacketKind::kHello;
  int32_t rank = -1;
  int32_t size = 0;
  uint32_t slots = 0;
  uint32_t segment = 0;
  int64_t ring_bytes = 0;
  int64_t bytes = 0;
  char job[128] = {};
  char text[256] = {};
};

}  // namespace bluefog::transport::shm
