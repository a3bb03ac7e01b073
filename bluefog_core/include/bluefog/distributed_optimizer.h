// A model's parameters bound to an optimizer plugin and a communicator: what a training loop talks
// to.
//
//   auto opt = DistributedOptimizer::Create(comm, {.plugin = "decentlam", .params = {…}});
//   loop: compute gradients; opt->Ready(i, {x, g, state}, hypers) as each is there;
//   opt->Step({…}, hypers)
//
// From Ready(i) (overlap) or Step (no overlap) until Step's return x, g and the states of parameter
// i belong to the engine. Not thread-safe, but Ready may come from another thread than Step if they
// do not overlap.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <bluefog/communicator.h>
#include <bluefog/optimizer.h>
#include <bluefog/status.h>

namespace bluefog {

/// What does not change about a parameter.
struct ParameterInfo {
  std::string name;
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  int group = 0;             ///< Index into the hyper-parameters.
  uint32_t layout_hash = 1;  ///< TensorView::LayoutHash(): must be equal on all ranks.
  std::string layout;        ///< TensorView::ToString(), for error messages.
};

/// Pointers of one parameter, bound anew in every step.
struct ParameterBinding {
  void* x = nullptr;
  const void* g = nullptr;  ///< Null: no gradient in this step; the parameter is sent all the same.
  std::array<void*, kMaxStates> state{};
};

struct DistributedOptimizerOptions {
  std::string plugin;
  std::unique_ptr<Optimizer> optimizer;  ///< Instead of `plugin`: an object that is not registered.
  std::vector<ParameterInfo> params;     ///< In registration order; buckets run in reverse.
  /// What stands for the plugin's neighbor_allreduce: itself, or
  /// kHierarchicalNeighborAllreduce, which mixes the means of machines over a graph between them.
  Collective communication = Collective::kNeighborAllreduce;
  /// Between ranks or machines. Null: the communicator's, read when a step begins.
  std::shared_ptr<const TopologySequence> topology;
  /// Of what is sent to neighbours; see OpSpec. Refused where a parameter has not more bits, and
  /// for plugins that average with everybody or have a codec. A plugin's all-reduces among other
  /// steps are not rounded.
  std::optional<DType> message_dtype;
  /// What is sent in a step is averaged until the gradients of the next one are there: see
  /// Traits::delayed, which says what becomes of the method. InvalidArgument where it is empty.
  bool delayed = false;
  bool allow_unstable = false;  ///< Run on a graph that CheckTopology refuses; warns.
  int64_t step = 0;             ///< First step, when resuming.
  std::string agreed;           ///< Settings of the caller's own that all ranks must share.
  /// By which the ranks find each other; equal on all of them, and new. Empty: by how many without
  /// a name the communicator has made before.
  std::string name;
  /// Asked about every 100 ms while Create waits for the other ranks; true gives up (Ctrl-C).
  std::function<bool()> interrupted;
};

class DistributedOptimizer {
 public:
  /// Collective: compares names, layouts, plugin and order of the parameters over the ranks; the
  /// error names the rank that differs and both values.
  static StatusOr<std::unique_ptr<DistributedOptimizer>> Create(
      Communicator* comm, DistributedOptimizerOptions options);
  /// Instead of Create on a rank that does not come to it: that of the others fails with `why`.
  /// `name`: as in the options.
  static void NotCreated(Communicator* comm, const std::string& why, std::string name = "");
  virtual ~DistributedOptimizer() = default;

  virtual const Traits& traits() const = 0;
  virtual const std::string& name() const = 0;
  /// The first failure that neighbours were told of, or that they told; Ok. No step is possible
  /// after it: parameters may be partly updated, so load a checkpoint into a new optimizer.
  virtual Status status() const = 0;
  /// Ends it between two steps: a neighbour that steps on is told `why`, instead of waiting.
  virtual void Retire(const std::string& why) = 0;
  virtual int64_t step() const = 0;
  /// Of the next step: after a checkpoint was loaded. Not while a step is under way.
  virtual Status SetStep(int64_t step) = 0;
  /// From step `from_step` on (must be later than this one), on all ranks alike.
  virtual Status SetTopology(std::shared_ptr<const TopologySequence> topology,
                             int64_t from_step) = 0;

  /// The gradient of one parameter is there. `hypers`: one per group, snapshotted by the first
  /// Ready of a step and compared by the later ones and by Step: FailedPrecondition if they differ.
  /// A second Ready for a parameter in one step is FailedPrecondition.
  virtual Status Ready(int param, const ParameterBinding& binding,
                       std::span<const Hyper> hypers) = 0;
  /// Ends the step: binds what was not Ready yet (`bindings` by parameter; those already Ready are
  /// not looked at), opens all gates and waits until every parameter is updated. On failure the
  /// parameters may be partly updated and the communicator's status says why.
  virtual Status Step(std::span<const ParameterBinding> bindings,
                      std::span<const Hyper> hypers) = 0;
  /// True between the first Ready and the end of Step.
  virtual bool in_step() const = 0;
  /// Like Step's second half, bounded: FailedPrecondition if no Step was begun. For callers that
  /// must look at signals: BeginStep, then WaitStep(100 ms) until it is not DeadlineExceeded.
  virtual Status BeginStep(std::span<const ParameterBinding> bindings,
                           std::span<const Hyper> hypers) = 0;
  virtual Status WaitStep(std::chrono::nanoseconds timeout) = 0;
  /// Delayed mode: waits for the averages under way and takes them, x += W x - x, so that nothing
  /// is under way; on all ranks at the same step, and not within one. Not needed for a checkpoint:
  /// what is under way is the model itself, and sent again by whoever starts from it.
  /// DeadlineExceeded: call it again. Otherwise it does nothing.
  virtual Status Synchronize(std::span<const ParameterBinding> bindings,
                             std::chrono::nanoseconds timeout) = 0;
  /// Bytes of payload slots held for this optimizer.
  virtual int64_t bytes_pinned() const = 0;
};

}  // namespace bluefog
