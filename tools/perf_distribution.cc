// The spread of the times of `bluefog perf`: percentiles, and a histogram whose classes grow by a
// factor, so that the body and a tail a thousand times as long fit in one picture.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "perf.h"

namespace bluefog::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::pair<const char*, double> kPercentiles[] = {
    {"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"p99.9", 0.999}, {"max", 1.0}};
/// Classes by factor of ten: their bounds are 1, 1.26, 1.58, 2, … 10.
constexpr int kClassesPerDecade = 10;
constexpr int kBarColumns = 50;

int ClassOf(double us) {
  return static_cast<int>(std::floor(std::log10(std::max(us, 1e-3)) * kClassesPerDecade));
}
double LowerBound(int index) { return std::pow(10.0, double(index) / kClassesPerDecade); }

}  // namespace

double Percentile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  const auto at = static_cast<size_t>(std::lround(p * static_cast<double>(values.size() - 1)));
  return values[at];
}

Json LatencyDistribution(const std::vector<double>& us) {
  Json result;
  for (const auto& [name, p] : kPercentiles) result[name] = Percentile(us, p);
  const int first = ClassOf(Percentile(us, 0)), last = ClassOf(Percentile(us, 1));
  std::vector<int64_t> counts(static_cast<size_t>(last - first + 1));
  for (const double t : us) ++counts[static_cast<size_t>(ClassOf(t) - first)];
  for (int c = first; c <= last; ++c) {
    result["histogram"].push_back({{"from_us", LowerBound(c)},
                                   {"to_us", LowerBound(c + 1)},
                                   {"count", counts[static_cast<size_t>(c - first)]}});
  }
  return result;
}

std::string DrawLatencyDistribution(const Json& distribution) {
  std::string text = " ";
  for (const auto& [name, p] : kPercentiles) {
    text += fmt::format("  {} {:.1f} us", name, distribution[name].get<double>());
  }
  text += "\n";
  int64_t most = 1;
  for (const Json& c : distribution["histogram"]) most = std::max(most, c["count"].get<int64_t>());
  for (const Json& c : distribution["histogram"]) {
    const auto count = c["count"].get<int64_t>();
    // What is there is seen.
    const auto bar = (count * kBarColumns + most - 1) / most;
    text +=
        fmt::format("{:>11.1f} … {:>9.1f} us {:>8}  {}\n", c["from_us"].get<double>(),
                    c["to_us"].get<double>(), count, std::string(static_cast<size_t>(bar), '#'));
  }
  return text;
}

}  // namespace bluefog::tools
