// A reduction inside a group of ranks, by which all of allreduce, or what the ranks of a machine do
// around an exchange between machines, is planned. Sums go in the order of the members, so that
// every rank has the same bits.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "collective/builder.h"

namespace bluefog::collective {

/// The ranks that reduce together, ascending, and which of them this one is.
struct Group {
  std::vector<int> members;
  int me = 0;
  Group(std::vector<int> ranks, int rank)
      : members(std::move(ranks)),
        me(static_cast<int>(std::find(members.begin(), members.end(), rank) - members.begin())) {}
  int size() const { return static_cast<int>(members.size()); }
  int member(int index) const { return members[static_cast<size_t>(index)]; }
  std::vector<Edge> Others() const {
    std::vector<Edge> edges;
    for (int d = 1; d < size(); ++d) edges.push_back({member((me + d) % size()), 1.0});
    return edges;
  }
};

/// Pieces of at most a chunk, each in one shard of every group of these sizes, in order of shards.
/// With `parts` each shard is cut into so many about equal ones first, numbered in Piece::part,
/// whose pieces take turns. None of an empty tensor.
std::vector<Piece> CutShards(const PlanInput& in, std::vector<int> group_sizes, int parts = 1);
/// Which of so many members has the shard that this element lies in.
int OwnerOf(int64_t element, int64_t count, int members);

/// What is known of each piece when the group has its result.
struct Reduced {
  std::vector<int32_t> written;  ///< The step after which the result is there.
  std::vector<int32_t> shown;    ///< The publish of this rank's input, or -1.
};

/// The owner of a piece sums it up and hands the result round, 2(n-1)/n of the tensor per rank each
/// way. `reduce(p, addends)`, on the owner, appends what makes the result of the members' inputs,
/// in `result`, and returns the step that writes it.
Reduced ReduceScatterGather(const PlanInput& in, const Group& group,
                            const std::vector<Piece>& pieces, Role result, Builder* plan,
                            const std::function<int32_t(size_t, std::vector<Source>)>& reduce);

/// Sum / divisor over the group into `result`: each member sends all to all and sums up itself
/// (`one_shot`, small sizes), or by shards.
Reduced ReduceInGroup(const PlanInput& in, const Group& group, const std::vector<Piece>& pieces,
                      Role result, double divisor, bool one_shot, Builder* plan);

}  // namespace bluefog::collective
