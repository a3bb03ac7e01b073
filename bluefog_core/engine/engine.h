// One rank's engine: the inbox, the progress lock and who holds it, the background thread, the
// waiters that drive. What is done under the lock is the executor's business.
//
// Threads. Callers touch the inbox (one mutex), Works and Completions. Everything else belongs to
// whoever holds the progress lock: the background thread, a caller that waits, or for a moment one
// that submits.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include <bluefog/communicator.h>

#include "base/mutex.h"
#include "base/trace.h"
#include "control/membership.h"
#include "engine/block_pool.h"
#include "engine/completion.h"
#include "engine/executor.h"
#include "engine/fork_guard.h"
#include "engine/planner.h"
#include "transport/arena.h"
#include "transport/routes.h"
#include "transport/transport.h"

namespace bluefog {

class Engine final : private transport::Receiver {
 public:
  Engine(const Config& config, const control::Place& place);
  ~Engine() override;

  // ---- Start and end. Called by Communicator.
  transport::Receiver* receiver() { return this; }
  const std::shared_ptr<transport::Arena>& arena() const { return arena_; }
  /// `transport` is null when alone; its SetPeers has been called.
  /// `by_rank`: which of the transports leads to which rank; null for this one.
  Status Start(std::vector<std::unique_ptr<transport::Transport>> transports,
               std::vector<transport::Transport*> by_rank);
  /// Before Start.
  void SetPlacement(Placement placement) { planner_.SetPlacement(std::move(placement)); }
  /// From now on failures that this rank sees are reported here.
  void SetMembership(std::unique_ptr<control::Membership> membership);
  /// Where the ranks are, for those who ask. Before Start; empty where nobody was asked.
  void SetWhereabouts(std::vector<transport::Whereabouts> whereabouts) {
    whereabouts_ = std::move(whereabouts);
  }
  const std::vector<transport::Whereabouts>& whereabouts() const { return whereabouts_; }
  control::MembershipEvents MembershipEvents();
  /// `interrupted`: see Communicator::Shutdown.
  void Shutdown(const std::function<bool()>& interrupted = {});

  // ---- For callers; thread-safe.
  StatusOr<std::shared_ptr<Work>> Submit(OpSpec spec);
  /// `nodes`: what the graph is between. That of machines is null until it is set.
  enum class Nodes : uint8_t { kRanks, kMachines };
  Status SetTopology(TopologySequence topology, Nodes nodes = Nodes::kRanks);
  std::shared_ptr<const TopologySequence> topology(Nodes nodes = Nodes::kRanks) const;
  const control::Place& place() const { return place_; }
  const Placement& placement() const { return planner_.placement(); }
  int machine() const { return placement().host[static_cast<size_t>(place_.rank)]; }
  /// All ranks but this one.
  std::vector<int> others() const;
  const Config& config() const { return config_; }
  Planner& planner() { return planner_; }
  Trace& trace() { return trace_; }
  EngineStats stats();
  Status status();
  bool in_forked_child() const { return ForkGeneration() != fork_generation_; }
  bool usable() const { return !in_forked_child() && !down_.load(std::memory_order_relaxed); }
  /// Ok unless the engine is shut down or this process is a forked child.
  Status CheckUsable(const std::string& what) const;

  // ---- For the optimizer and other users inside the engine.
  NameEntry* Name(const std::string& name, bool automatic) EXCLUDES(inbox_mu_);
  /// Runs `task` under the progress lock, after everything submitted before.
  void Run(std::function<void(Executor&)> task) EXCLUDES(inbox_mu_);
  /// Waits for `completion`, driving progress first; false on time-out. `what` and `detail` are for
  /// the timeline.
  bool Wait(Completion& completion, std::chrono::nanoseconds timeout, const std::string& what,
            TraceDetail detail = {});
  /// A handler for active messages, served while the caller's own threads sleep.
  void SetUserHandler(uint8_t handler, UserHandler fn);
  /// Names the optimizers of this communicator; created in the same order on all ranks.
  std::string NextOptimizer() { return "optimizer" + std::to_string(optimizers_.fetch_add(1)); }
  /// Instead of Submit: counts as a use of the name, and the partners are told why.
  void Decline(const OpSpec& spec, const Status& why) EXCLUDES(inbox_mu_) {
    if (usable()) Refuse(spec, Name(spec.name, false), 0, why);
  }
  void CountNonFinite(int64_t n) { nonfinite_.fetch_add(n, std::memory_order_relaxed); }

