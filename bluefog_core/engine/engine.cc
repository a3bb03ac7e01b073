#include "engine/engine.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/clock.h"
#include "base/failpoint.h"
#include "base/hash.h"
#include "base/leave_note.h"
#include "base/log.h"
#include "engine/fork_guard.h"

namespace bluefog {
namespace {

/// Reserving is slow (60 ms for 64 MiB), and the first staged operation waits for it.
constexpr int64_t kSegmentBytes = int64_t{8} << 20;
/// After a caller has driven, its next wait is likely to come within this time; see PrepareSleep.
constexpr int kLendMs = 2;
/// A caller that comes back this soon after it drove is in a series of waits.
constexpr int64_t kSeriesNs = 50 * kMicrosecond;
/// A slow yield after fewer quick ones than this means that the core is wanted by others.
constexpr int kManyYields = 16;
/// How soon a sleeping caller sees that the engine goes down.
constexpr auto kSleepSlice = std::chrono::seconds(1);
/// How long the end of this rank waits for what only has to leave.
constexpr int64_t kDepartNs = 100 * kMillisecond;
/// So long when a rank of the job has failed: one that is stopped releases nothing.
constexpr int64_t kFailedLingerNs = 1000 * kMillisecond;
/// After it, between two looks at whether it was interrupted.
constexpr auto kLingerSlice = std::chrono::milliseconds(50);

std::chrono::steady_clock::time_point After(std::chrono::nanoseconds timeout) {
  const auto now = std::chrono::steady_clock::now();
  const auto longest = std::chrono::hours(24 * 365);
  return now + std::min<std::chrono::nanoseconds>(timeout, longest);
}

int64_t RanksPerCore(int ranks) {
  cpu_set_t cores;
  const int n = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
  return (ranks + n - 1) / n;
}

// How late a time-out may be noticed that began while nothing was under way.
int64_t IdleNapMs(const Config& config) {
  return std::min(config.stall_report_ms, config.op_timeout_ms) / 8;
}

}  // namespace

Status WorkImpl::Wait(std::chrono::nanoseconds timeout) {
  if (!completion_.done()) {
    if (!engine_->usable() && !completion_.done()) {
      return engine_->CheckUsable("wait for '" + name_->name + "'");
    }
    if (!engine_->Wait(completion_, timeout, name_->name)) {
      return absl::DeadlineExceededError(name_->name + " is still under way");
    }
  }
  DropKeepAlive();
  return status_;
}

void WorkImpl::Complete(Status status) {
  if (status.ok()) name_->proven.store(true, std::memory_order_relaxed);
  status_ = std::move(status);
  completion_.Set();
}

Engine::Engine(const Config& config, const control::Place& place)
    : config_(config),
      place_(place),
      arena_(transport::Arena::Create(kSegmentBytes)),
      outputs_(BlockPool::Create(int64_t{1} << 30)),
      scratch_(BlockPool::Create(int64_t{256} << 20, arena_)),
      planner_(config, place.rank, place.size),
      fork_generation_(ForkGeneration()),
      ranks_per_core_(RanksPerCore(place.local_size)),
      drive_ns_(config.drive_us * kMicrosecond * ranks_per_core_),
      yield_limit_ns_(config.yield_limit_us * kMicrosecond * ranks_per_core_),
      executor_(config, place.rank, place.size, arena_, &trace_, &stats_) {
  for (size_t op = 0; op < op_names_.size(); ++op) {
    op_names_[op] = Name(bluefog::NameOf(static_cast<Op>(op)), true);
  }
  local_name_ = Name("local allreduce", true);
}

Engine::~Engine() {
  if (ForkGeneration() != fork_generation_) {
    // The thread does not exist in this process; its handle must not be joined.
    if (thread_.joinable()) thread_.detach();
    return;
  }
  Shutdown();
}

Status Engine::Start(std::vector<std::unique_ptr<transport::Transport>> transports,
                     std::vector<transport::Transport*> by_rank) {
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  kick_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_fd_ < 0 || kick_fd_ < 0) {
    return absl::ResourceExhaustedError("no file descriptors for the engine; see ulimit -n");
  }
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = kick_fd_;
  epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, kick_fd_, &event);
  for (const auto& transport : transports) {
    event.data.fd = transport->fd();
    epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, transport->fd(), &event);
  }
  if (!config_.timeline.empty()) {
    if (Status s = trace_.Start(config_.timeline, place_.rank); !s.ok()) return s;
  }
  {
    MutexLock lock(progress_mu_);
    transports_ = std::move(transports);
    executor_.SetPeers(std::move(by_rank));
  }
  thread_ = std::thread(&Engine::Loop, this);
  return absl::OkStatus();
}

