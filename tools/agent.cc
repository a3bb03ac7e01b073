#include "agent.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <optional>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include <bluefog/config.h>

#include "agent_protocol.h"
#include "base/clock.h"
#include "base/component.h"
#include "base/leave_note.h"
#include "base/port.h"
#include "base/token.h"
#include "children.h"
#include "control/membership.h"
#include "hosts.h"
#include "output.h"
#include "signals.h"

namespace bluefog::tools {
namespace {

constexpr int64_t kSecondNs = 1'000'000'000;

// The token in a memory file that the ranks, and what they start, open through /proc. An inherited
// descriptor would be lost where a rank starts the training by Python's subprocess, which closes
// all.
StatusOr<std::string> HoldToken(const std::string& token) {
  const StatusOr<int> fd = MakeTokenDescriptor(token);
  if (!fd.ok()) return fd.status();
  fchmod(*fd, 0600);
  return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(*fd);
}

class Agent {
 public:
  Agent(int from, int to) : from_(from), to_(to) {
    for (const int fd : {from, to}) fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(from, F_SETFL, O_NONBLOCK);
  }

  int Run() {
    signals_ = TakeSignals({SIGCHLD, SIGINT, SIGTERM, SIGHUP}, &inherited_mask_);
    output_.Add(to_, Greeting() + "\n");
    while (!gone_ || (children_ && children_->running())) Turn();
    End();
    return 0;
  }

 private:
  void Send(FrameKind kind, int rank, int value, std::string text = "") {
    output_.Add(to_, Pack(Frame{kind, rank, value, std::move(text)}));
  }

  void Turn() {
    std::vector<pollfd> fds = {{signals_, POLLIN, 0}};
    std::vector<Stream*> streams;
    if (children_ && !children_->sink().full()) streams = children_->streams();
    for (const Stream* stream : streams) fds.push_back({stream->from, POLLIN, 0});
    if (!gone_) fds.push_back({from_, POLLIN, 0});
    if (left_) fds.push_back({left_->fd(), POLLIN, 0});
    if (!output_.empty()) fds.push_back({to_, POLLOUT, 0});
    int64_t due_ns = due_ns_;
    if (!gone_ && patience_ns_ != 0) due_ns = heard_ns_ + patience_ns_;
    const int64_t in_ms = (due_ns - NowNs()) / 1'000'000 + 1;
    poll(fds.data(), fds.size(), due_ns == 0 ? -1 : static_cast<int>(std::max<int64_t>(0, in_ms)));

    for (size_t i = 0; i < streams.size(); ++i) {
      if (fds[i + 1].revents != 0) streams[i]->Drain(children_->sink());
    }
    signalfd_siginfo info;
    while (read(signals_, &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo != SIGCHLD) LauncherGone();
    }
    Listen();
    TellEnds();
    if (!gone_ && patience_ns_ != 0 && NowNs() >= heard_ns_ + patience_ns_) LauncherGone();
    if (due_ns_ != 0 && NowNs() >= due_ns_) {
      children_->Signal(SIGKILL);
      due_ns_ = 0;
    }
    if (!output_.Flush()) LauncherGone();
  }

  void Listen() {
    std::array<char, 64 << 10> bytes;
    while (!gone_) {
      const ssize_t n = read(from_, bytes.data(), bytes.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) return;
      if (n <= 0) return LauncherGone();
      heard_ns_ = NowNs();
      frames_.Add({bytes.data(), static_cast<size_t>(n)});
      while (true) {
        StatusOr<std::optional<Frame>> frame = frames_.Next();
        if (!frame.ok()) return LauncherGone();
        if (!*frame) break;
        OnFrame(**frame);
      }
    }
  }

  void OnFrame(const Frame& frame) {
    switch (frame.kind) {
      case FrameKind::kJob: {
        if (children_) return;
        StatusOr<HostJob> job = UnpackJob(frame.text);
        if (!job.ok()) return LauncherGone();
        job_ = *std::move(job);
        return Send(FrameKind::kReady, 0, 0, Pack(Prepare()));
      }
      case FrameKind::kStart:
        return Start(frame.text);
      case FrameKind::kSignal:
        if (children_) children_->Signal(frame.value);
        return;
      case FrameKind::kHold:
        hold_ = frame.value != 0;
        return;
      case FrameKind::kAlive:
        patience_ns_ = frame.value * kSecondNs;
        return;
      default:
        return;
    }
  }

