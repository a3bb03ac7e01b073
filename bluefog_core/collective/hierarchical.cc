// Operations that know which ranks share a host. What leaves a host leaves it once, not once for
// each of its ranks: a rank has a shard of the tensor, and meets between hosts only the ranks that
// have the same one. Where hosts have different numbers of ranks, pieces are cut so fine that each
// lies in one shard on every host. A piece is exchanged between hosts while others still reduce.
#include "collective/group.h"

namespace bluefog::collective {
namespace {

std::vector<int> SizesOf(const std::vector<std::vector<int>>& hosts) {
  std::vector<int> sizes;
  for (const auto& ranks : hosts) sizes.push_back(static_cast<int>(ranks.size()));
  return sizes;
}

class Hierarchical {
 public:
  /// `parts`: see CutShards.
  Hierarchical(const PlanInput& in, const Placement& placement, int parts)
      : in_(in),
        hosts_(placement.RanksByHost()),
        host_(placement.host[static_cast<size_t>(in.rank)]),
        group_(hosts_[static_cast<size_t>(host_)], in.rank),
        pieces_(CutShards(in, SizesOf(hosts_), parts)),
        plan_(in.count, in.count) {
    int64_t begin = in.count, end = 0;
    for (const Piece& piece : pieces_) {
      if (OwnerOf(piece.begin, in.count, group_.size()) != group_.me) continue;
      begin = std::min(begin, piece.begin);
      end = std::max(end, piece.begin + piece.count);
    }
    own_begin_ = begin;
    own_count_ = std::max<int64_t>(0, end - begin);
  }

  Schedule Average(const Neighborhood& machines, const std::vector<double>& send_weights) &&;
  Schedule Allreduce(double divisor) &&;

 private:
  /// The rank of `host` that has this piece.
  int OwnerAt(int host, const Piece& piece) const {
    const auto& ranks = hosts_[static_cast<size_t>(host)];
    return ranks[static_cast<size_t>(
        OwnerOf(piece.begin, in_.count, static_cast<int>(ranks.size())))];
  }
  std::vector<Edge> OwnersAt(std::vector<Edge> machines, const Piece& piece) const {
    for (Edge& edge : machines) edge.rank = OwnerAt(edge.rank, piece);
    return machines;
  }
  std::vector<Edge> OtherMachines() const {
    std::vector<Edge> others;
    const auto hosts = static_cast<int>(hosts_.size());
    for (int d = 1; d < hosts; ++d) others.push_back({(host_ + d) % hosts, 1.0});
    return others;
  }

  struct Reduction {
    Range range;
    std::vector<int32_t> after;
  };
  /// What the host has of a piece, divided by `divisor`, in memory that other hosts may read.
  Reduction ReduceHere(const Piece& piece, std::vector<Source> addends, double divisor) {
    if (group_.size() == 1 && !in_.in_place) return {At(Role::kInput, piece), {}};
    plan_.ReserveScratch(own_count_);
    const Range range{Role::kScratch, 0, piece.begin - own_begin_, piece.count};
    // One after the other, on all hosts in the same order: else each of two could have sent what
    // the other cannot use yet, and have no room for what it needs.
    std::vector<int32_t> after;
    if (last_reduction_ >= 0) after = {last_reduction_};
    last_reduction_ = plan_.Combine(range, std::move(addends), divisor, std::move(after));
    return {range, {last_reduction_}};
  }

