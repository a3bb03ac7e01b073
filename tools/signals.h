// Signals as events: the launcher and its agents read them from a descriptor.
#pragma once

#include <signal.h>

#include <initializer_list>
#include <string>

namespace bluefog::tools {

/// Blocks `wanted` in this process and returns a signalfd for them, non-blocking. What was ignored
/// at the start stays so (SIGHUP by nohup, SIGINT by a script's `command &`), but for SIGCHLD.
/// *inherited: the mask before, for what this process starts. SIGPIPE is ignored from now on.
int TakeSignals(std::initializer_list<int> wanted, sigset_t* inherited);

/// "SIGTERM".
std::string SignalName(int signal);

}  // namespace bluefog::tools
