#include "launcher.h"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <optional>

#include "agent.h"
#include "base/clock.h"
#include "output.h"
#include "signals.h"

namespace bluefog::tools {
namespace {

constexpr int64_t kSecondNs = 1'000'000'000;
constexpr int64_t kGraceNs = 3 * kSecondNs;  // To fail by themselves, with an error that says why.
constexpr int64_t kVerdictNs = kSecondNs;    // For the rank that left first to end, too.
constexpr int64_t kNewsNs = kSecondNs / 5;   // For what happened before on other hosts.
constexpr int64_t kTermNs = kTermSeconds * kSecondNs;
constexpr int64_t kFarewellNs = 30 * kSecondNs;  // For agents whose ranks have ended.
constexpr int64_t kAliveNs = 2 * kSecondNs;
constexpr int kGiveUp = NSIG;  // After SIGKILL: hosts that do not answer.
constexpr int kHostFailed = 255;

std::string Count(int n, const std::string& what) {
  return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

struct Rank {
  bool running = false;
  int code = 0;       // Of the end; 128 + signal.
  std::string how;    // It failed, in words; else empty.
  std::string place;  // " on host", if there are several.
};

class Launcher {
 public:
  explicit Launcher(const LaunchOptions& options)
      : options_(options), ranks_(static_cast<size_t>(options.ranks)) {}

  int Run() {
    if (Status s = MakeLinks(); !s.ok()) {
      Say(std::string(s.message()));
      output_.Flush();
      return kHostFailed;
    }
    signals_ = TakeSignals({SIGCHLD, SIGINT, SIGTERM, SIGHUP, SIGTSTP}, &inherited_mask_);
    for (const bool local : {true, false}) {
      for (AgentLink& link : links_) {
        if (link.host.local != local) continue;
        if (const int error = link.Open(inherited_mask_); error != 0) {
          CannotStart(link, link.host.first, error);
        }
      }
    }
    while ((!started_ && !exit_code_) || AnyRunning()) Turn();
    Judge();
    End();
    return exit_code_.value_or(0);
  }

 private:
  Status MakeLinks() {
    StatusOr<std::vector<HostPlan>> plans = PlanJob(options_);
    if (!plans.ok()) return plans.status();
    job_id_ = plans->front().job.job_id;
    if (HasCoordinator(options_)) coordinator_ = options_.coordinator;
    for (HostPlan& plan : *plans) {
      const int end = plan.host.name.empty() ? 0 : plan.host.first + plan.host.count;
      for (int r = plan.host.first; r < end; ++r) {
        ranks_[static_cast<size_t>(r)].place = " on " + plan.host.name;
      }
      links_.emplace_back(std::move(plan.host), std::move(plan.job), options_.ssh);
    }
    start_by_ns_ = NowNs() + options_.start_timeout_s * kSecondNs;
    return absl::OkStatus();
  }

  // Waits for whatever comes next and handles it.
  void Turn() {
    std::vector<pollfd> fds = {{signals_, POLLIN, 0}};
    for (const AgentLink& link : links_) link.AddTo(fds, true);
    if (!output_.empty()) fds.push_back({output_.fd(), POLLOUT, 0});
    int64_t due_ns = NowNs() + kAliveNs;
    if (next_signal_ != 0) due_ns = std::min(due_ns, due_ns_);
    if (!started_) due_ns = std::min(due_ns, start_by_ns_);
    int64_t wait_ms = std::max<int64_t>(0, (due_ns - NowNs()) / 1'000'000 + 1);
    if (first_failure_ns_ != 0 && !exit_code_) wait_ms = std::min<int64_t>(wait_ms, 20);
    poll(fds.data(), fds.size(), static_cast<int>(wait_ms));
    Listen(true);
    signalfd_siginfo info;
    while (read(signals_, &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo == SIGTSTP) Suspend();
      if (info.ssi_signo != SIGCHLD && info.ssi_signo != SIGTSTP) {
        Interrupted(static_cast<int>(info.ssi_signo));
      }
    }
    if (!started_ && !exit_code_ && NowNs() >= start_by_ns_) TooLate();
    if (NowNs() >= alive_at_ns_) SayAlive(true);
    Judge();
    if (next_signal_ != 0 && NowNs() >= due_ns_) Stop(next_signal_);
    if (!output_.Flush()) ReaderGone();
    if (output_.full() != hold_ && (output_.full() || output_.empty())) {
      hold_ = !hold_;
      for (AgentLink& link : links_) link.Send(FrameKind::kHold, hold_ ? 1 : 0);
    }
  }

  void Listen(bool read) {
    const LineSink lines = {[this](int fd, std::string text) { output_.Add(fd, std::move(text)); },
                            [this] { return output_.full(); }};
    for (AgentLink& link : links_) {
      const bool over = link.Turn(
          read, [&](const Frame& frame) { OnFrame(link, frame); }, lines);
      if (over && !ending_) Lost(link);
    }
  }

  void OnFrame(AgentLink& link, const Frame& frame) {
    const HostRanks& host = link.host;
    const bool has_rank = frame.rank >= 0 && frame.rank < options_.ranks;
    switch (frame.kind) {
      case FrameKind::kReady:
        return OnReady(link, frame.text);
      case FrameKind::kOutput:
        return output_.Add(frame.value == STDERR_FILENO ? STDERR_FILENO : STDOUT_FILENO,
                           frame.text);
      case FrameKind::kLeft:
        if (!has_rank) return;
        std::erase(left_, frame.rank);  // It came back meanwhile.
        left_.push_back(frame.rank);
        return;
      case FrameKind::kFailed:
        for (int r = std::max(frame.rank, host.first); r < host.first + host.count; ++r) {
          ranks_[static_cast<size_t>(r)].running = false;
        }
        if (has_rank) CannotStart(link, frame.rank, frame.value);
        return;
      case FrameKind::kEnded:
        if (has_rank) OnEnded(frame.rank, frame.value);
        return;
      default:
        return;
    }
  }

  void OnReady(AgentLink& link, const std::string& text) {
    if (exit_code_ || link.phase != AgentLink::Phase::kPreparing) return;
    link.phase = AgentLink::Phase::kReady;
    StatusOr<HostReady> ready = UnpackReady(text);
    if (ready.ok()) link.ready = *std::move(ready);
    if (link.ready.error != 0) return CannotStart(link, link.host.first, link.ready.error);
    if (!link.ready.coordinator.empty()) coordinator_ = link.ready.coordinator;
    const bool all = std::all_of(links_.begin(), links_.end(), [](const AgentLink& other) {
      return other.phase == AgentLink::Phase::kReady;
    });
    if (!all) return;
    started_ = true;
    for (Rank& rank : ranks_) rank.running = true;
    for (AgentLink& other : links_) other.Send(FrameKind::kStart, 0, coordinator_);
    if (!options_.verbose) return;
    Say(Count(options_.ranks, "rank") + " on " +
        (links_.front().host.name.empty() ? "this host"
                                          : Count(static_cast<int>(links_.size()), "host")) +
        ", job " + job_id_ + ", control plane at " + coordinator_);
    SayPrograms();
  }

  // The same word may mean another program on another host.
  void SayPrograms() {
    if (links_.size() < 2) return;
    std::string text;
    for (const AgentLink& link : links_) {
      text += (text.empty() ? "" : ", ") + link.ready.program + " on " + link.host.name;
    }
    Say("'" + options_.command[0] + "' is " + text);
  }

  bool ProgramsDiffer() const {
    return std::any_of(links_.begin(), links_.end(), [&](const AgentLink& link) {
      return link.ready.program != links_.front().ready.program;
    });
  }

  void CannotStart(const AgentLink& link, int rank, int error) {
    if (exit_code_) return;
    const std::string& problem = link.ready.problem;
    const std::string what = problem.empty() ? "'" + options_.command[0] + "'" : problem;
    Say("cannot start rank " + Name(rank) + ", " + what + ": " +
        (error == ENOENT && problem.empty() ? "command not found" : std::strerror(error)) +
        (problem.starts_with("the folder") ? "; --cwd names another" : ""));
    exit_code_ = error == ENOENT && problem.empty() ? 127 : 126;
    if (started_) Stop(SIGKILL);
  }

  void Lost(const AgentLink& link) {
    const HostRanks& host = link.host;
    if (!started_) {
      if (!exit_code_) Say(link.Explain());
      if (!exit_code_) exit_code_ = kHostFailed;
      return;
    }
    int first = -1;
    for (int r = host.first + host.count - 1; r >= host.first; --r) {
      if (ranks_[static_cast<size_t>(r)].running) first = r;
    }
    if (first < 0) return;
    for (int r = first; r < host.first + host.count; ++r) {
      ranks_[static_cast<size_t>(r)].running = false;
    }
    ranks_[static_cast<size_t>(first)].code = kHostFailed;
    ranks_[static_cast<size_t>(first)].how = link.Explain() + ", and with it " +
                                             Count(host.count, "rank") + " from rank " +
                                             std::to_string(first) + " on";
    OnFailed(first, /*always_say=*/true);
  }

  void OnEnded(int r, int value) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    if (!rank.running) return;
    rank.running = false;
    if (value == 0) return;
    rank.code = value < 0 ? 128 - value : value;
    rank.how = "rank " + Name(r) +
               (value < 0 ? " was killed by " + SignalName(-value)
                          : " failed with exit code " + std::to_string(value));
    OnFailed(r, options_.verbose);
  }

  void OnFailed(int r, bool always_say) {
    if (exit_code_) {
      if (always_say) Say(ranks_[static_cast<size_t>(r)].how);
      return;
    }
    failed_.push_back(r);
    if (first_failure_ns_ == 0) first_failure_ns_ = NowNs();
  }

  // Which failure is the cause? That of a rank which ended without leaving the job; else that of
  // the one that left first: the others could fail because it left, and may have ended before it.
  void Judge() {
    if (failed_.empty() || exit_code_) return;
    const int64_t since_ns = NowNs() - first_failure_ns_;
    if (links_.size() > 1 && AnyRunning() && since_ns < kNewsNs) return;
    int cause = -1;
    for (const int r : failed_) {
      if (cause < 0 && std::count(left_.begin(), left_.end(), r) == 0) cause = r;
    }
    for (const int r : left_) {
      const Rank& rank = ranks_[static_cast<size_t>(r)];
      if (cause >= 0) break;
      if (rank.running && since_ns < kVerdictNs) return;
      if (!rank.running && !rank.how.empty()) cause = r;
    }
    const Rank& rank = ranks_[static_cast<size_t>(cause < 0 ? failed_.front() : cause)];
    exit_code_ = rank.code;
    Say(rank.how + (AnyRunning() ? "; the others get 3 s to end by themselves" : ""));
    if (!options_.verbose && ProgramsDiffer()) SayPrograms();
    for (const int r : failed_) {
      if (options_.verbose && &ranks_[static_cast<size_t>(r)] != &rank) {
        Say(ranks_[static_cast<size_t>(r)].how);
      }
    }
    Schedule(SIGTERM, first_failure_ns_ + kGraceNs - NowNs());
  }

  void Interrupted(int signal) {
    if (interrupted_) return Stop(SIGKILL);  // Asked twice: at once.
    interrupted_ = true;
    exit_code_ = 128 + signal;
    if (!started_) return Say("got " + SignalName(signal) + " before the ranks were started");
    Say("got " + SignalName(signal) + ", passing SIGINT on to the ranks");
    SendAll(FrameKind::kSignal, SIGINT);
    Schedule(SIGTERM, kGraceNs);
  }

  // Ctrl-Z. The ranks go on; agents on other hosts must not take the silence for our end.
  void Suspend() {
    SayAlive(false);
    kill(getpid(), SIGSTOP);
    SayAlive(true);
  }

  void SayAlive(bool there) {
    for (AgentLink& link : links_) link.SendAlive(there);
    alive_at_ns_ = NowNs() + kAliveNs;
  }

  void TooLate() {
    for (const AgentLink& link : links_) {
      if (link.phase == AgentLink::Phase::kReady) continue;
      Say(link.host.name + " was not ready within " + std::to_string(options_.start_timeout_s) +
          " s (--start-timeout): " +
          (link.phase == AgentLink::Phase::kConnecting ? "it did not answer over ssh"
                                                       : "its agent did not answer"));
    }
    exit_code_ = kHostFailed;
  }

  void ReaderGone() {
    if (exit_code_) return;
    exit_code_ = 128 + SIGPIPE;
    Stop(SIGTERM);
  }

  void Schedule(int signal, int64_t in_ns) {
    next_signal_ = signal;
    due_ns_ = NowNs() + in_ns;
  }

  // Sends `signal` to what still runs; SIGKILL follows SIGTERM.
  void Stop(int signal) {
    next_signal_ = 0;
    if (signal == kGiveUp) return GiveUp();
    std::string left;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      if (ranks_[r].running) left += (left.empty() ? "" : ", ") + std::to_string(r);
    }
    if (!left.empty()) Say(SignalName(signal) + " to the ranks that still run: " + left);
    SendAll(FrameKind::kSignal, signal);
    Schedule(signal == SIGTERM ? SIGKILL : kGiveUp, kTermNs);
  }

