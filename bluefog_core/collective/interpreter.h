// Runs the schedules of all ranks in one thread, with doubles for elements, and checks them: every
// message matches in number and length, nothing deadlocks, nothing is read before it is written, no
// range is overwritten while a publish of it is outstanding, every send is received.
#pragma once

#include <cstdint>
#include <vector>

#include "collective/schedule.h"

namespace bluefog::collective {

struct InterpreterOptions {
  /// Steps that could run are picked in an order drawn from this seed.
  uint64_t seed = 0;
};

/// `inputs[r]` is rank r's input; returns the outputs. Errors name rank and step.
StatusOr<std::vector<std::vector<double>>> Interpret(const std::vector<Schedule>& schedules,
                                                     const std::vector<std::vector<double>>& inputs,
                                                     const InterpreterOptions& options = {});

}  // namespace bluefog::collective
