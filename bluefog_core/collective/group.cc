#include "collective/group.h"

#include <optional>

namespace bluefog::collective {
namespace {

// Shards begin at multiples of this, so that ranks rarely write to one cache line.
constexpr int64_t kShardUnit = 16;

int64_t Units(int64_t count) { return (count + kShardUnit - 1) / kShardUnit; }

}  // namespace

int OwnerOf(int64_t element, int64_t count, int members) {
  // The last whose shard begins at or before it; shard m begins at unit floor(units * m / members).
  return static_cast<int>(((element / kShardUnit + 1) * members - 1) / Units(count));
}

std::vector<Piece> CutShards(const PlanInput& in, std::vector<int> group_sizes, int parts) {
  const int64_t units = Units(in.count);
  std::sort(group_sizes.begin(), group_sizes.end());
  group_sizes.erase(std::unique(group_sizes.begin(), group_sizes.end()), group_sizes.end());
  std::vector<int64_t> bounds;  // In units.
  for (const int size : group_sizes) {
    for (int64_t m = 0; m <= size; ++m) bounds.push_back(units * m / size);
  }
  std::sort(bounds.begin(), bounds.end());
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());

  std::vector<Piece> pieces;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    const int64_t length = bounds[i + 1] - bounds[i];
    std::vector<std::vector<Piece>> cut(static_cast<size_t>(parts));
    size_t longest = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const auto at = [&](int64_t p) {
        return std::min(in.count, (bounds[i] + length * p / parts) * kShardUnit);
      };
      auto& own = cut[static_cast<size_t>(part)];
      if (at(part) < at(part + 1)) own = Cut(at(part), at(part + 1) - at(part), in.chunk);
      for (Piece& piece : own) piece.part = static_cast<int>(part);
      longest = std::max(longest, own.size());
    }
    // In turn, so that those who care for one part each are all busy at the same time.
    for (size_t c = 0; c < longest; ++c) {
      for (const auto& own : cut) {
        if (c < own.size()) pieces.push_back(own[c]);
      }
    }
  }
  return pieces;
}

Reduced ReduceScatterGather(const PlanInput& in, const Group& group,
                            const std::vector<Piece>& pieces, Role result, Builder* plan,
                            const std::function<int32_t(size_t, std::vector<Source>)>& reduce) {
  const auto size = static_cast<size_t>(group.size());
  std::vector<std::vector<size_t>> owned(size);
  size_t longest = 0;
  for (size_t p = 0; p < pieces.size(); ++p) {
    auto& own = owned[static_cast<size_t>(OwnerOf(pieces[p].begin, in.count, group.size()))];
    own.push_back(p);
    longest = std::max(longest, own.size());
  }
  Reduced reduced{std::vector<int32_t>(pieces.size(), -1), std::vector<int32_t>(pieces.size(), -1)};
  const auto piece_of = [&](int index, size_t chunk) -> std::optional<size_t> {
    const std::vector<size_t>& own = owned[static_cast<size_t>(index)];
    return chunk < own.size() ? std::optional(own[chunk]) : std::nullopt;
  };
  // Chunk by chunk on all ranks, which each start with the one next to them: not everybody sends to
  // the first one first.
  for (size_t chunk = 0; chunk < longest; ++chunk) {
    for (int d = 1; d < group.size(); ++d) {
      const int owner = (group.me + d) % group.size();
      const std::optional<size_t> p = piece_of(owner, chunk);
      if (!p) continue;
      reduced.shown[*p] = plan->Send(At(Role::kInput, pieces[*p]), {{group.member(owner), 1.0}});
    }
    if (const std::optional<size_t> p = piece_of(group.me, chunk)) {
      const Piece& piece = pieces[*p];
      std::vector<Source> addends;
      for (const int rank : group.members) {
        addends.push_back(rank == in.rank ? Local(At(Role::kInput, piece))
                                          : View(plan->ReceiveNext(rank, piece.count)));
      }
      reduced.written[*p] = reduce(*p, std::move(addends));
      if (size > 1) plan->Send(At(result, piece), group.Others(), {reduced.written[*p]});
    }
    for (int d = 1; d < group.size(); ++d) {
      const int owner = (group.me + group.size() - d) % group.size();
      const std::optional<size_t> p = piece_of(owner, chunk);
      if (!p) continue;
      const int32_t receive = plan->ReceiveNext(group.member(owner), pieces[*p].count);
      // In place: the owner must have read my contribution before this overwrites it; it waits for
      // nobody's copy, so this cannot close a cycle.
      std::vector<int32_t> after;
      if (in.in_place && result == Role::kOutput) after = {reduced.shown[*p]};
      reduced.written[*p] = plan->Copy(At(result, pieces[*p]), View(receive), std::move(after));
    }
  }
  return reduced;
}

Reduced ReduceInGroup(const PlanInput& in, const Group& group, const std::vector<Piece>& pieces,
                      Role result, double divisor, bool one_shot, Builder* plan) {
  if (!one_shot) {
    return ReduceScatterGather(
        in, group, pieces, result, plan, [&](size_t p, std::vector<Source> addends) {
          return plan->Combine(At(result, pieces[p]), std::move(addends), divisor);
        });
  }
  const bool stage = in.in_place && result == Role::kOutput;
  if (stage) plan->ReserveScratch(in.count);
  Reduced reduced;
  for (const Piece& piece : pieces) {
    const Range mine = At(Role::kInput, piece);
    std::vector<int32_t> staged;
    if (stage) staged = {plan->Copy(At(Role::kScratch, piece), Local(mine))};
    reduced.shown.push_back(group.size() > 1 ? plan->Send(stage ? At(Role::kScratch, piece) : mine,
                                                          group.Others(), staged)
                                             : -1);
    std::vector<Source> addends;
    for (const int rank : group.members) {
      addends.push_back(rank == in.rank ? Local(mine) : View(plan->ReceiveNext(rank, piece.count)));
    }
    reduced.written.push_back(
        plan->Combine(At(result, piece), std::move(addends), divisor, std::move(staged)));
  }
  return reduced;
}

}  // namespace bluefog::collective