  void GiveUp() {
    for (AgentLink& link : links_) {
      if (link.host.local) continue;
      bool running = false;
      for (int r = link.host.first; r < link.host.first + link.host.count; ++r) {
        running |= std::exchange(ranks_[static_cast<size_t>(r)].running, false);
      }
      if (!running) continue;
      link.Abandon();
      Say(link.host.name +
          " does not answer; ranks there are ended by their agent, at the latest "
          "when it has heard nothing for " +
          std::to_string(options_.ssh.lost_after_s) + " s");
    }
  }

  void SendAll(FrameKind kind, int value) {
    for (AgentLink& link : links_) link.Send(kind, value);
  }

  bool AnyRunning() const {
    return std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.running; });
  }

  std::string Name(int rank) const {
    return std::to_string(rank) + ranks_[static_cast<size_t>(rank)].place;
  }

  void Say(const std::string& text) { output_.Add(STDERR_FILENO, "bluefog run: " + text + "\n"); }

  // All ranks have ended. Agents end what those started, send the last output and end, too. After a
  // Ctrl-C nobody waits long for a reader.
  void End() {
    ending_ = true;
    for (AgentLink& link : links_) link.Close();
    int64_t moved_ns = NowNs();
    size_t waiting = 0;
    while (true) {
      const bool read = !output_.full();
      Listen(read);
      if (!output_.Flush() && !exit_code_) exit_code_ = 128 + SIGPIPE;
      const bool over = std::all_of(links_.begin(), links_.end(),
                                    [](const AgentLink& link) { return link.over(); });
      if (over && output_.empty()) return;
      if (output_.waiting() != std::exchange(waiting, output_.waiting())) moved_ns = NowNs();
      const int64_t patience_ns = output_.empty() ? kFarewellNs : interrupted_ ? kSecondNs : 0;
      if (patience_ns != 0 && NowNs() - moved_ns > patience_ns) return;
      std::vector<pollfd> fds = {{signals_, POLLIN, 0}};
      for (const AgentLink& link : links_) link.AddTo(fds, read);
      if (!output_.empty()) fds.push_back({output_.fd(), POLLOUT, 0});
      poll(fds.data(), fds.size(), patience_ns == 0 ? -1 : 100);
      signalfd_siginfo info;
      while (::read(signals_, &info, sizeof(info)) == sizeof(info)) {
        if (info.ssi_signo == SIGCHLD || info.ssi_signo == SIGTSTP) continue;
        if (!exit_code_) exit_code_ = 128 + static_cast<int>(info.ssi_signo);
        return;
      }
    }
  }

  const LaunchOptions& options_;
  std::string job_id_, coordinator_;
  std::vector<Rank> ranks_;
  std::deque<AgentLink> links_;  // One a host.
  sigset_t inherited_mask_ = {};
  int signals_ = -1;
  Output output_;
  std::optional<int> exit_code_;  // Set by what ended the job first.
  std::vector<int> left_;         // Ranks, in the order in which they left the job.
  std::vector<int>
      failed_;  // Ranks, in the order of their ends, until one is found to be the cause.
  int64_t first_failure_ns_ = 0;
  bool started_ = false;  // All hosts were ready.
  bool interrupted_ = false, ending_ = false;
  bool hold_ = false;    // Agents keep output back: our reader does not keep up.
  int next_signal_ = 0;  // To be sent at due_ns_; 0: none.
  int64_t due_ns_ = 0, start_by_ns_ = 0, alive_at_ns_ = 0;
};

}  // namespace

int Launch(const LaunchOptions& options) { return Launcher(options).Run(); }

}  // namespace bluefog::tools
