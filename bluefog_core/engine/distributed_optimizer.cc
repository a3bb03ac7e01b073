// The optimizer's life: agreement of all ranks, buckets and slots, what may be changed between
// steps, its end.
#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "engine/agreement.h"
#include "engine/codec.h"
#include "engine/distributed_optimizer_impl.h"
#include "engine/hyper.h"

namespace bluefog {
namespace {

/// How long the end of an optimizer waits for neighbours that have not reached its last step.
constexpr int64_t kLingerNs = 10'000'000'000;

}  // namespace

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

// What this rank needs no other for.
Status DistributedOptimizerImpl::Prepare() {
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
  if (Status s = CheckMessages(); !s.ok()) return s;
  if (Status s = CheckDelayed(); !s.ok()) return s;
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
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::CheckMessages() const {
  if (!options_.message_dtype.has_value()) return absl::OkStatus();
  const std::string what = std::string("message_dtype=") + NameOf(*options_.message_dtype);
  if (!traits().uses_topology) {
    return absl::InvalidArgumentError(
        what + " is for messages to neighbours; " + traits().name +
        " averages over all ranks, where each sum would be rounded again");
  }
  if (over_machines()) {
    return absl::UnimplementedError(what +
                                    " is not there yet for averages over machines: use "
                                    "communication=neighbor_allreduce, or leave it out");
  }
  if (const Codec* codec = shared_.plugin->codec(); codec != nullptr) {
    return absl::InvalidArgumentError(what + ": the messages of " + traits().name +
                                      " are coded by '" + codec->name() + "' already");
  }
  for (const ParameterInfo& p : options_.params) {
    if (Status s = MessageCodec(p.dtype, *options_.message_dtype).status(); !s.ok()) {
      return absl::InvalidArgumentError("parameter '" + p.name + "': " + std::string(s.message()));
    }
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::CheckDelayed() const {
  if (!delayed()) return absl::OkStatus();
  if (over_machines()) {
    return absl::UnimplementedError(
        "delayed mode is not there yet for averages over machines: use "
        "communication=neighbor_allreduce, or overlap=True");
  }
  const Traits& t = traits();
  if (t.delayed.empty()) {
    return absl::InvalidArgumentError(t.name + " has no delayed mode" +
                                      (t.delayed_reason.empty() ? "" : ": " + t.delayed_reason));
  }
  if (t.payloads != 1 || t.payload_time != PayloadTime::kGradient ||
      t.consume != ConsumeTrigger::kCombined || t.measure_scope != MeasureScope::kNone) {
    return absl::InvalidArgumentError("optimizer plugin '" + t.name +
                                      "': delayed mode is for one payload that needs the "
                                      "gradient, consumed when combined, without measures");
  }
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::Init() {
  shared_.name = options_.name.empty() ? shared_.engine->NextOptimizer() : options_.name;
  if (Status s = Prepare(); !s.ok()) {
    DeclineOptimizer(shared_.engine, shared_.name, s);
    return s;
  }
  // Agreement first: buckets of different lengths would only say that something differs.
  std::string settings = options_.agreed;
  const auto add = [&](const std::string& text) {
    settings += (settings.empty() ? "" : ", ") + text;
  };
  if (options_.message_dtype) add(std::string("message_dtype=") + NameOf(*options_.message_dtype));
  if (delayed()) add("delayed");
  if (over_machines()) add("communication=hierarchical_neighbor_allreduce");
  if (Status s = AgreeOnOptimizer(shared_.engine, shared_.name, traits().name, settings, step_,
                                  shared_.params, options_.interrupted);
      !s.ok()) {
    return s;
  }
  Status made = UseTopologyOf(step_);
  if (made.ok()) {
    MakeBuckets();
    made = AllocateSlots();
  }
  return AgreeOnSuccess(shared_.engine, shared_.name, made, options_.interrupted);
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
  const auto allocate = [&](int64_t bytes, auto* slots) -> Status {
    for (auto& slot : *slots) {
      auto memory = shared_.engine->arena()->Allocate(bytes);
      if (!memory.ok()) return Located(memory.status());
      slot = *std::move(memory);
      bytes_pinned_ += bytes;
    }
    return absl::OkStatus();
  };
  bool whole_messages = false;
  for (auto& bucket : buckets_) {
    const int64_t es = SizeOf(bucket->dtype);
    if (Status s = allocate(traits().payloads * bucket->count * es, &bucket->payload); !s.ok()) {
      return s;
    }
    bucket->codec = shared_.plugin->codec();
    if (options_.message_dtype.has_value()) {
      bucket->codec = *MessageCodec(bucket->dtype, *options_.message_dtype);
    }
    if (bucket->codec == nullptr) continue;
    const Codec& codec = *bucket->codec;
    const int64_t chunk = std::max<int64_t>(1, config.chunk_bytes / es);
    if (const int64_t bytes = codec.MaxBytes(bucket->dtype, chunk); bytes > SlotBytes(config)) {
      return absl::InvalidArgumentError(
          "optimizer plugin '" + traits().name + "': its codec '" + codec.name() +
          "' makes up to " + std::to_string(bytes) + " bytes of " + std::to_string(chunk) +
          " elements, a message holds " + std::to_string(SlotBytes(config)));
    }
    bucket->coded_stride = CodedStride(codec, bucket->dtype, chunk);
    bucket->coded_bytes = CodedBytes(codec, bucket->dtype, bucket->count, chunk);
    if (Status s = allocate(traits().payloads * bucket->coded_bytes, &bucket->coded); !s.ok()) {
      return s;
    }
    whole_messages = whole_messages || codec.ElementBytes() == 0;
  }
  // Stands for as many elements as are consumed at once.
  int64_t longest = std::max<int64_t>(config.tile_bytes, 64 * 8);
  if (whole_messages) longest = std::max(longest, config.chunk_bytes);
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
  has_delayed_ = false;  // The averages under way are of another model; this one is sent anew.
  return absl::OkStatus();
}

Status DistributedOptimizerImpl::SetTopology(std::shared_ptr<const TopologySequence> topology,
                                             int64_t from_step) {
  if (topology == nullptr) return absl::InvalidArgumentError(Where() + ": no topology");
  if (Status s = CheckSize(*topology); !s.ok()) return s;
  const int64_t next =
      step_ + (in_step_ || has_early_ ? 1 : 0) + (delayed() && (in_step_ || has_delayed_) ? 1 : 0);
  if (from_step < next) {
    return absl::InvalidArgumentError(
        Where() + ": a topology for step " + std::to_string(from_step) +
        " comes too late, the next step to plan is " + std::to_string(next));
  }
  if (!options_.allow_unstable) {
    if (Status s = CheckGraph(*topology); !s.ok()) return s;
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
  const int size =
      over_machines() ? shared_.engine->placement().hosts() : shared_.engine->place().size;
  if (topology.size() == size) return absl::OkStatus();
  return absl::InvalidArgumentError(
      Where() + ": the topology '" + topology.name() + "' has " + std::to_string(topology.size()) +
      (over_machines() ? " machines" : " ranks") + ", the job has " + std::to_string(size));
}

Status DistributedOptimizerImpl::CheckGraph(const TopologySequence& topology) const {
  if (!over_machines()) return CheckTopology(traits(), topology);
  const StatusOr<TopologySequence> ranks = OverRanks(topology, shared_.engine->placement());
  return ranks.ok() ? CheckTopology(traits(), *ranks) : ranks.status();
}

Status DistributedOptimizerImpl::UseTopologyOf(int64_t step) {
  const auto it = topologies_.upper_bound(step);
  std::shared_ptr<const TopologySequence> topology =
      it != topologies_.begin() ? std::prev(it)->second
      : over_machines()         ? shared_.engine->topology(Engine::Nodes::kMachines)
                                : shared_.engine->topology();
  if (topology == nullptr) {
    return absl::FailedPreconditionError(
        Where() +
        ": no topology of machines was set; use set_machine_topology first, or give the "
        "optimizer one");
  }
  if (topology == topology_) return absl::OkStatus();
  if (Status s = CheckSize(*topology); !s.ok()) return s;
  if (Status s = CheckGraph(*topology); !s.ok()) {
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

StatusOr<std::unique_ptr<DistributedOptimizer>> DistributedOptimizer::Create(
    Communicator* comm, DistributedOptimizerOptions options) {
  auto made = std::make_unique<DistributedOptimizerImpl>(comm->engine(), std::move(options));
  if (Status s = made->Init(); !s.ok()) return s;
  return std::unique_ptr<DistributedOptimizer>(std::move(made));
}

void DistributedOptimizer::NotCreated(Communicator* comm, const std::string& why,
                                      std::string name) {
  Engine* const engine = comm->engine();
  if (name.empty()) name = engine->NextOptimizer();
  DeclineOptimizer(engine, name, absl::InvalidArgumentError(why));
}

}  // namespace bluefog
