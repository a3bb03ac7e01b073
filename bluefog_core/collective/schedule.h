// A collective is a pure function to a Schedule: (operation, rank, size, neighbourhood, elements)
// -> a DAG of steps over buffers that are named by role. Nothing here knows pointers, transports or
// time; the engine's executor replays schedules, the interpreter checks them, a simulator can price
// them. Planners are pure, keep nothing, and take arguments that were validated before.
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
  kCoded,    ///< The same for encoded messages: what is written there is encoded.
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

/// "input[0] 128+64".
std::string ToString(const Range& range);

enum class StepKind : uint8_t {
  kProduce,  ///< Plugin writes `range` (all payload buffers over begin/count).
  kPublish,  ///< `range` becomes readable by each target; done when all of them have released it.
  kReceive,  ///< Message number `message` of `peer`; its view serves the steps that name this one.
  kCombine,  ///< range = sum of weight * source, in list order (then ÷ divisor if divisor > 0).
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
  double weight =
      1.0;  ///< Of a view: multiplied with the weight that came in the message's header.
};

struct Target {
  int peer = -1;
  int32_t message = 0;  ///< Pairs with the kReceive of the same number at the peer.
  double weight = 1.0;  ///< Travels in the header; the receiver multiplies.
};

/// When a step runs. A receive is open from the start and done when its message has arrived; the
/// view is released when every step that names it in `sources` is done, at once if none does. Any
/// other step becomes runnable when all steps in `after` are done and all receives in `sources`
/// have arrived.
///
/// Messages. On a directed edge the messages of one operation are numbered 0, 1, 2, …; the sender's
/// list publishes them in that order, but in time one may overtake another. The targets of one
/// publish may differ in message numbers. A range of no elements still travels, as an empty
/// message: operations on empty tensors are matched, and their mismatches found, like others.
///
/// Combine. Addends come in list order, and a total weight of exactly 0 leaves its addend out (NaN
/// times 0 must not poison). No sources: zeros. With a divisor all weights here are 1: a plain sum,
/// then one division; where a header brought another weight, the weighted sum divided by the
/// divisor. A local source may be the very range that is written.
///
/// Coded. A kCopy to kCoded encodes its source; what is published from there travels encoded, and
/// is taken by a kReceive whose range has that role. A combine of such views has one local source x
/// (in the list also when its weight is 0), and in `after` the step that encoded x. With Q(m) for
/// what a message stands for it writes t*x + sum of weight * (Q(view) - Q(x)), t being the sum of
/// all weights: where every rank gives away as much weight as it takes, the sum over the ranks is
/// what it would be without a codec, whatever Q is.
///
/// Groups. Steps of one group are neighbours in the list: for each payload one combine or copy,
/// then their consume over the same begin and count. They are run as one, tile by tile; the group
/// is runnable when each of its steps is, dependencies inside the group apart. A kCombine to kTile
/// writes one tile of scratch memory. A kCopy to kTile moves nothing: what is consumed is the
/// copy's source itself, a view or (on a silent step) the payload. kTile appears in groups only.
struct Step {
  StepKind kind = StepKind::kCopy;
  Range range;  ///< Of kReceive only count is set, the elements expected, and for kCoded the role.
  std::vector<Target> targets{};  ///< kPublish; not empty.
  int peer = -1;                  ///< kReceive
  int32_t message = 0;            ///< kReceive
  std::vector<Source> sources{};  ///< kCombine, kCopy
  double divisor = 0.0;           ///< kCombine: if > 0, plain sum, then one division.
  std::vector<int32_t> after{};   ///< Must be done first; receives in `sources` are implied.
  int32_t group = -1;             ///< Equal for the steps that run as one; -1: alone.
};

/// "copy output[0] 0+3 = #4".
std::string ToString(const Step& step);

/// Steps are sorted: `after` and `sources` name earlier steps only. The operation is complete when
/// all steps are done, so buffers may be touched again only when all peers have released what they
/// read.
struct Schedule {
  std::vector<Step> steps;
  /// Buffers of each role: the payloads of a plugin.
  int buffers = 1;
  /// Elements of each buffer by role; the same for every payload. output_count is 0 where
  /// everything passes through kTile.
  int64_t input_count = 0, output_count = 0, scratch_count = 0, coded_count = 0;
  std::vector<int> sources() const;       ///< Ranks this one receives from, ascending.
  std::vector<int> destinations() const;  ///< Ranks this one sends to, ascending.
  std::string ToString() const;           ///< One line per step.
};

