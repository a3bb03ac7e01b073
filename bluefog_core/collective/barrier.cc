// Dissemination: in round k every rank tells rank + 2^k that it, and all it has heard of, have
// come. Hensgen, Finkel, Manber, "Two algorithms for barrier synchronization", 1988.
#include "collective/builder.h"

namespace bluefog::collective {

Schedule PlanBarrier(const PlanInput& in) {
  Builder plan(0, 0);
  std::vector<int32_t> heard;
  for (int distance = 1; distance < in.size; distance *= 2) {
    plan.Publish({}, {{(in.rank + distance) % in.size, 0}}, heard);
    heard.push_back(plan.Receive((in.rank + in.size - distance) % in.size, 0, 0));
  }
  return std::move(plan).Finish();
}

}  // namespace bluefog::collective
