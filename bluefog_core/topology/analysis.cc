// What the mathematics asks of a graph. Sums, symmetry and connectivity work on the sparse graph at
// any size; the spectrum is that of the dense matrix.
#include <algorithm>
#include <cmath>
#include <complex>
#include <utility>

#include <bluefog/topology.h>
#include <fmt/format.h>
#include <Eigen/Eigenvalues>

namespace bluefog {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Eigenvalues = std::vector<std::complex<double>>;

constexpr double kTolerance = 1e-9;  // Of weights and their sums.
constexpr double kRounding = 1e-12;  // Below this the eigenvalues' digits are noise.

double Sum(double self_weight, const std::vector<Edge>& edges) {
  for (const Edge& edge : edges) self_weight += edge.weight;
  return self_weight;
}

// "in round 2" where there is more than one.
std::string InRound(const TopologySequence& sequence, int round) {
  return sequence.is_static() ? "" : fmt::format(" in round {}", round);
}

void CheckSums(const TopologySequence& sequence, TopologyAnalysis& result) {
  result.row_stochastic = result.column_stochastic = true;
  for (int k = 0; k < sequence.period(); ++k) {
    const Topology graph = sequence.at(k);
    for (int i = 0; i < sequence.size(); ++i) {
      const Neighborhood& ranks = graph.neighborhood(i);
      const double column = Sum(ranks.self_weight, ranks.in);
      if (!(std::abs(column - 1.0) <= kTolerance)) {
        result.column_stochastic = false;
        if (result.problem.empty()) {
          result.problem = fmt::format(
              "column {0} sums to {1:.12g} instead of 1{2}: what rank {0} combines is not a mean",
              i, column, InRound(sequence, k));
        }
      }
      const double row = Sum(ranks.self_weight, ranks.out);
      if (!(std::abs(row - 1.0) <= kTolerance)) {
        result.row_stochastic = false;
        if (result.problem.empty()) {
          result.problem = fmt::format(
              "row {0} sums to {1:.12g} instead of 1{2}: rank {0} counts {3} in the global mean", i,
              row, InRound(sequence, k), row < 1.0 ? "too little" : "too much");
        }
      }
    }
  }
  result.doubly_stochastic = result.row_stochastic && result.column_stochastic;
}

void CheckSymmetry(const TopologySequence& sequence, TopologyAnalysis& result) {
  for (int k = 0; k < sequence.period(); ++k) {
    const Topology topology = sequence.at(k);
    for (int i = 0; i < sequence.size(); ++i) {
      for (const Edge& edge : topology.neighborhood(i).out) {
        const double back = topology.weight(edge.rank, i);
        if (std::abs(back - edge.weight) <= kTolerance) continue;
        result.asymmetry = fmt::format("W[{0}][{1}] = {2:.12g} but W[{1}][{0}] = {3:.12g}{4}", i,
                                       edge.rank, edge.weight, back, InRound(sequence, k));
        return;
      }
    }
  }
  result.symmetric = true;
}

// The first rank that no path over the edges of a period leads to from rank 0 (or, if `backwards`,
// from which none leads to rank 0); -1 if there is none. Edges of weight 0 do not mix.
int FirstUnreached(const TopologySequence& sequence, bool backwards) {
  std::vector<bool> seen(static_cast<size_t>(sequence.size()), false);
  std::vector<int> open{0};
  seen[0] = true;
  while (!open.empty()) {
    const int i = open.back();
    open.pop_back();
    for (int k = 0; k < sequence.period(); ++k) {
      const Neighborhood& ranks = sequence.at(k).neighborhood(i);
      for (const Edge& edge : backwards ? ranks.in : ranks.out) {
        if (edge.weight == 0.0 || seen[static_cast<size_t>(edge.rank)]) continue;
        seen[static_cast<size_t>(edge.rank)] = true;
        open.push_back(edge.rank);
      }
    }
  }
  const auto unseen = std::find(seen.begin(), seen.end(), false);
  return unseen == seen.end() ? -1 : static_cast<int>(unseen - seen.begin());
}

void CheckConnectivity(const TopologySequence& sequence, TopologyAnalysis& result) {
  const int deaf = FirstUnreached(sequence, false);
  const int mute = FirstUnreached(sequence, true);
  result.connected = deaf < 0 && mute < 0;
  if (result.connected) return;
  result.cut = deaf >= 0 ? fmt::format("no path leads from rank 0 to rank {}", deaf)
                         : fmt::format("no path leads from rank {} to rank 0", mute);
  if (!sequence.is_static()) result.cut += " over a whole period";
  if (result.problem.empty()) result.problem = "not connected: " + result.cut;
}

void CountMessages(const TopologySequence& sequence, TopologyAnalysis& result) {
  int64_t busiest = 0;
  for (int i = 0; i < sequence.size(); ++i) {
    int64_t sent = 0;
    for (int k = 0; k < sequence.period(); ++k) {
      const Neighborhood& ranks = sequence.at(k).neighborhood(i);
      sent += static_cast<int64_t>(ranks.out.size());
      result.max_in_degree = std::max(result.max_in_degree, static_cast<int>(ranks.in.size()));
      result.max_out_degree = std::max(result.max_out_degree, static_cast<int>(ranks.out.size()));
    }
    busiest = std::max(busiest, sent);
  }
  result.messages_per_step = static_cast<double>(busiest) / sequence.period();
}

Matrix Dense(const Topology& topology) {
  const std::vector<double> weights = topology.ToMatrix();
  return Eigen::Map<const Matrix>(weights.data(), topology.size(), topology.size());
}

double Clean(double value) {
  for (const double exact : {0.0, 1.0, -1.0}) {
    if (std::abs(value - exact) < kRounding) return exact;
  }
  return value;
}

Eigenvalues EigenvaluesOf(const Matrix& w, bool symmetric) {
  if (symmetric) {
    const Eigen::VectorXd real =
        Eigen::SelfAdjointEigenSolver<Matrix>(w, Eigen::EigenvaluesOnly).eigenvalues();
    return Eigenvalues(real.begin(), real.end());
  }
  const Eigen::VectorXcd all =
      Eigen::EigenSolver<Matrix>(w, /*computeEigenvectors=*/false).eigenvalues();
  return Eigenvalues(all.begin(), all.end());
}

double SmallestRealPart(const Eigenvalues& values) {
  double smallest = values[0].real();
  for (const auto& value : values) smallest = std::min(smallest, value.real());
  return smallest;
}

void AnalyzeSpectrum(const TopologySequence& sequence, TopologyAnalysis& result) {
  result.spectrum_known = true;
  const int n = sequence.size();
  Matrix product = Dense(sequence.at(0));
  result.lambda_min = SmallestRealPart(EigenvaluesOf(product, result.symmetric));
  for (int k = 1; k < sequence.period(); ++k) {
    const Matrix round = Dense(sequence.at(k));
    result.lambda_min =
        std::min(result.lambda_min, SmallestRealPart(EigenvaluesOf(round, result.symmetric)));
    product = product * round;
  }
  result.lambda_min = Clean(result.lambda_min);
  result.exact_average = ((product.array() - 1.0 / n).abs() <= kRounding).all();
  if (n == 1 || result.exact_average) {
    result.spectral_gap = 1.0;
    return;
  }

  const bool real = result.symmetric && sequence.is_static();
  Eigenvalues values = EigenvaluesOf(product, real);
  const auto by_modulus = [](const auto& a, const auto& b) { return std::abs(a) > std::abs(b); };
  std::partial_sort(values.begin(), values.begin() + 2, values.end(), by_modulus);
  const double modulus = std::pow(std::abs(values[1]), 1.0 / sequence.period());
  result.spectral_gap = Clean(1.0 - modulus);
  if (real) {
    std::partial_sort(values.begin(), values.begin() + 2, values.end(),
                      [](const auto& a, const auto& b) { return a.real() > b.real(); });
    result.lambda2 = Clean(values[1].real());
  } else {
    result.lambda2 = Clean(modulus);
  }
}

}  // namespace

TopologyAnalysis Analyze(const TopologySequence& topology, bool spectrum) {
  TopologyAnalysis result;
  CheckSums(topology, result);
  CheckSymmetry(topology, result);
  CheckConnectivity(topology, result);
  CountMessages(topology, result);
  if (spectrum && topology.size() <= kMaxSpectrumSize) AnalyzeSpectrum(topology, result);
  return result;
}

}  // namespace bluefog