 private:
  // transport::Receiver, from inside Progress.
  void Incoming(int peer, const transport::Header& header, const transport::View& view) override;
  void SendDone(uint64_t cookie, const Status& status) override;
  void FetchDone(uint64_t cookie, const Status& status) override;
  void PeerDown(int peer, const Status& status) override;

  void Loop();
  bool ProgressLocked() REQUIRES(progress_mu_);
  bool DrainInbox() REQUIRES(progress_mu_) EXCLUDES(inbox_mu_);
  bool ProgressTransports() REQUIRES(progress_mu_);
  /// All of them; false if something came in at one.
  bool Arm() REQUIRES(progress_mu_);
  void Disarm() REQUIRES(progress_mu_);
  void Drive(Completion& completion, std::chrono::steady_clock::time_point deadline);
  void DriveLocked(Completion& completion, std::chrono::steady_clock::time_point deadline,
                   int64_t idle_since) RELEASE(progress_mu_);
  /// Progress until `enough()` or nothing has moved for `budget_ns` (counted from `idle_since` at
  /// first); gives up the core between two looks. False: other processes want this core.
  template <typename Enough>
  bool Poll(Enough enough, int64_t budget_ns, int64_t idle_since) REQUIRES(progress_mu_);
  /// Arms the doorbell, gives up the lock, and wakes the background thread if something is left to
  /// do. `more_soon`: a caller will drive again or the background thread look, so the doorbell may
  /// stay disarmed while that looks again by itself.
  void LeaveProgress(bool more_soon) RELEASE(progress_mu_);
  struct Nap {
    bool sleep = false;
    int timeout_ms = -1;
  };
  /// What the background thread does before it sleeps. `rung`: what it slept on woke it.
  Nap PrepareSleep(bool rung) REQUIRES(progress_mu_);
  /// After the lock was given up: is there something that nobody else would look at?
  void KickIfNeeded();
  void Kick();
  void RankFailed(int rank, const std::string& text);
  void RankLeft(int rank);
  void DropFinished() EXCLUDES(inbox_mu_);
  StatusOr<std::shared_ptr<const Plan>> PlanFor(const OpSpec& spec, int64_t round);
  NameEntry* AutomaticName(const OpSpec& spec) const {
    return spec.local ? local_name_ : op_names_[static_cast<size_t>(spec.op)];
  }
  Status CheckUse(const OpSpec& spec, NameEntry* name, uint32_t layout_hash, int64_t* round);
  void Refuse(const OpSpec& spec, NameEntry* name, int64_t round, const Status& why);
  /// Whom this call may keep waiting.
  std::vector<int> PeersOf(const OpSpec& spec, int64_t round) const;
  StatusOr<Neighborhood> CallNeighborhood(const OpSpec& spec, const Neighborhood* graph,
                                          std::vector<double>* send_weights) const;
  /// The message says what is wrong, not where.
  Status Validate(const OpSpec& spec) const;

  const Config config_;
  const control::Place place_;
  const std::shared_ptr<transport::Arena> arena_;
  const std::shared_ptr<BlockPool> outputs_, scratch_;
  const std::shared_ptr<Recycler> works_ = std::make_shared<Recycler>(sizeof(WorkImpl) + 64);
  Planner planner_;
  Trace trace_;
  const uint32_t fork_generation_;
  const int64_t
      ranks_per_core_;  ///< On this host, rounded up. A yield gives each of them its turn.
  const int64_t drive_ns_, yield_limit_ns_;  ///< As configured, for that many ranks.

