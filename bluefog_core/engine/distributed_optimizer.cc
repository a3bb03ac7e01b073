// Binds parameters, plugin and engine: buckets and their slots, gates, what changes between steps.
// What moves and when is decided here; how is the executor's business.
#include <bluefog/distributed_optimizer.h>

#include <algorithm>
#include <bit>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "base/clock.h"
#include "base/guarded.h"
#include "base/hash.h"
#include "base/log.h"
#include "engine/agreement.h"
#include "engine/bucket.h"
#include "engine/hyper.h"

namespace bluefog {
namespace {

/// How long the end of an optimizer waits for neighbours that have not reached its last step.
constexpr int64_t kLingerNs = 10'000'000'000;

class DistributedOptimizerImpl final : public DistributedOptimizer {
 public:
  DistributedOptimizerImpl(Engine* engine, DistributedOptimizerOptions options);
  ~DistributedOptimizerImpl() override;
  Status Init();

  const Traits& traits() const override { return shared_.plugin->traits(); }
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

 private:
  bool early() const { return traits().payload_time == PayloadTime::kEarly; }
  bool delayed() const { return traits().consume == ConsumeTrigger::kNextGradient; }
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
  Status CheckSize(const TopologySequence& topology) const;
  Status CheckBinding(int param, const ParameterBinding& binding) const;
  /// Finds and checks the topology of `step`, for all of its buckets.
  Status UseTopologyOf(int64_t step);
  StatusOr<const Exchange*> ExchangeOf(const StepPlan& exchanges) const;
  Status AllocateMixed(Bucket& bucket);
  BucketStep* FreeStepOf(Bucket& bucket);
  Status SubmitBucket(Bucket& bucket, int64_t step, bool consume_open);
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
  bool has_delayed_ = false;  ///< The averages of the step before wait to be consumed.
  int64_t bytes_pinned_ = 0;
  std::map<int64_t, std::shared_ptr<const TopologySequence>> topologies_;  ///< From step on.
  /// Of the step under way, whatever is set meanwhile; the last one that was checked.
  std::shared_ptr<const TopologySequence> topology_;
};

DistributedOptimizerImpl::DistributedOptimizerImpl(Engine* engine,
                                                   DistributedOptimizerOptions options)
    : options_(std::move(options)) {
  shared_.engine = engine;
  step_ = options_.step;
  if (options_.topology != nullptr) topologies_[0] = options_.topology;
}

DistributedOptimizerImpl::~DistributedOptimizerImpl() {
  if (shared_.engine->in_forked_child() || shared_.plugin == nullptr) return;
  // The exchange of the last step is still the neighbours' business: theirs would fail with it.
  if (delayed() && !in_step_) AwaitQuiet();
  if (shared_.in_flight.load() > 0) {
    UnderTheLock([this](Executor& executor) {
      executor.FailUnfinished(
          [this](const Operation& op) {
            return std::any_of(buckets_.begin(), buckets_.end(),
                               [&](const auto& b) { return op.name == b->name; });
          },
          absl::AbortedError("the optimizer was destroyed with a step under way"));
    });
    // A shutdown that lingers in another thread ends them too, but not before its own end.
    for (shared_.quiet.Reset(); shared_.in_flight.load() > 0; shared_.quiet.Reset()) {
      shared_.engine->Wait(shared_.quiet, std::chrono::milliseconds(100), title_);
    }
  }
  // The last OnDone has counted, and may not have returned.
  UnderTheLock([](Executor&) {});
}

void DistributedOptimizerImpl::UnderTheLock(std::function<void(Executor&)> task) {
  // Shared: whoever sets it still looks at it when the waiter has gone on.
  const auto done = std::make_shared<Completion>();
  shared_.engine->Run([task = std::move(task), done](Executor& executor) {
    task(executor);
    done->Set();
  });
  // Who waits drives, so it comes also when the communicator is shut down meanwhile.
  while (!shared_.engine->Wait(*done, std::chrono::milliseconds(100), title_)) {
  }
}

void DistributedOptimizerImpl::AwaitQuiet() {
  const int64_t deadline = NowNs() + kLingerNs;
  while (NowNs() < deadline && shared_.engine->CheckUsable("").ok()) {
    shared_.quiet.Reset();
    if (shared_.in_flight.load() == 0) return;
    if (options_.interrupted && options_.interrupted()) return;
    shared_.engine->Wait(shared_.quiet, std::chrono::milliseconds(100), title_);
  }
}

std::string DistributedOptimizerImpl::Where() const {
  return "rank " + std::to_string(shared_.engine->place().rank) + ": " + traits().name + ", step " +
         std::to_string(step_);
}

std::string DistributedOptimizerImpl::Where(int param) const {
  return Where() + ", parameter '" + shared_.params[static_cast<size_t>(param)].name + "'";
}

Status DistributedOptimizerImpl::Init() {
  if (options_.optimizer != nullptr) {
    shared_.plugin = std::move(options_.optimizer);
  } else {
    StatusOr<std::unique_ptr<Optimizer>> plugin = MakeOptimizer(options_.plugin);
    if (!plugin.ok()) return plugin.status();
    shared_.plugin = *std::move(plugin);
  }
  const Traits& t = traits();
  if (t.payloads < 1 || t.payloads > kMaxPayloads ||
      static_cast<int>(t.states.size()) > kMaxStates || t.measures > kMaxMeasures ||
      static_cast<int>(t.hypers.size()) > kMaxOwnHypers) {
    return absl::InvalidArgumentError(
        "optimizer plugin '" + t.name +
        "' asks for more payloads, states, measures or hyper-parameters than exist");
  }
  shared_.name = "optimizer" + std::to_string(shared_.engine->NextOptimizer());
  title_ = shared_.name + " (" + t.name + ")";
  shared_.params = std::move(options_.params);
  shared_.bindings.resize(shared_.params.size());
  ready_.resize(shared_.params.size());
  for (size_t i = 0; i < shared_.params.size(); ++i) {
    const ParameterInfo& p = shared_.params[i];
    if (p.count < 0 || p.group < 0) {
      return absl::InvalidArgumentError("parameter '" + p.name + "' has a negative size or group");
    }
    if (p.dtype != DType::kFloat32 && p.dtype != DType::kFloat64) {
      return absl::InvalidArgumentError("parameter '" + p.name + "' is " + NameOf(p.dtype) +
                                        "; optimizers work on float32 and float64 parameters");
    }
  }
  // Agreement first: buckets of different lengths would only say that something differs.
  if (Status s = AgreeOnOptimizer(shared_.engine, shared_.name, t.name, options_.agreed, step_,
                                  shared_.params, options_.interrupted);
      !s.ok()) {
    return s;
  }
  if (Status s = UseTopologyOf(step_); !s.ok()) return s;
  MakeBuckets();
  return AgreeOnSuccess(shared_.engine, shared_.name, AllocateSlots(), options_.interrupted);
}

// Reverse registration order: the last layers' gradients come first.
void DistributedOptimizerImpl::MakeBuckets() {
  const int64_t limit = shared_.engine->config().bucket_bytes;
  bucket_of_.assign(shared_.params.size(), nullptr);
  for (size_t r = shared_.params.size(); r-- > 0;) {
    const ParameterInfo& p = shared_.params[r];
    if (p.count == 0) continue;
    Bucket* bucket = buckets_.empty() ? nullptr : buckets_.back().get();
    if (bucket == nullptr || bucket->group != p.group || bucket->dtype != p.dtype ||
        (bucket->count + p.count) * SizeOf(p.dtype) > limit) {
      buckets_.push_back(std::make_unique<Bucket>());
      bucket = buckets_.back().get();
      bucket->index = static_cast<int>(buckets_.size()) - 1;
      bucket->group = p.group;
      bucket->dtype = p.dtype;
      bucket->name =
          shared_.engine->Name(shared_.name + ".bucket" + std::to_string(bucket->index), true);
      shared_.bucket_names.push_back(bucket->name);
    }
    bucket->params.push_back(static_cast<int>(r));
    bucket->offsets.push_back(bucket->count);
    bucket->count += p.count;
    bucket_of_[r] = bucket;
  }
  for (auto& bucket : buckets_) {
    bucket->offsets.push_back(bucket->count);
    // This step's, the last one's until all neighbours released it, and one that waits for its
    // slot.
    for (int i = 0; i < 4; ++i) {
      bucket->steps.push_back(std::make_unique<BucketStep>(&shared_, bucket.get()));
    }
  }
}

Status DistributedOptimizerImpl::AllocateSlots() {
  const Config& config = shared_.engine->config();
  for (auto& bucket : buckets_) {
    const int64_t bytes = traits().payloads * bucket->count * SizeOf(bucket->dtype);
    for (int d = 0; d < Bucket::kDepth; ++d) {
      auto slot = shared_.engine->arena()->Allocate(bytes);
      if (!slot.ok()) return Located(slot.status());
      bucket->payload[d] = *std::move(slot);
      bytes_pinned_ += bytes;
    }
  }
  int64_t longest = std::max<int64_t>(config.tile_bytes, 64 * 8);
  if (const Codec* codec = shared_.plugin->codec(); codec != nullptr) {
    // Whole messages are decoded and consumed at once, and encoded into one slot.
    longest = std::max(longest, config.chunk_bytes);
    for (const auto& bucket : buckets_) {
      const int64_t n = std::min(bucket->count, config.chunk_bytes / SizeOf(bucket->dtype));
      const int64_t bytes = codec->MaxBytes(bucket->dtype, n);
      if (bytes > SlotBytes(config)) {
        return absl::InvalidArgumentError(
            "optimizer plugin '" + traits().name + "': its codec '" + codec->name() +
            "' makes up to " + std::to_string(bytes) + " bytes of " + std::to_string(n) +
            " elements, a message holds " + std::to_string(SlotBytes(config)));
      }
    }
  }
  shared_.zeros.resize(static_cast<size_t>(longest));
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::SetStep(int64_t step) {
  if (in_step_) {
    return absl::FailedPreconditionError(Where() + ": the step counter cannot be set to " +
                                         std::to_string(step) + " while a step is under way");
  }
  if (step < 0) {
    return absl::InvalidArgumentError(Where() + ": the step counter cannot be set to " +
                                      std::to_string(step) + ", it counts from 0");
  }
  if (has_early_ && step != step_) {
    return absl::FailedPreconditionError(Where() + ": the step counter cannot be set to " +
                                         std::to_string(step) +
                                         ", the payloads of this step have already left");
  }
  step_ = step;
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::SetTopology(std::shared_ptr<const TopologySequence> topology,
                                             int64_t from_step) {
  if (topology == nullptr) return absl::InvalidArgumentError(Where() + ": no topology");
  if (Status s = CheckSize(*topology); !s.ok()) return s;
  const int64_t next = step_ + (in_step_ || has_early_ ? 1 : 0);
  if (from_step < next) {
    return absl::InvalidArgumentError(
        Where() + ": a topology for step " + std::to_string(from_step) +
        " comes too late, the next step to plan is " + std::to_string(next));
  }
  if (!options_.allow_unstable) {
    if (Status s = CheckTopology(traits(), *topology); !s.ok()) return s;
  }
  topologies_[from_step] = std::move(topology);
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::CheckBinding(int param, const ParameterBinding& binding) const {
  if (shared_.params[static_cast<size_t>(param)].count == 0) return absl::OkStatus();
  if (binding.x == nullptr) return absl::InvalidArgumentError(Where(param) + ": x is null");
  for (size_t k = 0; k < traits().states.size(); ++k) {
    if (binding.state[k] != nullptr) continue;
    return absl::InvalidArgumentError(Where(param) + ": the state '" + traits().states[k] +
                                      "' is null; it must be as long as the parameter, and zero at "
                                      "the start");
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::CheckSize(const TopologySequence& topology) const {
  const int size = shared_.engine->place().size;
  if (topology.size() == size) return absl::OkStatus();
  return absl::InvalidArgumentError(Where() + ": the topology '" + topology.name() + "' has " +
                                    std::to_string(topology.size()) + " ranks, the job has " +
                                    std::to_string(size));
}

Status DistributedOptimizerImpl::UseTopologyOf(int64_t step) {
  const auto it = topologies_.upper_bound(step);
  std::shared_ptr<const TopologySequence> topology =
      it == topologies_.begin() ? shared_.engine->topology() : std::prev(it)->second;
  if (topology == topology_) return absl::OkStatus();
  if (Status s = CheckSize(*topology); !s.ok()) return s;
  if (Status s = CheckTopology(traits(), *topology); !s.ok()) {
    if (!options_.allow_unstable) return s;
    BLUEFOG_LOG(kWarning) << s.message() << " (allowed by allow_unstable)";
  }
  topology_ = std::move(topology);
  return absl::OkStatus();
}

// The hyper-parameters of a step are those of its first touch.
Status DistributedOptimizerImpl::CheckUnchanged(std::span<const Hyper> hypers) const {
  for (size_t g = 0; g < shared_.hypers.size(); ++g) {
    if (g < hypers.size() && hypers[g] == shared_.hypers[g]) continue;
    return absl::FailedPreconditionError(
        Where() + ": the hyper-parameters of group " + std::to_string(g) +
        " changed while the step was under way: " + ToString(traits(), shared_.hypers[g]) +
        " became " + (g < hypers.size() ? ToString(traits(), hypers[g]) : "absent") +
        ". Change them after step() and before backward(), or use overlap=False");
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::CheckHypers(std::span<const Hyper> hypers) const {
  for (const auto& bucket : buckets_) {
    if (static_cast<size_t>(bucket->group) >= hypers.size()) {
      return absl::InvalidArgumentError(traits().name + ": no hyper-parameters for group " +
                                        std::to_string(bucket->group));
    }
  }
  for (size_t g = 0; g < hypers.size(); ++g) {
    if (Status s = CheckHyper(traits(), hypers[g]); !s.ok()) {
      return absl::InvalidArgumentError(Where() + ", group " + std::to_string(g) + ": " +
                                        std::string(s.message()));
    }
  }
  return absl::OkStatus();
}

// The first touch of a step, or a later one.
Status DistributedOptimizerImpl::Open(std::span<const Hyper> hypers) {
  if (in_step_) return CheckUnchanged(hypers);
  if (Status s = Failure(); absl::IsUnavailable(s)) {
    return s;
  } else if (!s.ok()) {
    return Status(s.code(),
                  Where() +
                      ": the optimizer failed before, and parameters may be partly updated: " +
                      std::string(s.message()) +
                      ". Load a checkpoint on all ranks, or make a new optimizer there");
  }
  if (leaving_) {
    return absl::FailedPreconditionError(
        Where() + ": the end of the step before was not waited for; see WaitStep");
  }
  if (Status s = CheckHypers(hypers); !s.ok()) return s;
  if (!has_early_) {
    if (Status s = UseTopologyOf(step_); !s.ok()) return s;
  }
  in_step_ = true;
  begun_ = false;
  shared_.hypers.assign(hypers.begin(), hypers.end());
  shared_.hypers_no_decay = shared_.hypers;
  for (Hyper& h : shared_.hypers_no_decay) h.weight_decay = 0.0;
  std::fill(ready_.begin(), ready_.end(), false);
  const int n = static_cast<int>(buckets_.size());
  // Early payloads of this step were produced in the last one.
  if (!has_early_) {
    shared_.to_produce.store(n);
    shared_.produced.Reset();
    if (n == 0) shared_.produced.Set();
  }
  if (!delayed() && !has_early_) {
    shared_.to_consume.store(n);
    shared_.consumed.Reset();
    if (n == 0) shared_.consumed.Set();
  }
  for (auto& bucket : buckets_) {
    bucket->ready = 0;
    bucket->submitted = has_early_;
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::Failure() const {
  MutexLock lock(shared_.mu);
  return shared_.failure;
}

void DistributedOptimizerImpl::GiveUp(const Status& status) {
  shared_.Fail(status);
  const Topology graph = topology_->at(step_);
  const Neighborhood& around = graph.neighborhood(shared_.engine->place().rank);
  std::set<int> peers;
  for (const auto* edges : {&around.in, &around.out}) {
    for (const Edge& e : *edges) peers.insert(e.rank);
  }
  for (int r = 0; !traits().uses_topology && r < graph.size(); ++r) peers.insert(r);
  peers.erase(shared_.engine->place().rank);
  UnderTheLock([&](Executor& executor) {
    for (NameEntry* const name : shared_.bucket_names) {
      executor.Condemn(name, status, std::vector<int>(peers.begin(), peers.end()));
    }
  });
}

// What the plugin exchanges in a step: null on silent ones, else its one kind of exchange.
StatusOr<const Exchange*> DistributedOptimizerImpl::ExchangeOf(const StepPlan& exchanges) const {
  if (exchanges.empty()) return nullptr;
  const Exchange* const first = &*exchanges.begin();
  uint32_t payloads = 0;
  int named = 0;
  for (const Exchange& other : exchanges) {
    if (other.collective != first->collective || other.round != first->round) {
      return absl::UnimplementedError("optimizer plugin '" + traits().name +
                                      "' plans exchanges of different kinds in one step");
    }
    payloads |= other.payloads;
    named += std::popcount(other.payloads);
  }
  if (payloads != (1U << traits().payloads) - 1 || named != traits().payloads) {
    return absl::InvalidArgumentError(
        "optimizer plugin '" + traits().name + "' has " + std::to_string(traits().payloads) +
        " payloads; a step that exchanges must name each of them once");
  }
  if (shared_.plugin->codec() != nullptr && first->collective != Collective::kNeighborAllreduce) {
    return absl::InvalidArgumentError("optimizer plugin '" + traits().name +
                                      "': a codec goes with neighbor_allreduce only");
  }
  return first;
}

// Where averages go that are not consumed tile by tile.
Status DistributedOptimizerImpl::AllocateMixed(Bucket& bucket) {
  const int64_t bytes = traits().payloads * bucket.count * SizeOf(bucket.dtype);
  for (auto& mixed : bucket.mixed) {
    if (mixed != nullptr) continue;
    auto memory = shared_.engine->arena()->Allocate(bytes);
    if (!memory.ok()) return Located(memory.status());
    mixed = *std::move(memory);
    bytes_pinned_ += bytes;
  }
  return absl::OkStatus();
}

BucketStep* DistributedOptimizerImpl::FreeStepOf(Bucket& bucket) {
  for (auto& s : bucket.steps) {
    if (!s->in_use()) return s.get();
  }
  bucket.steps.push_back(std::make_unique<BucketStep>(&shared_, &bucket));
  return bucket.steps.back().get();
}

Status DistributedOptimizerImpl::SubmitBucket(Bucket& bucket, int64_t step, bool consume_open) {
  const control::Place& place = shared_.engine->place();
  const Hyper& hyper = shared_.hypers[static_cast<size_t>(bucket.group)];
  const StatusOr<StepPlan> exchanges =
      Guarded([&] { return traits().name + ", step " + std::to_string(step); },
              [&]() -> StatusOr<StepPlan> { return shared_.plugin->Plan(step, hyper); });
  if (!exchanges.ok()) return exchanges.status();
  const StatusOr<const Exchange*> exchange = ExchangeOf(*exchanges);
  if (!exchange.ok()) return exchange.status();
  collective::PluginPlan plugin;
  plugin.payloads = traits().payloads;
  plugin.measure = traits().measure_scope == MeasureScope::kParameter;
  plugin.consume = !delayed();
  plugin.fuse = !plugin.measure && plugin.consume;
  std::optional<Topology> graph;
  Planner::Request request;
  request.op = Op::kOptimizer;
  request.count = bucket.count;
  request.element_bytes = SizeOf(bucket.dtype);
  request.plugin = &plugin;
  request.silent = *exchange == nullptr;
  StableHash hash;
  hash.Add(step).Add(hyper.lr).Add(HashOfRest(traits(), hyper));
  if (*exchange != nullptr) {
    request.collective = (*exchange)->collective;
    hash.Add((*exchange)->collective).Add((*exchange)->round);
    graph = topology_->at((*exchange)->round);
    request.neighborhood = &graph->neighborhood(place.rank);
  }
  StatusOr<std::shared_ptr<const Plan>> plan = shared_.engine->planner().Get(request);
  if (!plan.ok()) return plan.status();
  if ((*plan)->schedule.output_count > 0) {
    if (Status s = AllocateMixed(bucket); !s.ok()) return s;
  }
  StepContext ctx;
  ctx.step = step;
  ctx.dtype = bucket.dtype;
  ctx.rank = place.rank;
  ctx.size = place.size;
  ctx.exchanged = *exchange != nullptr;
  BucketStep* const free = FreeStepOf(bucket);
  free->Begin(ctx, *std::move(plan), delayed() && has_delayed_, delayed() || early(), consume_open,
              hash.value());
  bucket.current = free;
  bucket.submitted = true;
  shared_.engine->Run([free](Executor& executor) { free->Start(&executor); });
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::Ready(int param, const ParameterBinding& binding,
                                       std::span<const Hyper> hypers) {
  if (param < 0 || static_cast<size_t>(param) >= shared_.params.size()) {
    return absl::InvalidArgumentError(traits().name + ": no parameter number " +
                                      std::to_string(param));
  }
  if (Status s = shared_.engine->CheckUsable(traits().name); !s.ok()) return s;
  if (Status s = CheckBinding(param, binding); !s.ok()) return s;
  if (begun_ && in_step_) {
    return absl::FailedPreconditionError(Where(param) + ": ready after the step was begun");
  }
  if (Status s = Open(hypers); !s.ok()) return s;
  if (ready_[static_cast<size_t>(param)]) {
    return absl::FailedPreconditionError(
        Where(param) +
        ": a second gradient in one step. For gradient accumulation use no_sync() around all "
        "backward passes but the last, or overlap=False");
  }
  Bucket* bucket = bucket_of_[static_cast<size_t>(param)];
  ready_[static_cast<size_t>(param)] = true;
  if (bucket == nullptr) return absl::OkStatus();
  if (has_early_ && shared_.bindings[static_cast<size_t>(param)].x != binding.x) {
    return absl::FailedPreconditionError(
        Where(param) + ": the parameter moved in memory after its payload had left");
  }
  if (shared_.engine->trace().on()) {
    shared_.engine->trace().Instant(TraceTrack::kCaller, "GRADIENT_READY",
                                    shared_.params[static_cast<size_t>(param)].name, NowNs(),
                                    {"step", step_});
  }
  shared_.bindings[static_cast<size_t>(param)] = binding;
  if (++bucket->ready < static_cast<int>(bucket->params.size())) return absl::OkStatus();
  if (traits().measure_scope == MeasureScope::kModel) return absl::OkStatus();
  const bool consume_open = traits().consume != ConsumeTrigger::kStep;
  if (bucket->submitted) {  // Early: what was waiting is the gradient.
    BucketStep* current = bucket->current;
    if (consume_open) {
      shared_.engine->Run([current](Executor& executor) { current->OpenConsume(&executor); });
    }
    return absl::OkStatus();
  }
  return SubmitBucket(*bucket, step_, consume_open);
}

void DistributedOptimizerImpl::MeasureModel() {
  const auto measures = static_cast<size_t>(traits().measures);
  shared_.model_measure.assign(measures, 0.0);
  std::vector<double> partial(measures);
  StepContext ctx;
  ctx.step = step_;
  ctx.rank = shared_.engine->place().rank;
  ctx.size = shared_.engine->place().size;
  // In registration order and by chunks, so that the sum does not depend on buckets.
  for (size_t i = 0; i < shared_.params.size(); ++i) {
    const ParameterInfo& p = shared_.params[i];
    const int64_t es = SizeOf(p.dtype);
    const int64_t chunk = static_cast<int64_t>(shared_.zeros.size()) / es;
    ctx.dtype = p.dtype;
    for (int64_t begin = 0; begin < p.count; begin += chunk) {
      const ParameterBinding& b = shared_.bindings[i];
      Segment s;
      s.param = static_cast<int>(i);
      s.offset = begin;
      s.n = std::min(chunk, p.count - begin);
      s.x = static_cast<std::byte*>(b.x) + begin * es;
      s.g = b.g == nullptr ? shared_.zeros.data() : static_cast<const std::byte*>(b.g) + begin * es;
      s.hyper = &shared_.hypers[static_cast<size_t>(p.group)];
      std::fill(partial.begin(), partial.end(), 0.0);
      s.measure = partial.data();
      shared_.plugin->Measure(ctx, {&s, 1});
      for (size_t m = 0; m < measures; ++m) shared_.model_measure[m] += partial[m];
    }
  }
}

Status DistributedOptimizerImpl::BeginStep(std::span<const ParameterBinding> bindings,
                                           std::span<const Hyper> hypers) {
  if (Status s = shared_.engine->CheckUsable(traits().name); !s.ok()) return s;
  if (begun_ && in_step_) {
    return absl::FailedPreconditionError(traits().name + ": the step was begun already");
  }
  if (bindings.size() != shared_.params.size()) {
    return absl::InvalidArgumentError(traits().name + ": " + std::to_string(bindings.size()) +
                                      " bindings for " + std::to_string(shared_.params.size()) +
                                      " parameters");
  }
  for (size_t i = 0; i < bindings.size(); ++i) {
    if (in_step_ && ready_[i]) continue;
    if (Status s = CheckBinding(static_cast<int>(i), bindings[i]); !s.ok()) return s;
  }
  if (Status s = Open(hypers); !s.ok()) return s;
  for (size_t i = 0; i < bindings.size(); ++i) {
    if (ready_[i]) continue;
    if (has_early_ && bucket_of_[i] != nullptr && shared_.bindings[i].x != bindings[i].x) {
      return absl::FailedPreconditionError(
          Where(static_cast<int>(i)) +
          ": the parameter moved in memory after its payload had left");
    }
    shared_.bindings[i] = bindings[i];
  }
  begun_ = true;
  if (traits().measure_scope == MeasureScope::kModel) {
    Status s = Guarded([&] { return traits().name + ", step " + std::to_string(step_); },
                       [&] {
                         MeasureModel();
                         return absl::OkStatus();
                       });
    if (!s.ok()) {
      in_step_ = begun_ = false;
      GiveUp(s);
      return s;
    }
  }
  for (auto& bucket : buckets_) {
    const bool complete = bucket->ready == static_cast<int>(bucket->params.size()) &&
                          traits().measure_scope != MeasureScope::kModel;
    if (!bucket->submitted) {
      if (Status s = SubmitBucket(*bucket, step_, true); !s.ok()) {
        in_step_ = begun_ = false;  // There is nothing to wait for.
        GiveUp(s);
        return s;
      }
    } else if (!complete || traits().consume == ConsumeTrigger::kStep) {
      BucketStep* current = bucket->current;
      shared_.engine->Run([current](Executor& executor) { current->OpenConsume(&executor); });
    }
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::WaitStep(std::chrono::nanoseconds timeout) {
  const auto wait = [&](Completion& completion) -> Status {
    if (shared_.engine->Wait(completion, timeout, title_, {"step", step_})) return absl::OkStatus();
    return absl::DeadlineExceededError(Where() + " is still under way");
  };
  if (!leaving_) {
    if (!in_step_ || !begun_) {
      return absl::FailedPreconditionError(Where() + ": no step was begun");
    }
    if (Status s = wait(delayed() ? shared_.produced : shared_.consumed); !s.ok()) return s;
    in_step_ = begun_ = false;
    has_early_ = false;
    has_delayed_ = delayed();
    ++step_;
    if (Status s = Failure(); !s.ok()) return s;
    if (!early()) return absl::OkStatus();
    if (Status s = SubmitEarly(); !s.ok()) {
      GiveUp(s);
      return absl::OkStatus();
    }
    has_early_ = leaving_ = true;
  }
  if (Status s = wait(shared_.produced); !s.ok()) return s;
  leaving_ = false;
  // A failure now is the next step's, which may never come: a rank that has ended fails its
  // neighbours'.
  return absl::OkStatus();
}

// The payloads of the next step are known: let them leave.
Status DistributedOptimizerImpl::SubmitEarly() {
  const int n = static_cast<int>(buckets_.size());
  shared_.to_produce.store(n);
  shared_.to_consume.store(n);
  shared_.produced.Reset();
  shared_.consumed.Reset();
  if (n == 0) {
    shared_.produced.Set();
    shared_.consumed.Set();
  }
  if (Status s = UseTopologyOf(step_); !s.ok()) return s;
  for (auto& bucket : buckets_) {
    if (Status s = SubmitBucket(*bucket, step_, false); !s.ok()) return s;
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::Step(std::span<const ParameterBinding> bindings,
                                      std::span<const Hyper> hypers) {
  if (Status s = BeginStep(bindings, hypers); !s.ok()) return s;
  return WaitStep(std::chrono::nanoseconds::max());
}

}  // namespace

StatusOr<std::unique_ptr<DistributedOptimizer>> DistributedOptimizer::Create(
    Communicator* comm, DistributedOptimizerOptions options) {
  auto made = std::make_unique<DistributedOptimizerImpl>(comm->engine(), std::move(options));
  if (Status s = made->Init(); !s.ok()) return s;
  return std::unique_ptr<DistributedOptimizer>(std::move(made));
}

}  // namespace bluefog
