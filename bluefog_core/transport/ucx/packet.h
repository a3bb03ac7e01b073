// What goes over the wire. A *packet* is one active message of UCX:
//
//   joined  head · releases[] · revocations[] · frames, each with its payload
//   large   head and frame; the payload stays with the sender
//
// Everything a peer wrote is checked before use. Changing any of this means a new kAbi.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "transport/transport.h"

namespace bluefog::transport::ucx {

inline constexpr uint32_t kMagic = 0x75626c75;
inline constexpr uint16_t kAbi = 2;
/// Frames, and the payloads behind them, begin at multiples of this.
inline constexpr int64_t kUnit = 16;

/// Proves in every packet that its sender belongs to the job: the answer to a nonce that each rank
/// puts into its address, with the job's token as key, different for each ordered pair of ranks.
using Tag = std::array<std::byte, 16>;

enum PacketFlags : uint16_t {
  kLarge = 1,
  kPing = 2,  ///< Answer, with kPong if there is nothing else to say.
  kPong = 4,
  kFarewell = 8,  ///< The last one: the sender leaves in good order. Answered by the same.
};

struct PacketHead {
  uint32_t magic = kMagic;
  uint16_t abi = kAbi;
  uint16_t flags = 0;
  int32_t rank = -1;
  uint32_t releases = 0;     ///< Slots of the receiver's sends that are released.
  uint32_t revocations = 0;  ///< Slots of the sender's own.
  uint32_t frames = 0;
  Tag tag{};
  uint64_t sequence = 0;  ///< 1, 2, 3, … to this receiver.
  int64_t taken = 0;      ///< Bytes of the receiver's small payloads taken so far.
};

struct Frame {
  uint32_t slot = 0;  ///< Which of the sends in flight.
  uint32_t reserved = 0;
  int64_t bytes = 0;
  Header header{};
};

struct LargePacket {
  PacketHead head;
  Frame frame;
};

static_assert(sizeof(PacketHead) == 56 && sizeof(Frame) == 96 && sizeof(Frame) % kUnit == 0);
static_assert(sizeof(LargePacket) == sizeof(PacketHead) + sizeof(Frame));

inline constexpr int64_t Padded(int64_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

}  // namespace bluefog::transport::ucx
