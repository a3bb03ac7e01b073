#include "engine/plan.h"

#include <algorithm>
#include <set>
#include <string>

namespace bluefog {

using collective::Role;
using collective::Step;
using collective::StepKind;

int Plan::InboundOf(int peer) const {
  const auto it = std::lower_bound(inbound.begin(), inbound.end(), peer,
                                   [](const Inbound& a, int p) { return a.peer < p; });
  return it != inbound.end() && it->peer == peer ? static_cast<int>(it - inbound.begin()) : -1;
}

int Plan::DestinationOf(int peer) const {
  const auto it = std::lower_bound(destinations.begin(), destinations.end(), peer);
  return it != destinations.end() && *it == peer ? static_cast<int>(it - destinations.begin()) : -1;
}

int32_t Plan::EncodingOf(const Step& step) const {
  for (const int32_t before : step.after) {
    const Step& encode = schedule.steps[before];
    if (encode.kind == StepKind::kCopy && encode.range.role == Role::kCoded) return before;
  }
  return -1;
}

namespace {

void SortUnique(std::vector<int>* ranks) {
  std::sort(ranks->begin(), ranks->end());
  ranks->erase(std::unique(ranks->begin(), ranks->end()), ranks->end());
}

void CutIntoUnits(const std::vector<Step>& steps, Plan* plan) {
  const auto n = static_cast<int32_t>(steps.size());
  for (int32_t s = 0; s < n;) {
    Plan::Unit unit;
    unit.first = s;
    if (steps[s].group >= 0) {
      while (s + unit.count < n && steps[s + unit.count].group == steps[s].group) ++unit.count;
    }
    for (int32_t i = 0; i < unit.count; ++i) {
      plan->unit_of_step.push_back(static_cast<int32_t>(plan->units.size()));
    }
    s += unit.count;
    plan->units.push_back(unit);
  }
}

void AddReceive(const Step& step, int32_t u, Plan* plan) {
  auto it = std::find_if(plan->inbound.begin(), plan->inbound.end(),
                         [&](const Plan::Inbound& in) { return in.peer == step.peer; });
  if (it == plan->inbound.end()) {
    plan->inbound.push_back({step.peer, {}, 0.0f});
    it = plan->inbound.end() - 1;
  }
  const auto message = static_cast<size_t>(step.message);
  if (message >= it->receives.size()) it->receives.resize(message + 1, -1);
  it->receives[message] = u;
}

void CountMessage(const collective::Range& range, Plan* plan) {
  int64_t& largest = range.role == Role::kCoded ? plan->largest_coded : plan->largest_message;
  largest = std::max(largest, range.count);
}

// What the step adds to the plan's counts and tables.
void AddStep(const Step& step, int32_t u, Plan* plan) {
  Plan::Unit& unit = plan->units[u];
  switch (step.kind) {
    case StepKind::kReceive:
      unit.ordinal = plan->receives++;
      AddReceive(step, u, plan);
      CountMessage(step.range, plan);
      break;
    case StepKind::kPublish:
      unit.ordinal = plan->publishes++;
      plan->publish_units.push_back(u);
      CountMessage(step.range, plan);
      break;
    case StepKind::kCopy:
      if (step.range.role == Role::kCoded) unit.ordinal = plan->encodings++;
      break;
    case StepKind::kProduce:
      ++plan->produces;
      break;
    case StepKind::kMeasure:
      unit.ordinal = plan->measures++;
      break;
    case StepKind::kConsume:
      unit.consume = true;
      break;
    default:
      break;
  }
}

// Counts for each unit what must be done before, and lists for each what waits for it.
Status LinkUnits(const std::vector<Step>& steps, Plan* plan) {
  std::vector<std::vector<int32_t>> dependents(plan->units.size());
  for (int32_t u = 0; u < static_cast<int32_t>(plan->units.size()); ++u) {
    Plan::Unit& unit = plan->units[u];
    std::set<int32_t> before, read;  // Each once.
    for (int32_t s = unit.first; s < unit.first + unit.count; ++s) {
      for (const int32_t a : steps[s].after) {
        if (a >= s || a < 0) return absl::InternalError("schedule is not sorted");
        before.insert(plan->unit_of_step[a]);
      }
      for (const collective::Source& source : steps[s].sources) {
        if (source.receive >= s) return absl::InternalError("schedule is not sorted");
        if (source.receive >= 0) read.insert(plan->unit_of_step[source.receive]);
      }
    }
    for (const int32_t r : read) ++plan->units[r].users;
    before.insert(read.begin(), read.end());
    before.erase(u);
    unit.pending = static_cast<int32_t>(before.size());
    for (const int32_t b : before) dependents[b].push_back(u);
  }
  for (size_t u = 0; u < plan->units.size(); ++u) {
    plan->units[u].dependents_begin = static_cast<int32_t>(plan->dependents.size());
    plan->dependents.insert(plan->dependents.end(), dependents[u].begin(), dependents[u].end());
    plan->units[u].dependents_end = static_cast<int32_t>(plan->dependents.size());
  }
  return absl::OkStatus();
}

void AddEdgeWeights(const Neighborhood& edges, Plan* plan) {
  plan->edge_weights.resize(plan->destinations.size());
  for (const Edge& e : edges.out) {
    if (const int d = plan->DestinationOf(e.rank); d >= 0) {
      plan->edge_weights[d] = static_cast<float>(e.weight);
    }
  }
  for (const Edge& e : edges.in) {
    if (const int i = plan->InboundOf(e.rank); i >= 0) {
      plan->inbound[i].weight = static_cast<float>(e.weight);
    }
  }
}

}  // namespace

StatusOr<std::shared_ptr<const Plan>> MakePlan(collective::Schedule schedule,
                                               const Neighborhood* edges) {
  auto plan = std::make_shared<Plan>();
  const std::vector<Step>& steps = schedule.steps;
  CutIntoUnits(steps, plan.get());
  for (size_t s = 0; s < steps.size(); ++s) AddStep(steps[s], plan->unit_of_step[s], plan.get());
  for (const Plan::Unit& unit : plan->units) plan->consumes += unit.consume ? 1 : 0;
  for (Plan::Unit& unit : plan->units) {
    unit.answers =
        plan->consumes > 0 ? unit.consume : steps[unit.first].range.role == Role::kOutput;
    plan->answers += unit.answers ? 1 : 0;
  }
  if (Status s = LinkUnits(steps, plan.get()); !s.ok()) return s;
  std::sort(plan->inbound.begin(), plan->inbound.end(),
            [](const Plan::Inbound& a, const Plan::Inbound& b) { return a.peer < b.peer; });
  plan->destinations = schedule.destinations();
  if (edges != nullptr) AddEdgeWeights(*edges, plan.get());
  plan->peers = plan->destinations;
  for (const Plan::Inbound& in : plan->inbound) plan->peers.push_back(in.peer);
  SortUnique(&plan->peers);
  plan->schedule = std::move(schedule);
  return std::shared_ptr<const Plan>(std::move(plan));
}

std::vector<int> PeersOf(const Neighborhood& neighborhood) {
  std::vector<int> peers;
  for (const auto* edges : {&neighborhood.in, &neighborhood.out}) {
    for (const Edge& e : *edges) peers.push_back(e.rank);
  }
  SortUnique(&peers);
  return peers;
}

}  // namespace bluefog
