// The agent: runs the ranks of one host for the launcher, which started it by ssh or, on its own
// host, by a fork. It decides nothing; when the launcher is gone it ends its ranks and itself.
#pragma once

namespace bluefog::tools {

/// From SIGTERM to SIGKILL, for ranks that do not end.
constexpr int kTermSeconds = 2;

/// Serves one launcher over two pipes (agent_protocol.h) to the end; returns the exit code.
int RunAgent(int from_launcher, int to_launcher);

/// The same over standard input and output, which the ranks do not get then.
int RunRemoteAgent();

}  // namespace bluefog::tools
