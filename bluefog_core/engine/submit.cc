// The caller's side of an operation: what can be wrong with a call is found here, on the caller's
// thread.
#include <algorithm>
#include <cmath>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "base/failpoint.h"
#include "base/hash.h"
#include "base/log.h"
#include "engine/codec.h"
#include "engine/engine.h"

namespace bluefog {

const char* NameOf(Op op) {
  switch (op) {
    case Op::kNeighborAllreduce:
      return "neighbor_allreduce";
    case Op::kHierarchicalNeighborAllreduce:
      return "hierarchical_neighbor_allreduce";
    case Op::kAllreduce:
      return "allreduce";
    case Op::kBroadcast:
      return "broadcast";
    case Op::kAllgather:
      return "allgather";
    case Op::kBarrier:
      return "barrier";
    case Op::kOptimizer:
      return "optimizer";
  }
  return "?";
}

namespace {

bool AlongGraph(Op op) {
  return op == Op::kNeighborAllreduce || op == Op::kHierarchicalNeighborAllreduce;
}
Engine::Nodes NodesOf(Op op) {
  return op == Op::kHierarchicalNeighborAllreduce ? Engine::Nodes::kMachines
                                                  : Engine::Nodes::kRanks;
}

/// What partners compare, and errors name: see WireHeader.
int ValueOf(const OpSpec& spec) {
  switch (spec.op) {
    case Op::kBroadcast:
      return spec.root;
    case Op::kNeighborAllreduce:
      return static_cast<int>(spec.message_dtype.value_or(spec.input.dtype));
    case Op::kAllreduce:
      return (spec.average ? kAverage : 0) + (spec.local ? kLocal : 0);
    default:
      return 0;
  }
}

/// Blocks of all ranks along the first dimension, which is the outermost in memory.
TensorView Gathered(const TensorView& input, int ranks) {
  TensorView output = input;
  output.count *= ranks;
  if (output.ndim == 0) {
    output.ndim = 1;
    output.strides[0] = 1;
    output.shape[0] = output.count;
    return output;
  }
  output.shape[0] *= ranks;
  int64_t stride = 1;
  for (int d = output.ndim - 1; d >= 0; --d) {
    output.strides[d] = stride;
    stride *= output.shape[d];
  }
  return output;
}

/// The name is this call's own from the moment it was found free, also beside other threads.
class Claim {
 public:
  Claim() = default;
  ~Claim() {
    if (name_ != nullptr) name_->in_flight.store(false, std::memory_order_release);
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  /// False if it is in flight.
  bool Take(NameEntry* name) {
    if (name->in_flight.exchange(true, std::memory_order_acquire)) return false;
    name_ = name;
    return true;
  }
  /// From now on it is the operation's.
  void Submitted() { name_ = nullptr; }

 private:
  NameEntry* name_ = nullptr;
};

}  // namespace

Status Engine::Validate(const OpSpec& spec) const {
  const auto bad = [&](const std::string& text) { return absl::InvalidArgumentError(text); };
  if (spec.input.device.type != DeviceType::kCpu) return bad("only CPU tensors are supported");
  if (spec.input.count < 0) return bad("negative element count");
  if (spec.input.data == nullptr && spec.input.count > 0) return bad("the tensor has no data");
  // A barrier has no tensor, and what stands there by default is not one.
  if (Status dense = spec.input.CheckDense(); !dense.ok() && spec.op != Op::kBarrier) {
    return bad("input " + std::string(dense.message()));
  }
  const bool floating = IsFloating(spec.input.dtype);
  if (AlongGraph(spec.op) && !floating) {
    return bad(std::string("needs a floating-point tensor, got ") + NameOf(spec.input.dtype));
  }
  if (spec.message_dtype.has_value()) {
    if (spec.op != Op::kNeighborAllreduce) {
      return bad(
          std::string("message_dtype=") + NameOf(*spec.message_dtype) +
          " is for neighbor_allreduce: what others pass on would be rounded again and again");
    }
    if (Status s = MessageCodec(spec.input.dtype, *spec.message_dtype).status(); !s.ok()) return s;
  }
  if (spec.op == Op::kAllreduce && !floating &&
      (spec.average || (spec.input.dtype != DType::kInt32 && spec.input.dtype != DType::kInt64))) {
    return bad(std::string("cannot ") + (spec.average ? "average " : "sum ") +
               NameOf(spec.input.dtype) +
               " tensors; use average=False with int32 or int64, or a "
               "floating-point tensor");
  }
  if (spec.op == Op::kBroadcast && (spec.root < 0 || spec.root >= place_.size)) {
    return bad("root rank " + std::to_string(spec.root) + " is outside 0.." +
               std::to_string(place_.size - 1));
  }
  constexpr const char* kGathered =
      " is not contiguous: blocks are gathered along the first dimension";
  if (spec.op == Op::kAllgather && !spec.input.IsContiguous()) {
    return bad("input " + spec.input.ToString() + kGathered);
  }
  if (spec.output.data != nullptr) {
    const int64_t count = spec.input.count * (spec.op == Op::kAllgather ? place_.size : 1);
    if (spec.output.count != count || spec.output.dtype != spec.input.dtype) {
      return bad("output is " + spec.output.ToString() + ", expected " + std::to_string(count) +
                 " elements of " + NameOf(spec.input.dtype));
    }
    if (Status dense = spec.output.CheckDense(); !dense.ok()) {
      return bad("output " + std::string(dense.message()));
    }
    // Elements are moved as they lie in memory.
    if (spec.op == Op::kAllgather) {
      if (!spec.output.IsContiguous()) return bad("output " + spec.output.ToString() + kGathered);
    } else if (spec.output.LayoutHash() != spec.input.LayoutHash()) {
      return bad("output is " + spec.output.ToString() + ", input is " + spec.input.ToString() +
                 ": shape and memory order must be equal");
    }
    const auto* a = static_cast<const std::byte*>(spec.input.data);
    const auto* b = static_cast<const std::byte*>(spec.output.data);
    const bool overlap = a < b + spec.output.bytes() && b < a + spec.input.bytes();
    if (overlap && (a != b || spec.op == Op::kAllgather)) {
      return bad("input and output overlap without being the same tensor");
    }
  }
  return absl::OkStatus();
}

StatusOr<Neighborhood> Engine::CallNeighborhood(const OpSpec& spec, const Neighborhood* graph,
                                                std::vector<double>* send_weights) const {
  const MixingWeights& call = *spec.weights;
  const bool machines = spec.op == Op::kHierarchicalNeighborAllreduce;
  const int self = machines ? machine() : place_.rank;
  const int nodes = machines ? placement().hosts() : place_.size;
  const std::string node = machines ? "machine " : "rank ";
  const char* const sources = machines ? "src_machine_weights" : "src_weights";
  const char* const destinations = machines ? "dst_machine_weights" : "dst_weights";
  const auto bad = [&](const std::string& text) {
    return absl::InvalidArgumentError(
        "rank " + std::to_string(place_.rank) + ": " + NameOf(spec.op) +
        (spec.name.empty() ? "" : " '" + spec.name + "'") + ": " + text);
  };
  if (machines && !call.dst.has_value()) {
    return bad(std::string(sources) + " is given without " + destinations + "; give both");
  }
  if (!std::isfinite(call.self_weight)) {
    return bad("self_weight is " + std::to_string(call.self_weight) + "; weights must be finite");
  }
  const auto check = [&](const std::vector<Edge>& edges, const char* which) -> Status {
    std::set<int> seen;
    for (const Edge& e : edges) {
      if (!std::isfinite(e.weight)) {
        return bad(which + (" gives " + node) + std::to_string(e.rank) + " the weight " +
                   std::to_string(e.weight) + "; weights must be finite");
      }
      if (e.rank < 0 || e.rank >= nodes) {
        return bad(which + (" names " + node) + std::to_string(e.rank) + ", outside 0.." +
                   std::to_string(nodes - 1));
      }
      if (e.rank == self) return bad(which + (" names this " + node) + "itself");
      if (!seen.insert(e.rank).second) {
        return bad(which + (" names " + node) + std::to_string(e.rank) + " twice");
      }
    }
    return absl::OkStatus();
  };
  if (Status s = check(call.src, sources); !s.ok()) return s;
  Neighborhood out;
  out.self_weight = call.self_weight;
  out.in = call.src;
  const auto by_rank = [](const Edge& a, const Edge& b) { return a.rank < b.rank; };
  if (call.dst.has_value()) {
    if (Status s = check(*call.dst, destinations); !s.ok()) return s;
    out.out = *call.dst;
    std::sort(out.out.begin(), out.out.end(), by_rank);
    for (const Edge& e : out.out) send_weights->push_back(e.weight);
  } else {
    out.out = graph->out;
    for (const Edge& e : graph->in) {
      const bool given = std::any_of(call.src.begin(), call.src.end(),
                                     [&](const Edge& s) { return s.rank == e.rank; });
      // It sends all the same; what it sends is taken and left out.
      if (!given) out.in.push_back({e.rank, 0.0});
    }
    for (const Edge& e : call.src) {
      const bool known = std::any_of(graph->in.begin(), graph->in.end(),
                                     [&](const Edge& g) { return g.rank == e.rank; });
      if (!known) {
        return bad("src_weights names rank " + std::to_string(e.rank) +
                   ", which is not an in-neighbour; give dst_weights too for a dynamic call");
      }
    }
  }
  std::sort(out.in.begin(), out.in.end(), by_rank);
  const double even = 1.0 / static_cast<double>(call.src.size() + 1);
  out.uniform =
      out.in.size() == call.src.size() && out.self_weight == even &&
      std::all_of(out.in.begin(), out.in.end(), [&](const Edge& e) { return e.weight == even; });
  return out;
}

std::vector<int> Engine::others() const {
  std::vector<int> ranks;
  for (int r = 0; r < place_.size; ++r) {
    if (r != place_.rank) ranks.push_back(r);
  }
  return ranks;
}

std::vector<int> Engine::PeersOf(const OpSpec& spec, int64_t round) const {
  if (spec.op == Op::kAllreduce && spec.local) {
    std::vector<int> ranks = placement().RanksByHost()[static_cast<size_t>(machine())];
    std::erase(ranks, place_.rank);
    return ranks;
  }
  if (spec.op != Op::kNeighborAllreduce) return others();
  Neighborhood around;
  if (spec.weights && spec.weights->dst) {
    around.in = spec.weights->src;
    around.out = *spec.weights->dst;
  } else {
    around = topology()->at(round).neighborhood(place_.rank);
  }
  std::vector<int> peers = bluefog::PeersOf(around);
  std::erase_if(peers, [&](int r) { return r < 0 || r >= place_.size || r == place_.rank; });
  return peers;
}

StatusOr<std::shared_ptr<const Plan>> Engine::PlanFor(const OpSpec& spec, int64_t round) {
  Planner::Request request;
  request.op = spec.op;
  request.count = spec.input.count;
  request.element_bytes = SizeOf(spec.input.dtype);
  request.in_place = spec.output.data != nullptr && spec.output.data == spec.input.data;
  request.average = spec.average;
  request.local = spec.local;
  request.root = spec.root;
  request.coded = spec.message_dtype.value_or(spec.input.dtype) != spec.input.dtype;
  if (!AlongGraph(spec.op)) return planner_.Get(request);
  const bool machines = spec.op == Op::kHierarchicalNeighborAllreduce;
  const std::shared_ptr<const TopologySequence> topology = this->topology(NodesOf(spec.op));
  std::optional<Topology> round_graph;
  if (topology != nullptr) {
    round_graph = topology->at(round);
    request.neighborhood = &round_graph->neighborhood(machines ? machine() : place_.rank);
  } else if (!spec.weights.has_value()) {
    return absl::FailedPreconditionError(
        "rank " + std::to_string(place_.rank) + ": " + NameOf(spec.op) +
        ": no topology of machines was set; use set_machine_topology first, or give weights");
  }
  std::vector<double> send_weights;
  Neighborhood call;
  if (spec.weights.has_value()) {
    StatusOr<Neighborhood> given = CallNeighborhood(spec, request.neighborhood, &send_weights);
    if (!given.ok()) return given.status();
    call = *std::move(given);
    request.neighborhood = &call;
    request.send_weights = &send_weights;
  }
  return planner_.Get(request);
}

// What a name stands for, and which round of the topology its use is.
Status Engine::CheckUse(const OpSpec& spec, NameEntry* name, uint32_t layout_hash, int64_t* round) {
  MutexLock lock(inbox_mu_);
  // By name, so that the order of submission does not matter here either.
  if (AlongGraph(spec.op) && !(spec.weights && spec.weights->dst)) {
    const int64_t number = graphs_[static_cast<size_t>(NodesOf(spec.op))].number;
    if (std::exchange(name->topologies, number) != number) name->round = 0;
    *round = name->round++;
  }
  if (spec.name.empty()) return absl::OkStatus();
  const uint64_t hash = StableHash().Add(spec.op).Add(layout_hash).value();
  const auto text = [&] { return std::string(NameOf(spec.op)) + " " + spec.input.ToString(); };
  // Only what succeeded counts: after a mistake the name may be used as it should have been.
  if (name->first_hash == 0 || !name->proven.load(std::memory_order_relaxed)) {
    name->first_hash = hash;
    name->first_use = text();
  } else if (name->first_hash != hash) {
    return absl::InvalidArgumentError("the name stands for " + name->first_use +
                                      " since its first use, and now came " + text() +
                                      "; use another name for another tensor");
  }
  return absl::OkStatus();
}

// This may be the only rank where the call is wrong: it counts as a use, and the others are told.
void Engine::Refuse(const OpSpec& spec, NameEntry* name, int64_t round, const Status& why) {
  {
    const std::vector<int> peers = PeersOf(spec, round);
    MutexLock lock(inbox_mu_);
    inbox_.push_back({{}, [name, use = name->next_use++, why, peers](Executor& executor) {
                        executor.Reject(*name, use, why, peers);
                      }});
    inbox_filled_.store(true);
  }
  KickIfNeeded();
}

StatusOr<std::shared_ptr<Work>> Engine::Submit(OpSpec spec) {
  const bool automatic = spec.name.empty();
  // For error messages only.
  const auto what = [&] {
    return std::string(NameOf(spec.op)) + " '" + (automatic ? NameOf(spec.op) : spec.name) + "'";
  };
  DropFinished();
  if (!usable()) return CheckUsable(what());
  if (failed_.load(std::memory_order_relaxed)) {
    const Status failure = status();
    return Status(failure.code(), what() + ": " + std::string(failure.message()));
  }
  const auto located = [&](const Status& s) {
    return Status(s.code(), "rank " + std::to_string(place_.rank) + ": " + what() + ": " +
                                std::string(s.message()));
  };
  if (Status s = Validate(spec); !s.ok()) return located(s);
  if (FailpointHit("engine.submit")) {
    return absl::InternalError(what() + ": failpoint engine.submit");
  }
  NameEntry* name = automatic ? AutomaticName(spec) : Name(spec.name, false);
  const uint32_t layout_hash = spec.input.LayoutHash();
  Claim claim;
  if (!automatic && !claim.Take(name)) {
    MutexLock lock(inbox_mu_);
    return located(absl::InvalidArgumentError("an operation of this name is in flight (" +
                                              name->first_use +
                                              "); wait for it first, or use another name"));
  }
  int64_t round = 0;
  const auto refuse = [&](const Status& s) {
    Refuse(spec, name, round, s);
    return s;
  };
  if (Status s = CheckUse(spec, name, layout_hash, &round); !s.ok()) return refuse(located(s));
  StatusOr<std::shared_ptr<const Plan>> plan = PlanFor(spec, round);
  if (!plan.ok()) return refuse(plan.status());

  Submission s;
  s.op = spec.op;
  s.name = name;
  s.plan = *plan;
  s.dynamic = spec.weights.has_value() && spec.weights->dst.has_value();
  s.input = spec.input;
  s.layout_hash = layout_hash;
  s.dtype = spec.input.dtype;
  s.element_bytes = SizeOf(spec.input.dtype);
  // Shapes of broadcast may differ in memory order only if nobody reads them as elements: they must
  // not.
  s.value = ValueOf(spec);
  s.plan_hash = StableHash().Add(spec.op).Add(s.value).value();
  s.description_hash = StableHash().Add(s.plan_hash).Add(layout_hash).value();
  s.in[0] = static_cast<std::byte*>(spec.input.data);
  auto work = std::allocate_shared<WorkImpl>(RecyclingAllocator<WorkImpl>(works_), this, name);
  if (spec.output.data == nullptr && spec.op != Op::kBarrier) {
    TensorView output = spec.op == Op::kAllgather ? Gathered(spec.input, place_.size) : spec.input;
    StatusOr<std::shared_ptr<std::byte>> memory = outputs_->Allocate(output.bytes());
    if (!memory.ok()) return refuse(located(memory.status()));
    output.data = memory->get();
    spec.output = output;
    work->BindOutput(output, *std::move(memory));
  } else {
    work->BindOutput(spec.output, nullptr);
  }
  s.out[0] = static_cast<std::byte*>(spec.output.data);
  if (s.plan->schedule.scratch_count > 0) {
    StatusOr<std::shared_ptr<std::byte>> scratch =
        scratch_->Allocate(s.plan->schedule.scratch_count * s.element_bytes);
    if (!scratch.ok()) return refuse(located(scratch.status()));
    s.scratch[0] = scratch->get();
    s.scratch_memory = *std::move(scratch);
  }
  if (s.plan->encodings > 0) {                              // Also of no elements.
    s.codec = *MessageCodec(s.dtype, *spec.message_dtype);  // Validate has asked.
    s.coded_stride = s.codec->ElementBytes();
    StatusOr<std::shared_ptr<std::byte>> coded =
        scratch_->Allocate(s.plan->schedule.coded_count * s.coded_stride);
    if (!coded.ok()) return refuse(located(coded.status()));
    s.coded[0] = coded->get();
    s.coded_memory = *std::move(coded);
  }
  work->BindKeepAlive(std::move(spec.keep_alive));
  s.work = work;
  const bool small = spec.input.bytes() <= config_.eager_bytes;
  {
    MutexLock lock(inbox_mu_);
    claim.Submitted();
    s.key.name_hash = name->hash;
    s.key.use = name->next_use++;
    inbox_.push_back({std::move(s), nullptr});
    inbox_filled_.store(true);
  }
  // A small operation leaves at once, on this thread; a large one is the background thread's.
  if (small && progress_mu_.TryLock()) {
    ProgressLocked();
    LeaveProgress(true);  // A wait follows, most likely.
  } else {
    KickIfNeeded();
  }
  return std::shared_ptr<Work>(std::move(work));
}

Status Engine::SetTopology(TopologySequence topology, Nodes nodes) {
  const bool machines = nodes == Nodes::kMachines;
  const std::string what = machines ? "set_machine_topology" : "set_topology";
  if (Status s = CheckUsable(what); !s.ok()) return s;
  const int expected = machines ? placement().hosts() : place_.size;
  if (topology.size() != expected) {
    const std::string unit = machines ? " machines" : " ranks";
    return absl::InvalidArgumentError(what + ": the graph '" + topology.name() + "' has " +
                                      std::to_string(topology.size()) + unit + ", the job has " +
                                      std::to_string(expected));
  }
  if (place_.rank == 0) {
    // One rank speaks for all: the graph is the same everywhere. Of a graph between machines
    // counts what it does to ranks.
    StatusOr<TopologySequence> ranks = machines ? OverRanks(topology, placement()) : topology;
    if (!ranks.ok()) return ranks.status();
    const TopologyAnalysis a = Analyze(*ranks, /*spectrum=*/false);
    if (!a.doubly_stochastic) {
      BLUEFOG_LOG(kWarning) << what << ": '" << topology.name()
                            << "' does not keep averages: " << a.problem;
    }
    if (!a.connected) {
      BLUEFOG_LOG(kWarning) << what << ": '" << topology.name() << "' is not connected: " << a.cut;
    }
  }
  auto shared = std::make_shared<const TopologySequence>(std::move(topology));
  MutexLock lock(inbox_mu_);
  Graph& graph = graphs_[static_cast<size_t>(nodes)];
  graph.topology = std::move(shared);
  ++graph.number;
  return absl::OkStatus();
}

std::shared_ptr<const TopologySequence> Engine::topology(Nodes nodes) const {
  MutexLock lock(inbox_mu_);
  return graphs_[static_cast<size_t>(nodes)].topology;
}

}  // namespace bluefog
