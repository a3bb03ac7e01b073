#include "launcher.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>

#include "base/clock.h"
#include "base/leave_note.h"
#include "base/port.h"

namespace bluefog::tools {
namespace {

constexpr int64_t kSecondNs = 1'000'000'000;
constexpr int64_t kGraceNs = 3 * kSecondNs;  // To fail by themselves, with an error that says why.
constexpr int64_t kVerdictNs = kSecondNs;    // For the rank that left first to end, too.
constexpr int64_t kTermNs = 2 * kSecondNs;   // From SIGTERM to SIGKILL.
constexpr size_t kMaxLine = 64 << 10;        // A longer line comes in pieces.

std::string SignalName(int signal) {
  const char* name = sigabbrev_np(signal);
  return name == nullptr ? "signal " + std::to_string(signal) : std::string("SIG") + name;
}

/// Our own standard output and error, in order and piece by piece. No write waits: a pager may not
/// read for hours, and signals want an answer meanwhile.
class Output {
 public:
  void Add(int fd, std::string text) {
    if (text.empty()) return;
    bytes_ += text.size();
    pieces_.push_back({fd, std::move(text)});
  }
  bool empty() const { return pieces_.empty(); }
  // Nothing more should be added.
  bool full() const { return bytes_ >= kMaxLine; }
  // Where the first piece goes.
  int fd() const { return pieces_.front().fd; }

  // Writes what goes at once. False if a reader is gone; what is for it is dropped.
  bool Flush() {
    bool all_read = true;
    while (!pieces_.empty()) {
      const auto& [fd, text] = pieces_.front();
      pollfd ready = {fd, POLLOUT, 0};
      if (poll(&ready, 1, 0) == 0) break;
      // A pipe that has room at all has it for so much.
      const size_t most = std::min<size_t>(text.size() - done_, PIPE_BUF);
      const ssize_t n = write(fd, text.data() + done_, most);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) break;
      if (n < 0) {
        all_read = false;
        const int gone = fd;
        std::erase_if(pieces_, [gone](const Piece& piece) { return piece.fd == gone; });
        bytes_ = done_ = 0;
        for (const Piece& piece : pieces_) bytes_ += piece.text.size();
        continue;
      }
      done_ += static_cast<size_t>(n);
      if (done_ < text.size()) continue;
      bytes_ -= text.size();
      done_ = 0;
      pieces_.pop_front();
    }
    return all_read;
  }

 private:
  struct Piece {
    int fd;
    std::string text;
  };
  std::deque<Piece> pieces_;
  size_t bytes_ = 0, done_ = 0;  // Of all; of the first, written.
};

/// One output stream of one rank: whole lines go on, with the tag in front.
struct Stream {
  int from = -1;  // The pipe; -1 once it ended.
  int to = -1;
  std::string tag, pending;

  void Forward(Output& output, bool at_end) {
    std::string out;
    size_t begin = 0;
    for (size_t i = 0; i < pending.size(); ++i) {
      // A lone carriage return ends a line, too: progress bars.
      const bool end = pending[i] == '\n' ||
                       (pending[i] == '\r' && i + 1 < pending.size() && pending[i + 1] != '\n');
      if (!end) continue;
      out += tag + pending.substr(begin, i + 1 - begin);
      begin = i + 1;
    }
    pending.erase(0, begin);
    if (!pending.empty() && (at_end || pending.size() >= kMaxLine)) {
      out += tag + pending + "\n";
      pending.clear();
    }
    output.Add(to, std::move(out));
  }

  // Takes what lies in the pipe, as far as there is room.
  void Drain(Output& output) {
    std::array<char, 64 << 10> bytes;
    while (from >= 0 && !output.full()) {
      const ssize_t n = read(from, bytes.data(), bytes.size());
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) return Forward(output, false);
      if (n <= 0) {
        close(from);
        from = -1;
        return Forward(output, true);
      }
      pending.append(bytes.data(), static_cast<size_t>(n));
      Forward(output, false);
    }
  }
};

