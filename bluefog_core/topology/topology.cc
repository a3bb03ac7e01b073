// The graph itself: checked once at construction, stored as one Neighborhood per rank.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include <bluefog/topology.h>
#include <fmt/format.h>

namespace bluefog {
namespace {

// Whether the weights a rank combines are all 1/(k+1), whichever way they were rounded.
bool IsUniform(const Neighborhood& neighborhood) {
  const double mean = 1.0 / (static_cast<double>(neighborhood.in.size()) + 1.0);
  const auto equal = [mean](double w) { return std::abs(w - mean) <= 1e-15 * mean; };
  return equal(neighborhood.self_weight) &&
         std::all_of(neighborhood.in.begin(), neighborhood.in.end(),
                     [&](const Edge& edge) { return equal(edge.weight); });
}

Status CheckEdge(int n, const Topology::WeightedEdge& edge) {
  for (const int rank : {edge.from, edge.to}) {
    if (rank < 0 || rank >= n) {
      return absl::InvalidArgumentError(
          fmt::format("edge {} -> {}: rank {} is outside 0 … {}", edge.from, edge.to, rank, n - 1));
    }
  }
  if (!std::isfinite(edge.weight) || edge.weight < 0) {
    return absl::InvalidArgumentError(
        fmt::format("weight on the edge {} -> {} (row {}, column {}) is {}; weights must be finite "
                    "and not negative",
                    edge.from, edge.to, edge.from, edge.to, edge.weight));
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<Topology> Topology::FromEdges(int n, std::vector<WeightedEdge> edges, std::string name) {
  if (n < 1) {
    return absl::InvalidArgumentError(
        fmt::format("topology \"{}\": n = {}; at least one rank is needed", name, n));
  }
  for (const WeightedEdge& edge : edges) {
    if (Status status = CheckEdge(n, edge); !status.ok()) return status;
  }
  std::sort(edges.begin(), edges.end(), [](const WeightedEdge& a, const WeightedEdge& b) {
    return std::tie(a.from, a.to) < std::tie(b.from, b.to);
  });
  const auto twin = std::adjacent_find(edges.begin(), edges.end(),
                                       [](const WeightedEdge& a, const WeightedEdge& b) {
                                         return a.from == b.from && a.to == b.to;
                                       });
  if (twin != edges.end()) {
    return absl::InvalidArgumentError(
        fmt::format("edge {} -> {} is given twice, with weights {} and {}; give it once",
                    twin->from, twin->to, twin->weight, std::next(twin)->weight));
  }

  std::vector<Neighborhood> neighborhoods(static_cast<size_t>(n));
  for (Neighborhood& neighborhood : neighborhoods) neighborhood.self_weight = 0.0;
  for (const WeightedEdge& edge : edges) {
    Neighborhood& from = neighborhoods[static_cast<size_t>(edge.from)];
    if (edge.from == edge.to) {
      from.self_weight = edge.weight;
    } else {
      from.out.push_back({edge.to, edge.weight});
      neighborhoods[static_cast<size_t>(edge.to)].in.push_back({edge.from, edge.weight});
    }
  }
  for (Neighborhood& neighborhood : neighborhoods) neighborhood.uniform = IsUniform(neighborhood);
  return Topology(std::make_shared<const Graph>(Graph{std::move(name), std::move(neighborhoods)}));
}

StatusOr<Topology> Topology::FromMatrix(int n, const std::vector<double>& weights,
                                        std::string name) {
  if (n >= 1 && weights.size() != static_cast<size_t>(n) * static_cast<size_t>(n)) {
    return absl::InvalidArgumentError(
        fmt::format("weight matrix for {0} ranks has {1} entries; {0} x {0} = {2} are needed", n,
                    weights.size(), static_cast<size_t>(n) * static_cast<size_t>(n)));
  }
  std::vector<WeightedEdge> edges;
  const double* entry = weights.data();
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j, ++entry) {
      if (*entry != 0.0) edges.push_back({i, j, *entry});
    }
  }
  return FromEdges(n, std::move(edges), std::move(name));
}

double Topology::weight(int from, int to) const {
  const Neighborhood& row = neighborhood(from);
  if (from == to) return row.self_weight;
  const auto edge = std::lower_bound(row.out.begin(), row.out.end(), to,
                                     [](const Edge& e, int rank) { return e.rank < rank; });
  return edge != row.out.end() && edge->rank == to ? edge->weight : 0.0;
}

std::vector<double> Topology::ToMatrix() const {
  const auto n = static_cast<size_t>(size());
  std::vector<double> matrix(n * n, 0.0);
  for (size_t i = 0; i < n; ++i) {
    const Neighborhood& row = neighborhood(static_cast<int>(i));
    matrix[i * n + i] = row.self_weight;
    for (const Edge& edge : row.out) {
      matrix[i * n + static_cast<size_t>(edge.rank)] = edge.weight;
    }
  }
  return matrix;
}

TopologySequence::TopologySequence(Topology topology) : name_(topology.name()) {
  rounds_.push_back(std::move(topology));
}

StatusOr<TopologySequence> TopologySequence::Of(std::vector<Topology> rounds, std::string name) {
  if (rounds.empty()) {
    return absl::InvalidArgumentError(
        fmt::format("topology sequence \"{}\" has no round; at least one is needed", name));
  }
  for (size_t k = 1; k < rounds.size(); ++k) {
    if (rounds[k].size() != rounds[0].size()) {
      return absl::InvalidArgumentError(
          fmt::format("topology sequence \"{}\": round {} has {} ranks but round 0 has {}", name, k,
                      rounds[k].size(), rounds[0].size()));
    }
  }
  TopologySequence sequence;
  sequence.name_ = std::move(name);
  sequence.rounds_ = std::move(rounds);
  return sequence;
}

}  // namespace bluefog
