// The launcher's end of one agent: the process that leads to it (ssh, or a fork for this host) and
// the frames in both directions.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/types.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "agent_protocol.h"
#include "hosts.h"
#include "output.h"

namespace bluefog::tools {

struct SshOptions {
  int port = 0;                      ///< 0: ssh's own choice.
  std::vector<std::string> options;  ///< "Name=value", as for ssh -o; they win over ours.
  std::string remote_bluefog;        ///< Empty: where this program lies here.
  int connect_timeout_s = 60;
  int lost_after_s = 30;  ///< An agent that hears nothing for so long ends its ranks.
};

/// What leads to the agent on `host`: words for exec.
std::vector<std::string> SshCommand(const SshOptions& ssh, const std::string& host);

class AgentLink {
 public:
  enum class Phase { kConnecting, kPreparing, kReady };

  /// `ssh` is borrowed.
  AgentLink(HostRanks host, HostJob job, const SshOptions& ssh)
      : host(std::move(host)), job_(std::move(job)), ssh_(ssh) {}
  /// Closes the pipes; an ssh that still runs is told to end.
  ~AgentLink();
  AgentLink(const AgentLink&) = delete;
  AgentLink& operator=(const AgentLink&) = delete;

  /// Starts the process; `mask` is for it. Local agents come before all ssh, whose pipes they would
  /// keep open. 0 or an errno.
  int Open(const sigset_t& mask);
  /// Frames go in order when there is room; none after Close.
  void Send(FrameKind kind, int value = 0, std::string text = "");
  /// Says that the launcher is there; to be repeated before lost_after_s are over. Not `there`: it
  /// will be silent.
  void SendAlive(bool there);
  /// The agent ends what runs, and itself.
  void Close();
  /// It does not answer: its process here need not wait for it.
  void Abandon();
  /// There is no process: it has ended and all it said was read, or it was never started.
  bool over() const { return over_; }

  void AddTo(std::vector<pollfd>& fds, bool read) const;
  /// Reads, if wanted, and writes what can be. Frames go to `on_frame`, what else is said to
  /// `lines`. True once: it is over.
  bool Turn(bool read, const std::function<void(const Frame&)>& on_frame, const LineSink& lines);
  /// Once it is over: why, and what to do.
  std::string Explain() const;

  const HostRanks host;
  Phase phase = Phase::kConnecting;
  HostReady ready;

 private:
  void Read(const std::function<void(const Frame&)>& on_frame, const LineSink& lines);
  void Greet(const LineSink& lines);
  // To the process, while it is there: −1 would be everybody.
  void Kill(int signal) const;

  HostJob job_;
  const SshOptions& ssh_;
  pid_t pid_ = -1;  // Until it is known to have ended.
  bool over_ = true;
  int status_ = 0;  // As of waitpid.
  int to_ = -1, from_ = -1;
  Stream errors_;  // ssh's standard error, which is the agent's, too.
  Output queue_;
  FrameReader frames_;
  std::string before_;    // What came so far and is no greeting yet.
  std::string greeting_;  // If it is not ours.
  std::string said_;      // The end of what went to `lines`.
};

}  // namespace bluefog::tools