struct Rank {
  pid_t pid = -1;  // Also its session and process group.
  bool ended = false;
  int code = 0;     // Of the end; 128 + signal.
  std::string how;  // It failed, in words; else empty.
  Stream out, err;
};

class Launcher {
 public:
  explicit Launcher(const LaunchOptions& options)
      : options_(options), ranks_(static_cast<size_t>(options.ranks)), left_(options.job_id) {}

  int Run() {
    signal(SIGPIPE, SIG_IGN);
    sigset_t taken;
    sigemptyset(&taken);
    for (int s : {SIGCHLD, SIGINT, SIGTERM, SIGHUP}) {
      // What was ignored at the start stays so: SIGHUP by nohup, SIGINT by a script's `command &`.
      struct sigaction inherited {};
      sigaction(s, nullptr, &inherited);
      if (s == SIGCHLD || inherited.sa_handler != SIG_IGN) sigaddset(&taken, s);
    }
    sigprocmask(SIG_BLOCK, &taken, &inherited_mask_);
    signals_ = signalfd(-1, &taken, SFD_CLOEXEC | SFD_NONBLOCK);
    for (int r = 0; r < options_.ranks && !exit_code_; ++r) {
      if (const int error = Start(r); error != 0) {
        Say("cannot start rank " + std::to_string(r) + ", '" + options_.command[0] +
            "': " + (error == ENOENT ? "command not found" : std::strerror(error)));
        exit_code_ = error == ENOENT ? 127 : 126;
        Stop(SIGKILL);
      }
    }
    while (!AllEnded()) Turn();
    Judge();
    End();
    return exit_code_.value_or(0);
  }

