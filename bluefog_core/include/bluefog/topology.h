// Weighted directed graphs over ranks, sequences of them, and what can be said about them.
// Convention everywhere: W[i][j] is the weight on the edge i -> j; a receiver uses its column.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <bluefog/status.h>

namespace bluefog {

struct Edge {
  int rank = 0;         ///< The neighbour.
  double weight = 0.0;  ///< W on the edge.
  friend bool operator==(const Edge&, const Edge&) = default;
};

/// What one rank needs to know of the graph. Neighbours ascend and never contain the rank itself.
struct Neighborhood {
  double self_weight = 1.0;
  std::vector<Edge> in;   ///< Sources j with W[j][me].
  std::vector<Edge> out;  ///< Destinations j with W[me][j].
  /// True if self and all sources share one weight 1/(in.size()+1): the mean is then computed as a
  /// sum and one division.
  bool uniform = true;
  friend bool operator==(const Neighborhood&, const Neighborhood&) = default;
};

/// An immutable weighted directed graph on ranks 0 … size()-1. Copies share it.
class Topology {
 public:
  /// `weights` is the dense row-major n x n matrix, W[i*n+j] on i -> j; zero means no edge. Errors:
  /// wrong length, a negative or non-finite entry (named with row and column).
  static StatusOr<Topology> FromMatrix(int n, const std::vector<double>& weights,
                                       std::string name = "custom");

  struct WeightedEdge {
    int from, to;
    double weight;
  };
  /// Edges in any order, self-loops included; ranks outside 0 … n-1, duplicates and negative or
  /// non-finite weights are errors that name the edge. An edge of weight 0 given here stays an
  /// edge: it carries messages.
  static StatusOr<Topology> FromEdges(int n, std::vector<WeightedEdge> edges,
                                      std::string name = "custom");

  int size() const { return static_cast<int>(graph_->neighborhoods.size()); }
  const std::string& name() const { return graph_->name; }
  /// Valid for 0 <= rank < size().
  const Neighborhood& neighborhood(int rank) const {
    return graph_->neighborhoods[static_cast<size_t>(rank)];
  }
  /// W[from][to], 0 where there is no edge; both ranks valid.
  double weight(int from, int to) const;
  std::vector<double> ToMatrix() const;
  friend bool operator==(const Topology& a, const Topology& b) {
    return a.graph_->neighborhoods == b.graph_->neighborhoods;
  }

 private:
  struct Graph {
    std::string name;
    std::vector<Neighborhood> neighborhoods;  ///< By rank.
  };
  explicit Topology(std::shared_ptr<const Graph> graph) : graph_(std::move(graph)) {}
  std::shared_ptr<const Graph> graph_;
};

/// Round -> Topology, repeating with a period. A static graph is a sequence of period 1.
class TopologySequence {
 public:
  explicit TopologySequence(Topology topology);
  /// All rounds have the same size and there is at least one.
  static StatusOr<TopologySequence> Of(std::vector<Topology> rounds, std::string name);

  int size() const { return rounds_.front().size(); }
  int period() const { return static_cast<int>(rounds_.size()); }
  bool is_static() const { return rounds_.size() == 1; }
  const std::string& name() const { return name_; }
  /// round >= 0. The graph's neighborhoods live as long as a copy of it: keep one.
  Topology at(int64_t round) const {
    return rounds_[static_cast<size_t>(round % static_cast<int64_t>(rounds_.size()))];
  }

 private:
  TopologySequence() = default;
  std::string name_;
  std::vector<Topology> rounds_;
};

/// Where ranks live: host and network interface of each. Ranks of one host share memory.
struct Placement {
  std::vector<int> host;  ///< host[rank], 0 …; all zero on one machine.
  std::vector<int> nic;   ///< nic[rank] on its host.
  static Placement OneHost(int n) { return {std::vector<int>(n, 0), std::vector<int>(n, 0)}; }
  /// Consecutive ranks, counts[h] of them on host h, which has one interface.
  static Placement OfCounts(const std::vector<int>& counts);
  /// Consecutive ranks, `per_host` of them on each; on the last what is left.
  static Placement Evenly(int n, int per_host);

