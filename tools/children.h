// The ranks that one host runs, as children of the agent: starting them, their output, their end.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <string>
#include <string_view>
#include <vector>

#include "agent_protocol.h"
#include "output.h"

namespace bluefog::tools {

/// What execvp would run for `name`, which is looked up in `path` unless it has a slash. 0, or the
/// errno.
int FindProgram(const std::string& name, std::string_view path, std::string* found);

class Children {
 public:
  struct Ended {
    int rank, value;  ///< Its exit code, or minus the signal that killed it.
  };

  /// `program` is run as job.command. Children get the mask `signals`, and BLUEFOG_TOKEN_FILE is
  /// `token_file`. `job` is borrowed.
  Children(const HostJob& job, std::string program, std::string token_file, const sigset_t& signals,
           LineSink sink);

  /// 0, or the errno that kept the rank from starting.
  int Start(int rank, const std::string& coordinator);
  /// Pipes of output that have not ended.
  std::vector<Stream*> streams();
  const LineSink& sink() const { return sink_; }
  /// Ranks that ended since the last call; their output goes first, as far as there is room.
  std::vector<Ended> TakeEnded();
  bool running() const;
  /// To all ranks and what they started (but for what made itself a group of its own).
  void Signal(int signal);
  /// When none is running: nothing they started stays, and their last output is on its way.
  void End();

 private:
  struct Child {
    pid_t pid = -1;  // Also its session and process group.
    int rank = 0;
    bool ended = false;
    Stream out, err;
  };

  [[noreturn]] void Become(int rank, const std::string& coordinator, pid_t parent, int out, int err,
                           int failure);

  const HostJob& job_;
  const std::string program_, token_file_;
  const sigset_t signals_;
  const LineSink sink_;
  std::vector<Child> children_;
};

}  // namespace bluefog::tools