  // Inbox.
  struct Item {
    Submission submission;
    std::function<void(Executor&)> task;
  };
  mutable Mutex inbox_mu_;
  std::vector<Item> inbox_ GUARDED_BY(inbox_mu_);
  std::unordered_map<std::string, std::unique_ptr<NameEntry>> names_ GUARDED_BY(inbox_mu_),
      automatic_names_ GUARDED_BY(inbox_mu_);
  std::array<NameEntry*, 7> op_names_{};  ///< By Op: of operations without a name.
  NameEntry* local_name_ = nullptr;       ///< Machines need not call these equally often.
  struct Graph {
    std::shared_ptr<const TopologySequence> topology;
    int64_t number = 0;  ///< How many were set.
  };
  std::array<Graph, 2> graphs_ GUARDED_BY(inbox_mu_);  ///< By Nodes.
  std::vector<std::shared_ptr<WorkImpl>> finished_ GUARDED_BY(inbox_mu_);
  std::atomic<bool> inbox_filled_{false};

  // Progress.
  Mutex progress_mu_;
  EngineStats stats_ GUARDED_BY(progress_mu_);
  Executor executor_ GUARDED_BY(progress_mu_);
  std::vector<std::unique_ptr<transport::Transport>> transports_ GUARDED_BY(progress_mu_);
  std::vector<Item> drained_ GUARDED_BY(progress_mu_);
  Status failure_ GUARDED_BY(progress_mu_);
  uint32_t polls_ GUARDED_BY(progress_mu_) = 0;
  int64_t next_check_ns_ GUARDED_BY(progress_mu_) = 0;
  /// Peers that the transport has lost, though they may have left in good order; the control plane
  /// says how, and says first whose death made them leave. `control_gone_`: it no longer does.
  std::vector<int> lost_ GUARDED_BY(progress_mu_);
  bool control_gone_ GUARDED_BY(progress_mu_) = false;
  int64_t no_drive_ns_ GUARDED_BY(progress_mu_) = 0;  ///< How long the next pause will be at least.
  int quick_yields_ GUARDED_BY(progress_mu_) = 0;     ///< Since the last slow one.
  int64_t drove_ns_ GUARDED_BY(progress_mu_) = 0;     ///< When a caller last left off driving.
  bool in_series_ GUARDED_BY(progress_mu_) = false;   ///< The last drive began right after another.
  /// Times a caller drove, and how many of them the background thread knows of.
  uint64_t drives_ GUARDED_BY(progress_mu_) = 0, drives_seen_ GUARDED_BY(progress_mu_) = 0;

  std::atomic<bool> runnable_{false};  ///< The executor has work that waits for the lock only.
  std::atomic<bool> failed_{false};
  std::atomic<bool> sleeping_{
      false};                     ///< The background thread is in, or about to enter, epoll_wait.
  std::atomic<int> drivers_{0};   ///< Callers in Wait that drive, or are about to.
  std::atomic<int> sleepers_{0};  ///< Those that have given it up, or must not.
  /// The background thread looks again within kLendMs: the doorbell need not be armed.
  std::atomic<bool> looks_again_{false};
  std::atomic<bool> stop_{false};
  std::atomic<bool> down_{false};
  Completion idle_;  ///< After down_: nothing is under way any more.
  std::atomic<int64_t> no_drive_until_ns_{0};
  std::atomic<int> optimizers_{0};
  std::atomic<int64_t> blocked_ns_{0}, nonfinite_{0}, ops_done_{0};
  int epoll_fd_ = -1, kick_fd_ = -1;
  Mutex membership_mu_;
  std::vector<transport::Whereabouts> whereabouts_;
  std::unique_ptr<control::Membership> membership_ GUARDED_BY(membership_mu_);
  std::thread thread_;
};

/// Logging and failpoints are the process's: set up by every Create.
Status PrepareProcess(const Config& config, int rank);

}  // namespace bluefog
