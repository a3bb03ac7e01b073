#include "engine/plan.h"

#include <algorithm>
#include <set>
#include <string>

namespace bluefog {

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

StatusOr<std::shared_ptr<const Plan>> MakePlan(collective::Schedule schedule,
                                               const Neighborhood* edges) {
  auto plan = std::make_shared<Plan>();
  const auto& steps = schedule.steps;
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
  // Predecessors of each unit, each once.
  std::vector<std::vector<int32_t>> dependents(plan->units.size());
  for (int32_t u = 0; u < static_cast<int32_t>(plan->units.size()); ++u) {
    Plan::Unit& unit = plan->units[u];
    std::set<int32_t> before, read;
    for (int32_t s = unit.first; s < unit.first + unit.count; ++s) {
      const Step& step = steps[s];
      for (const int32_t a : step.after) {
        if (a >= s || a < 0) return absl::InternalError("schedule is not sorted");
        before.insert(plan->unit_of_step[a]);
      }
      for (const collective::Source& source : step.sources) {
        if (source.receive >= s) return absl::InternalError("schedule is not sorted");
        if (source.receive >= 0) read.insert(plan->unit_of_step[source.receive]);
      }
      plan->largest_message = std::max(
          plan->largest_message, step.kind == StepKind::kPublish || step.kind == StepKind::kReceive
                                     ? step.range.count
                                     : 0);
      if (step.kind == StepKind::kReceive) {
        unit.ordinal = plan->receives++;
        auto it = std::find_if(plan->inbound.begin(), plan->inbound.end(),
                               [&](const Plan::Inbound& in) { return in.peer == step.peer; });
        if (it == plan->inbound.end()) {
          plan->inbound.push_back({step.peer, {}, 0.0f});
          it = plan->inbound.end() - 1;
        }
        if (static_cast<size_t>(step.message) >= it->receives.size()) {
          it->receives.resize(static_cast<size_t>(step.message) + 1, -1);
        }
        it->receives[static_cast<size_t>(step.message)] = u;
      } else if (step.kind == StepKind::kPublish) {
        unit.ordinal = plan->publishes++;
        plan->publish_units.push_back(u);
      } else if (step.kind == StepKind::kProduce) {
        ++plan->produces;
      } else if (step.kind == StepKind::kMeasure) {
        unit.ordinal = plan->measures++;
      } else if (step.kind == StepKind::kConsume) {
        unit.consume = true;
      }
    }
    plan->consumes += unit.consume ? 1 : 0;
    for (const int32_t r : read) {
      ++plan->units[r].users;
      before.insert(r);
    }
    before.erase(u);
    unit.pending = static_cast<int32_t>(before.size());
    for (const int32_t b : before) dependents[b].push_back(u);
  }
  for (size_t u = 0; u < plan->units.size(); ++u) {
    plan->units[u].dependents_begin = static_cast<int32_t>(plan->dependents.size());
    plan->dependents.insert(plan->dependents.end(), dependents[u].begin(), dependents[u].end());
    plan->units[u].dependents_end = static_cast<int32_t>(plan->dependents.size());
  }
  std::sort(plan->inbound.begin(), plan->inbound.end(),
            [](const Plan::Inbound& a, const Plan::Inbound& b) { return a.peer < b.peer; });
  plan->destinations = schedule.destinations();
  if (edges != nullptr) {
    plan->edge_weights.resize(plan->destinations.size());
    for (const Edge& e : edges->out) {
      if (const int d = plan->DestinationOf(e.rank); d >= 0) {
        plan->edge_weights[d] = static_cast<float>(e.weight);
      }
    }
    for (const Edge& e : edges->in) {
      if (const int i = plan->InboundOf(e.rank); i >= 0) {
        plan->inbound[i].weight = static_cast<float>(e.weight);
      }
    }
  }
  plan->peers = plan->destinations;
  for (const Plan::Inbound& in : plan->inbound) plan->peers.push_back(in.peer);
  std::sort(plan->peers.begin(), plan->peers.end());
  plan->peers.erase(std::unique(plan->peers.begin(), plan->peers.end()), plan->peers.end());
  plan->schedule = std::move(schedule);
  return std::shared_ptr<const Plan>(std::move(plan));
}

}  // namespace bluefog
