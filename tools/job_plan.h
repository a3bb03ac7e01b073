// What is to be run, and what of it each host gets.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <bluefog/status.h>

#include "agent_link.h"
#include "agent_protocol.h"
#include "hosts.h"

namespace bluefog::tools {

struct LaunchOptions {
  int ranks = 1;
  std::vector<HostRanks> hosts;      ///< Of `ranks` in all. Empty: all on this host.
  std::vector<std::string> command;  ///< Not empty; looked up in PATH.
  std::vector<std::pair<std::string, std::string>> env;  ///< Put into every rank's environment.
  std::string cwd;                                       ///< On every host; empty: this folder.
  std::string coordinator;                               ///< HOST:PORT, or HOST, or empty: chosen.
  SshOptions ssh;
  int start_timeout_s = 60;  ///< Until all hosts are ready.
  bool tag = true;           ///< "[rank] " in front of every line.
  bool verbose = false;
};

struct HostPlan {
  HostRanks host;
  HostJob job;
};
/// One a host, in the order of their ranks, with an id and a token for the job.
StatusOr<std::vector<HostPlan>> PlanJob(const LaunchOptions& options);

/// options.coordinator names a port, too: it is used as it is.
bool HasCoordinator(const LaunchOptions& options);
/// The name or address by which all hosts reach rank 0's. FailedPrecondition if only --coordinator
/// can tell.
StatusOr<std::string> CoordinatorHost(const LaunchOptions& options);

}  // namespace bluefog::tools
