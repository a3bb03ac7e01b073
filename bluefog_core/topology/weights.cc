// Mixing weights from neighbour lists: Metropolis-Hastings and uniform.
#include <algorithm>
#include <utility>

#include <bluefog/topology.h>
#include <fmt/format.h>

namespace bluefog {
namespace {

// Sorted copy; an error names the list and the entry at fault.
StatusOr<Adjacency> Checked(const Adjacency& neighbors) {
  const int n = static_cast<int>(neighbors.size());
  Adjacency sorted = neighbors;
  for (int i = 0; i < n; ++i) {
    std::vector<int>& list = sorted[static_cast<size_t>(i)];
    std::sort(list.begin(), list.end());
    for (const int j : list) {
      if (j < 0 || j >= n) {
        return absl::InvalidArgumentError(
            fmt::format("neighbours of rank {}: rank {} is outside 0 … {}", i, j, n - 1));
      }
      if (j == i) {
        return absl::InvalidArgumentError(fmt::format(
            "neighbours of rank {} contain the rank itself; its weight is computed, leave it out",
            i));
      }
    }
    const auto twin = std::adjacent_find(list.begin(), list.end());
    if (twin != list.end()) {
      return absl::InvalidArgumentError(
          fmt::format("neighbours of rank {}: rank {} is given twice", i, *twin));
    }
  }
  return sorted;
}

}  // namespace

StatusOr<Topology> MetropolisHastings(const Adjacency& neighbors, std::string name) {
  StatusOr<Adjacency> checked = Checked(neighbors);
  if (!checked.ok()) return checked.status();
  const int n = static_cast<int>(checked->size());
  const auto list = [&](int i) -> const std::vector<int>& {
    return (*checked)[static_cast<size_t>(i)];
  };
  const auto share = [&](int i) { return 1.0 / (static_cast<double>(list(i).size()) + 1.0); };

  std::vector<Topology::WeightedEdge> edges;
  for (int i = 0; i < n; ++i) {
    // What the edges leave for self, 1 - sum of w_ij, written without cancellation: on a regular
    // graph it is then exactly as large as the other weights.
    double self = share(i);
    for (const int j : list(i)) {
      if (!std::binary_search(list(j).begin(), list(j).end(), i)) {
        return absl::InvalidArgumentError(
            fmt::format("rank {0} lists rank {1} as neighbour but rank {1} does not list {0}: "
                        "Metropolis-Hastings weights need an undirected graph",
                        i, j));
      }
      const double weight = std::min(share(i), share(j));
      self += share(i) - weight;
      edges.push_back({i, j, weight});
    }
    edges.push_back({i, i, self});
  }
  return Topology::FromEdges(n, std::move(edges), std::move(name));
}

StatusOr<Topology> UniformWeights(const Adjacency& neighbors, std::string name) {
  StatusOr<Adjacency> checked = Checked(neighbors);
  if (!checked.ok()) return checked.status();
  std::vector<double> inputs(checked->size(), 1.0);
  for (const std::vector<int>& list : *checked) {
    for (const int j : list) inputs[static_cast<size_t>(j)] += 1.0;
  }
  std::vector<Topology::WeightedEdge> edges;
  for (int i = 0; i < static_cast<int>(checked->size()); ++i) {
    edges.push_back({i, i, 1.0 / inputs[static_cast<size_t>(i)]});
    for (const int j : (*checked)[static_cast<size_t>(i)]) {
      edges.push_back({i, j, 1.0 / inputs[static_cast<size_t>(j)]});
    }
  }
  return Topology::FromEdges(static_cast<int>(checked->size()), std::move(edges), std::move(name));
}

}  // namespace bluefog
