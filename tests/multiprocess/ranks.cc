#include "ranks.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/clock.h"
#include "base/port.h"

namespace bluefog::testing {

struct Job::Process {
  pid_t pid = -1;
  int pidfd = -1;
  int log_fd = -1;
};

void Rank::Mark() const { record->marked_ns = NowNs(); }

std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
  return out << "exit code " << outcome.exit_code << ", " << outcome.status << "\n" << outcome.log;
}

std::vector<std::string> FilesLeft(const std::string& job) {
  std::vector<std::string> names;
  for (const std::string folder : {"/dev/shm", "/tmp"}) {
    DIR* dir = opendir(folder.c_str());
    if (dir == nullptr) continue;
    while (const dirent* entry = readdir(dir)) {
      const std::string name = entry->d_name;
      // Other programs, and other tests, use /tmp meanwhile.
      const bool ours = name.find(job) != std::string::npos ||
                        (folder == "/dev/shm" && name.find("bluefog") != std::string::npos);
      if (ours) names.push_back(folder + "/" + name);
    }
    closedir(dir);
  }
  return names;
}

Job::Job(int size, Tweak tweak)
    : size_(size),
      tweak_(std::move(tweak)),
      port_(*FreePort()),
      id_("faults-" + std::to_string(getpid()) + "-" + std::to_string(port_)) {
  records_ = static_cast<Record*>(mmap(nullptr, sizeof(Record) * static_cast<size_t>(size),
                                       PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  for (int r = 0; r < size; ++r) records_[r].code = -1;
}

Job::~Job() {
  if (!processes_.empty()) Join(0);
  munmap(records_, sizeof(Record) * static_cast<size_t>(size_));
}

void Job::Start(const Body& body) {
  const pid_t parent = getpid();
  for (int r = 0; r < size_; ++r) {
    Process process;
    process.log_fd = memfd_create("log", MFD_CLOEXEC);
    std::fflush(nullptr);
    process.pid = fork();
    if (process.pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(1);
      dup2(process.log_fd, STDERR_FILENO);
      records_[r].pid = getpid();
      Rank me{r, {}, &records_[r]};
      Config& config = me.options.config;
      config.job_id = id_;
      config.coordinator = "127.0.0.1:" + std::to_string(port_);
      config.rank = config.local_rank = r;
      config.size = config.local_size = size_;
      config.join_timeout_ms = 20'000;
      if (tweak_) tweak_(r, config);
      const Status status = body(me);
      std::snprintf(me.record->text, sizeof(me.record->text), "%s",
                    std::string(status.message()).c_str());
      me.record->code = static_cast<int32_t>(status.code());
      std::exit(0);
    }
    process.pidfd = static_cast<int>(syscall(SYS_pidfd_open, process.pid, 0));
    processes_.push_back(process);
  }
}

std::vector<Outcome> Job::Join(int seconds) {
  const int64_t deadline = NowNs() + int64_t{seconds} * 1'000'000'000;
  std::vector<Outcome> outcomes(processes_.size());
  std::vector<pollfd> fds;
  for (const Process& p : processes_) fds.push_back({p.pidfd, POLLIN, 0});
  size_t running = fds.size();
  bool hangs = false;
  while (running > 0) {
    const int64_t left = (deadline - NowNs()) / 1'000'000;
    if (!hangs && poll(fds.data(), fds.size(), static_cast<int>(std::max<int64_t>(0, left))) == 0) {
      hangs = true;
      for (size_t r = 0; r < fds.size(); ++r) {
        if (fds[r].fd >= 0) kill(processes_[r].pid, SIGKILL);
      }
    }
    for (size_t r = 0; r < fds.size(); ++r) {
      if (fds[r].fd < 0 || (fds[r].revents == 0 && !hangs)) continue;
      Outcome& out = outcomes[r];
      out.ended_ns = NowNs();
      int wait_status = 0;
      waitpid(processes_[r].pid, &wait_status, 0);
      out.exit_code =
          WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 128 + WTERMSIG(wait_status);
      const Record& record = records_[r];
      out.marked_ns = record.marked_ns;
      out.status = record.code < 0
                       ? absl::UnknownError(hangs ? "hangs" : "ended early")
                       : Status(static_cast<absl::StatusCode>(record.code), record.text);
      out.log.resize(static_cast<size_t>(lseek(processes_[r].log_fd, 0, SEEK_END)));
      [[maybe_unused]] const ssize_t n =
          pread(processes_[r].log_fd, out.log.data(), out.log.size(), 0);
      close(processes_[r].log_fd);
      close(processes_[r].pidfd);
      fds[r].fd = -1;
      --running;
    }
  }
  processes_.clear();
  return outcomes;
}

Gate::Gate() { [[maybe_unused]] const int made = pipe2(fds_, O_CLOEXEC); }

void Gate::Open() const { [[maybe_unused]] const ssize_t n = write(fds_[1], "", 1); }

void Gate::Pass() const {
  char byte;
  [[maybe_unused]] const ssize_t n = read(fds_[0], &byte, 1);
}

StatusOr<std::unique_ptr<Communicator>> JoinRing(const Rank& me) {
  auto comm = Communicator::Create(me.options);
  if (!comm.ok()) return comm.status();
  auto ring = MakeTopology("ring", (*comm)->size());
  if (!ring.ok()) return ring.status();
  if (Status s = (*comm)->SetTopology(*std::move(ring)); !s.ok()) return s;
  return comm;
}

StatusOr<std::shared_ptr<Work>> SubmitAverage(Communicator& comm, const std::string& name,
                                              std::vector<float>& x) {
  OpSpec spec;
  spec.name = name;
  spec.input = TensorView::Of(x.data(), static_cast<int64_t>(x.size()));
  return comm.Submit(std::move(spec));
}

Status Average(Communicator& comm, const std::string& name, std::vector<float>& x) {
  auto work = SubmitAverage(comm, name, x);
  return work.ok() ? (*work)->Wait() : work.status();
}

Status Train(Rank& me, Communicator& comm, int rounds) {
  std::vector<float> small(250, 1.0f), large(500'000, 1.0f);
  constexpr int64_t kCount = 300'000;
  std::vector<float> x(kCount), gradient(kCount, 0.01f);
  DistributedOptimizerOptions options;
  options.plugin = "decentlam";
  options.params = {{.name = "x", .count = kCount, .layout = "float32[300000]"}};
  const auto fail = [&](const Status& status) {
    me.Mark();
    return status;
  };
  auto optimizer = DistributedOptimizer::Create(&comm, std::move(options));
  if (!optimizer.ok()) return fail(optimizer.status());
  std::vector<std::vector<float>> states((*optimizer)->traits().states.size(), x);
  ParameterBinding binding{.x = x.data(), .g = gradient.data()};
  for (size_t s = 0; s < states.size(); ++s) binding.state[s] = states[s].data();
  const Hyper hyper{.lr = 0.1, .momentum = 0.9};
  for (int round = 0; round < rounds; ++round) {
    auto first = SubmitAverage(comm, "small", small);
    if (!first.ok()) return fail(first.status());
    auto second = SubmitAverage(comm, "large", large);
    const Status ends[] = {(*first)->Wait(), second.ok() ? (*second)->Wait() : second.status()};
    for (const Status& status : ends) {
      if (!status.ok()) return fail(status);
    }
    if (Status s = (*optimizer)->Step({&binding, 1}, {&hyper, 1}); !s.ok()) return fail(s);
    OpSpec sum;
    sum.op = Op::kAllreduce;
    sum.name = "everybody";
    sum.input = TensorView::Of(small.data(), static_cast<int64_t>(small.size()));
    auto third = comm.Submit(std::move(sum));
    if (!third.ok()) return fail(third.status());
    if (Status s = (*third)->Wait(); !s.ok()) return fail(s);
  }
  return absl::OkStatus();
}

}  // namespace bluefog::testing
