// Named places at which a test makes something go wrong, so that fault tests need no sleeps. Off:
// one predictable branch. Set by BLUEFOG_FAILPOINTS="name=action[@n]; …" (n: the n-th time, default
// the first) or SetFailpoints. Actions:
//   kill     SIGKILL to this process
//   stop     SIGSTOP to this process
//   error    the place fails: FailpointHit returns true and the code there returns its error
//   sleep:MS sleeps for MS milliseconds, once
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include <bluefog/status.h>

namespace bluefog {

/// InvalidArgument names the part that cannot be read or a failpoint that does not exist.
Status SetFailpoints(const std::string& spec);
/// All names, for tests that go through each. A new failpoint is entered in failpoint.cc.
std::vector<std::string> FailpointNames();

extern std::atomic<bool> failpoints_on;
bool FailpointHitSlow(const char* name);
/// True if the place should fail now; kill, stop and sleep happen inside.
inline bool FailpointHit(const char* name) {
  return failpoints_on.load(std::memory_order_relaxed) && FailpointHitSlow(name);
}

}  // namespace bluefog
