// Generators of static graphs and of the one-peer sequences. W[i][j] is the weight on i -> j.
#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include <bluefog/topology.h>
#include <fmt/format.h>

#include "topology/integer.h"

namespace bluefog {
namespace {

using topology::CeilLog2;
using topology::IsPowerOf;

Status CheckSize(const char* name, int n) {
  if (n >= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("topology \"{}\": n = {}; at least one rank is needed", name, n));
}

Status CheckBase(const char* name, int n, int base) {
  if (Status status = CheckSize(name, n); !status.ok()) return status;
  if (base >= 2) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("topology \"{}\": base = {}; it must be at least 2", name, base));
}

Status CheckPowerOfTwo(const char* name, int n) {
  if (Status status = CheckSize(name, n); !status.ok()) return status;
  if (IsPowerOf(n, 2)) return absl::OkStatus();
  const int64_t above = int64_t{1} << CeilLog2(n);
  return absl::InvalidArgumentError(
      fmt::format("topology \"{}\": n = {} is not a power of two; use {} or {} ranks, or "
                  "\"{}\", which takes any number",
                  name, n, above / 2, above,
                  std::string(name) == "hypercube" ? "exponential" : "one-peer-exponential"));
}

// C(n, S): i sends to i+d mod n for d in S, all weights 1/|S|. The set merges equal offsets.
StatusOr<Topology> Circulant(int n, const std::set<int>& offsets, std::string name) {
  const double weight = 1.0 / static_cast<double>(offsets.size());
  std::vector<Topology::WeightedEdge> edges;
  for (int i = 0; i < n; ++i) {
    for (const int d : offsets) {
      edges.push_back({i, static_cast<int>((int64_t{i} + d) % n), weight});
    }
  }
  return Topology::FromEdges(n, std::move(edges), std::move(name));
}

StatusOr<Topology> Grid(const char* name, int n, int rows, bool wrap) {
  if (Status status = CheckSize(name, n); !status.ok()) return status;
  if (rows == 0) {
    for (int r = 1; int64_t{r} * r <= n; ++r) {
      if (n % r == 0) rows = r;
    }
  }
  if (rows < 1 || n % rows != 0) {
    return absl::InvalidArgumentError(
        fmt::format("topology \"{}\": {} ranks cannot be laid out in {} rows; the number of rows "
                    "must divide the number of ranks",
                    name, n, rows));
  }
  const int columns = n / rows;
  Adjacency neighbors(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    const int r = i / columns, c = i % columns;
    std::set<int> list;
    const auto add = [&](int row, int column) {
      if (wrap) {
        row = (row + rows) % rows;
        column = (column + columns) % columns;
      }
      const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
      if (inside && row * columns + column != i) list.insert(row * columns + column);
    };
    add(r - 1, c);
    add(r + 1, c);
    add(r, c - 1);
    add(r, c + 1);
    neighbors[static_cast<size_t>(i)].assign(list.begin(), list.end());
  }
  return MetropolisHastings(neighbors, name);
}

// splitmix64 (Steele, Lea, Flood 2014): the standard library's distributions differ by platform.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  /// Uniform in [0, 1), 53 bits.
  double Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }

 private:
  uint64_t state_;
};

bool IsConnected(const Adjacency& neighbors) {
  std::vector<bool> seen(neighbors.size(), false);
  std::vector<int> open{0};
  seen[0] = true;
  size_t count = 1;
  while (!open.empty()) {
    const int i = open.back();
    open.pop_back();
    for (const int j : neighbors[static_cast<size_t>(i)]) {
      if (seen[static_cast<size_t>(j)]) continue;
      seen[static_cast<size_t>(j)] = true;
      ++count;
      open.push_back(j);
    }
  }
  return count == neighbors.size();
}

// Rounds k = 0 … ceil(log2 n)-1 in which i sends half of itself to peer(i, 2^k).
template <typename Peer>
StatusOr<TopologySequence> OnePeer(const char* name, int n, Peer peer) {
  std::vector<Topology> rounds;
  for (int k = 0; k < std::max(1, CeilLog2(n)); ++k) {
    std::vector<Topology::WeightedEdge> edges;
    for (int i = 0; i < n; ++i) {
      if (n == 1) {
        edges.push_back({0, 0, 1.0});
        break;
      }
      edges.push_back({i, i, 0.5});
      edges.push_back({i, static_cast<int>(peer(i, int64_t{1} << k)), 0.5});
    }
    StatusOr<Topology> round = Topology::FromEdges(n, std::move(edges), name);
    if (!round.ok()) return round.status();
    rounds.push_back(*std::move(round));
  }
  return TopologySequence::Of(std::move(rounds), name);
}

}  // namespace