void Engine::SetMembership(std::unique_ptr<control::Membership> membership) {
  MutexLock lock(membership_mu_);
  membership_ = std::move(membership);
}

control::MembershipEvents Engine::MembershipEvents() {
  control::MembershipEvents events;
  events.rank_failed = [this](int rank, const std::string& text) {
    Run([this, rank, text](Executor&) { RankFailed(rank, text); });
  };
  events.rank_left = [this](int rank) { Run([this, rank](Executor&) { RankLeft(rank); }); };
  events.progress = [this] { return ops_done_.load(std::memory_order_relaxed); };
  return events;
}

void Engine::RankLeft(int rank) NO_THREAD_SAFETY_ANALYSIS {
  // What it sent before it left counts: the notice may overtake it. Armed, so that every turn looks
  // at the sockets too: an answer to a connection may lie there, and releases wait for it.
  do {
    Arm();
  } while (ProgressTransports());
  Disarm();
  lost_.push_back(rank);
  if (rank == 0) control_gone_ = true;  // It served the control plane.
  for (const int lost : std::exchange(lost_, {})) {
    if (lost != rank && !control_gone_) {
      lost_.push_back(lost);
      continue;
    }
    executor_.FailPeer(lost,
                       absl::UnavailableError("rank " + std::to_string(lost) + " has left the job"),
                       /*died=*/false);
  }
}

void Engine::RankFailed(int rank, const std::string& text) NO_THREAD_SAFETY_ANALYSIS {
  if (failure_.ok()) {
    failure_ = absl::UnavailableError(text);
    failed_.store(true);
    BLUEFOG_LOG(kError) << text << "; no further operation is possible in this job";
  }
  executor_.FailPeer(rank, failure_, /*died=*/true);
  executor_.FailAll(failure_);
}

void Engine::Shutdown(const std::function<bool()>& interrupted) {
  if (in_forked_child() || down_.exchange(true)) return;
  if (thread_.joinable()) {
    {
      // What needs no neighbour's answer leaves first: not chance, whether the thread was in time.
      const int64_t until = NowNs() + kDepartNs;
      MutexLock lock(progress_mu_);
      while (ProgressLocked() && NowNs() < until) {
      }
    }
    // What is complete here but for the neighbours' releases may linger; the rest nobody will wait
    // for.
    const std::string text =
        "rank " + std::to_string(place_.rank) + " was shut down with the operation under way";
    Run([text](Executor& executor) {
      executor.FailUnfinished([](const Operation&) { return true; }, absl::AbortedError(text));
    });
    // Set under the lock where the last operation ended: see ProgressLocked. Neighbours may be as
    // late here as in any operation.
    const int64_t begin = NowNs();
    int64_t report = begin + config_.stall_report_ms * kMillisecond;
    while (!Wait(idle_, kLingerSlice, "shutdown")) {
      const int64_t now = NowNs();
      if (now - begin >= config_.op_timeout_ms * kMillisecond) break;
      if (failed_.load() && now - begin >= kFailedLingerNs) break;
      if (interrupted && interrupted()) break;
      if (now < report) continue;
      report = now + config_.stall_report_ms * kMillisecond;
      Run([rank = place_.rank](const Executor& executor) {
        const std::string what = executor.Outstanding();
        if (what.empty()) return;
        BLUEFOG_LOG(kWarning) << "shutdown: rank " << rank << " stays until its neighbours are "
                              << "through: " << what;
      });
    }
    std::unique_ptr<control::Membership> membership;
    {
      MutexLock lock(membership_mu_);
      membership = std::move(membership_);
    }
    if (membership != nullptr) {
      SendLeaveNote(place_.job_id, place_.rank);
      membership->Leave();
      membership.reset();
    }
    stop_.store(true);
    Kick();
    thread_.join();
  }
  {
    MutexLock lock(progress_mu_);
    const Status end = absl::FailedPreconditionError("rank " + std::to_string(place_.rank) +
                                                     ": the communicator was shut down");
    executor_.FailAll(end);
    ProgressLocked();
    executor_.LosePeers(end);
    transports_.clear();
  }
  DropFinished();
  trace_.Stop();
  if (epoll_fd_ >= 0) close(epoll_fd_);
  if (kick_fd_ >= 0) close(kick_fd_);
  epoll_fd_ = kick_fd_ = -1;
}

// ---- Inbox
// -----------------------------------------------------------------------------------------