  const PlanInput& in_;
  const std::vector<std::vector<int>> hosts_;
  const int host_;
  const Group group_;
  const std::vector<Piece> pieces_;
  int64_t own_begin_ = 0, own_count_ = 0;  // This rank's shard.
  int32_t last_reduction_ = -1;
  Builder plan_;
};

Schedule Hierarchical::Average(const Neighborhood& machines,
                               const std::vector<double>& send_weights) && {
  const std::vector<Edge> to = SendEdges(machines, send_weights);
  const bool alone = to.empty() && machines.in.empty() && machines.self_weight == 1.0;
  const auto exchange = [&](size_t p, std::vector<Source> addends) {
    const Piece& piece = pieces_[p];
    if (alone) return plan_.Combine(At(Role::kOutput, piece), std::move(addends), group_.size());
    Reduction mean = ReduceHere(piece, std::move(addends), group_.size());
    if (!to.empty()) plan_.Send(mean.range, OwnersAt(to, piece), mean.after);
    Mixture mixture = MixtureOf(machines, mean.range, [&](const Edge& edge) {
      return plan_.ReceiveNext(OwnerAt(edge.rank, piece), piece.count);
    });
    return plan_.Combine(At(Role::kOutput, piece), std::move(mixture.addends), mixture.divisor,
                         std::move(mean.after));
  };
  ReduceScatterGather(in_, group_, pieces_, Role::kOutput, &plan_, exchange);
  return std::move(plan_).Finish();
}

// Two hosts send each other all they have, in one hop. Of more, each sums up its part of every
// shard, which Piece::part names, and hands it to the others: 2(n-1)/n of the tensor per host each
// way.
Schedule Hierarchical::Allreduce(double divisor) && {
  const auto exchange = [&](size_t p, std::vector<Source> addends) {
    const Piece& piece = pieces_[p];
    const Range result = At(Role::kOutput, piece);
    if (hosts_.size() == 1) return plan_.Combine(result, std::move(addends), divisor);
    Reduction sum = ReduceHere(piece, std::move(addends), 1.0);
    const bool direct = hosts_.size() == 2;
    if (!direct && piece.part != host_) {
      const int root = OwnerAt(piece.part, piece);
      plan_.Send(sum.range, {{root, 1.0}}, sum.after);
      return plan_.Copy(result, View(plan_.ReceiveNext(root, piece.count)));
    }
    const std::vector<Edge> others = OwnersAt(OtherMachines(), piece);
    if (direct) plan_.Send(sum.range, others, sum.after);
    std::vector<Source> sums;
    for (int host = 0; host < static_cast<int>(hosts_.size()); ++host) {
      sums.push_back(host == host_ ? Local(sum.range)
                                   : View(plan_.ReceiveNext(OwnerAt(host, piece), piece.count)));
    }
    const int32_t total = plan_.Combine(result, std::move(sums), divisor, std::move(sum.after));
    if (!direct) plan_.Send(result, others, {total});
    return total;
  };
  ReduceScatterGather(in_, group_, pieces_, Role::kOutput, &plan_, exchange);
  return std::move(plan_).Finish();
}

/// The ranks of another host that take what this member sends: the `index`-th of `size` here.
std::vector<int> Counterparts(const std::vector<int>& there, int index, int size) {
  std::vector<int> ranks;
  for (size_t l = static_cast<size_t>(index); l < there.size(); l += static_cast<size_t>(size)) {
    ranks.push_back(there[l]);
  }
  return ranks;
}

Schedule PlanFlat(const PlanInput& in, const Placement& placement, const Neighborhood& machines,
                  const std::vector<double>& send_weights, bool one_shot) {
  const std::vector<std::vector<int>> hosts = placement.RanksByHost();
  const auto ranks_of = [&](int host) -> const std::vector<int>& {
    return hosts[static_cast<size_t>(host)];
  };
  const Group group(ranks_of(placement.host[static_cast<size_t>(in.rank)]), in.rank);
  one_shot = one_shot || in.count == 0;
  const std::vector<Piece> pieces =
      one_shot ? Cut(0, in.count, in.chunk) : CutShards(in, SizesOf(hosts));
  Builder plan(in.count, in.count);
  plan.ReserveScratch(in.count);
  const Reduced mean =
      ReduceInGroup(in, group, pieces, Role::kScratch, group.size(), one_shot, &plan);

  std::vector<Edge> to;
  for (const Edge& machine : SendEdges(machines, send_weights)) {
    for (const int rank : Counterparts(ranks_of(machine.rank), group.me, group.size())) {
      to.push_back({rank, machine.weight});
    }
  }
  for (size_t p = 0; p < pieces.size(); ++p) {
    const Range mine = At(Role::kScratch, pieces[p]);
    std::vector<int32_t> after = {mean.written[p]};
    if (!to.empty()) plan.Send(mine, to, after);
    Mixture mixture = MixtureOf(machines, mine, [&](const Edge& edge) {
      const std::vector<int>& there = ranks_of(edge.rank);
      return plan.ReceiveNext(there[static_cast<size_t>(group.me) % there.size()], pieces[p].count);
    });
    // In place: nobody's reading of this rank's input waits for what this writes.
    if (in.in_place && mean.shown[p] >= 0) after.push_back(mean.shown[p]);
    plan.Combine(At(Role::kOutput, pieces[p]), std::move(mixture.addends), mixture.divisor,
                 std::move(after));
  }
  return std::move(plan).Finish();
}

}  // namespace

const char* NameOf(Form form) { return form == Form::kFlat ? "flat" : "hierarchical"; }

Schedule PlanHierarchicalNeighborAllreduce(const PlanInput& in, const Placement& placement,
                                           const Neighborhood& machines,
                                           const std::vector<double>& send_weights, Form form,
                                           bool one_shot) {
  if (form == Form::kFlat || in.count == 0) {
    return PlanFlat(in, placement, machines, send_weights, one_shot);
  }
  return Hierarchical(in, placement, 1).Average(machines, send_weights);
}

Schedule PlanHierarchicalAllreduce(const PlanInput& in, const Placement& placement, bool average) {
  const int hosts = placement.hosts();
  return Hierarchical(in, placement, hosts > 2 ? hosts : 1).Allreduce(average ? in.size : 1.0);
}

}  // namespace bluefog::collective
