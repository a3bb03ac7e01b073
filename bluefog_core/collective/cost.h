// What an operation costs on a given placement, in closed form: the bytes that leave each network
// interface and that ranks of a host exchange, the hops that follow each other, and the seconds
// that links need for them. Pure functions, which choose between the flat and the hierarchical
// form.
//
//   seconds = host_hops * host_latency + nic_hops * nic_latency
//             + max(bytes of the busiest interface, either way / nic_bandwidth,
//                   bytes inside the busiest host / host_bandwidth)
//
// The maximum, because operations are pipelined by chunk. Ranks that share an interface share its
// bandwidth; the ranks of a host share its memory's. Computation between ranks' steps, and other
// traffic on the links, do not count.
#pragma once

#include <cstdint>
#include <vector>

#include <bluefog/config.h>

#include "collective/schedule.h"

namespace bluefog::collective {

/// Latencies in seconds a hop, bandwidths in bytes a second: of one interface in each direction,
/// and of all that the ranks of one host read from each other.
struct Links {
  double host_latency = 0.0, host_bandwidth = 1.0;
  double nic_latency = 0.0, nic_bandwidth = 1.0;
};

Links LinksOf(const Config& config);

struct NicBytes {
  int host = 0, nic = 0;
  double out = 0.0, in = 0.0;
};

struct Cost {
  std::vector<NicBytes> nics;       ///< By host, then interface.
  std::vector<double> host_bytes;   ///< By host: what its ranks read from each other.
  int host_hops = 0, nic_hops = 0;  ///< One after the other.
  double Seconds(const Links& links) const;
  /// Of the busiest interface, in the direction that is busier; of the busiest host.
  double BusiestNic() const;
  double BusiestHost() const;
};

/// Of PlanNeighborAllreduce over a graph between ranks.
Cost CostOfNeighborAllreduce(const Placement& placement, const Topology& ranks, double bytes);
/// Of PlanHierarchicalNeighborAllreduce; `machines`: all of the graph.
Cost CostOfHierarchicalNeighborAllreduce(Form form, const Placement& placement,
                                         const Topology& machines, double bytes, bool one_shot);
/// Of PlanAllreduce (kFlat) and PlanHierarchicalAllreduce.
Cost CostOfAllreduce(Form form, const Placement& placement, double bytes, bool one_shot);

/// The form that takes less time. The graph between machines is not asked, since a call may bring
/// weights that other ranks do not know: it is chosen for one neighbouring machine, which is where
/// hierarchy gains least.
Form ChooseHierarchicalNeighborAllreduce(const Placement& placement, double bytes, bool one_shot,
                                         const Links& links);
Form ChooseAllreduce(const Placement& placement, double bytes, bool one_shot, const Links& links);

}  // namespace bluefog::collective