Status Engine::CheckUsable(const std::string& what) const {
  if (ForkGeneration() != fork_generation_) {
    return absl::FailedPreconditionError(
        what + ": this process was forked from rank " + std::to_string(place_.rank) +
        "; an engine cannot be used in a forked child (start workers with spawn, or do not "
        "communicate in them)");
  }
  if (down_.load(std::memory_order_relaxed)) {
    return absl::FailedPreconditionError(what + ": the communicator was shut down");
  }
  return absl::OkStatus();
}

NameEntry* Engine::Name(const std::string& name, bool automatic) {
  MutexLock lock(inbox_mu_);
  // Automatic names live beside the users': an operation called "allreduce" is not the unnamed one.
  auto& names = automatic ? automatic_names_ : names_;
  const auto it = names.find(name);
  if (it != names.end()) return it->second.get();
  std::unique_ptr<NameEntry>& entry = names[name];
  if (entry == nullptr) {
    entry = std::make_unique<NameEntry>();
    entry->name = name;
    entry->hash = StableHash().Add(automatic).Add(std::string_view(name)).value();
  }
  return entry.get();
}

void Engine::Run(std::function<void(Executor&)> task) {
  {
    MutexLock lock(inbox_mu_);
    inbox_.push_back({{}, std::move(task)});
    inbox_filled_.store(true);
  }
  KickIfNeeded();
}

bool Engine::DrainInbox() {
  if (!inbox_filled_.load()) return false;
  {
    MutexLock lock(inbox_mu_);
    std::swap(drained_, inbox_);
    inbox_filled_.store(false);
  }
  for (Item& item : drained_) {
    if (item.task) {
      item.task(executor_);
      continue;
    }
    Operation* op = executor_.NewOperation();
    static_cast<Submission&>(*op) = std::move(item.submission);
    ++stats_.ops_submitted;
    executor_.Start(op);
  }
  drained_.clear();
  return true;
}

void Engine::DropFinished() {
  std::vector<std::shared_ptr<WorkImpl>> finished;
  {
    MutexLock lock(inbox_mu_);
    if (finished_.empty()) return;
    std::swap(finished, finished_);
  }
  finished.clear();  // Outside the lock: the deleters of tensors may take the GIL.
  MutexLock lock(inbox_mu_);
  if (finished_.empty()) std::swap(finished, finished_);  // Keeps the capacity.
}

// ---- Progress
// --------------------------------------------------------------------------------------

void Engine::Incoming(int peer, const transport::Header& header,
                      const transport::View& view) NO_THREAD_SAFETY_ANALYSIS {
  executor_.OnMessage(peer, header, view);
}
void Engine::SendDone(uint64_t cookie, const Status& status) NO_THREAD_SAFETY_ANALYSIS {
  executor_.OnSendDone(cookie, status);
}
void Engine::FetchDone(uint64_t cookie, const Status& status) NO_THREAD_SAFETY_ANALYSIS {
  executor_.OnFetchDone(cookie, status);
}
void Engine::PeerDown(int peer, const Status& status) NO_THREAD_SAFETY_ANALYSIS {
  // Who lacks the means to reach a neighbour has failed itself.
  const int failed = absl::IsResourceExhausted(status) ? place_.rank : peer;
  const std::string text =
      "rank " + std::to_string(failed) + " failed: " + std::string(status.message());
  const bool left = absl::IsCancelled(status);
  const bool unclear = left || absl::IsNotFound(status);
  {
    // Neighbours see a death first; the others learn of it through the control plane, which knows
    // better of a rank that may have left.
    MutexLock lock(membership_mu_);
    if (membership_ != nullptr && !left) membership_->ReportFailure(failed, text);
    if (membership_ != nullptr && unclear && !control_gone_) return lost_.push_back(peer);
  }
  if (unclear) {
    executor_.FailPeer(peer,
                       absl::UnavailableError("rank " + std::to_string(peer) + " has left the job"),
                       /*died=*/false);
  } else {
    RankFailed(failed, text);
  }
}

bool Engine::ProgressLocked() {
  bool moved = DrainInbox();
  moved |= ProgressTransports();
  moved |= executor_.Run();
  for (const auto& transport : transports_) transport->Flush();
  if ((++polls_ & 63) == 0 || !moved) {
    const int64_t now = NowNs();
    if (now >= next_check_ns_) {
      const int64_t next = executor_.CheckDeadlines(now);
      next_check_ns_ = std::min(next, now + 50 * kMillisecond);
    }
  }
  if (down_.load(std::memory_order_relaxed) && executor_.idle() && !inbox_filled_.load()) {
    idle_.Set();
  }
  runnable_.store(executor_.runnable(), std::memory_order_relaxed);
  ops_done_.store(stats_.ops_done, std::memory_order_relaxed);
  if (!executor_.finished().empty()) {
    MutexLock lock(inbox_mu_);
    for (auto& work : executor_.finished()) finished_.push_back(std::move(work));
    executor_.finished().clear();
  }
  return moved;
}

