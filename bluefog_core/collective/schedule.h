// A collective is a pure function to a Schedule: (operation, rank, size, neighbourhood, elements) -> a
// DAG of steps over buffers that are named by role. Nothing here knows pointers, transports or time;
// the engine's executor replays schedules, the interpreter checks them, a simulator can price them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <bluefog/status.h>
#include <bluefog/topology.h>

namespace bluefog::collective {

enum class Role : uint8_t {
  kInput,    ///< The payload this rank contributes; for a plugin what Produce writes.
  kOutput,   ///< The result; for a plugin what Consume reads.
  kScratch,  ///< Memory for the length of the operation, owned by the executor.
  kTile,     ///< Exists tile by tile between a combine and the consume after it, never as a whole.
};

/// `count` elements from `begin` of one buffer. `buffer` counts buffers of one role: the payload.
struct Range {
  Role role = Role::kInput;
  int16_t buffer = 0;
  int64_t begin = 0;
  int64_t count = 0;
  friend bool operator==(const Range&, const Range&) = default;
};

enum class StepKind : uint8_t {
  kProduce,  ///< Plugin writes `range` (all payload buffers over begin/count).
  kPublish,  ///< `range` becomes readable by each target; done when all of them have released it.
  kReceive,  ///< Message number `message` of `peer`; its view serves the steps that name this one.
  kCombine,  ///< range = sum of weight * source, in list order (or the sum ÷ divisor if divisor > 0).
  kMeasure,  ///< Plugin adds to its per-parameter partials over `range`.
  kConsume,  ///< Plugin reads `range` (all payload buffers) and updates the parameters.
  kCopy,     ///< range = sources[0].
  kNative,   ///< A whole library call (NCCL) in submission order.
};
const char* NameOf(StepKind kind);

/// One addend of a combine, or what a copy reads.
struct Source {
  int32_t receive = -1;  ///< Index of the kReceive step whose view is read, or -1 for `local`.
  Range local;
  double weight = 1.0;  ///< Multiplied with the weight that came in the message's header.
};

struct Target {
  int peer = -1;
  int32_t message = 0;  ///< Pairs with the kReceive of the same number at the peer.
  double weight = 1.0;  ///< Travels in the header; the receiver multiplies.
};

struct Step {
  StepKind kind = StepKind::kCopy;
  Range range;                  ///< Not for kReceive, where only range.count is set.
  std::vector<Target> targets;  ///< kPublish
  int peer = -1;                ///< kReceive
  int32_t message = 0;          ///< kReceive
  std::vector<Source> sources;  ///< kCombine, kCopy
  double divisor = 0.0;         ///< kCombine: if > 0, plain sum, then one division.
  std::vector<int32_t> after;   ///< Steps that must be done first; receives in `sources` are implied.
};

struct Schedule {
  std::vector<Step> steps;
  /// Elements of each buffer by role; the same for every payload.
  int64_t input_count = 0, output_count = 0, scratch_count = 0;
  std::vector<int> sources() const;       ///< Ranks this one receives from, ascending.
  std::vector<int> destinations() const;  ///< Ranks this one sends to, ascending.
  std::string ToString() const;
};

/// What all planners take. Chunks are the unit on the wire.
struct PlanInput {
  int rank = 0;
  int size = 1;
  int64_t count = 0;                 ///< Elements this rank contributes.
  int64_t chunk = int64_t{1} << 17;  ///< Elements a message carries at most; > 0.
};

/// y = self*x + sum over in-edges; an in-edge of weight 0 is received and left out. The combine's order
/// is self, then sources ascending. `send_weights[k]`, if not empty, goes with out[k]'s message.
Schedule PlanNeighborAllreduce(const PlanInput& in, const Neighborhood& neighborhood,
                               const std::vector<double>& send_weights = {});
/// Sum (or mean) over all ranks, in rank order, identical bits everywhere. `one_shot`: each sends all to
/// all (small sizes); else each rank reduces its own shard and hands it round.
Schedule PlanAllreduce(const PlanInput& in, bool average, bool one_shot);
/// Output of every rank = input of root, along a binomial tree, pipelined by chunk.
Schedule PlanBroadcast(const PlanInput& in, int root);
/// Output = inputs of all ranks in rank order (output_count = size * count).
Schedule PlanAllgather(const PlanInput& in);
/// Dissemination: ceil(log2 n) rounds of empty messages.
Schedule PlanBarrier(const PlanInput& in);

/// What a plugin adds to an exchange.
struct PluginPlan {
  int payloads = 1;
  bool fuse = true;     ///< Consume on the tile just combined; false keeps the whole output.
  bool measure = false; ///< Measure every combined range; consume waits for all of them.
  bool consume = true;  ///< False: the output is kept for a later step.
};
/// Wraps an exchange over one payload into produce -> exchange per payload -> (measure ->) consume.
Schedule WithPlugin(const Schedule& exchange, const PluginPlan& plan);

}  // namespace bluefog::collective
