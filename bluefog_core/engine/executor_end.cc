// How operations end: well, refused, in time-outs, with a peer that is gone, with the whole job.
#include <algorithm>

#include "base/clock.h"
#include "base/failpoint.h"
#include "base/log.h"
#include "engine/executor.h"
#include "engine/executor_detail.h"

namespace bluefog {

void Executor::Fail(Operation* op, const Status& status, int except_peer) {
  // What is left of a completed operation is the neighbours': they get what was sent to them.
  if (op->failing || op->completed) return;
  op->failing = true;
  op->failure = status;
  ready_units_ -= static_cast<int64_t>(op->starts.size() + op->ready.size());
  op->starts.Clear();
  op->ready.Clear();
  op->blocked.clear();
  op->publishes_open.clear();
  op->fetch_waiting.clear();
  for (const int peer : op->plan->peers) {
    if (peer != except_peer) Abort(HeaderOf(*op, MessageKind::kAbort), peer, status);
  }
  for (const Operation::Inflight& f : op->inflight) {
    peers_[f.peer]->Revoke(f.peer, Cookie{op->index, f.publish, f.target}.Pack());
  }
  for (Operation::Publish& p : op->publishes) {
    if (p.prepared) {
      p.unreleased -= static_cast<int32_t>(p.unsent.size());
      p.unsent.clear();
    }
    if (p.slot != nullptr && p.unreleased == 0) {
      slots_.Release(std::move(p.slot));
      p.slot = nullptr;
    }
  }
  for (Operation::Receive& r : op->receives) {
    // A fetch under way writes into its slot until FetchDone.
    if (r.arrived && (r.fetched == nullptr || op->fetching == 0)) ReleaseReceive(op, r);
  }
}

void Executor::FinishIfQuiet(Operation* op) {
  if (!op->active) return;
  if (!op->inflight.empty() || op->fetching > 0) {
    if (!op->completed && Settled(*op)) (void)Complete(op, absl::OkStatus());
    return;
  }
  if (op->failing || op->units_left == 0) Finish(op);
}

// Nothing is left but releases that can bring no news: the tensor may be overwritten, as small
// messages were copied, and the peers sent for this operation themselves, so they will match it.
// With more ranks than cores a turn of all of them lies between here and the releases.
bool Executor::Settled(const Operation& op) const {
  const Plan& plan = *op.plan;
  if (op.hooks != nullptr || op.failing || op.dynamic || !op.broken.empty() || op.fetching > 0 ||
      op.units_left > plan.publishes) {
    return false;
  }
  int32_t unreleased = 0;
  for (const Operation::Publish& p : op.publishes) {
    if (!p.prepared || !p.unsent.empty()) return false;
    unreleased += p.unreleased > 0 ? 1 : 0;
  }
  return op.units_left == unreleased &&
         std::all_of(op.inflight.begin(), op.inflight.end(), [&](const Operation::Inflight& f) {
           const auto bytes = static_cast<int64_t>(op.publishes[f.publish].payload.size());
           return bytes <= peers_[f.peer]->inline_limit() && plan.InboundOf(f.peer) >= 0;
         });
}

// For its caller. Neighbours may still have to release what was sent to them.
Status Executor::Complete(Operation* op, Status status) {
  if (FailpointHit("engine.op_done") && status.ok()) {
    status = absl::InternalError(op->ToString() + ": failpoint engine.op_done");
  }
  op->completed = true;
  ++completed_;
  Answered(op);
  if (trace_->on()) {
    trace_->Async(NameOf(op->op), op->name->name, TraceId(op->key, rank_, rank_, 0), op->started_ns,
                  NowNs(), op->hooks == nullptr ? TraceDetail{} : TraceDetail{"step", op->step});
  }
  ++(status.ok() ? stats_->ops_done : stats_->ops_failed);
  op->name->in_flight.store(false, std::memory_order_release);
  if (op->work != nullptr) {
    op->work->Complete(status);
    finished_.push_back(std::move(op->work));
    op->work = nullptr;
  }
  return status;
}

void Executor::Finish(Operation* op) {
  op->active = false;
  if (op->failing) {
    for (Operation::Receive& r : op->receives) {
      if (r.arrived) ReleaseReceive(op, r);
    }
  }
  ahead_ -= op->ahead;
  Status status = op->failing ? op->failure : absl::OkStatus();
  match_.Remove(*op);
  active_bytes_ -= op->input.bytes();
  active_.erase(
      std::lower_bound(active_.begin(), active_.end(), op,
                       [](const Operation* a, const Operation* b) { return a->order < b->order; }));
  if (!op->completed) status = Complete(op, std::move(status));
  --completed_;
  op->scratch_memory = op->coded_memory = nullptr;
  PluginHooks* hooks = op->hooks;
  op->hooks = nullptr;
  op->plan = nullptr;
  free_.push_back(op->index);
  if (hooks != nullptr) hooks->OnDone(status);  // May start the next operation.
}

void Executor::Abandon(Operation* op, const Status& status) {
  Fail(op, status);
  FinishIfQuiet(op);
}

void Executor::FailAll(const Status& status) {
  if (status_.ok()) status_ = status;
  for (const std::vector<Operation*> all = active_; Operation * op : all) {
    if (!op->active) continue;
    Fail(op, About(*op, status_));
    FinishIfQuiet(op);
  }
}

void Executor::FailUnfinished(const std::function<bool(const Operation&)>& which,
                              const Status& status) {
  for (const std::vector<Operation*> all = active_; Operation * op : all) {
    if (!op->active || !which(*op)) continue;
    // What is left to do for neighbours only may linger.
    const auto sent =
        std::count_if(op->publishes.begin(), op->publishes.end(), [&](const Operation::Publish& p) {
          return p.prepared ? !p.unsent.empty() || p.unreleased > 0 : !op->needs_posts;
        });
    if (op->units_left > sent) Fail(op, About(*op, status));
    FinishIfQuiet(op);
  }
}

void Executor::Condemn(NameEntry* name, const Status& status, std::span<const int> tell) {
  if (!match_.Condemned(name->hash).ok()) return;
  for (const Match::Early& e : match_.Condemn(name->hash, status)) {
    if (e.header.kind == MessageKind::kAbort) continue;
    Refuse(e.header, e.peer, status, e.header.kind == MessageKind::kData ? &e.view : nullptr);
  }
  // Whoever only receives from here, and is through with what failed, would wait for the next one.
  WireHeader next;
  next.key = {name->hash, match_.NextUse(name->hash)};
  for (const int peer : tell) Abort(next, peer, status);
  FailUnfinished([name](const Operation& op) { return op.name == name; }, status);
}

void Executor::Reject(const NameEntry& name, uint64_t use, const Status& why,
                      std::span<const int> peers) {
  WireHeader header;
  header.key = {name.hash, use};
  for (const Match::Early& e : match_.Skip(header.key)) {
    if (e.header.kind == MessageKind::kAbort) continue;
    Refuse(e.header, e.peer, why, e.header.kind == MessageKind::kData ? &e.view : nullptr);
  }
  for (const int peer : peers) Abort(header, peer, why);
}

void Executor::FailPeer(int peer, const Status& status, bool died) {
  if (!peer_status_[peer].ok()) return;
  peer_status_[peer] = status;
  outbox_count_ -= static_cast<int64_t>(outbox_[peer].size());
  outbox_[peer].clear();
  std::vector<Match::Early> views;
  if (died) match_.Forget(peer, &views);
  for (const Match::Early& e : views) {
    if (e.header.kind == MessageKind::kData) peers_[peer]->Release(e.view);
  }
  for (auto it = refused_.begin(); it != refused_.end();) {
    const transport::View view = it->second;
    it = view.peer == peer ? refused_.erase(it) : std::next(it);
    if (view.peer == peer) peers_[peer]->Release(view);
  }
  for (const std::vector<Operation*> all = active_; Operation * op : all) {
    if (!op->active || !Needs(*op, peer)) continue;
    Fail(op, About(*op, status));
    FinishIfQuiet(op);
  }
}

void Executor::LosePeers(const Status& status) {
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) FailPeer(peer, status, /*died=*/true);
  }
  peers_.assign(peers_.size(), nullptr);
}

