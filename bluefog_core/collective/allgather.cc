// Direct exchange: each rank's chunks go to all others, who copy them into place.
#include "collective/builder.h"

namespace bluefog::collective {

Schedule PlanAllgather(const PlanInput& in) {
  Builder plan(in.count, in.count * in.size);
  auto place = [&](int rank, Piece piece) {
    return At(Role::kOutput, {piece.begin + rank * in.count, piece.count});
  };
  int32_t message = 0;
  for (Piece piece : Cut(0, in.count, in.chunk)) {
    const Range mine = At(Role::kInput, piece);
    if (in.size > 1) {
      // Starting with the next rank, so that not everybody sends to rank 0 first.
      std::vector<Target> targets;
      for (int d = 1; d < in.size; ++d) targets.push_back({(in.rank + d) % in.size, message});
      plan.Publish(mine, std::move(targets));
    }
    plan.Copy(place(in.rank, piece), Local(mine));
    for (int d = 1; d < in.size; ++d) {
      const int from = (in.rank + in.size - d) % in.size;
      plan.Copy(place(from, piece), View(plan.Receive(from, message, piece.count)));
    }
    ++message;
  }
  return std::move(plan).Finish();
}

}  // namespace bluefog::collective
