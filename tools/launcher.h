// Starts the ranks of a job, on this host and over ssh on others, and sees them to their end:
// tagged output, the first failure ends all, nothing is left behind on any host. An agent on each
// host holds the ranks there. Single-threaded: one poll loop over signals and pipes.
#pragma once

#include "job_plan.h"

namespace bluefog::tools {

/// Runs the job to its end and returns the exit code: 0; that of the rank that failed first (128 +
/// signal if it was killed); 127 or 126 if the command cannot be found or started; 255 if a host
/// cannot be reached, or was lost; 128 + signal if this process was told to end (Ctrl-C: 130). To
/// be called once per process: it takes over SIGINT, SIGTERM, SIGHUP, SIGTSTP and SIGCHLD.
int Launch(const LaunchOptions& options);

}  // namespace bluefog::tools