StatusOr<Topology> Exponential(int n, int base) {
  if (Status status = CheckBase("exponential", n, base); !status.ok()) return status;
  std::set<int> offsets{0};
  for (int64_t d = 1; d < n; d *= base) offsets.insert(static_cast<int>(d));
  return Circulant(n, offsets, "exponential");
}

StatusOr<Topology> SymmetricExponential(int n, int base) {
  if (Status status = CheckBase("symmetric-exponential", n, base); !status.ok()) return status;
  std::set<int> offsets{0};
  for (int d = 1; d < n; ++d) {
    if (IsPowerOf(std::min(d, n - d), base)) offsets.insert(d);
  }
  return Circulant(n, offsets, "symmetric-exponential");
}

StatusOr<Topology> Ring(int n, RingStyle style) {
  const char* const name = style == RingStyle::kLeft    ? "ring-left"
                           : style == RingStyle::kRight ? "ring-right"
                                                        : "ring";
  if (Status status = CheckSize(name, n); !status.ok()) return status;
  std::set<int> offsets{0};
  if (style != RingStyle::kLeft) offsets.insert(1 % n);
  if (style != RingStyle::kRight) offsets.insert(n - 1);
  return Circulant(n, offsets, name);
}

StatusOr<Topology> Star(int n, int center) {
  if (Status status = CheckSize("star", n); !status.ok()) return status;
  if (center < 0 || center >= n) {
    return absl::InvalidArgumentError(
        fmt::format("topology \"star\": center {} is outside 0 … {}", center, n - 1));
  }
  const double share = 1.0 / n;
  std::vector<Topology::WeightedEdge> edges{{center, center, share}};
  for (int i = 0; i < n; ++i) {
    if (i == center) continue;
    edges.push_back({i, i, 1.0 - share});
    edges.push_back({i, center, share});
    edges.push_back({center, i, share});
  }
  return Topology::FromEdges(n, std::move(edges), "star");
}

StatusOr<Topology> MeshGrid2D(int n, int rows) { return Grid("mesh-grid-2d", n, rows, false); }

StatusOr<Topology> Torus2D(int n, int rows) { return Grid("torus-2d", n, rows, true); }

StatusOr<Topology> Hypercube(int n) {
  if (Status status = CheckPowerOfTwo("hypercube", n); !status.ok()) return status;
  Adjacency neighbors(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    for (int bit = 1; bit < n; bit *= 2) neighbors[static_cast<size_t>(i)].push_back(i ^ bit);
  }
  return UniformWeights(neighbors, "hypercube");
}

StatusOr<Topology> FullyConnected(int n) {
  if (Status status = CheckSize("fully-connected", n); !status.ok()) return status;
  std::set<int> offsets;
  for (int d = 0; d < n; ++d) offsets.insert(d);
  return Circulant(n, offsets, "fully-connected");
}

StatusOr<Topology> ErdosRenyi(int n, double p, uint64_t seed) {
  if (Status status = CheckSize("erdos-renyi", n); !status.ok()) return status;
  if (!(p >= 0.0 && p <= 1.0)) {
    return absl::InvalidArgumentError(
        fmt::format("topology \"erdos-renyi\": p = {}; a probability is needed", p));
  }
  constexpr int kDraws = 1000;
  SplitMix64 random(seed);
  for (int draw = 0; draw < kDraws; ++draw) {
    Adjacency neighbors(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
      for (int j = i + 1; j < n; ++j) {
        if (random.Next() >= p) continue;
        neighbors[static_cast<size_t>(i)].push_back(j);
        neighbors[static_cast<size_t>(j)].push_back(i);
      }
    }
    if (IsConnected(neighbors)) return MetropolisHastings(neighbors, "erdos-renyi");
  }
  return absl::InvalidArgumentError(
      fmt::format("topology \"erdos-renyi\": none of {} draws with n = {}, p = {} was connected; "
                  "p should be above ln(n)/n",
                  kDraws, n, p));
}

StatusOr<TopologySequence> OnePeerExponential(int n) {
  if (Status status = CheckSize("one-peer-exponential", n); !status.ok()) return status;
  return OnePeer("one-peer-exponential", n, [n](int i, int64_t d) { return (i + d) % n; });
}

StatusOr<TopologySequence> OnePeerHypercube(int n) {
  if (Status status = CheckPowerOfTwo("one-peer-hypercube", n); !status.ok()) return status;
  return OnePeer("one-peer-hypercube", n, [](int i, int64_t d) { return i ^ d; });
}

}  // namespace bluefog
