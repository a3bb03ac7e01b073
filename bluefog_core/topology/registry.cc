// The generators by name, as help texts, MakeTopology and the Python package offer them.
#include <algorithm>
#include <type_traits>
#include <utility>

#include <bluefog/topology.h>
#include <fmt/format.h>

#include "topology/integer.h"

namespace bluefog {
namespace {

template <typename Make>
TopologyGenerator Entry(std::string name, std::string summary, Make make) {
  using Result = std::invoke_result_t<Make, int>;
  if constexpr (std::is_same_v<Result, StatusOr<TopologySequence>>) {
    return {std::move(name), std::move(summary), true, make};
  } else {
    return {std::move(name), std::move(summary), false,
            [make](int n) -> StatusOr<TopologySequence> {
              StatusOr<Topology> topology = make(n);
              if (!topology.ok()) return topology.status();
              return TopologySequence(*std::move(topology));
            }};
  }
}

// Well above the threshold ln(n)/n, so that few draws are disconnected; no libm, so that every
// platform has the same p.
StatusOr<Topology> DefaultErdosRenyi(int n) {
  const double p = n > 1 ? std::min(1.0, 1.5 * topology::CeilLog2(n) / n) : 0.0;
  return ErdosRenyi(n, p, /*seed=*/0);
}

std::vector<TopologyGenerator> All() {
  std::vector<TopologyGenerator> all;
  all.push_back(
      Entry("ring", "both neighbours on a ring, weights 1/3", [](int n) { return Ring(n); }));
  all.push_back(Entry("ring-left", "i sends to i-1, weights 1/2 (directed)",
                      [](int n) { return Ring(n, RingStyle::kLeft); }));
  all.push_back(Entry("ring-right", "i sends to i+1, weights 1/2 (directed)",
                      [](int n) { return Ring(n, RingStyle::kRight); }));
  all.push_back(Entry("exponential", "i sends to i+1, i+2, i+4, … (directed)",
                      [](int n) { return Exponential(n); }));
  all.push_back(Entry("symmetric-exponential", "ring distances 1, 4, 16, …",
                      [](int n) { return SymmetricExponential(n); }));
  all.push_back(Entry("mesh-grid-2d", "grid as square as n allows, Metropolis-Hastings weights",
                      [](int n) { return MeshGrid2D(n); }));
  all.push_back(Entry("torus-2d", "grid that wraps around", [](int n) { return Torus2D(n); }));
  all.push_back(Entry("hypercube", "ranks that differ in one bit; n a power of two", Hypercube));
  all.push_back(Entry("star", "rank 0 with everybody", [](int n) { return Star(n); }));
  all.push_back(Entry("fully-connected", "everybody with everybody, weights 1/n", FullyConnected));
  all.push_back(Entry("erdos-renyi",
                      "random graph (fixed seed, about 1.5 log2 n neighbours), "
                      "Metropolis-Hastings weights",
                      DefaultErdosRenyi));
  all.push_back(Entry("one-peer-exponential",
                      "round k: i sends to i+2^k; exact average every log2 n rounds if n = 2^t",
                      OnePeerExponential));
  all.push_back(Entry("one-peer-hypercube",
                      "round k: pairs that differ in bit k; exact average every log2 n rounds",
                      OnePeerHypercube));
  return all;
}

}  // namespace

const std::vector<TopologyGenerator>& TopologyGenerators() {
  static const auto& all = *new std::vector<TopologyGenerator>(All());
  return all;
}

StatusOr<TopologySequence> MakeTopology(const std::string& name, int n) {
  std::string wanted = name;
  std::replace(wanted.begin(), wanted.end(), '_', '-');
  std::string known;
  for (const TopologyGenerator& generator : TopologyGenerators()) {
    if (generator.name == wanted) return generator.make(n);
    known += (known.empty() ? "" : ", ") + generator.name;
  }
  return absl::NotFoundError(fmt::format("unknown topology \"{}\"; known are {}", name, known));
}

}  // namespace bluefog
