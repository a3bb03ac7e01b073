// Which receive takes which target of which publish: what the checks find and the interpreter runs
// on.
#pragma once

#include <string>
#include <vector>

#include "collective/schedule.h"

namespace bluefog::collective {

/// A step of a rank.
struct StepId {
  int rank = -1;
  int32_t step = -1;
};

/// "rank 2, step #5 (copy output[0] 0+3 = #4): <what>".
Status StepError(const std::vector<Schedule>& schedules, StepId id, const std::string& what);

struct Matching {
  /// [rank][step] of a publish: the receives of its targets, in the order of targets.
  std::vector<std::vector<std::vector<StepId>>> receives;
  /// [rank][step] of a receive: its publish, and the weight that comes with the message.
  struct Sender {
    StepId publish;
    double weight = 1.0;
  };
  std::vector<std::vector<Sender>> senders;
};
/// Errors: those of each schedule by itself; a message without receiver or sender, with two, of two
/// lengths, or numbered with a gap.
StatusOr<Matching> Match(const std::vector<Schedule>& schedules, bool allow_unread_views);

}  // namespace bluefog::collective
