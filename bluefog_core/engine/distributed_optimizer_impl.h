// Binds parameters, plugin and engine: buckets and their slots, gates, what changes between steps.
// What moves and when is decided here; how is the executor's business. Its life and what it checks
// is in distributed_optimizer.cc, the steps are in optimizer_step.cc.
#pragma once

#include <bluefog/distributed_optimizer.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/bucket.h"

namespace bluefog {

class DistributedOptimizerImpl final : public DistributedOptimizer {
 public:
  DistributedOptimizerImpl(Engine* engine, DistributedOptimizerOptions options);
  ~DistributedOptimizerImpl() override;
  Status Init();

  const Traits& traits() const override { return shared_.plugin->traits(); }
  const std::string& name() const override { return shared_.name; }
  int64_t step() const override { return step_; }
  bool in_step() const override { return in_step_ || leaving_; }
  int64_t bytes_pinned() const override { return bytes_pinned_; }
  Status status() const override { return Failure(); }
  void Retire(const std::string& why) override { GiveUp(absl::AbortedError(Where() + ": " + why)); }
  Status SetStep(int64_t step) override;
  Status SetTopology(std::shared_ptr<const TopologySequence> topology, int64_t from_step) override;
  Status Ready(int param, const ParameterBinding& binding, std::span<const Hyper> hypers) override;
  Status BeginStep(std::span<const ParameterBinding> bindings,
                   std::span<const Hyper> hypers) override;
  Status WaitStep(std::chrono::nanoseconds timeout) override;
  Status Step(std::span<const ParameterBinding> bindings, std::span<const Hyper> hypers) override;
  Status Synchronize(std::span<const ParameterBinding> bindings,
                     std::chrono::nanoseconds timeout) override;

 private:
  Status Prepare();
  Status CheckMessages() const;
  Status CheckDelayed() const;
  bool early() const { return traits().payload_time == PayloadTime::kEarly; }
  bool delayed() const { return options_.delayed; }
  /// Head of an error: "rank 1: dsgd, step 3", and ", parameter 'w'".
  std::string Where() const;
  std::string Where(int param) const;
  Status Located(const Status& status) const {
    return Status(status.code(), Where() + ": " + std::string(status.message()));
  }
  void AwaitQuiet();
  /// Runs `task` under the progress lock and returns when it, and what ran before it, has returned.
  void UnderTheLock(std::function<void(Executor&)> task);
  void MakeBuckets();
  Status AllocateSlots();
  Status CheckUnchanged(std::span<const Hyper> hypers) const;
  Status CheckHypers(std::span<const Hyper> hypers) const;
  Status Open(std::span<const Hyper> hypers);
  /// Mixes over machines: graphs are between these.
  bool over_machines() const {
    return options_.communication == Collective::kHierarchicalNeighborAllreduce &&
           traits().uses_topology;
  }
  int node() const {
    return over_machines() ? shared_.engine->machine() : shared_.engine->place().rank;
  }
  Status CheckSize(const TopologySequence& topology) const;
  /// Whether the plugin may run on what the graph does to ranks.
  Status CheckGraph(const TopologySequence& topology) const;
  Status CheckBinding(int param, const ParameterBinding& binding) const;
  /// Finds and checks the topology of `step`, for all of its buckets.
  Status UseTopologyOf(int64_t step);
  StatusOr<const Exchange*> ExchangeOf(const StepPlan& exchanges) const;
  Status AllocateKept(Bucket& bucket, const collective::Schedule& schedule);
  BucketStep* FreeStepOf(Bucket& bucket);
  Status SubmitBucket(Bucket& bucket, bool consume_open);
  Status SubmitExchange(Bucket& bucket, int64_t step, const TopologySequence& topology,
                        BucketStep::Mode mode, bool consume_open);
  Status SubmitEarly();
  /// The step cannot go on here: nobody is to wait for it, nor for a later one.
  void GiveUp(const Status& status);
  void MeasureModel();
  Status Failure() const;

  OptimizerShared shared_;
  DistributedOptimizerOptions options_;
  std::string title_;  ///< For the timeline.
  std::vector<std::unique_ptr<Bucket>> buckets_;
  std::vector<Bucket*> bucket_of_;  ///< By parameter; null for empty parameters.
  std::vector<bool> ready_;
  int64_t step_ = 0;
  bool in_step_ = false, begun_ = false;
  bool has_early_ = false;    ///< The early payloads of step_ are under way.
  bool leaving_ = false;      ///< And x is still the engine's, until they are written.
  bool has_delayed_ = false;  ///< The averages for step_ are under way since the one before.
  int64_t bytes_pinned_ = 0;
  std::map<int64_t, std::shared_ptr<const TopologySequence>> topologies_;  ///< From step on.
  /// Of the step under way, whatever is set meanwhile; the last one that was checked.
  std::shared_ptr<const TopologySequence> topology_;
  std::shared_ptr<const TopologySequence> first_topology_;  ///< Delayed: of a model never sent.
};

}  // namespace bluefog
