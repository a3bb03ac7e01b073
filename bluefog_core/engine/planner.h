// From an operation to the Plan it replays: picks the collective, cuts chunks, remembers what was
// planned.
#pragma once

#include <memory>
#include <unordered_map>

#include <bluefog/communicator.h>
#include <bluefog/optimizer.h>

#include "base/mutex.h"
#include "collective/schedule.h"
#include "engine/plan.h"

namespace bluefog {

/// Thread-safe: callers plan on their own threads.
class Planner {
 public:
  Planner(const Config& config, int rank, int size) : config_(config), rank_(rank), size_(size) {}

  struct Request {
    Op op = Op::kBarrier;
    int64_t count = 0;
    int64_t element_bytes = 1;
    bool in_place = false, average = true;
    bool coded = false;  ///< kNeighborAllreduce, and of kOptimizer the one with neighbours.
    int root = 0;
    const Neighborhood* neighborhood = nullptr;         ///< kNeighborAllreduce, kOptimizer.
    const std::vector<double>* send_weights = nullptr;  ///< By neighborhood->out, or null.
    // kOptimizer:
    const collective::PluginPlan* plugin = nullptr;
    bool silent = false;  ///< No exchange in this step.
    Collective collective = Collective::kNeighborAllreduce;
  };
  StatusOr<std::shared_ptr<const Plan>> Get(const Request& request);
  /// Plans made, that is: misses of the cache.
  int64_t planned() const;
  /// Those kept now.
  size_t kept() const;

 private:
  uint64_t Hash(const Request& request) const;
  collective::Schedule Make(const Request& request) const;

  const Config config_;
  const int rank_, size_;
  mutable Mutex mu_;
  std::unordered_map<uint64_t, std::shared_ptr<const Plan>> plans_ GUARDED_BY(mu_);
  int64_t steps_ GUARDED_BY(mu_) = 0;  ///< Of plans_, and one more for each.
  int64_t planned_ GUARDED_BY(mu_) = 0;
};

}  // namespace bluefog
