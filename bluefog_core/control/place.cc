// Finds this process's place in a job: from the variables of `bluefog run`, else from torchrun's,
// else it is alone. Works on the parsed Config only.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/token.h"
#include "control/membership.h"

namespace bluefog::control {
namespace {

Status Missing(const std::string& launcher, const std::vector<std::string>& given,
               const std::vector<std::string>& missing) {
  auto join = [](const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
  };
  return absl::InvalidArgumentError("half a set of " + launcher + "'s variables: " + join(given) +
                                    (given.size() == 1 ? " is" : " are") + " set and " +
                                    join(missing) + (missing.size() == 1 ? " is" : " are") +
                                    " not; set all of them, or none to run alone");
}

/// Sorts (name, is it there) into the two lists; an error if some are there and some are not.
Status CheckWhole(const std::string& launcher,
                  const std::vector<std::pair<std::string, bool>>& variables) {
  std::vector<std::string> given, missing;
  for (const auto& [name, present] : variables) (present ? given : missing).push_back(name);
  return missing.empty() ? absl::OkStatus() : Missing(launcher, given, missing);
}

Status CheckRange(const std::string& rank_name, int rank, const std::string& size_name, int size) {
  if (size < 1) {
    return absl::InvalidArgumentError(size_name + " is " + std::to_string(size) +
                                      ": a job has at least 1 rank");
  }
  if (rank < 0 || rank >= size) {
    return absl::InvalidArgumentError(rank_name + " is " + std::to_string(rank) + " and " +
                                      size_name + " is " + std::to_string(size) +
                                      ": ranks go from 0 to " + std::to_string(size - 1));
  }
  return absl::OkStatus();
}

StatusOr<Place> FromBluefogRun(const Config& c) {
  std::vector<std::pair<std::string, bool>> needed = {{"BLUEFOG_RANK", c.rank != -1},
                                                      {"BLUEFOG_SIZE", c.size != -1},
                                                      {"BLUEFOG_LOCAL_RANK", c.local_rank != -1},
                                                      {"BLUEFOG_LOCAL_SIZE", c.local_size != -1}};
  if (c.size != 1) {  // A rank alone in its job meets nobody.
    needed.emplace_back("BLUEFOG_JOB_ID", !c.job_id.empty());
    needed.emplace_back("BLUEFOG_COORDINATOR", !c.coordinator.empty());
  }
  if (Status s = CheckWhole("bluefog run", needed); !s.ok()) return s;
  if (Status s = CheckRange("BLUEFOG_RANK", c.rank, "BLUEFOG_SIZE", c.size); !s.ok()) return s;
  if (Status s = CheckRange("BLUEFOG_LOCAL_RANK", c.local_rank, "BLUEFOG_LOCAL_SIZE", c.local_size);
      !s.ok()) {
    return s;
  }
  return Place{.rank = c.rank,
               .size = c.size,
               .local_rank = c.local_rank,
               .local_size = c.local_size,
               .job_id = c.job_id,
               .coordinator = c.coordinator,
               .launched_by = "bluefog run"};
}

StatusOr<Place> FromTorchrun(const Config& c) {
  if (Status s = CheckWhole("torchrun", {{"RANK", c.torch_rank != -1},
                                         {"WORLD_SIZE", c.torch_world_size != -1},
                                         {"LOCAL_RANK", c.torch_local_rank != -1},
                                         {"LOCAL_WORLD_SIZE", c.torch_local_world_size != -1},
                                         {"MASTER_ADDR", !c.torch_master_addr.empty()},
                                         {"MASTER_PORT", c.torch_master_port != -1}});
      !s.ok()) {
    return s;
  }
  if (Status s = CheckRange("RANK", c.torch_rank, "WORLD_SIZE", c.torch_world_size); !s.ok())
    return s;
  if (Status s = CheckRange("LOCAL_RANK", c.torch_local_rank, "LOCAL_WORLD_SIZE",
                            c.torch_local_world_size);
      !s.ok()) {
    return s;
  }
  if (c.torch_master_port < 1 || c.torch_master_port > 65535) {
    return absl::InvalidArgumentError("MASTER_PORT is " + std::to_string(c.torch_master_port) +
                                      ": a port goes from 1 to 65535");
  }
  // PyTorch's own store listens on MASTER_PORT itself, so every rank takes the port beside it.
  const int port = c.torch_master_port == 65535 ? 65534 : c.torch_master_port + 1;
  const bool v6 = c.torch_master_addr.find(':') != std::string::npos;
  const std::string host = v6 ? "[" + c.torch_master_addr + "]" : c.torch_master_addr;
  const std::string store = host + ":" + std::to_string(c.torch_master_port);
  return Place{
      .rank = c.torch_rank,
      .size = c.torch_world_size,
      .local_rank = c.torch_local_rank,
      .local_size = c.torch_local_world_size,
      .job_id = c.job_id.empty() ? "torchrun-" + store : c.job_id,
      .coordinator = c.coordinator.empty() ? host + ":" + std::to_string(port) : c.coordinator,
      .launched_by = "torchrun"};
}

StatusOr<Place> FromLauncher(const Config& c) {
  const bool bluefog_run = c.rank != -1 || c.size != -1 || c.local_rank != -1 || c.local_size != -1;
  if (bluefog_run) return FromBluefogRun(c);
  if (c.torch_rank != -1 || c.torch_world_size != -1) return FromTorchrun(c);
  if (!c.coordinator.empty() || !c.job_id.empty())
    return FromBluefogRun(c);  // Names what is missing.
  Place alone;
  alone.launched_by = "alone";
  return alone;
}

}  // namespace

StatusOr<Place> FindPlace(const Config& config) {
  StatusOr<Place> place = FromLauncher(config);
  if (!place.ok()) return place;
  if (const int k = config.nodes_per_machine; k > 0 && place->size > 1) {
    place->local_rank = place->rank % k;
    place->local_size = std::min(k, place->size - place->rank / k * k);
  }
  if (config.token_fd >= 0 || !config.token_file.empty()) {
    StatusOr<std::string> token = config.token_fd >= 0 ? ReadTokenDescriptor(config.token_fd)
                                                       : ReadTokenFile(config.token_file);
    if (!token.ok()) return token.status();
    place->token = *std::move(token);
  }
  return place;
}

}  // namespace bluefog::control
