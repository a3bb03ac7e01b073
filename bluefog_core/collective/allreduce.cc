// Two forms, both summing in rank order so that every rank has the same bits. Small: all send all
// to all. Large: rank r reduces shard r and hands it round.
#include <numeric>

#include "collective/group.h"

namespace bluefog::collective {
Schedule PlanAllreduce(const PlanInput& in, bool average, bool one_shot, std::vector<int> members) {
  if (members.empty()) {
    members.resize(static_cast<size_t>(in.size));
    std::iota(members.begin(), members.end(), 0);
  }
  if (members.size() == 1) return PlanLocal(in);
  const Group group(std::move(members), in.rank);
  // Divisor 1 leaves the sum alone, for integers too.
  const double divisor = average ? group.size() : 1.0;
  Builder plan(in.count, in.count);
  one_shot = one_shot || in.count == 0;
  ReduceInGroup(in, group, one_shot ? Cut(0, in.count, in.chunk) : CutShards(in, {group.size()}),
                Role::kOutput, divisor, one_shot, &plan);
  return std::move(plan).Finish();
}

}  // namespace bluefog::collective
