// The C++ face of the engine: submit named operations, get Works, wait for them. Thread-safe. Any
// order of submission works: peers match operations by name and by how often the name was used.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <bluefog/config.h>
#include <bluefog/status.h>
#include <bluefog/tensor.h>
#include <bluefog/topology.h>

namespace bluefog {

class Engine;

enum class Op : uint8_t {
  kNeighborAllreduce,
  kHierarchicalNeighborAllreduce,
  kAllreduce,
  kBroadcast,
  kAllgather,
  kBarrier,
  kOptimizer
};
/// "neighbor_allreduce", … the same in C++, Python, the timeline and error messages.
const char* NameOf(Op op);

/// Weights of one call, instead of the topology's. y = self_weight*x + sum src[j].weight * (weight
/// that j gave in its dst) * x_j. Of kHierarchicalNeighborAllreduce ranks are machines here, x_j
/// their means, and dst must be set.
struct MixingWeights {
  double self_weight = 1.0;
  std::vector<Edge> src;
  /// Not set: a static call; src must be in-neighbours, the rest of the topology is sent to as
  /// usual. Set (also when empty): a dynamic call; any ranks, the topology is ignored.
  std::optional<std::vector<Edge>> dst;
};

/// One operation. Shapes, dtype, memory order, operation and weights-relevant facts are compared
/// with the partner's; a difference is an error on every rank involved that names both values.
struct OpSpec {
  Op op = Op::kNeighborAllreduce;
  /// Empty: matched by kind of operation and order of call.
  std::string name;
  TensorView input;
  /// data null: a fresh output from the pool (Work::output). May be the input (in place).
  TensorView output;
  bool average = true;                   ///< kAllreduce: mean instead of sum.
  bool local = false;                    ///< kAllreduce: over the ranks of this machine only.
  int root = 0;                          ///< kBroadcast.
  std::optional<MixingWeights> weights;  ///< k(Hierarchical)NeighborAllreduce.
  /// kNeighborAllreduce: messages of fewer bits, float16 or bfloat16 for float32, these and float32
  /// for float64, rounded to nearest even; the same on all ranks. Sums are made in the tensor's own
  /// type, as y = t*x + sum w_j (Q(x_j) - Q(x)), t being the sum of all weights, 1 as a rule: of
  /// what this rank rounds away when it sends x, it keeps as much as it takes from others. Not set,
  /// or the tensor's own type: nothing is rounded.
  std::optional<DType> message_dtype;
  /// Dropped on a caller's thread (in Submit or Wait), never on the engine's.
  std::shared_ptr<void> keep_alive;
};

/// An operation under way. Shared between the caller and the engine.
class Work {
 public:
  virtual ~Work() = default;
  virtual bool done() const = 0;
  /// Blocks until done, or until `timeout` (then DeadlineExceeded, and the work goes on). Drives
  /// progress itself for a bounded time before it blocks. The status is that of the operation.
  virtual Status Wait(std::chrono::nanoseconds timeout = std::chrono::nanoseconds::max()) = 0;
  /// After done() with Ok. Fresh outputs stay valid as long as `output_memory` is held.
  virtual TensorView output() const = 0;
  virtual std::shared_ptr<std::byte> output_memory() const = 0;
};

/// Options that are not settings of the environment.
struct CommunicatorOptions {
  Config config;
  /// Asked about every 100 ms while Create waits for the other ranks; true gives up (Ctrl-C).
  std::function<bool()> interrupted;
  /// CreateInProcess: payloads beyond eager_bytes arrive as over a network, and are fetched.
  bool fetch_views = false;
};

struct EngineStats {
  int64_t ops_submitted = 0, ops_done = 0, ops_failed = 0;
  int64_t messages_sent = 0, bytes_sent = 0, posts_sent = 0, nacks_sent = 0;
  int64_t allocations =
      0;  ///< Heap allocations by operations once plans and pools are warm: stays.
  int64_t bytes_pinned = 0;  ///< Arena segments.
  int64_t control_messages = 0;
  int64_t nonfinite_gradients = 0;
  /// Union of the times in which a caller could have had to wait: from the start of an exchange
  /// until its result is there. That neighbours still read what was sent does not count: it holds
  /// nobody up here.
  int64_t busy_ns = 0;
  int64_t blocked_ns = 0;  ///< Callers' time inside Wait; 1 - blocked / busy is hidden.
};

class Communicator {
 public:
  /// Joins the job that the configuration describes (bluefog run, torchrun's variables) or is
  /// alone, and logs one line that says which. Blocks until all ranks have joined or
  /// join_timeout_ms is over; the error names the missing ranks.
  static StatusOr<std::unique_ptr<Communicator>> Create(const CommunicatorOptions& options);
  /// The same with Config::FromEnvironment().
  static StatusOr<std::unique_ptr<Communicator>> Create();
  /// `size` ranks inside this process, over the in-process transport (tests, simulation).
  static StatusOr<std::vector<std::unique_ptr<Communicator>>> CreateInProcess(
      int size, const CommunicatorOptions& options = {});
  /// Shuts down.
  ~Communicator();

  int rank() const;
  int size() const;
  int local_rank() const;
  int local_size() const;
  /// Which ranks share a host, and so memory; a machine is a host here, unless
  /// BLUEFOG_NODES_PER_MACHINE lets one look like several.
  const Placement& placement() const;
  int machine_rank() const;
  int machine_size() const;
  /// All machines have the same number of ranks.
  bool is_homogeneous() const;
  /// Where this rank's place came from: "bluefog run", "torchrun", "alone", "in process".
  const std::string& launched_by() const;

  /// Used by operations submitted from now on. Every rank calls it at the same point of its
  /// program. Warnings (sums, connectivity) are logged; a wrong size is an error. The round of a
  /// neighbor_allreduce is how often its name was used since; calls with `weights.dst`, which go
  /// along no topology, do not count.
  Status SetTopology(TopologySequence topology);
  std::shared_ptr<const TopologySequence> topology() const;
  /// The same for hierarchical_neighbor_allreduce: the nodes of the graph are machines. There is
  /// none until it is set: null.
  Status SetMachineTopology(TopologySequence topology);
  std::shared_ptr<const TopologySequence> machine_topology() const;

  /// Errors that are the caller's own come back at once; everything else comes with the Work. A
  /// handle that is dropped does not cancel the operation.
  StatusOr<std::shared_ptr<Work>> Submit(OpSpec spec);

  /// Memory that neighbours on this host read in place (`bf.empty`).
  StatusOr<std::shared_ptr<std::byte>> Allocate(int64_t bytes);

  EngineStats stats() const;
  /// The first failure of the communicator (a dead peer), or Ok.
  Status status() const;
  /// Completes or fails what is outstanding, leaves the job. Safe to call again. `interrupted` is
  /// asked about every 50 ms while neighbours have yet to take what was sent to them, for
  /// BLUEFOG_OP_TIMEOUT_MS at most; true leaves at once (Ctrl-C).
  void Shutdown(const std::function<bool()>& interrupted = {});

  Engine* engine() const { return engine_.get(); }

 private:
  explicit Communicator(std::unique_ptr<Engine> engine);
  std::unique_ptr<Engine> engine_;
};

}  // namespace bluefog
