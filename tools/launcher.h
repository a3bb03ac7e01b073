// Starts the ranks of a job, on this host and over ssh on others, and sees them to their end:
// tagged output, the first failure ends all, nothing is left behind on any host. An agent on each
// host holds the ranks there. Single-threaded: one poll loop over signals and pipes.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <bluefog/status.h>

#include "agent_link.h"
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

/// Runs the job to its end and returns the exit code: 0; that of the rank that failed first (128 +
/// signal if it was killed); 127 or 126 if the command cannot be found or started; 255 if a host
/// cannot be reached, or was lost; 128 + signal if this process was told to end (Ctrl-C: 130). To
/// be called once per process: it takes over SIGINT, SIGTERM, SIGHUP, SIGTSTP and SIGCHLD.
int Launch(const LaunchOptions& options);

/// The name or address by which all hosts reach rank 0's. FailedPrecondition if only --coordinator
/// can tell.
StatusOr<std::string> CoordinatorHost(const LaunchOptions& options);

}  // namespace bluefog::tools