bool Engine::ProgressTransports() {
  bool moved = false;
  for (const auto& transport : transports_) moved |= transport->Progress();
  return moved;
}

bool Engine::Arm() {
  bool quiet = true;
  for (const auto& transport : transports_) quiet &= transport->Arm();
  return quiet;
}

void Engine::Disarm() {
  for (const auto& transport : transports_) transport->Disarm();
}

void Engine::LeaveProgress(bool more_soon) {
  const bool more = !(more_soon && looks_again_.load() && sleepers_.load() == 0) && !Arm();
  progress_mu_.Unlock();
  if (more && sleeping_.exchange(false)) Kick();
  KickIfNeeded();
}

void Engine::Kick() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = write(kick_fd_, &one, sizeof(one));
}

void Engine::KickIfNeeded() {
  // Pairs with Loop: either it sees the inbox after raising sleeping_, or this sees sleeping_.
  if ((inbox_filled_.load() || runnable_.load()) && sleeping_.exchange(false)) Kick();
}

// While a caller drives, this thread leaves it the lock: of two threads that could move the same
// data, the one that waits for it is the better one, as it need not be woken. For a caller that has
// given up driving and sleeps, this thread drives if there is a core for each rank: what it waits
// for comes in many pieces.
//
// While callers drive, operation after operation, nobody needs the doorbell: every ring between two
// of them would wake this thread only to take the lock and a core from the next. So it leaves the
// doorbell disarmed and looks again after kLendMs; when nobody has driven in between, it arms as
// usual. With operations under way it does so only for a caller that waits for one after the other,
// and never while a caller sleeps: that one needs the doorbell.
Engine::Nap Engine::PrepareSleep(bool rung) {
  if (rung) {
    Arm();  // So that the next look takes the doorbell's ring, or it would go on.
    ProgressLocked();
  }
  const int64_t now = NowNs();
  const bool drive =
      sleepers_.load() > 0 && ranks_per_core_ == 1 && now >= no_drive_until_ns_.load();
  Poll([this] { return stop_.load() || drivers_.load() > 0; }, drive ? drive_ns_ : 0, now);
  sleeping_.store(true);
  const bool driven = drivers_.load() > 0;
  bool lend = driven || (drives_ != drives_seen_ && (in_series_ || executor_.active_count() == 0));
  drives_seen_ = drives_;
  looks_again_.store(lend);
  // Pairs with Wait: either it sees that this thread lends, or this sees that it sleeps.
  if (lend && sleepers_.load() > 0) {
    lend = false;
    looks_again_.store(false);
  }
  // A caller that was about to do it may have left off.
  const bool more = inbox_filled_.load() || executor_.runnable();
  if (lend) {
    Disarm();
    return {(driven || !more) && !stop_.load(), kLendMs};
  }
  // A publish that met back-pressure is tried again when a release rings; time-outs need a clock,
  // also those of operations that a caller starts and leaves while this thread sleeps.
  const int64_t until_check = (next_check_ns_ - NowNs()) / kMillisecond + 1;
  const int64_t ms = executor_.active_count() > 0 ? until_check : IdleNapMs(config_);
  return {!more && Arm() && !stop_.load(), static_cast<int>(std::clamp<int64_t>(ms, 1, 1000))};
}

void Engine::Loop() NO_THREAD_SAFETY_ANALYSIS {
  bool rung = false;
  while (!stop_.load()) {
    // Raised before the lock is tried: whoever holds it sees that when it leaves.
    sleeping_.store(true);
    Nap nap{true, kLendMs};
    // A doorbell that rang rings on until somebody has looked: wait for the lock, then.
    if (rung) progress_mu_.Lock();
    if (rung || progress_mu_.TryLock()) {
      nap = PrepareSleep(rung);
      progress_mu_.Unlock();
    } else {
      looks_again_.store(true);
    }
    rung = false;
    if (nap.sleep) {
      epoll_event events[4];
      const int n = epoll_wait(epoll_fd_, events, 4, nap.timeout_ms);
      for (int i = 0; i < n; ++i) {
        if (events[i].data.fd != kick_fd_) {
          rung = true;
          continue;
        }
        uint64_t count;
        [[maybe_unused]] const ssize_t bytes = read(kick_fd_, &count, sizeof(count));
      }
    }
    sleeping_.store(false);
  }
}

