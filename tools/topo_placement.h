// `bluefog topo --placement`: what operations on a graph cost on given hosts.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <bluefog/config.h>
#include <bluefog/topology.h>
#include <nlohmann/json.hpp>

namespace bluefog::tools {

struct NamedPlacement {
  Placement placement;
  std::vector<std::string> names;  ///< Of the hosts.
};
/// "2x4": 2 hosts of 4 ranks each; "host1:4,host2:4". InvalidArgument says what is wrong.
StatusOr<NamedPlacement> ParsePlacement(const std::string& text);

struct PlacementRequest {
  NamedPlacement hosts;
  std::optional<TopologySequence> ranks, machines;  ///< What graphs there are.
  double bytes = 0.0;
  Config config;
};
void PrintPlacement(const PlacementRequest& request);
nlohmann::ordered_json PlacementAsJson(const PlacementRequest& request);

}  // namespace bluefog::tools
