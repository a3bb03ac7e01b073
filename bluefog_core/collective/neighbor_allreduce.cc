// One message per chunk and edge; each chunk is combined as soon as its neighbours' chunks are
// there.
#include <algorithm>

#include "collective/builder.h"

namespace bluefog::collective {

Schedule PlanNeighborAllreduce(const PlanInput& in, const Neighborhood& neighborhood,
                               const std::vector<double>& send_weights) {
  Builder plan(in.count, in.count);
  const std::vector<Edge>& sources = neighborhood.in;
  const std::vector<Edge>& destinations = neighborhood.out;
  const bool coded = in.coded && !(sources.empty() && destinations.empty());
  const bool stage = coded || (in.in_place && !destinations.empty());
  const Role staging = coded ? Role::kCoded : Role::kScratch;
  if (coded) {
    plan.ReserveCoded(in.count);
  } else if (stage) {
    plan.ReserveScratch(in.count);
  }

  int32_t message = 0;
  for (Piece piece : Cut(0, in.count, in.chunk)) {
    const Range mine = At(Role::kInput, piece);
    std::vector<int32_t> staged;
    if (stage) staged = {plan.Copy(At(staging, piece), Local(mine))};
    if (!destinations.empty()) {
      std::vector<Target> targets;
      for (size_t k = 0; k < destinations.size(); ++k) {
        const double weight = send_weights.empty() ? 1.0 : send_weights[k];
        targets.push_back({destinations[k].rank, message, weight});
      }
      plan.Publish(stage ? At(staging, piece) : mine, std::move(targets), staged);
    }

    std::vector<Source> addends;
    const bool uniform = neighborhood.uniform && !sources.empty();
    if (neighborhood.self_weight != 0.0 || coded) {
      addends.push_back(Local(mine, uniform ? 1.0 : neighborhood.self_weight));
    }
    for (const Edge& edge : sources) {
      const int32_t receive =
          plan.Receive(edge.rank, message, piece.count, coded ? Role::kCoded : Role::kInput);
      if (edge.weight != 0.0) addends.push_back(View(receive, uniform ? 1.0 : edge.weight));
    }
    const Range result = At(Role::kOutput, piece);
    if (sources.empty() && neighborhood.self_weight == 1.0) {
      // In place the result is already there.
      if (!in.in_place) plan.Copy(result, Local(mine));
    } else {
      const double divisor = uniform ? static_cast<double>(sources.size() + 1) : 0.0;
      plan.Combine(result, std::move(addends), divisor, std::move(staged));
    }
    ++message;
  }
  return std::move(plan).Finish();
}

Schedule PlanLocal(const PlanInput& in) {
  Builder plan(in.count, in.count);
  for (Piece piece : Cut(0, in.count, in.chunk)) {
    if (!in.in_place) plan.Copy(At(Role::kOutput, piece), Local(At(Role::kInput, piece)));
  }
  return std::move(plan).Finish();
}

}  // namespace bluefog::collective
