// Runs one program on n ranks: as threads over the in-process transport, with views read in place
// or fetched, or as forked processes over shared memory or UCX with the real control plane. What
// each rank returns comes back to the test.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <bluefog/communicator.h>

namespace bluefog::spine {

enum class Fabric { kInPlace, kFetched, kShm, kUcx };
std::string NameOf(Fabric fabric);
/// Those of this build.
std::vector<Fabric> AllFabrics();

struct RankResult {
  std::string error;           ///< Empty if the program ended well.
  std::vector<double> values;  ///< What it put out.
};

/// Called on every rank. Fills `values`; a failure is its Status.
using Program = std::function<Status(Communicator& comm, std::vector<double>* values)>;

/// All ranks, to the end: nobody leaves before every other rank has ended its program. With
/// processes the caller must have no other threads. A rank that crashed has an error that says so.
std::vector<RankResult> RunRanks(Fabric fabric, int size, const Config& config,
                                 const Program& program);

/// The same, with a test failure for each error; values by rank.
std::vector<std::vector<double>> RunRanksOk(Fabric fabric, int size, const Config& config,
                                            const Program& program);

/// Submits `op` and waits.
Status RunOp(Communicator& comm, OpSpec spec);
Status Barrier(Communicator& comm, const std::string& name);

}  // namespace bluefog::spine
