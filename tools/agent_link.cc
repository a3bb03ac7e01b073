#include "agent_link.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <optional>

#include "agent.h"
#include "format.h"
#include "signals.h"

namespace bluefog::tools {
namespace {

constexpr size_t kMaxSaid = 8 << 10;

std::string OwnPath() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).string();
}

std::string RemoteBluefog(const SshOptions& ssh) {
  return ssh.remote_bluefog.empty() ? OwnPath() : ssh.remote_bluefog;
}

// ssh says what happened; this says what to do about it.
std::string Advice(const std::string& said, const std::string& host) {
  const struct {
    const char* text;
    std::string advice;
  } known[] = {
      {"Permission denied",
       "ssh must log in without a password: ssh-copy-id " + host + ", or a key in ssh-agent"},
      {"Host key verification failed",
       "log in once by hand to see and accept its key: ssh " + host},
      {"REMOTE HOST IDENTIFICATION HAS CHANGED", "its key is not the one in known_hosts"},
      {"Connection refused", "does sshd run there, and at this port (-p)?"},
      {"Could not resolve", "is the name right? 'ssh " + host + "' must work"},
      {"timed out", "is the host up, and reachable from here?"},
      {"No route to host", "is the host up, and reachable from here?"},
  };
  for (const auto& [text, advice] : known) {
    if (said.find(text) != std::string::npos) return ": " + advice;
  }
  return "; 'ssh " + host + "' must work without a question";
}

}  // namespace

std::vector<std::string> SshCommand(const SshOptions& ssh, const std::string& host) {
  std::vector<std::string> words = {"ssh", "-T", "-x"};
  if (ssh.port != 0) words.insert(words.end(), {"-p", std::to_string(ssh.port)});
  // The first value counts. An existing master connection is used, none is left behind.
  std::vector<std::string> options = ssh.options;
  options.insert(options.end(),
                 {"BatchMode=yes", "ConnectTimeout=" + std::to_string(ssh.connect_timeout_s),
                  "ServerAliveInterval=5", "ServerAliveCountMax=3", "ControlMaster=no",
                  "ClearAllForwardings=yes", "RemoteCommand=none"});
  for (const std::string& option : options) words.insert(words.end(), {"-o", option});
  words.insert(words.end(), {host, ShellWord(RemoteBluefog(ssh)) + " run-agent"});
  return words;
}

AgentLink::~AgentLink() {
  Close();
  for (const int fd : {from_, errors_.from}) {
    if (fd >= 0) close(fd);
  }
  if (!host.local) Kill(SIGTERM);
}

void AgentLink::Abandon() {
  Close();
  Kill(SIGTERM);
}

int AgentLink::Open(const sigset_t& mask) {
  int to[2], from[2], err[2] = {-1, -1};
  if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) return errno;
  if (!host.local && pipe2(err, O_CLOEXEC) != 0) return errno;
  const std::vector<std::string> words = SshCommand(ssh_, host.name);
  std::vector<char*> argv;
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ < 0) return errno;
  if (pid_ == 0) {
    setsid();  // Ctrl-C reaches the launcher only, which passes it on.
    sigprocmask(SIG_SETMASK, &mask, nullptr);
    if (host.local) {
      close(to[1]);
      close(from[0]);
      _exit(RunAgent(to[0], from[1]));
    }
    signal(SIGPIPE, SIG_DFL);
    dup2(to[0], STDIN_FILENO);
    dup2(from[1], STDOUT_FILENO);
    dup2(err[1], STDERR_FILENO);
    execvp(argv[0], argv.data());
    dprintf(STDERR_FILENO, "%s cannot be run: %s\n", argv[0], std::strerror(errno));
    _exit(127);
  }
  over_ = false;
  close(to[0]);
  close(from[1]);
  to_ = to[1];
  from_ = from[0];
  fcntl(from_, F_SETFL, O_NONBLOCK);
  if (!host.local) {
    close(err[1]);
    fcntl(err[0], F_SETFL, O_NONBLOCK);
    errors_ = {err[0], STDERR_FILENO, "[" + host.name + "] ", ""};
  }
  return 0;
}

void AgentLink::Send(FrameKind kind, int value, std::string text) {
  if (to_ >= 0) queue_.Add(to_, Pack(Frame{kind, 0, value, std::move(text)}));
}

void AgentLink::SendAlive(bool there) {
  if (host.local || phase == Phase::kConnecting || queue_.full()) return;
  Send(FrameKind::kAlive, there ? ssh_.lost_after_s : 0);
  queue_.Flush();
}

