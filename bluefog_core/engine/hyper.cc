#include "engine/hyper.h"

#include <array>
#include <cmath>
#include <sstream>
#include <utility>

#include "base/hash.h"

namespace bluefog {
namespace {

const std::array<HyperInfo, 3> kCommon = {
    {{.name = "lr"}, {.name = "momentum"}, {.name = "weight_decay"}}};
constexpr std::array<double Hyper::*, 3> kCommonValues = {&Hyper::lr, &Hyper::momentum,
                                                          &Hyper::weight_decay};

// lr, momentum, weight_decay, then the plugin's own.
size_t HyperCount(const Traits& traits) { return kCommon.size() + traits.hypers.size(); }

std::pair<const HyperInfo&, double> HyperAt(const Traits& traits, const Hyper& hyper, size_t i) {
  if (i < kCommon.size()) return {kCommon[i], hyper.*kCommonValues[i]};
  i -= kCommon.size();
  return {traits.hypers[i], hyper.own[i]};
}

}  // namespace

std::string ToString(const Traits& traits, const Hyper& hyper, bool learning_rate) {
  std::ostringstream text;
  for (size_t i = learning_rate ? 0 : 1; i < HyperCount(traits); ++i) {
    const auto [info, value] = HyperAt(traits, hyper, i);
    text << (text.tellp() > 0 ? ", " : "") << info.name << " " << value;
  }
  return text.str();
}

uint64_t HashOfRest(const Traits& traits, const Hyper& hyper) {
  StableHash hash;
  for (size_t i = 1; i < HyperCount(traits); ++i) hash.Add(HyperAt(traits, hyper, i).second);
  return hash.value();
}

Status CheckHyper(const Traits& traits, const Hyper& hyper) {
  for (size_t i = 0; i < HyperCount(traits); ++i) {
    const auto [info, value] = HyperAt(traits, hyper, i);
    if (std::isfinite(value) && value >= info.lowest && value <= info.highest) continue;
    std::ostringstream text;
    text << info.name << " is " << value << ", but must be a finite number >= " << info.lowest;
    if (info.highest < std::numeric_limits<double>::max()) text << " and <= " << info.highest;
    return absl::InvalidArgumentError(text.str());
  }
  return absl::OkStatus();
}

}  // namespace bluefog