  HostReady Prepare() {
    HostReady ready;
    if (!job_.cwd.empty() && chdir(job_.cwd.c_str()) != 0) {
      ready.error = errno;
      ready.problem = "the folder " + job_.cwd;
      return ready;
    }
    const auto given = std::find_if(job_.env.rbegin(), job_.env.rend(),
                                    [](const auto& setting) { return setting.first == "PATH"; });
    const char* path = given != job_.env.rend() ? given->second.c_str() : std::getenv("PATH");
    std::string program = job_.command[0];
    if (given == job_.env.rend() && !job_.program.empty() &&
        FindProgram(job_.program, "", &ready.program) == 0) {
      program = job_.program;
    } else if (ready.error =
                   FindProgram(program, path == nullptr ? "/bin:/usr/bin" : path, &ready.program);
               ready.error != 0) {
      return ready;
    }
    if (!job_.coordinator_host.empty()) {
      const StatusOr<int> port = FreePort();
      if (!port.ok()) {
        ready.error = EADDRINUSE;
        ready.problem = std::string(port.status().message());
        return ready;
      }
      const std::string host =
          job_.choose_host ? ReachableName(job_.coordinator_host) : job_.coordinator_host;
      ready.coordinator = JoinHostPort(host, *port);
    }
    const StatusOr<std::string> token_file = HoldToken(job_.token);
    if (!token_file.ok()) {
      ready.error = EMFILE;
      ready.problem = std::string(token_file.status().message());
      return ready;
    }
    left_.emplace(job_.job_id);
    children_.emplace(job_, program, *token_file, inherited_mask_,
                      LineSink{[this](int fd, std::string text) {
                                 if (!text.empty()) {
                                   Send(FrameKind::kOutput, 0, fd, std::move(text));
                                 }
                               },
                               [this] { return output_.full() || (hold_ && !gone_); }});
    return ready;
  }

  void Start(const std::string& coordinator) {
    if (!children_) return;
    coordinator_ = coordinator;
    for (int r = job_.first_rank; r < job_.first_rank + job_.ranks; ++r) {
      if (const int error = children_->Start(r, coordinator); error != 0) {
        return Send(FrameKind::kFailed, r, error);
      }
    }
    // What a report needs takes long to load. On one host ranks see each other's deaths themselves.
    if (job_.ranks < job_.size) {
      reports_.emplace_back([] {
        StatusOr<Config> config = Config::FromEnvironment();
        if (!config.ok()) return;
        LoadComponentSymbol("control", "bluefog_control_factory", config->component_dir)
            .IgnoreError();
      });
    }
  }

  void TellEnds() {
    if (!children_) return;
    // A note is there before its sender ends, so the order of the frames tells who left first.
    for (const int rank : left_->Take()) {
      Send(FrameKind::kLeft, rank, 0);
      told_.insert(rank);
    }
    for (const Children::Ended& ended : children_->TakeEnded()) {
      Send(FrameKind::kEnded, ended.rank, ended.value);
      if (ended.value != 0 && job_.size > 1 && !told_.contains(ended.rank)) ReportDeath(ended);
    }
  }

  // What the dead rank had forked may hold its sockets open, so that its peers would see nothing.
  void ReportDeath(const Children::Ended& ended) {
    reports_.emplace_back(
        [ended, job_id = job_.job_id, token = job_.token, coordinator = coordinator_] {
          StatusOr<Config> config = Config::FromEnvironment();
          if (!config.ok()) return;
          control::Place place;
          place.job_id = job_id;
          place.coordinator = coordinator;
          place.token = token;
          const std::string how = ended.value < 0 ? "killed by " + SignalName(-ended.value)
                                                  : "exit code " + std::to_string(ended.value);
          // Nobody there: the ranks do not use bluefog, or not yet, or no more.
          control::ReportDeath(place, *config, ended.rank, how + " on " + OwnName()).IgnoreError();
        });
  }

  void LauncherGone() {
    if (gone_) return;
    gone_ = true;
    if (!children_ || !children_->running()) return;
    children_->Signal(SIGTERM);
    due_ns_ = NowNs() + kTermSeconds * kSecondNs;
  }

  // The last output goes out as fast as the launcher reads, if it still does.
  void End() {
    if (children_) children_->End();
    for (std::thread& report : reports_) report.join();
    const auto flush = [this] {
      while (!output_.empty()) {
        pollfd fd = {to_, POLLOUT, 0};
        poll(&fd, 1, -1);
        if (!output_.Flush()) return false;
      }
      return true;
    };
    if (!children_) {
      flush();
      return;
    }
    const LineSink& sink = children_->sink();
    for (Stream* stream : children_->streams()) {
      for (stream->Drain(sink); output_.full(); stream->Drain(sink)) {
        if (!flush()) return;
      }
      if (stream->from >= 0) stream->Forward(sink, true);
    }
    flush();
  }

  const int from_, to_;
  sigset_t inherited_mask_ = {};
  int signals_ = -1;
  FrameReader frames_;
  Output output_;
  HostJob job_;
  std::optional<LeaveNotes> left_;
  std::optional<Children> children_;
  std::set<int> told_;  // Ranks that have left, so that their end is news to nobody.
  std::string coordinator_;
  std::vector<std::thread> reports_;  // No rank is started any more.
  bool hold_ = false;                 // The launcher's reader does not keep up.
  bool gone_ = false;                 // The launcher is, or needs us no more.
  int64_t heard_ns_ = NowNs(), patience_ns_ = 0;
  int64_t due_ns_ = 0;  // SIGKILL to what still runs; 0: no.
};

}  // namespace

int RunAgent(int from_launcher, int to_launcher) { return Agent(from_launcher, to_launcher).Run(); }

int RunRemoteAgent() {
  const int from = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
  const int to = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
  const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (from < 0 || to < 0 || null < 0) return 1;
  dup2(null, STDIN_FILENO);
  dup2(STDERR_FILENO, STDOUT_FILENO);
  return RunAgent(from, to);
}

}  // namespace bluefog::tools