/// What all planners take. Chunks are the unit on the wire.
struct PlanInput {
  int rank = 0;
  int size = 1;
  int64_t count = 0;                 ///< Elements this rank contributes.
  int64_t chunk = int64_t{1} << 17;  ///< Elements a message carries at most; > 0.
  /// Input and output are the same memory. Other ranks read the input in place, and two neighbours
  /// that each wait for the other's release before they write would wait for ever; so what would be
  /// overwritten is copied to kScratch and published from there, or the write waits for the release
  /// where that cannot close a cycle. Not for allgather.
  bool in_place = false;
  /// Messages are coded (Role::kCoded). Of neighbor_allreduce.
  bool coded = false;
};

/// y = self*x + sum over in-edges; an in-edge of weight 0 is received and left out. The combine's
/// order is self, then sources ascending. `send_weights` is empty or has one weight for each of
/// out; weight k goes with out[k]'s messages.
Schedule PlanNeighborAllreduce(const PlanInput& in, const Neighborhood& neighborhood,
                               const std::vector<double>& send_weights = {});
/// Sum (or mean) over all ranks (or over `members`, ascending), in rank order, identical bits
/// everywhere. `one_shot`: each sends all to all (small sizes); else each rank reduces its own
/// shard and hands it round.
Schedule PlanAllreduce(const PlanInput& in, bool average, bool one_shot,
                       std::vector<int> members = {});

/// How an operation that knows of machines moves its bytes. kFlat: every rank by itself, as if all
/// links were alike. kHierarchical: the ranks of a host reduce a shard each, exchange it with the
/// ranks of other hosts that have the same shard, and hand the result round: of S bytes that go to
/// another host S leave through the network interfaces of this one, instead of S for each rank.
enum class Form : uint8_t { kFlat, kHierarchical };
const char* NameOf(Form form);

/// With m the mean over the ranks of a machine: y = self*m + sum over in-edges, the same bits on
/// all ranks of a machine. `machines`: of this rank's host in the graph between hosts, whose nodes
/// are the hosts of `placement`; `send_weights` as above. Hosts may have different numbers of
/// ranks. kFlat: the whole mean to every rank first, which then exchanges it with its counterpart
/// on each neighbouring host (`one_shot`: as in allreduce, inside the host); also what
/// kHierarchical is for empty tensors.
Schedule PlanHierarchicalNeighborAllreduce(const PlanInput& in, const Placement& placement,
                                           const Neighborhood& machines,
                                           const std::vector<double>& send_weights, Form form,
                                           bool one_shot);
/// Allreduce in the hierarchical form: sums of hosts are added in host order, so the result differs
/// from the flat form's in rounding; identical bits everywhere. count > 0.
Schedule PlanHierarchicalAllreduce(const PlanInput& in, const Placement& placement, bool average);
/// Output of every rank = input of root, along a binomial tree, pipelined by chunk. Only the root's
/// input is read.
Schedule PlanBroadcast(const PlanInput& in, int root);
/// Output = inputs of all ranks in rank order (output_count = size * count).
Schedule PlanAllgather(const PlanInput& in);
/// Dissemination: ceil(log2 n) rounds of empty messages.
Schedule PlanBarrier(const PlanInput& in);
/// Output = input without any message: the exchange of a silent step.
Schedule PlanLocal(const PlanInput& in);

/// What a plugin adds to an exchange.
struct PluginPlan {
  int payloads = 1;
  bool fuse = true;      ///< Consume on the tile just combined; false keeps the whole output.
  bool measure = false;  ///< Measure every combined range; consume waits for all of them.
  bool consume = true;   ///< False: the output is kept for a later step.
};
/// Wraps an exchange over one payload (planned without in_place) into produce -> exchange per
/// payload -> (measure ->) consume. Produces cover the whole input, cut where the exchange's reads
/// begin and end. Payload p uses the buffers p, and message m of the exchange becomes m * payloads
/// + p. What others read too (this rank's shard of an allreduce) and what is measured is kept whole
/// in kOutput and consumed from there; the rest passes through kTile in groups. With payloads > 1 a
/// range is consumed when all payloads' combines of it are there.
Schedule WithPlugin(const Schedule& exchange, const PluginPlan& plan);

}  // namespace bluefog::collective
