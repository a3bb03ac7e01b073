#include "children.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <utility>

namespace bluefog::tools {
namespace {

int CannotRun(const std::string& file) {
  struct stat st;
  if (stat(file.c_str(), &st) != 0) return errno;
  if (!S_ISREG(st.st_mode)) return EACCES;
  return access(file.c_str(), X_OK) == 0 ? 0 : errno;
}

}  // namespace

int FindProgram(const std::string& name, std::string_view path, std::string* found) {
  *found = name;
  if (name.find('/') != std::string::npos) return CannotRun(name);
  int error = ENOENT;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find(':', begin), path.size());
    const std::string folder(path.substr(begin, end - begin));
    *found = (folder.empty() ? "." : folder) + "/" + name;
    const int here = CannotRun(*found);
    if (here == 0) return 0;
    if (here == EACCES) error = EACCES;
    begin = end + 1;
  }
  return error;
}

Children::Children(const HostJob& job, std::string program, std::string token_file,
                   const sigset_t& signals, LineSink sink)
    : job_(job),
      program_(std::move(program)),
      token_file_(std::move(token_file)),
      signals_(signals),
      sink_(std::move(sink)) {
  children_.reserve(static_cast<size_t>(job.ranks));
}

int Children::Start(int rank, const std::string& coordinator) {
  Child& child = children_.emplace_back();
  child.rank = rank;
  int out[2] = {-1, -1}, err[2] = {-1, -1}, failure[2];
  if (pipe2(failure, O_CLOEXEC) != 0) return errno;
  if (!job_.inherit) {
    if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) return errno;
    const std::string tag =
        job_.tag ? "[" + std::to_string(rank) + job_.tag_suffix + "] " : std::string();
    child.out = {out[0], STDOUT_FILENO, tag, ""};
    child.err = {err[0], STDERR_FILENO, tag, ""};
    for (int fd : {out[0], err[0]}) fcntl(fd, F_SETFL, O_NONBLOCK);
  }
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) Become(rank, coordinator, parent, out[1], err[1], failure[1]);
  int error = pid < 0 ? errno : 0;
  for (int fd : {out[1], err[1], failure[1]}) {
    if (fd >= 0) close(fd);
  }
  // The pipe closes when the command runs.
  if (pid > 0 && read(failure[0], &error, sizeof(error)) == sizeof(error)) {
    waitpid(pid, nullptr, 0);
  } else if (pid > 0) {
    child.pid = pid;
  }
  close(failure[0]);
  return error;
}

void Children::Become(int rank, const std::string& coordinator, pid_t parent, int out, int err,
                      int failure) {
  setsid();  // A group of its own: what the rank starts ends with it.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);  // It died before the line above.
  signal(SIGPIPE, SIG_DFL);
  signal(SIGINT, SIG_DFL);  // It is how the launcher asks a rank to end.
  sigprocmask(SIG_SETMASK, &signals_, nullptr);
  if (out >= 0) dup2(out, STDOUT_FILENO);
  if (err >= 0) dup2(err, STDERR_FILENO);
  if (rank != 0) {
    const int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null >= 0) dup2(null, STDIN_FILENO);
  }
  const std::string number = std::to_string(rank), size = std::to_string(job_.size),
                    local_rank = std::to_string(rank - job_.first_rank),
                    local_size = std::to_string(job_.ranks);
  for (const auto& [name, value] : job_.env) setenv(name.c_str(), value.c_str(), 1);
  const std::pair<const char*, const std::string&> place[] = {{"BLUEFOG_RANK", number},
                                                              {"OMPI_COMM_WORLD_RANK", number},
                                                              {"BLUEFOG_SIZE", size},
                                                              {"OMPI_COMM_WORLD_SIZE", size},
                                                              {"BLUEFOG_LOCAL_RANK", local_rank},
                                                              {"BLUEFOG_LOCAL_SIZE", local_size},
                                                              {"BLUEFOG_JOB_ID", job_.job_id},
                                                              {"BLUEFOG_COORDINATOR", coordinator}};
  for (const auto& [name, value] : place) setenv(name, value.c_str(), 1);
  setenv("BLUEFOG_TOKEN_FILE", token_file_.c_str(), 1);
  unsetenv("BLUEFOG_TOKEN_FD");
  std::vector<char*> argv = {const_cast<char*>(program_.c_str())};
  for (size_t i = 1; i < job_.command.size(); ++i) {
    argv.push_back(const_cast<char*>(job_.command[i].c_str()));
  }
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  const int error = errno;
  [[maybe_unused]] const ssize_t n = write(failure, &error, sizeof(error));
  _exit(127);
}

std::vector<Stream*> Children::streams() {
  std::vector<Stream*> open;
  for (Child& child : children_) {
    for (Stream* stream : {&child.out, &child.err}) {
      if (stream->from >= 0) open.push_back(stream);
    }
  }
  return open;
}

std::vector<Children::Ended> Children::TakeEnded() {
  std::vector<Ended> ended;
  for (Child& child : children_) {
    siginfo_t info = {};
    // Left as a zombie to the end: so its group's number cannot become somebody else's.
    if (child.pid < 0 || child.ended ||
        waitid(P_PID, static_cast<id_t>(child.pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
        info.si_pid == 0) {
      continue;
    }
    child.ended = true;
    for (Stream* stream : {&child.out, &child.err}) stream->Drain(sink_);
    ended.push_back({child.rank, info.si_code == CLD_EXITED ? info.si_status : -info.si_status});
  }
  return ended;
}

bool Children::running() const {
  return std::any_of(children_.begin(), children_.end(),
                     [](const Child& child) { return child.pid > 0 && !child.ended; });
}

void Children::Signal(int signal) {
  for (const Child& child : children_) {
    if (child.pid > 0) kill(-child.pid, signal);
  }
}

void Children::End() {
  Signal(SIGKILL);
  for (Child& child : children_) {
    if (child.pid > 0) waitpid(child.pid, nullptr, 0);
    child.pid = -1;
  }
}

}  // namespace bluefog::tools