// `peer` has given the operation up or is gone: it fails as soon as the reason is here.
void Executor::Break(Operation* op, int peer) {
  if (peer_status_[peer].ok()) {
    op->broken.push_back(peer);
  } else {
    Fail(op, About(*op, peer_status_[peer]));
  }
}

// Is anything owed in either direction? Else the operation can end well without the peer.
bool Executor::Needs(const Operation& op, int peer) const {
  if (std::count(op.broken.begin(), op.broken.end(), peer) > 0) return true;
  if (const int in = op.plan->InboundOf(peer); in >= 0) {
    for (const int32_t u : op.plan->inbound[in].receives) {
      if (!op.receives[op.plan->units[u].ordinal].arrived) return true;
    }
  }
  for (const Operation::Inflight& f : op.inflight) {
    if (f.peer == peer) return true;
  }
  for (size_t i = 0; i < op.publishes.size(); ++i) {
    const Operation::Publish& p = op.publishes[i];
    const auto& targets =
        op.plan->schedule.steps[op.plan->units[op.plan->publish_units[i]].first].targets;
    for (size_t t = 0; t < targets.size(); ++t) {
      if (targets[t].peer != peer) continue;
      if (!p.prepared ||
          std::count(p.unsent.begin(), p.unsent.end(), static_cast<int32_t>(t)) > 0) {
        return true;
      }
    }
  }
  return false;
}

