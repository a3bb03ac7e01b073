#include "engine/planner.h"

#include <algorithm>

#include "base/hash.h"
#include "collective/cost.h"

namespace bluefog {
namespace {

// Per-call weights can make a plan a call; forget all of them rather than grow. A step takes some
// 300 bytes, and a large tensor thousands of them.
constexpr int64_t kMaxSteps = 200'000;

Collective CollectiveOf(const Planner::Request& r) {
  switch (r.op) {
    case Op::kOptimizer:
      return r.collective;
    case Op::kNeighborAllreduce:
      return Collective::kNeighborAllreduce;
    case Op::kHierarchicalNeighborAllreduce:
      return Collective::kHierarchicalNeighborAllreduce;
    default:
      return Collective::kAllreduce;
  }
}

}  // namespace

uint64_t Planner::Hash(const Request& r) const {
  StableHash hash;
  hash.Add(r.op).Add(r.count).Add(r.element_bytes).Add(r.in_place).Add(r.average).Add(r.root);
  hash.Add(r.silent).Add(r.collective).Add(r.coded).Add(r.local);
  if (r.neighborhood != nullptr) {
    hash.Add(r.neighborhood->self_weight).Add(r.neighborhood->uniform);
    for (const auto* edges : {&r.neighborhood->in, &r.neighborhood->out}) {
      hash.Add(edges->size());
      for (const Edge& e : *edges) hash.Add(e.rank).Add(e.weight);
    }
  }
  if (r.send_weights != nullptr) {
    hash.Add(r.send_weights->size());
    for (const double w : *r.send_weights) hash.Add(w);
  }
  if (r.plugin != nullptr) {
    hash.Add(r.plugin->payloads).Add(r.plugin->fuse).Add(r.plugin->measure).Add(r.plugin->consume);
  }
  return hash.value();
}

collective::Form Planner::FormOf(const std::function<collective::Form()>& choose) const {
  if (config_.hierarchy == "auto") return choose();
  return config_.hierarchy == "flat" ? collective::Form::kFlat : collective::Form::kHierarchical;
}

collective::Schedule Planner::MakeExchange(Collective collective, const Request& r,
                                           const collective::PlanInput& in) const {
  const int64_t bytes = r.count * r.element_bytes;
  const bool one_shot = bytes <= config_.eager_bytes;
  const collective::Links links = collective::LinksOf(config_);
  const std::vector<double> send_weights =
      r.send_weights == nullptr ? std::vector<double>() : *r.send_weights;
  switch (collective) {
    case Collective::kNeighborAllreduce:
      return collective::PlanNeighborAllreduce(in, *r.neighborhood, send_weights);
    case Collective::kHierarchicalNeighborAllreduce:
      return collective::PlanHierarchicalNeighborAllreduce(
          in, placement_, *r.neighborhood, send_weights, FormOf([&] {
            return collective::ChooseHierarchicalNeighborAllreduce(
                placement_, static_cast<double>(bytes), one_shot, links);
          }),
          one_shot);
    case Collective::kAllreduce:
      break;
  }
  if (r.local) {
    const auto host = static_cast<size_t>(placement_.host[static_cast<size_t>(rank_)]);
    return collective::PlanAllreduce(in, r.average, one_shot, placement_.RanksByHost()[host]);
  }
  const collective::Form form = FormOf([&] {
    return collective::ChooseAllreduce(placement_, static_cast<double>(bytes), one_shot, links);
  });
  return form == collective::Form::kFlat || r.count == 0
             ? collective::PlanAllreduce(in, r.average, one_shot)
             : collective::PlanHierarchicalAllreduce(in, placement_, r.average);
}

collective::Schedule Planner::Make(const Request& r) const {
  collective::PlanInput in;
  in.rank = rank_;
  in.size = size_;
  in.count = r.count;
  in.chunk = std::max<int64_t>(1, config_.chunk_bytes / r.element_bytes);
  in.in_place = r.in_place;
  in.coded = r.coded;
  switch (r.op) {
    case Op::kNeighborAllreduce:
    case Op::kHierarchicalNeighborAllreduce:
    case Op::kAllreduce:
      return MakeExchange(CollectiveOf(r), r, in);
    case Op::kBroadcast:
      return collective::PlanBroadcast(in, r.root);
    case Op::kAllgather:
      return collective::PlanAllgather(in);
    case Op::kBarrier:
      return collective::PlanBarrier(in);
    case Op::kOptimizer:
      break;
  }
  return collective::WithPlugin(
      r.silent ? collective::PlanLocal(in) : MakeExchange(r.collective, r, in), *r.plugin);
}

Neighborhood Planner::EdgesOfRanks(const Neighborhood& machine) const {
  const std::vector<std::vector<int>> hosts = placement_.RanksByHost();
  Neighborhood edges;
  const auto add = [&](const std::vector<Edge>& from, std::vector<Edge>* to) {
    for (const Edge& e : from) {
      for (const int rank : hosts[static_cast<size_t>(e.rank)]) to->push_back({rank, e.weight});
    }
  };
  add(machine.in, &edges.in);
  add(machine.out, &edges.out);
  return edges;
}

StatusOr<std::shared_ptr<const Plan>> Planner::Get(const Request& request) {
  const uint64_t hash = Hash(request);
  {
    MutexLock lock(mu_);
    const auto it = plans_.find(hash);
    if (it != plans_.end()) return it->second;
  }
  const Collective collective = CollectiveOf(request);
  Neighborhood expanded;
  const Neighborhood* edges = nullptr;  // Whose weights both ends have of the topology.
  if (request.send_weights == nullptr && collective != Collective::kAllreduce) {
    edges = request.neighborhood;
    if (edges != nullptr && collective == Collective::kHierarchicalNeighborAllreduce) {
      expanded = EdgesOfRanks(*edges);
      edges = &expanded;
    }
  }
  StatusOr<std::shared_ptr<const Plan>> plan = MakePlan(Make(request), edges);
  if (!plan.ok()) return plan;
  MutexLock lock(mu_);
  // Without steps there would be no end either.
  const auto steps = static_cast<int64_t>((*plan)->schedule.steps.size()) + 1;
  if (steps_ + steps > kMaxSteps) {
    plans_.clear();
    steps_ = 0;
  }
  if (plans_.emplace(hash, *plan).second) steps_ += steps;
  ++planned_;
  return plan;
}

size_t Planner::kept() const {
  MutexLock lock(mu_);
  return plans_.size();
}

int64_t Planner::planned() const {
  MutexLock lock(mu_);
  return planned_;
}

}  // namespace bluefog