void AgentLink::Close() {
  if (to_ < 0) return;
  queue_.Flush();
  queue_ = Output();
  close(std::exchange(to_, -1));
  if (phase == Phase::kConnecting) Kill(SIGTERM);  // ssh looks at its input only later.
}

void AgentLink::Kill(int signal) const {
  if (pid_ > 0) kill(pid_, signal);
}

void AgentLink::AddTo(std::vector<pollfd>& fds, bool read) const {
  for (const int fd : {from_, errors_.from}) {
    if (fd >= 0 && read) fds.push_back({fd, POLLIN, 0});
  }
  if (!queue_.empty()) fds.push_back({to_, POLLOUT, 0});
}

bool AgentLink::Turn(bool read, const std::function<void(const Frame&)>& on_frame,
                     const LineSink& lines) {
  if (over_) return false;
  const bool ended = waitpid(pid_, &status_, WNOHANG) == pid_;
  if (ended) pid_ = -1;
  const LineSink kept = {[&](int fd, std::string text) {
                           said_ += text;
                           if (said_.size() > kMaxSaid) said_.erase(0, said_.size() - kMaxSaid);
                           lines.add(fd, std::move(text));
                         },
                         lines.full};
  if (read || ended) Read(on_frame, kept);
  if (read || ended) errors_.Drain(kept);
  queue_.Flush();  // That nobody reads is seen when the process ends.
  if (!ended) return false;
  if (errors_.from >= 0) errors_.Forward(kept, true);
  return over_ = true;
}

void AgentLink::Read(const std::function<void(const Frame&)>& on_frame, const LineSink& lines) {
  std::array<char, 64 << 10> bytes;
  while (from_ >= 0) {
    const ssize_t n = read(from_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      close(std::exchange(from_, -1));
      return;
    }
    const std::string_view got(bytes.data(), static_cast<size_t>(n));
    if (phase == Phase::kConnecting) {
      before_ += got;
      Greet(lines);
    } else {
      frames_.Add(got);
    }
    while (phase != Phase::kConnecting) {
      StatusOr<std::optional<Frame>> frame = frames_.Next();
      if (!frame.ok()) {
        lines.add(STDERR_FILENO, errors_.tag + std::string(frame.status().message()) + "\n");
        Kill(SIGTERM);
        close(std::exchange(from_, -1));
        return;
      }
      if (!*frame) break;
      on_frame(**frame);
    }
  }
}

// What a login shell prints comes before it, and is shown.
void AgentLink::Greet(const LineSink& lines) {
  const size_t mark = before_.find(kGreetingMark);
  const size_t end = mark == std::string::npos ? mark : before_.find('\n', mark);
  if (end == std::string::npos) {
    if (before_.size() > kMaxSaid) before_.erase(0, before_.size() - kMaxSaid);
    return;
  }
  Stream noise{-1, STDERR_FILENO, errors_.tag, before_.substr(0, mark)};
  if (mark > 0) noise.Forward(lines, true);
  if (const std::string greeting = before_.substr(mark, end - mark); greeting != Greeting()) {
    greeting_ = greeting.substr(std::strlen(kGreetingMark));
    return Close();
  }
  phase = Phase::kPreparing;
  frames_.Add(std::string_view(before_).substr(end + 1));
  Send(FrameKind::kJob, 0, Pack(job_));
  SendAlive(true);
}

std::string AgentLink::Explain() const {
  const std::string how = WIFSIGNALED(status_)
                              ? "was killed by " + SignalName(WTERMSIG(status_))
                              : "ended with exit code " + std::to_string(WEXITSTATUS(status_));
  if (host.local) return "the process that holds the ranks of this host " + how;
  if (phase == Phase::kReady)
    return "the connection to " + host.name + " was lost (ssh " + how + ")";
  const std::string there = RemoteBluefog(ssh_) + " on " + host.name;
  const std::string own = Greeting().substr(std::strlen(kGreetingMark));
  const std::string cure =
      ": install the same bluefog there, or name its place with "
      "--remote-bluefog";
  if (!greeting_.empty()) {
    return there + " is version " + greeting_ + " and this is version " + own +
           " (the last number is that of the launcher's protocol)" + cure;
  }
  const int code = WIFEXITED(status_) ? WEXITSTATUS(status_) : -1;
  if (code == 127 && said_.find("ssh cannot be run") == std::string::npos) {
    return host.name + " has no " + RemoteBluefog(ssh_) + cure;
  }
  if (code == 255 || code == 127) {
    return "cannot log in to " + host.name + " by ssh" + Advice(said_, host.name);
  }
  return there + " " + how + " and did not answer as bluefog " + own + " does" + cure;
}

}  // namespace bluefog::tools
