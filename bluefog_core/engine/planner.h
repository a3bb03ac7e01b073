// From an operation to the Plan it replays: picks the collective, cuts chunks, remembers what was
// planned.
#pragma once

#include <functional>
#include <memory>
#include <unordered_map>
#include <utility>

#include <bluefog/communicator.h>
#include <bluefog/optimizer.h>

#include "base/mutex.h"
#include "collective/schedule.h"
#include "engine/plan.h"

namespace bluefog {

/// Thread-safe: callers plan on their own threads.
class Planner {
 public:
  Planner(const Config& config, int rank, int size)
      : config_(config), rank_(rank), size_(size), placement_(Placement::OneHost(size)) {}
  /// Before the first Get.
  void SetPlacement(Placement placement) { placement_ = std::move(placement); }
  const Placement& placement() const { return placement_; }

  struct Request {
    Op op = Op::kBarrier;
    int64_t count = 0;
    int64_t element_bytes = 1;
    bool in_place = false, average = true, local = false;
    bool coded = false;  ///< kNeighborAllreduce, and of kOptimizer the one with neighbours.
    int root = 0;
    /// k(Hierarchical)NeighborAllreduce (there of this rank's machine), kOptimizer.
    const Neighborhood* neighborhood = nullptr;
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
  /// Those that an optimizer can use too.
  collective::Schedule MakeExchange(Collective collective, const Request& request,
                                    const collective::PlanInput& in) const;
  /// The setting, or what `choose` says takes less time.
  collective::Form FormOf(const std::function<collective::Form()>& choose) const;
  /// A machine's edges as those of its ranks.
  Neighborhood EdgesOfRanks(const Neighborhood& machine) const;

  const Config config_;
  const int rank_, size_;
  Placement placement_;
  mutable Mutex mu_;
  std::unordered_map<uint64_t, std::shared_ptr<const Plan>> plans_ GUARDED_BY(mu_);
  int64_t steps_ GUARDED_BY(mu_) = 0;  ///< Of plans_, and one more for each.
  int64_t planned_ GUARDED_BY(mu_) = 0;
};

}  // namespace bluefog
