// Whether an optimizer may run on a graph. Works on neighbour lists, so that it costs the same per
// edge for thousands of ranks; nothing here needs eigenvalues.
#include <cmath>
#include <cstdio>
#include <numeric>

#include <bluefog/optimizer.h>

namespace bluefog {
namespace {

constexpr double kTolerance = 1e-9;

// "0.3333333333": enough digits to see what is wrong with a weight.
std::string Number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.10g", value);
  return text;
}

// " in round 2", or nothing for a static graph.
std::string InRound(const TopologySequence& sequence, int round) {
  return sequence.is_static() ? "" : " in round " + std::to_string(round);
}

// The first row or column of W that does not sum to 1, or empty.
std::string FindUnbalanced(const TopologySequence& sequence) {
  for (int round = 0; round < sequence.period(); ++round) {
    const Topology& topology = sequence.at(round);
    for (int rank = 0; rank < topology.size(); ++rank) {
      const Neighborhood& mine = topology.neighborhood(rank);
      const auto sum = [&mine](const std::vector<Edge>& edges) {
        return std::accumulate(edges.begin(), edges.end(), mine.self_weight,
                               [](double total, const Edge& edge) { return total + edge.weight; });
      };
      const double column = sum(mine.in), row = sum(mine.out);
      const std::string r = std::to_string(rank);
      // Negated so that NaN counts as wrong.
      if (!(std::abs(column - 1.0) <= kTolerance)) {
        return "column " + r + " of W, the weights of what rank " + r + " receives, sums to " +
               Number(column) + " instead of 1" + InRound(sequence, round);
      }
      if (!(std::abs(row - 1.0) <= kTolerance)) {
        return "row " + r + " of W, the weights of what rank " + r + " sends, sums to " +
               Number(row) + " instead of 1" + InRound(sequence, round);
      }
    }
  }
  return "";
}

// Ranks that rank 0 reaches over a whole period, along the edges or against them.
std::vector<bool> Reached(const TopologySequence& sequence, bool forward) {
  std::vector<bool> seen(static_cast<size_t>(sequence.size()), false);
  std::vector<int> todo = {0};
  seen[0] = true;
  while (!todo.empty()) {
    const int rank = todo.back();
    todo.pop_back();
    for (int round = 0; round < sequence.period(); ++round) {
      const Neighborhood& mine = sequence.at(round).neighborhood(rank);
      for (const Edge& edge : forward ? mine.out : mine.in) {
        if (edge.weight == 0.0 || seen[static_cast<size_t>(edge.rank)]) continue;
        seen[static_cast<size_t>(edge.rank)] = true;
        todo.push_back(edge.rank);
      }
    }
  }
  return seen;
}

// The first pair of ranks without a path, or empty.
std::string FindCut(const TopologySequence& sequence) {
  for (const bool forward : {true, false}) {
    const std::vector<bool> seen = Reached(sequence, forward);
    for (int rank = 0; rank < sequence.size(); ++rank) {
      if (seen[static_cast<size_t>(rank)]) continue;
      const std::string r = std::to_string(rank);
      return "it is not connected: nothing gets from rank " +
             (forward ? "0 to rank " + r : r + " to rank 0") +
             (sequence.is_static() ? "" : " over a whole period");
    }
  }
  return "";
}

// The first round that differs from round 0, or empty.
std::string FindChange(const TopologySequence& sequence) {
  for (int round = 1; round < sequence.period(); ++round) {
    if (sequence.at(round) == sequence.at(0)) continue;
    return "it changes with time (period " + std::to_string(sequence.period()) + "; round " +
           std::to_string(round) + " differs from round 0)";
  }
  return "";
}

// The first pair with W[i][j] != W[j][i], or empty.
std::string FindAsymmetry(const TopologySequence& sequence) {
  for (int round = 0; round < sequence.period(); ++round) {
    const Topology& topology = sequence.at(round);
    for (int i = 0; i < topology.size(); ++i) {
      const Neighborhood& mine = topology.neighborhood(i);
      // Both lists: an edge may exist in one direction only.
      for (const auto* edges : {&mine.out, &mine.in}) {
        for (const Edge& edge : *edges) {
          const double there = topology.weight(i, edge.rank), back = topology.weight(edge.rank, i);
          if (std::abs(there - back) <= kTolerance) continue;
          const std::string a = std::to_string(i), b = std::to_string(edge.rank);
          return "it is not symmetric: W[" + a + "][" + b + "] = " + Number(there) + " but W[" + b +
                 "][" + a + "] = " + Number(back) + InRound(sequence, round);
        }
      }
    }
  }
  return "";
}

}  // namespace

Status CheckTopology(const Traits& traits, const TopologySequence& topology) {
  if (!traits.uses_topology) return absl::OkStatus();
  const std::string subject = "optimizer '" + traits.name + "' cannot run on topology '" +
                              topology.name() + "' of " + std::to_string(topology.size()) +
                              " ranks: ";
  if (std::string problem = FindUnbalanced(topology); !problem.empty()) {
    return absl::InvalidArgumentError(
        subject + problem +
        ". It needs a doubly stochastic matrix, or the ranks agree on a biased model; " +
        "Metropolis-Hastings weights give one on any undirected graph");
  }
  if (std::string problem = FindCut(topology); !problem.empty()) {
    return absl::InvalidArgumentError(subject + problem +
                                      ". The models of these ranks would never meet: add edges");
  }
  const std::string reason = traits.needs_reason.empty() ? "" : ". " + traits.needs_reason;
  if (traits.needs_static) {
    if (std::string problem = FindChange(topology); !problem.empty()) {
      return absl::InvalidArgumentError(subject + problem +
                                        ", and this method needs one fixed graph" + reason +
                                        ". Use a fixed graph, a method such as dmsgd or dsgd, or "
                                        "allow_unstable to run it all the same");
    }
  }
  if (traits.needs_symmetric) {
    if (std::string problem = FindAsymmetry(topology); !problem.empty()) {
      return absl::InvalidArgumentError(subject + problem + reason +
                                        ". Use an undirected graph (ring, mesh-grid-2d, "
                                        "symmetric-exponential, …), a method such as dmsgd " +
                                        "or dsgd, or allow_unstable to run it all the same");
    }
  }
  return absl::OkStatus();
}

}  // namespace bluefog
