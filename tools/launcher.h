// Starts the ranks of a job on this host and sees them to their end: tagged output, the first
// failure ends all, nothing is left behind. Single-threaded: one poll loop over signals and pipes.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <bluefog/status.h>

namespace bluefog::tools {

struct LaunchOptions {
  int ranks = 1;
  std::vector<std::string> command;                      ///< Not empty; looked up in PATH.
  std::vector<std::pair<std::string, std::string>> env;  ///< Put into every rank's environment.
  std::string coordinator, job_id;
  bool tag = true;  ///< "[rank] " in front of every line.
  bool verbose = false;
};

/// Runs the job to its end and returns the exit code: 0; that of the rank that failed first (128 +
/// signal if it was killed); 127 or 126 if the command cannot be found or started; 128 + signal if
/// this process was told to end (Ctrl-C: 130). To be called once per process: it takes over SIGINT,
/// SIGTERM, SIGHUP and SIGCHLD.
int Launch(const LaunchOptions& options);

/// "127.0.0.1:port" with a port that is free now and that the kernel gives to no outgoing
/// connection.
StatusOr<std::string> ChooseCoordinator();
/// 128 random bits in hex.
std::string MakeJobId();

}  // namespace bluefog::tools
