// Which way leads to which rank. Every rank tells where it is and how it can be reached (its entry
// of the address book); both ends of a pair see the same two entries and choose alike.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <bluefog/status.h>
#include <bluefog/topology.h>

#include "transport/arena.h"
#include "transport/transport.h"

namespace bluefog::transport {

/// Where a rank is. Shared memory needs the same kernel, and its namespaces of processes and of the
/// network.
struct Whereabouts {
  std::string host;  ///< For people.
  std::string boot;  ///< Names the running kernel.
  std::string process_namespace, network_namespace;
  std::string shm;      ///< Address; empty: cannot be reached that way.
  std::string ucx;      ///< Address; empty: cannot be reached that way.
  std::string problem;  ///< Why not over UCX.
  std::string network;  ///< For people: interfaces and their addresses.

  /// Not by which way they reach each other: the same kernel and namespaces.
  bool SameHost(const Whereabouts& other) const;
  bool SharesMemoryWith(const Whereabouts& other) const;
};

/// Hosts in the order of their first ranks.
Placement PlacementOf(const std::vector<Whereabouts>& ranks);

/// The entry of the address book.
std::string Pack(const Whereabouts& whereabouts);
/// InvalidArgument if it is none.
StatusOr<Whereabouts> Unpack(const std::string& entry);

struct RouteOptions {
  int rank = 0, size = 1;
  std::string job_id;
  int64_t inline_limit = 8 << 10;
  std::string transport = "auto";  ///< "shm" or "ucx": no other. Equal on all ranks.
  /// All ranks are known to be on this host: UCX need not be loaded.
  bool one_host = false;
  /// Which interfaces carry what goes to other hosts: names or subnets, or the one that leads to
  /// the coordinator ("host:port").
  std::string network_interface, coordinator;
  std::string component_dir;
  std::string token;  ///< The job's (base/token.h).
};

class Routes {
 public:
  /// `receiver` is borrowed. Without UCX that is no failure yet: see SetPeers.
  static StatusOr<Routes> Open(const RouteOptions& options, std::shared_ptr<Arena> arena,
                               Receiver* receiver);
  std::string address() const { return Pack(self_); }
  /// The address book by rank. FailedPrecondition names a rank that cannot be reached, and says
  /// what to install. Fills the members below.
  Status SetPeers(const std::vector<std::string>& entries);

  std::vector<std::unique_ptr<Transport>> transports;  ///< Those that are used.
  std::vector<Transport*> by_rank;                     ///< Null: this rank itself.
  std::vector<Whereabouts> whereabouts;                ///< Of all ranks.

 private:
  RouteOptions options_;
  Whereabouts self_;
  std::unique_ptr<Transport> shm_, ucx_;
};

}  // namespace bluefog::transport
