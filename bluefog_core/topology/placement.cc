// Hosts and the ranks on them, and graphs between hosts seen as graphs between ranks.
#include <algorithm>

#include <bluefog/topology.h>
#include <fmt/format.h>

namespace bluefog {

Placement Placement::OfCounts(const std::vector<int>& counts) {
  Placement placement;
  for (size_t h = 0; h < counts.size(); ++h) {
    placement.host.insert(placement.host.end(), static_cast<size_t>(counts[h]),
                          static_cast<int>(h));
  }
  placement.nic.assign(placement.host.size(), 0);
  return placement;
}

Placement Placement::Evenly(int n, int per_host) {
  std::vector<int> counts;
  for (int left = n; left > 0; left -= per_host) counts.push_back(std::min(left, per_host));
  return OfCounts(counts);
}

bool Placement::homogeneous() const {
  const auto ranks = RanksByHost();
  return std::all_of(ranks.begin(), ranks.end(),
                     [&](const auto& list) { return list.size() == ranks.front().size(); });
}

int Placement::hosts() const {
  return host.empty() ? 0 : 1 + *std::max_element(host.begin(), host.end());
}

std::vector<std::vector<int>> Placement::RanksByHost() const {
  std::vector<std::vector<int>> ranks(static_cast<size_t>(hosts()));
  for (int rank = 0; rank < size(); ++rank) {
    ranks[static_cast<size_t>(host[static_cast<size_t>(rank)])].push_back(rank);
  }
  return ranks;
}

StatusOr<Topology> OverRanks(const Topology& machines, const Placement& placement) {
  if (machines.size() != placement.hosts()) {
    return absl::InvalidArgumentError(
        fmt::format("the graph '{}' between machines has {} nodes, but there are {} machines",
                    machines.name(), machines.size(), placement.hosts()));
  }
  const std::vector<std::vector<int>> ranks = placement.RanksByHost();
  std::vector<Topology::WeightedEdge> edges;
  const auto add = [&](int from, int to, double weight) {
    const auto& senders = ranks[static_cast<size_t>(from)];
    for (const int i : senders) {
      for (const int j : ranks[static_cast<size_t>(to)]) {
        edges.push_back({i, j, weight / static_cast<double>(senders.size())});
      }
    }
  };
  for (int k = 0; k < machines.size(); ++k) {
    const Neighborhood& around = machines.neighborhood(k);
    add(k, k, around.self_weight);
    for (const Edge& edge : around.out) add(k, edge.rank, edge.weight);
  }
  return Topology::FromEdges(placement.size(), std::move(edges),
                             fmt::format("{} between machines", machines.name()));
}

StatusOr<TopologySequence> OverRanks(const TopologySequence& machines, const Placement& placement) {
  std::vector<Topology> rounds;
  for (int64_t round = 0; round < machines.period(); ++round) {
    StatusOr<Topology> topology = OverRanks(machines.at(round), placement);
    if (!topology.ok()) return topology.status();
    rounds.push_back(*std::move(topology));
  }
  const std::string name = rounds.front().name();
  return TopologySequence::Of(std::move(rounds), name);
}

}  // namespace bluefog
