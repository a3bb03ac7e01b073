#include "engine/planner.h"

#include <algorithm>

#include "base/hash.h"

namespace bluefog {
namespace {

// Per-call weights can make a plan a call; forget all of them rather than grow. A step takes some
// 300 bytes, and a large tensor thousands of them.
constexpr int64_t kMaxSteps = 200'000;

}  // namespace

uint64_t Planner::Hash(const Request& r) const {
  StableHash hash;
  hash.Add(r.op).Add(r.count).Add(r.element_bytes).Add(r.in_place).Add(r.average).Add(r.root);
  hash.Add(r.silent).Add(r.collective).Add(r.coded);
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

collective::Schedule Planner::Make(const Request& r) const {
  collective::PlanInput in;
  in.rank = rank_;
  in.size = size_;
  in.count = r.count;
  in.chunk = std::max<int64_t>(1, config_.chunk_bytes / r.element_bytes);
  in.in_place = r.in_place;
  in.coded = r.coded;
  const bool one_shot = r.count * r.element_bytes <= config_.eager_bytes;
  switch (r.op) {
    case Op::kNeighborAllreduce:
      return collective::PlanNeighborAllreduce(
          in, *r.neighborhood, r.send_weights == nullptr ? std::vector<double>() : *r.send_weights);
    case Op::kAllreduce:
      return collective::PlanAllreduce(in, r.average, one_shot);
    case Op::kBroadcast:
      return collective::PlanBroadcast(in, r.root);
    case Op::kAllgather:
      return collective::PlanAllgather(in);
    case Op::kBarrier:
      return collective::PlanBarrier(in);
    case Op::kOptimizer:
      break;
  }
  const collective::Schedule exchange =
      r.silent ? collective::PlanLocal(in)
      : r.collective == Collective::kAllreduce
          ? collective::PlanAllreduce(in, true, one_shot)
          : collective::PlanNeighborAllreduce(in, *r.neighborhood, {});
  return collective::WithPlugin(exchange, *r.plugin);
}

StatusOr<std::shared_ptr<const Plan>> Planner::Get(const Request& request) {
  const uint64_t hash = Hash(request);
  {
    MutexLock lock(mu_);
    const auto it = plans_.find(hash);
    if (it != plans_.end()) return it->second;
  }
  const bool of_topology =
      request.send_weights == nullptr && request.collective == Collective::kNeighborAllreduce;
  StatusOr<std::shared_ptr<const Plan>> plan =
      MakePlan(Make(request), of_topology ? request.neighborhood : nullptr);
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
