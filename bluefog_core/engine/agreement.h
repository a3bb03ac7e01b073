// Do all ranks build the same optimizer? Asked once, by all-gathers, before its buckets exist.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include <bluefog/distributed_optimizer.h>

#include "engine/engine.h"

namespace bluefog {

/// Collective. Compares plugin, settings, step, and names, layouts, groups and order of the
/// parameters; the error names the rank that differs from rank 0 and both values. `name` is the
/// optimizer's in this job; `interrupted` as in DistributedOptimizerOptions.
Status AgreeOnOptimizer(Engine* engine, const std::string& name, const std::string& plugin,
                        const std::string& settings, int64_t step,
                        std::span<const ParameterInfo> params,
                        const std::function<bool()>& interrupted);

/// Instead of it on a rank that cannot make the optimizer: that of the others fails with `why`.
void DeclineOptimizer(Engine* engine, const std::string& name, const Status& why);

/// Collective, the end of it: `mine`, or Aborted with the rank where it went wrong.
Status AgreeOnSuccess(Engine* engine, const std::string& name, const Status& mine,
                      const std::function<bool()>& interrupted);

}  // namespace bluefog
