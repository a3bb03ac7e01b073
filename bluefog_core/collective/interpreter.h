// Runs the schedules of all ranks in one thread, with doubles for elements, and checks them: every
// message matches in number and length, nothing deadlocks, nothing is read before it is written, no
// range is overwritten while a publish of it is outstanding, every send is received. Views are read
// where they lie, in the sender's memory, as late as a schedule allows. Messages are coded without
// loss here, so that they make no difference to values.
#pragma once

#include <cstdint>
#include <vector>

#include "collective/schedule.h"

namespace bluefog::collective {

struct InterpreterOptions {
  /// Steps that could run are picked in an order drawn from this seed.
  uint64_t seed = 0;
  /// Output is the same memory as input.
  bool in_place = false;
  /// A view with elements that no step reads is an error, unless this is set (in-edges of weight
  /// 0).
  bool allow_unread_views = false;
};

/// What can be seen without running: ranges, the order of steps, groups, and that each message has
/// one sender and one receiver who agree on its length. `schedules[r]` is rank r's. All errors are
/// InvalidArgument and name rank and step.
Status CheckSchedules(const std::vector<Schedule>& schedules, bool allow_unread_views = false);

/// Checks, then runs. `inputs[r]` is rank r's input; returns the outputs, all payloads' one after
/// the other. A schedule WithPlugin runs a toy: Produce writes (p + 1) * input to payload p, and
/// what Consume makes of an element, the sum over p of (p + 1) * mixed[p], is returned instead of
/// the output. Errors are InvalidArgument and name rank and step; a deadlock lists what is blocked.
StatusOr<std::vector<std::vector<double>>> Interpret(const std::vector<Schedule>& schedules,
                                                     const std::vector<std::vector<double>>& inputs,
                                                     const InterpreterOptions& options = {});

}  // namespace bluefog::collective
