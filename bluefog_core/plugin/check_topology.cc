// Whether an optimizer may run on a graph.
#include <bluefog/optimizer.h>

namespace bluefog {
namespace {

// The first round that differs from round 0, or empty.
std::string FindChange(const TopologySequence& sequence) {
  for (int round = 1; round < sequence.period(); ++round) {
    if (sequence.at(round) == sequence.at(0)) continue;
    return "it changes with time (period " + std::to_string(sequence.period()) + "; round " +
           std::to_string(round) + " differs from round 0)";
  }
  return "";
}

}  // namespace

Status CheckTopology(const Traits& traits, const TopologySequence& topology) {
  if (!traits.uses_topology) return absl::OkStatus();
  const std::string subject = "optimizer '" + traits.name + "' cannot run on topology '" +
                              topology.name() + "' of " + std::to_string(topology.size()) +
                              " ranks: ";
  const TopologyAnalysis analysis = Analyze(topology, /*spectrum=*/false);
  if (!analysis.doubly_stochastic) {
    return absl::InvalidArgumentError(
        subject + analysis.problem +
        ". It needs a doubly stochastic matrix, or the ranks agree on a biased model; " +
        "Metropolis-Hastings weights give one on any undirected graph");
  }
  if (!analysis.connected) {
    return absl::InvalidArgumentError(subject + "it is not connected: " + analysis.cut +
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
  if (traits.needs_symmetric && !analysis.symmetric) {
    return absl::InvalidArgumentError(subject + "it is not symmetric: " + analysis.asymmetry +
                                      reason +
                                      ". Use an undirected graph (ring, mesh-grid-2d, "
                                      "symmetric-exponential, …), a method such as dmsgd " +
                                      "or dsgd, or allow_unstable to run it all the same");
  }
  return absl::OkStatus();
}

}  // namespace bluefog
