// Two forms, both summing in rank order so that every rank has the same bits. Small: all send all
// to all. Large: rank r reduces shard r and hands it round, 2(n-1)/n of the tensor per rank each
// way.
#include <algorithm>

#include "collective/builder.h"

namespace bluefog::collective {
namespace {

// Shards begin at multiples of this, so that ranks rarely write to one cache line.
constexpr int64_t kShardUnit = 16;

Schedule PlanOneShot(const PlanInput& in, double divisor) {
  Builder plan(in.count, in.count);
  if (in.in_place) plan.ReserveScratch(in.count);

  int32_t message = 0;
  for (Piece piece : Cut(0, in.count, in.chunk)) {
    const Range mine = At(Role::kInput, piece);
    std::vector<int32_t> staged;
    if (in.in_place) staged = {plan.Copy(At(Role::kScratch, piece), Local(mine))};
    std::vector<Target> targets;
    for (int d = 1; d < in.size; ++d) targets.push_back({(in.rank + d) % in.size, message});
    plan.Publish(in.in_place ? At(Role::kScratch, piece) : mine, std::move(targets), staged);
    std::vector<Source> addends;
    for (int rank = 0; rank < in.size; ++rank) {
      addends.push_back(rank == in.rank ? Local(mine)
                                        : View(plan.Receive(rank, message, piece.count)));
    }
    plan.Combine(At(Role::kOutput, piece), std::move(addends), divisor, std::move(staged));
    ++message;
  }
  return std::move(plan).Finish();
}

/// The chunks of rank's shard; none if it is empty.
std::vector<Piece> ShardOf(const PlanInput& in, int rank) {
  const int64_t units = (in.count + kShardUnit - 1) / kShardUnit;
  const int64_t begin = std::min(in.count, units * rank / in.size * kShardUnit);
  const int64_t end = std::min(in.count, units * (rank + 1) / in.size * kShardUnit);
  if (begin == end) return {};
  return Cut(begin, end - begin, in.chunk);
}

Schedule PlanSharded(const PlanInput& in, double divisor) {
  Builder plan(in.count, in.count);
  std::vector<std::vector<Piece>> shards;
  size_t longest = 0;
  for (int rank = 0; rank < in.size; ++rank) {
    shards.push_back(ShardOf(in, rank));
    longest = std::max(longest, shards.back().size());
  }
  auto shard = [&](int rank) -> const std::vector<Piece>& {
    return shards[static_cast<size_t>(rank)];
  };
  // Of two ranks, the messages from a to b are first b's shard of a's input, then a's reduced
  // shard.
  auto reduced_message = [&](int to, size_t chunk) {
    return static_cast<int32_t>(shard(to).size() + chunk);
  };

  // Starting with the next rank, so that not everybody sends to rank 0 first.
  std::vector<std::vector<int32_t>> contributed(static_cast<size_t>(in.size));
  for (size_t chunk = 0; chunk < longest; ++chunk) {
    for (int d = 1; d < in.size; ++d) {
      const int owner = (in.rank + d) % in.size;
      if (chunk >= shard(owner).size()) continue;
      contributed[static_cast<size_t>(owner)].push_back(plan.Publish(
          At(Role::kInput, shard(owner)[chunk]), {{owner, static_cast<int32_t>(chunk)}}));
    }
  }

  const std::vector<Piece>& own = shard(in.rank);
  for (size_t chunk = 0; chunk < own.size(); ++chunk) {
    std::vector<Source> addends;
    for (int rank = 0; rank < in.size; ++rank) {
      addends.push_back(rank == in.rank ? Local(At(Role::kInput, own[chunk]))
                                        : View(plan.Receive(rank, static_cast<int32_t>(chunk),
                                                            own[chunk].count)));
    }
    const Range result = At(Role::kOutput, own[chunk]);
    const int32_t combine = plan.Combine(result, std::move(addends), divisor);
    std::vector<Target> targets;
    for (int d = 1; d < in.size; ++d) {
      const int to = (in.rank + d) % in.size;
      targets.push_back({to, reduced_message(to, chunk)});
    }
    plan.Publish(result, std::move(targets), {combine});
  }

  for (size_t chunk = 0; chunk < longest; ++chunk) {
    for (int d = 1; d < in.size; ++d) {
      const int owner = (in.rank + in.size - d) % in.size;
      if (chunk >= shard(owner).size()) continue;
      const Piece piece = shard(owner)[chunk];
      const int32_t receive = plan.Receive(owner, reduced_message(in.rank, chunk), piece.count);
      // In place: the owner must have read my contribution before this overwrites it; it waits for
      // nobody's copy, so this cannot close a cycle.
      std::vector<int32_t> after;
      if (in.in_place) after = {contributed[static_cast<size_t>(owner)][chunk]};
      plan.Copy(At(Role::kOutput, piece), View(receive), std::move(after));
    }
  }
  return std::move(plan).Finish();
}

}  // namespace

Schedule PlanAllreduce(const PlanInput& in, bool average, bool one_shot) {
  // Divisor 1 leaves the sum alone, for integers too.
  const double divisor = average ? in.size : 1.0;
  if (in.size == 1) return PlanLocal(in);
  return one_shot || in.count == 0 ? PlanOneShot(in, divisor) : PlanSharded(in, divisor);
}

}  // namespace bluefog::collective