std::string Executor::PeersMissing(const Operation& op) const {
  std::vector<int> missing = op.broken;
  std::string why = " to say why it gave up";
  for (const Plan::Inbound& in : op.plan->inbound) {
    if (!op.broken.empty()) break;
    for (const int32_t u : in.receives) {
      if (!op.receives[op.plan->units[u].ordinal].arrived) {
        missing.push_back(in.peer);
        why = " to send";
        break;
      }
    }
  }
  if (missing.empty()) {
    for (const Operation::Inflight& f : op.inflight) missing.push_back(f.peer);
    why = " to take what was sent";
  }
  if (missing.empty() && !op.publishes_open.empty()) {
    for (size_t d = 0; d < op.posted.size(); ++d) {
      if (op.posted[d] == Operation::kAsked ||
          (op.needs_posts && op.posted[d] != Operation::kPosted))
        missing.push_back(op.plan->destinations[d]);
    }
    why = " to submit it";
  }
  if (missing.empty()) return "its own turn: rank " + std::to_string(rank_) + " has more under way";
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  std::string text = missing.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < missing.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(missing[i]);
  }
  return text + why;
}

std::string Executor::Outstanding() const {
  for (const Operation* op : active_) {
    if (!op->failing) return op->ToString() + " waits for " + PeersMissing(*op);
  }
  return "";
}

int64_t Executor::CheckDeadlines(int64_t now) {
  constexpr int kReported = 4;
  int stalled = 0;
  int64_t next = INT64_MAX;
  sweep_.assign(active_.begin(), active_.end());  // What fails is taken out of active_.
  for (Operation* op : sweep_) {
    if (!op->active || op->failing || op->completed) continue;
    if (!op->produce_open || !op->consume_open) continue;  // Waits for its own caller.
    const int64_t timeout = op->waits_since_ns + config_.op_timeout_ms * kMillisecond;
    if (now >= timeout) {
      Fail(op, absl::DeadlineExceededError(
                   op->ToString() + ": rank " + std::to_string(rank_) + " waited " +
                   std::to_string((now - op->waits_since_ns) / kMillisecond / 1000) + " s for " +
                   PeersMissing(*op) +
                   ". Every rank must submit the operation under the same name; see "
                   "BLUEFOG_OP_TIMEOUT_MS"));
      FinishIfQuiet(op);
      continue;
    }
    if (now >= op->next_report_ns) {
      if (++stalled <= kReported) {
        BLUEFOG_LOG(kWarning) << "stall: " << op->ToString() << " waits since "
                              << (now - op->waits_since_ns) / kMillisecond / 1000 << " s for "
                              << PeersMissing(*op);
      }
      op->next_report_ns = now + config_.stall_report_ms * kMillisecond;
      if (!op->probed && !op->needs_posts) {
        // A partner that finished without this rank answers with a refusal.
        op->probed = true;
        for (const Plan::Inbound& in : op->plan->inbound) Post(op, in.peer, kReceivesFromYou);
      }
    }
    next = std::min({next, timeout, op->next_report_ns});
  }
  if (stalled > kReported) {
    BLUEFOG_LOG(kWarning) << "stall: and " << stalled - kReported << " operations more";
    // The others join in next time, so that there is one report and not one for each start.
    for (Operation* op : active_)
      op->next_report_ns =
          std::max(op->next_report_ns, now + config_.stall_report_ms * kMillisecond);
  }
  return next;
}

}  // namespace bluefog
