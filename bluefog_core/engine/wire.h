// What lies in a transport header: the key by which operations match without negotiation, and the
// facts that both ends must agree on.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <bluefog/communicator.h>

#include "transport/transport.h"

namespace bluefog {

enum class MessageKind : uint8_t {
  kData = 1,  ///< One message of a schedule.
  kPost,  ///< "I have submitted this operation and receive from you": more than the eager limit may
          ///< come.
  kDescribe,  ///< Payload: name '\0' description. Before the first message of a name, and when it
              ///< changes.
  kAbort,     ///< Payload: why. The operation failed at the sender, or the receiver's message was
              ///< refused.
  kUser,      ///< An active message for a handler of the engine.
};

/// Operations match by key. `use` counts how often the name was submitted, so a late message can
/// never meet a later operation.
struct Key {
  uint64_t name_hash = 0;
  uint64_t use = 0;
  friend bool operator==(const Key&, const Key&) = default;
};

/// Of an allreduce, in WireHeader::value.
inline constexpr int kAverage = 1, kLocal = 2;

struct WireHeader {
  MessageKind kind{};
  Op op{};
  DType dtype{};
  uint8_t code = 0;  ///< kAbort: absl::StatusCode. kUser: which handler.
  uint32_t message = 0;
  Key key;
  int64_t count = 0;     ///< Elements of the whole operation.
  int64_t elements = 0;  ///< Elements in this message.
  uint32_t layout_hash = 0;
  /// kData: the receiver's weight for the sender in the sender's copy of the topology; 0 where a
  /// call brings its own weights.
  float edge_weight = 0.0f;
  uint64_t plan_hash = 0;  ///< Root, average, plugin, hyper-parameters, step.
  double weight = 1.0;     ///< The sender's weight for this edge; the receiver multiplies.
  /// kOptimizer: learning rate; kBroadcast: root; kAllreduce: kAverage + kLocal. So that an error
  /// can name both.
  double value = 0.0;
  int64_t step = 0;  ///< kOptimizer: the step, likewise.
};
static_assert(std::is_trivially_copyable_v<WireHeader>);
static_assert(sizeof(WireHeader) == transport::kHeaderBytes);

inline transport::Header Pack(const WireHeader& wire) {
  transport::Header header;
  std::memcpy(header.bytes.data(), &wire, sizeof(wire));
  return header;
}
inline WireHeader Unpack(const transport::Header& header) {
  WireHeader wire;
  std::memcpy(&wire, header.bytes.data(), sizeof(wire));
  return wire;
}

}  // namespace bluefog