  int size() const { return static_cast<int>(host.size()); }
  int hosts() const;
  bool homogeneous() const;  ///< As many ranks on each host.
  /// The ranks of each host, ascending.
  std::vector<std::vector<int>> RanksByHost() const;
  friend bool operator==(const Placement&, const Placement&) = default;
};
/// What a graph between machines does to ranks: W (x) J/L, where each rank of machine k gives
/// W[k][l] / (ranks of k) to each of l. With equal numbers of ranks it has W's properties.
/// InvalidArgument if the graph's size is not the number of hosts.
StatusOr<Topology> OverRanks(const Topology& machines, const Placement& placement);
StatusOr<TopologySequence> OverRanks(const TopologySequence& machines, const Placement& placement);

/// What the mathematics asks of a graph; over a whole period for a sequence.
struct TopologyAnalysis {
  bool symmetric = false;          ///< W = W^T within 1e-9, in every round.
  bool doubly_stochastic = false;  ///< Rows and columns sum to 1 within 1e-9, in every round.
  bool column_stochastic = false;  ///< What each rank combines sums to 1 (constants are kept).
  bool row_stochastic = false;     ///< What each rank gives away sums to 1 (the mean is kept).
  bool connected = false;          ///< Strongly connected: the edges of one period together.
  int max_in_degree = 0, max_out_degree = 0;  ///< In one round, without self.
  double messages_per_step = 0.0;             ///< Sent by the busiest rank, mean over a period.
  std::string problem;    ///< The first sum that is not 1, or the first rank cut off; or empty.
  std::string cut;        ///< Between which ranks there is no path, or empty.
  std::string asymmetry;  ///< The first pair with W[i][j] != W[j][i], or empty.

  // The spectrum, if asked for and n <= kMaxSpectrumSize; else spectrum_known is false and the rest
  // is 0.
  bool spectrum_known = false;
  /// Second largest eigenvalue of a symmetric W; of a directed one the second largest modulus; of a
  /// sequence the same of the product over a period, per round: |lambda|^(1/period). 0 for n = 1.
  double lambda2 = 0.0;
  double lambda_min = 0.0;     ///< Smallest eigenvalue (real part) of any round.
  double spectral_gap = 0.0;   ///< 1 - the largest modulus but the first, per round.
  bool exact_average = false;  ///< The product over one period is 11^T/n to 1e-12.
};
inline constexpr int kMaxSpectrumSize = 256;
/// Without `spectrum` it costs the same per edge at any size.
TopologyAnalysis Analyze(const TopologySequence& topology, bool spectrum = true);

// Mixing weights on an undirected graph given by its neighbour lists (without self).
using Adjacency = std::vector<std::vector<int>>;
/// w_ij = 1/max(d_i, d_j), degrees counting self; self takes the rest. Symmetric, doubly
/// stochastic. An edge that only one of its ends lists, a rank outside, self or a duplicate is an
/// error.
StatusOr<Topology> MetropolisHastings(const Adjacency& neighbors, std::string name = "custom");
/// w_ij = 1/(indegree(j)+1) on i -> j: doubly stochastic on regular graphs only. `neighbors` may be
/// directed here: neighbors[i] are the destinations of i.
StatusOr<Topology> UniformWeights(const Adjacency& neighbors, std::string name = "custom");

/// A generator by its name, as on the command line: "ring", "exponential", "mesh-grid-2d", …
struct TopologyGenerator {
  std::string name;
  std::string summary;  ///< One line for help texts.
  bool dynamic = false;
  std::function<StatusOr<TopologySequence>(int n)> make;
};
/// All generators, in the order in which help texts list them.
const std::vector<TopologyGenerator>& TopologyGenerators();
/// Underscores and hyphens are alike. NotFound lists the known names; n < 1 is InvalidArgument.
StatusOr<TopologySequence> MakeTopology(const std::string& name, int n);

// Generators with parameters. All need n >= 1; base >= 2.
/// i sends to i + base^k mod n, all equal weights. Directed.
StatusOr<Topology> Exponential(int n, int base = 2);
/// i and j are neighbours if their distance around the ring is a power of `base`; equal weights.
StatusOr<Topology> SymmetricExponential(int n, int base = 4);
enum class RingStyle { kBidirectional = 0, kLeft = 1, kRight = 2 };  ///< kLeft: i sends to i-1.
StatusOr<Topology> Ring(int n, RingStyle style = RingStyle::kBidirectional);
StatusOr<Topology> Star(int n, int center = 0);
/// Row-major grids with Metropolis-Hastings weights; the torus wraps around. rows must divide n;
/// rows = 0: the largest divisor of n that is at most sqrt(n).
StatusOr<Topology> MeshGrid2D(int n, int rows = 0);
StatusOr<Topology> Torus2D(int n, int rows = 0);
/// n must be a power of two; i and i xor 2^k are neighbours.
StatusOr<Topology> Hypercube(int n);
StatusOr<Topology> FullyConnected(int n);
/// G(n, p) with Metropolis-Hastings weights; redrawn until connected (InvalidArgument if 1000 draws
/// are not). The same seed gives the same graph on every platform.
StatusOr<Topology> ErdosRenyi(int n, double p, uint64_t seed);
/// Round k: i sends to i + 2^k mod n, weights 1/2; period ceil(log2 n). Exact average if n = 2^t.
StatusOr<TopologySequence> OnePeerExponential(int n);
/// Round k: i and i xor 2^k average; period log2 n. n must be a power of two.
StatusOr<TopologySequence> OnePeerHypercube(int n);

}  // namespace bluefog
