#include "job_plan.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string_view>

#include "base/token.h"
#include "children.h"

extern char** environ;

namespace bluefog::tools {
namespace {

std::string Hex(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) {
    text += "0123456789abcdef"[static_cast<unsigned char>(byte) >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

// bluefog's own settings are equal on all hosts; all else goes there only if it was named.
std::vector<std::pair<std::string, std::string>> OwnSettings() {
  std::vector<std::pair<std::string, std::string>> settings;
  for (char** e = environ; *e != nullptr; ++e) {
    const std::string_view text(*e);
    const size_t equals = text.find('=');
    if (!text.starts_with("BLUEFOG_") || equals == std::string_view::npos) continue;
    settings.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  }
  return settings;
}

// Where this host finds the command; empty if it is no place that means something elsewhere.
std::string FindHere(const std::string& command) {
  const char* path = std::getenv("PATH");
  std::string found;
  const bool there = FindProgram(command, path == nullptr ? "" : path, &found) == 0;
  return there && found.starts_with('/') ? found : "";
}

}  // namespace

StatusOr<std::vector<HostPlan>> PlanJob(const LaunchOptions& options) {
  std::vector<HostRanks> hosts = options.hosts;
  if (hosts.empty()) hosts.push_back({"", true, options.ranks, 0, options.ranks});
  const bool one_host = hosts.size() == 1;
  const StatusOr<std::string> id = RandomBytes(16), token = RandomBytes(kTokenBytes);
  if (!id.ok() || !token.ok()) return id.ok() ? token.status() : id.status();

  HostJob job;
  job.job_id = Hex(*id);
  job.token = *token;
  job.size = options.ranks;
  job.command = options.command;
  job.program = FindHere(job.command[0]);
  job.tag = options.tag;
  job.cwd = options.cwd;
  if (job.cwd.empty() && !(one_host && hosts[0].local)) {
    std::error_code error;
    job.cwd = std::filesystem::current_path(error).string();
  }
  std::vector<HostPlan> plans;
  for (const HostRanks& host : hosts) {
    HostPlan& plan = plans.emplace_back(HostPlan{host, job});
    plan.job.first_rank = host.first;
    plan.job.ranks = host.count;
    plan.job.inherit = host.local && !options.tag;
    if (!host.name.empty() && options.verbose) plan.job.tag_suffix = "@" + host.name;
    if (!host.local) plan.job.env = OwnSettings();
    plan.job.env.insert(plan.job.env.end(), options.env.begin(), options.env.end());
    if (host.first != 0 || HasCoordinator(options)) continue;
    StatusOr<std::string> name = CoordinatorHost(options);
    if (!name.ok()) return name.status();
    plan.job.coordinator_host = *name;
    plan.job.choose_host = options.coordinator.empty() && !host.local && !one_host;
  }
  return plans;
}

bool HasCoordinator(const LaunchOptions& options) {
  const std::string& text = options.coordinator;
  if (text.starts_with('[')) return text.find("]:") != std::string::npos;
  return std::count(text.begin(), text.end(), ':') == 1;
}

StatusOr<std::string> CoordinatorHost(const LaunchOptions& options) {
  if (const std::string& given = options.coordinator; !given.empty()) {
    const bool bare = !given.starts_with('[') || HasCoordinator(options);
    return bare ? given : given.substr(1, given.size() - 2);  // JoinHostPort puts them back.
  }
  if (options.hosts.size() < 2) return "127.0.0.1";
  const HostRanks& first = options.hosts[0];
  const std::string name = WithoutUser(first.name);
  if (!first.local || !IsLoopback(name)) return name;
  const std::string other = WithoutUser(options.hosts[1].name);
  StatusOr<std::string> address = AddressTowards(other);
  if (address.ok()) return address;
  return absl::FailedPreconditionError("rank 0 runs on this host, and " + name +
                                       " is no name for it on " + other +
                                       ": give one that all hosts know with --coordinator HOST");
}

}  // namespace bluefog::tools