void Engine::Drive(Completion& completion, std::chrono::steady_clock::time_point deadline) {
  const int64_t begin = NowNs();
  if (begin < no_drive_until_ns_.load(std::memory_order_relaxed)) return;
  const int64_t budget = drive_ns_;
  drivers_.fetch_add(1);
  while (!completion.done()) {
    if (progress_mu_.TryLock()) {
      DriveLocked(completion, deadline, begin);
      return;
    }
    sched_yield();
    if (NowNs() - begin > budget || std::chrono::steady_clock::now() >= deadline) break;
  }
  drivers_.fetch_sub(1);
  // The background thread may have left the work to this one, which never came to it.
  if (completion.done()) {
    KickIfNeeded();
  } else if (sleeping_.exchange(false)) {
    Kick();
  }
}

void Engine::DriveLocked(Completion& completion, std::chrono::steady_clock::time_point deadline,
                         int64_t idle_since) {
  ++drives_;
  in_series_ = idle_since - drove_ns_ < kSeriesNs;
  Disarm();
  const bool calm =
      Poll([&] { return completion.done() || std::chrono::steady_clock::now() >= deadline; },
           drive_ns_, idle_since);
  if (calm && completion.done()) no_drive_ns_ /= 2;
  // Before the lock is given up: whoever takes it must not leave it to this caller.
  drivers_.fetch_sub(1);
  drove_ns_ = NowNs();
  LeaveProgress(completion.done() && (in_series_ || executor_.active_count() == 0));
}

template <typename Enough>
bool Engine::Poll(Enough enough, int64_t budget_ns, int64_t idle_since) {
  while (!enough()) {
    if (ProgressLocked()) {
      idle_since = NowNs();
      continue;
    }
    const int64_t before = NowNs();
    if (before - idle_since >= budget_ns) return true;
    sched_yield();
    const int64_t taken = NowNs() - before;
    if (taken <= yield_limit_ns_) {
      ++quick_yields_;
      continue;
    }
    // Somebody else wants this core: do not drive for a while, longer each time it happens again.
    // Once in a while is chance.
    idle_since += taken;
    if (std::exchange(quick_yields_, 0) >= kManyYields) continue;
    no_drive_ns_ =
        std::min(std::max(kMillisecond, 2 * no_drive_ns_), config_.no_drive_ms * kMillisecond);
    no_drive_until_ns_.store(before + taken + no_drive_ns_, std::memory_order_relaxed);
    return false;
  }
  return true;
}

bool Engine::Wait(Completion& completion, std::chrono::nanoseconds timeout, const std::string& what,
                  TraceDetail detail) {
  const int64_t begin = NowNs();
  const auto deadline = After(timeout);
  if (!completion.done()) Drive(completion, deadline);
  bool done = completion.done();
  if (!done) {
    sleepers_.fetch_add(1);
    // The background thread may have left the doorbell disarmed for callers that drive.
    if (looks_again_.load() && sleeping_.exchange(false)) Kick();
    while (!done) {
      // When the engine's thread has ended, what is left moves only under those who wait.
      done = completion.Sleep(std::min(deadline, After(kSleepSlice)));
      if (done || std::chrono::steady_clock::now() >= deadline) break;
      if (down_.load(std::memory_order_relaxed)) Drive(completion, deadline);
    }
    sleepers_.fetch_sub(1);
  }
  const int64_t end = NowNs();
  blocked_ns_.fetch_add(end - begin, std::memory_order_relaxed);
  trace_.Span(TraceTrack::kCaller, "WAIT", what, begin, end, detail);
  DropFinished();
  return done;
}

void Engine::SetUserHandler(uint8_t handler, UserHandler fn) {
  MutexLock lock(progress_mu_);
  executor_.SetUserHandler(handler, std::move(fn));
}

EngineStats Engine::stats() {
  EngineStats stats;
  {
    MutexLock lock(progress_mu_);
    stats = stats_;
    if (executor_.unanswered() > 0) stats.busy_ns += NowNs();
  }
  stats.allocations += planner_.planned();
  stats.bytes_pinned = arena_->bytes_reserved();
  stats.blocked_ns = blocked_ns_.load();
  stats.nonfinite_gradients = nonfinite_.load();
  MutexLock lock(membership_mu_);
  if (membership_ != nullptr) stats.control_messages += membership_->messages();
  return stats;
}

Status Engine::status() {
  MutexLock lock(progress_mu_);
  return failure_;
}

}  // namespace bluefog
