// One message per chunk and edge; each chunk is combined as soon as its neighbours' chunks are
// there.
#include <algorithm>

#include "collective/builder.h"

namespace bluefog::collective {

Schedule PlanNeighborAllreduce(const PlanInput& in, const Neighborhood& neighborhood,
                               const std::vector<double>& send_weights) {
  Builder plan(in.count, in.count);
  const std::vector<Edge> to = SendEdges(neighborhood, send_weights);
  const bool coded = in.coded && !(neighborhood.in.empty() && to.empty());
  const bool stage = coded || (in.in_place && !to.empty());
  const Role staging = coded ? Role::kCoded : Role::kScratch;
  if (coded) {
    plan.ReserveCoded(in.count);
  } else if (stage) {
    plan.ReserveScratch(in.count);
  }

  for (Piece piece : Cut(0, in.count, in.chunk)) {
    const Range mine = At(Role::kInput, piece);
    std::vector<int32_t> staged;
    if (stage) staged = {plan.Copy(At(staging, piece), Local(mine))};
    if (!to.empty()) plan.Send(stage ? At(staging, piece) : mine, to, staged);

    const auto view = [&](const Edge& edge) {
      return plan.ReceiveNext(edge.rank, piece.count, coded ? Role::kCoded : Role::kInput);
    };
    Mixture mixture = MixtureOf(neighborhood, mine, view, /*keep_self=*/coded);
    const Range result = At(Role::kOutput, piece);
    if (neighborhood.in.empty() && neighborhood.self_weight == 1.0) {
      // In place the result is already there.
      if (!in.in_place) plan.Copy(result, Local(mine));
    } else {
      plan.Combine(result, std::move(mixture.addends), mixture.divisor, std::move(staged));
    }
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
