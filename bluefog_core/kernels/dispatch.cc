// Which instruction set runs, and the switch by which tests choose another.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/dispatch.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstring>
#include <vector>

#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace bluefog::kernels {
namespace HWY_NAMESPACE {
const char* ThisTarget() { return hwy::TargetName(HWY_TARGET); }
}  // namespace HWY_NAMESPACE
}  // namespace bluefog::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace bluefog::kernels {
HWY_EXPORT(ThisTarget);

const char* ActiveTarget() { return HWY_DYNAMIC_DISPATCH(ThisTarget)(); }

std::span<const char* const> SupportedTargets() {
  static const auto* const names = [] {
    auto* list = new std::vector<const char*>;
    for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
      list->push_back(hwy::TargetName(target));
    }
    return list;
  }();
  return *names;
}

bool ForceTarget(const char* name) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (name != nullptr && std::strcmp(name, hwy::TargetName(target)) != 0) continue;
    hwy::GetChosenTarget().Update(name != nullptr ? target : hwy::SupportedTargets());
    return true;
  }
  return false;
}

}  // namespace bluefog::kernels
#endif  // HWY_ONCE