 private:
  // 0, or the errno that kept the rank from starting.
  int Start(int r) {
    Rank& rank = ranks_[static_cast<size_t>(r)];
    int out[2] = {-1, -1}, err[2] = {-1, -1}, failure[2];
    if (pipe2(failure, O_CLOEXEC) != 0) return errno;
    if (options_.tag) {
      if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) return errno;
      const std::string tag = "[" + std::to_string(r) + "] ";
      rank.out = {out[0], STDOUT_FILENO, tag, ""};
      rank.err = {err[0], STDERR_FILENO, tag, ""};
      for (int fd : {out[0], err[0]}) fcntl(fd, F_SETFL, O_NONBLOCK);
    }
    const pid_t parent = getpid();
    const pid_t pid = fork();
    if (pid == 0) Become(r, parent, out[1], err[1], failure[1]);
    int error = pid < 0 ? errno : 0;
    for (int fd : {out[1], err[1], failure[1]}) {
      if (fd >= 0) close(fd);
    }
    // The pipe closes when the command runs.
    if (pid > 0 && read(failure[0], &error, sizeof(error)) == sizeof(error)) {
      waitpid(pid, nullptr, 0);
    } else if (pid > 0) {
      rank.pid = pid;
    }
    close(failure[0]);
    return error;
  }

  [[noreturn]] void Become(int r, pid_t parent, int out, int err, int failure) {
    setsid();  // A group of its own: what the rank starts ends with it.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);  // It died before the line above.
    signal(SIGPIPE, SIG_DFL);
    signal(SIGINT, SIG_DFL);  // It is how the launcher asks a rank to end.
    sigprocmask(SIG_SETMASK, &inherited_mask_, nullptr);
    if (out >= 0) dup2(out, STDOUT_FILENO);
    if (err >= 0) dup2(err, STDERR_FILENO);
    if (r != 0) {
      const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
      if (null >= 0) dup2(null, STDIN_FILENO);
    }
    const std::string rank = std::to_string(r), size = std::to_string(options_.ranks);
    for (const auto& [name, value] : options_.env) setenv(name.c_str(), value.c_str(), 1);
    for (const char* name : {"BLUEFOG_RANK", "BLUEFOG_LOCAL_RANK", "OMPI_COMM_WORLD_RANK"}) {
      setenv(name, rank.c_str(), 1);
    }
    for (const char* name : {"BLUEFOG_SIZE", "BLUEFOG_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"}) {
      setenv(name, size.c_str(), 1);
    }
    setenv("BLUEFOG_JOB_ID", options_.job_id.c_str(), 1);
    setenv("BLUEFOG_COORDINATOR", options_.coordinator.c_str(), 1);
    std::vector<char*> argv;
    for (const std::string& word : options_.command)
      argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    execvp(argv[0], argv.data());
    const int error = errno;
    [[maybe_unused]] const ssize_t n = write(failure, &error, sizeof(error));
    _exit(127);
  }

  // Waits for whatever comes next and handles it.
  void Turn() {
    std::vector<pollfd> fds = {{signals_, POLLIN, 0}};
    std::vector<Stream*> streams;
    for (Rank& rank : ranks_) {
      for (Stream* stream : {&rank.out, &rank.err}) {
        if (stream->from < 0 || output_.full()) continue;
        fds.push_back({stream->from, POLLIN, 0});
        streams.push_back(stream);
      }
    }
    fds.push_back({left_.fd(), POLLIN, 0});
    if (!output_.empty()) fds.push_back({output_.fd(), POLLOUT, 0});
    int timeout_ms = -1;
    if (next_signal_ != 0) {
      timeout_ms = static_cast<int>(std::max<int64_t>(0, (due_ns_ - NowNs()) / 1'000'000 + 1));
    }
    if (first_failure_ns_ != 0 && !exit_code_) timeout_ms = 20;
    poll(fds.data(), fds.size(), timeout_ms);
    for (size_t i = 0; i < streams.size(); ++i) {
      if (fds[i + 1].revents != 0) streams[i]->Drain(output_);
    }
    left_.ranks();
    signalfd_siginfo info;
    while (read(signals_, &info, sizeof(info)) == sizeof(info)) {
      if (info.ssi_signo != SIGCHLD) Interrupted(static_cast<int>(info.ssi_signo));
    }
    LookForEnded();
    Judge();
    if (next_signal_ != 0 && NowNs() >= due_ns_) Stop(next_signal_);
    if (!output_.Flush()) ReaderGone();
  }

  void Say(const std::string& text) { output_.Add(STDERR_FILENO, "bluefog run: " + text + "\n"); }

  void LookForEnded() {
    for (size_t r = 0; r < ranks_.size(); ++r) {
      Rank& rank = ranks_[r];
      siginfo_t info = {};
      // Left as a zombie to the end: so its group's number cannot become somebody else's.
      if (rank.pid < 0 || rank.ended ||
          waitid(P_PID, static_cast<id_t>(rank.pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
          info.si_pid == 0) {
        continue;
      }
      rank.ended = true;
      for (Stream* stream : {&rank.out, &rank.err}) stream->Drain(output_);
      const bool killed = info.si_code != CLD_EXITED;
      if (!killed && info.si_status == 0) continue;
      rank.code = killed ? 128 + info.si_status : info.si_status;
      rank.how = "rank " + std::to_string(r) +
                 (killed ? " was killed by " + SignalName(info.si_status)
                         : " failed with exit code " + std::to_string(info.si_status));
      if (exit_code_) {
        if (options_.verbose) Say(rank.how);
        continue;
      }
      failed_.push_back(static_cast<int>(r));
      if (first_failure_ns_ == 0) first_failure_ns_ = NowNs();
    }
  }

  // Which failure is the cause? That of a rank which ended without leaving the job; else that of
  // the one that left first: the others could fail because it left, and may have ended before it.
  void Judge() {
    if (failed_.empty() || exit_code_) return;
    const std::vector<int>& left = left_.ranks();
    const auto has_left = [&](int r) { return std::count(left.begin(), left.end(), r) > 0; };
    int cause = -1;
    for (const int r : failed_) {
      if (cause < 0 && !has_left(r)) cause = r;
    }
    const bool late = NowNs() - first_failure_ns_ >= kVerdictNs;
    for (const int r : left) {
      if (cause >= 0 || r < 0 || r >= options_.ranks) continue;
      const Rank& rank = ranks_[static_cast<size_t>(r)];
      if (!rank.ended && !late) return;
      if (rank.ended && !rank.how.empty()) cause = r;
    }
    const Rank& rank = ranks_[static_cast<size_t>(cause < 0 ? failed_.front() : cause)];
    exit_code_ = rank.code;
    Say(rank.how + (AllEnded() ? "" : "; the others get 3 s to end by themselves"));
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
    Say("got " + SignalName(signal) + ", passing SIGINT on to the ranks");
    KillAll(SIGINT);
    Schedule(SIGTERM, kGraceNs);
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
    std::string left;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      if (ranks_[r].pid > 0 && !ranks_[r].ended)
        left += (left.empty() ? "" : ", ") + std::to_string(r);
    }
    if (!left.empty()) Say(SignalName(signal) + " to the ranks that still run: " + left);
    KillAll(signal);
    next_signal_ = 0;
    if (signal == SIGTERM) Schedule(SIGKILL, kTermNs);
  }

  void KillAll(int signal) {
    for (const Rank& rank : ranks_) {
      if (rank.pid > 0) kill(-rank.pid, signal);
    }
  }

  bool AllEnded() const {
    return std::all_of(ranks_.begin(), ranks_.end(),
                       [](const Rank& rank) { return rank.pid < 0 || rank.ended; });
  }

  // All ranks have ended: nothing they started stays.
  void End() {
    KillAll(SIGKILL);
    for (Rank& rank : ranks_) {
      if (rank.pid > 0) waitpid(rank.pid, nullptr, 0);
      for (Stream* stream : {&rank.out, &rank.err}) {
        for (stream->Drain(output_); output_.full(); stream->Drain(output_)) {
          if (!FlushAll()) return;
        }
        if (stream->from >= 0) stream->Forward(output_, true);
      }
    }
    FlushAll();
  }

  // False if the reader took too long after a Ctrl-C, or one came while it was waited for.
  bool FlushAll() {
    while (true) {
      if (!output_.Flush() && !exit_code_) exit_code_ = 128 + SIGPIPE;
      if (output_.empty()) return true;
      pollfd fds[] = {{output_.fd(), POLLOUT, 0}, {signals_, POLLIN, 0}};
      if (poll(fds, 2, interrupted_ ? 1000 : -1) == 0) return false;
      signalfd_siginfo info;
      while (read(signals_, &info, sizeof(info)) == sizeof(info)) {
        if (info.ssi_signo == SIGCHLD) continue;
        if (!exit_code_) exit_code_ = 128 + static_cast<int>(info.ssi_signo);
        return false;
      }
    }
  }

  const LaunchOptions& options_;
  std::vector<Rank> ranks_;
  sigset_t inherited_mask_;
  int signals_ = -1;
  Output output_;
  std::optional<int> exit_code_;  // Set by what ended the job first.
  LeaveNotes left_;
  std::vector<int>
      failed_;  // Ranks, in the order of their ends, until one is found to be the cause.
  int64_t first_failure_ns_ = 0;
  bool interrupted_ = false;
  int next_signal_ = 0;  // To be sent at due_ns_; 0: none.
  int64_t due_ns_ = 0;
};

}  // namespace

int Launch(const LaunchOptions& options) { return Launcher(options).Run(); }

StatusOr<std::string> ChooseCoordinator() {
  // A port of the kernel's range for outgoing connections could be gone before rank 0 listens, and
  // ranks that try to connect could even meet themselves on it.
  const StatusOr<int> port = FreePort();
  if (!port.ok()) return port.status();
  return "127.0.0.1:" + std::to_string(*port);
}

std::string MakeJobId() {
  std::array<unsigned char, 16> bytes = {};
  [[maybe_unused]] const ssize_t n = getrandom(bytes.data(), bytes.size(), 0);
  std::string id;
  for (const unsigned char byte : bytes) {
    id += "0123456789abcdef"[byte >> 4];
    id += "0123456789abcdef"[byte & 15];
  }
  return id;
}

}  // namespace bluefog::tools
