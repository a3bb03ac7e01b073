// One step of the optimizer: gradients that become ready, buckets that are submitted, gates that
// open, what the caller waits for.
#include <algorithm>
#include <bit>
#include <optional>
#include <utility>

#include <bluefog/elementwise.h>

#include "base/clock.h"
#include "base/guarded.h"
#include "base/hash.h"
#include "engine/distributed_optimizer_impl.h"
#include "engine/hyper.h"

namespace bluefog {

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
  if (delayed()) {
    first_topology_ = topology_;
    if (Status s = UseTopologyOf(step_ + 1); !s.ok()) return s;
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
    shared_.to_produce.store(delayed() && !has_delayed_ ? 2 * n : n);
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
  const std::vector<int> peers =
      traits().uses_topology && !over_machines()
          ? PeersOf(topology_->at(step_ + (delayed() ? 1 : 0)).neighborhood(node()))
          : shared_.engine->others();
  UnderTheLock([&](Executor& executor) {
    for (NameEntry* const name : shared_.bucket_names) executor.Condemn(name, status, peers);
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
  if (shared_.plugin->codec() != nullptr &&
      (first->collective != Collective::kNeighborAllreduce || over_machines())) {
    return absl::InvalidArgumentError("optimizer plugin '" + traits().name +
                                      "': a codec goes with neighbor_allreduce only");
  }
  return first;
}

// Where averages go that are not consumed tile by tile, and what an exchange keeps on its way.
Status DistributedOptimizerImpl::AllocateKept(Bucket& bucket,
                                              const collective::Schedule& schedule) {
  const auto allocate = [&](auto& slots, int64_t count) -> Status {
    const int64_t bytes = traits().payloads * count * SizeOf(bucket.dtype);
    for (auto& slot : slots) {
      if (slot != nullptr) continue;
      auto memory = shared_.engine->arena()->Allocate(bytes);
      if (!memory.ok()) return Located(memory.status());
      slot = *std::move(memory);
      bytes_pinned_ += bytes;
    }
    return absl::OkStatus();
  };
  if (schedule.output_count > 0) {
    if (Status s = allocate(bucket.mixed, bucket.count); !s.ok()) return s;
  }
  if (schedule.scratch_count <= bucket.scratch_count) return absl::OkStatus();
  bucket.scratch = {};  // The operations under way keep theirs.
  bucket.scratch_count = schedule.scratch_count;
  return allocate(bucket.scratch, bucket.scratch_count);
}

BucketStep* DistributedOptimizerImpl::FreeStepOf(Bucket& bucket) {
  for (auto& s : bucket.steps) {
    if (!s->in_use()) return s.get();
  }
  bucket.steps.push_back(std::make_unique<BucketStep>(&shared_, &bucket));
  return bucket.steps.back().get();
}

Status DistributedOptimizerImpl::SubmitBucket(Bucket& bucket, bool consume_open) {
  using Mode = BucketStep::Mode;
  if (!delayed()) {
    return SubmitExchange(bucket, step_, *topology_, early() ? Mode::kEarly : Mode::kAtOnce,
                          consume_open);
  }
  if (!has_delayed_) {
    if (Status s = SubmitExchange(bucket, step_, *first_topology_, Mode::kModel, true); !s.ok()) {
      return s;
    }
  }
  return SubmitExchange(bucket, step_ + 1, *topology_, Mode::kUpdated, true);
}

Status DistributedOptimizerImpl::SubmitExchange(Bucket& bucket, int64_t step,
                                                const TopologySequence& topology,
                                                BucketStep::Mode mode, bool consume_open) {
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
    const bool average = (*exchange)->collective == Collective::kNeighborAllreduce;
    request.collective = average ? options_.communication : (*exchange)->collective;
    request.coded = bucket.codec != nullptr && request.collective == Collective::kNeighborAllreduce;
    hash.Add(request.collective).Add((*exchange)->round);
    graph = topology.at((*exchange)->round);
    request.neighborhood = &graph->neighborhood(node());
  }
  StatusOr<std::shared_ptr<const Plan>> plan = shared_.engine->planner().Get(request);
  if (!plan.ok()) return plan.status();
  if (Status s = AllocateKept(bucket, (*plan)->schedule); !s.ok()) return s;
  StepContext ctx;
  ctx.step = step;
  ctx.dtype = bucket.dtype;
  ctx.rank = place.rank;
  ctx.size = place.size;
  ctx.exchanged = *exchange != nullptr;
  BucketStep* const free = FreeStepOf(bucket);
  free->Begin(ctx, *std::move(plan), mode, consume_open, hash.value());
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
  return SubmitBucket(*bucket, consume_open);
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
      if (Status s = SubmitBucket(*bucket, true); !s.ok()) {
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
    if (Status s = SubmitBucket(*bucket, false); !s.ok()) return s;
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::Synchronize(std::span<const ParameterBinding> bindings,
                                             std::chrono::nanoseconds timeout) {
  if (in_step_) {
    return absl::FailedPreconditionError(Where() + ": synchronized while a step is under way");
  }
  if (!has_delayed_) return absl::OkStatus();
  if (Status s = shared_.engine->CheckUsable(traits().name); !s.ok()) return s;
  if (bindings.size() != shared_.params.size()) {
    return absl::InvalidArgumentError(Where() + ": " + std::to_string(bindings.size()) +
                                      " bindings for " + std::to_string(shared_.params.size()) +
                                      " parameters");
  }
  for (size_t i = 0; i < bindings.size(); ++i) {
    if (Status s = CheckBinding(static_cast<int>(i), bindings[i]); !s.ok()) return s;
  }
  shared_.quiet.Reset();
  if (shared_.in_flight.load() > 0 &&
      !shared_.engine->Wait(shared_.quiet, timeout, title_, {"step", step_})) {
    return absl::DeadlineExceededError(Where() + " is still under way");
  }
  if (Status s = Failure(); !s.ok()) return s;
  const auto slot = static_cast<size_t>(step_ % Bucket::kDepth);
  for (auto& bucket : buckets_) {
    const int64_t es = SizeOf(bucket->dtype);
    std::byte* average = bucket->mixed[slot].get();
    elementwise::Sub(bucket->dtype, bucket->count, average, average, bucket->payload[slot].get());
    for (const int p : bucket->params) {
      const int64_t n = shared_.params[static_cast<size_t>(p)].count;
      void* x = bindings[static_cast<size_t>(p)].x;
      elementwise::Add(bucket->dtype, n, x, x, average);
      average += n * es;
    }
  }
  has_delayed_ = false;
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::Step(std::span<const ParameterBinding> bindings,
                                      std::span<const Hyper> hypers) {
  if (Status s = BeginStep(bindings, hypers); !s.ok()) return s;
  return WaitStep(std::chrono::nanoseconds::max());
}

}  // namespace bluefog
