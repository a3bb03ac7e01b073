// The life of an operation: its start, its units as they become runnable, the turn of the loop.
#include "engine/executor.h"

#include <algorithm>

#include "base/clock.h"
#include "base/failpoint.h"
#include "engine/executor_detail.h"

namespace bluefog {

using collective::StepKind;

namespace {

template <typename T>
std::span<T> FirstOf(std::vector<T>* memory, int count) {
  const auto n = static_cast<size_t>(count);
  if (memory->size() < n) memory->resize(n);
  return {memory->data(), n};
}

}  // namespace

Executor::Executor(const Config& config, int rank, int size,
                   std::shared_ptr<transport::Arena> arena, Trace* trace, EngineStats* stats)
    : config_(config),
      rank_(rank),
      size_(size),
      trace_(trace),
      stats_(stats),
      match_(rank),
      slots_(std::move(arena), SlotBytes(config), config.slot_bytes),
      peers_(static_cast<size_t>(size), nullptr),
      peer_status_(static_cast<size_t>(size)),
      lines_(static_cast<size_t>(size)),
      owed_(static_cast<size_t>(size)),
      outbox_(static_cast<size_t>(size)) {}

Executor::~Executor() = default;

Operation* Executor::NewOperation() {
  if (free_.empty()) {
    ++stats_->allocations;
    free_.push_back(static_cast<uint32_t>(slab_.size()));
    slab_.push_back(std::make_unique<Operation>());
    slab_.back()->index = free_.back();
  }
  Operation* op = slab_[free_.back()].get();
  free_.pop_back();
  return op;
}

void Executor::Start(Operation* op) {
  const Plan& plan = *op->plan;
  op->active = true;
  op->order = ++started_;
  op->listed = op->computing = op->failing = op->completed = false;
  op->failure = absl::OkStatus();
  op->pending.resize(plan.units.size());
  op->starts.Clear();
  op->ready.Clear();
  op->blocked.clear();
  op->publishes_open.clear();
  op->publishes = FirstOf(&op->publish_memory, plan.publishes);
  for (Operation::Publish& p : op->publishes) p.prepared = false;
  op->receives = FirstOf(&op->receive_memory, plan.receives);
  op->encoded_bytes.assign(static_cast<size_t>(plan.encodings), 0);
  op->posted.assign(plan.destinations.size(), Operation::kNotPosted);
  op->in_line.assign(plan.destinations.size(), false);
  op->inflight.clear();
  op->broken.clear();
  op->units_left = static_cast<int32_t>(plan.units.size());
  op->produces_left = plan.produces;
  op->answers_left = plan.answers;
  op->send_slots = op->fetch_slots = op->fetching = op->ahead = 0;
  op->fetch_waiting.clear();
  op->started_ns = NowNs();
  op->waits_since_ns = op->started_ns;
  op->next_report_ns = op->started_ns + config_.stall_report_ms * kMillisecond;
  op->probed = false;
  op->needs_posts =
      !op->dedicated && std::max(plan.largest_message * op->element_bytes,
                                 plan.largest_coded * op->coded_stride) > config_.eager_bytes;
  // How far these grow is chance: at once, so that the memory is there after the first operations.
  op->starts.Reserve(plan.units.size());
  op->ready.Reserve(plan.units.size());
  op->publishes_open.reserve(static_cast<size_t>(plan.publishes));
  active_.push_back(op);
  active_bytes_ += op->input.bytes();
  sweep_.reserve(active_.capacity());
  op->unanswered = true;
  if (unanswered_++ == 0) stats_->busy_ns -= op->started_ns;

  const Status condemned = match_.Add(op);
  for (size_t u = 0; u < plan.units.size(); ++u) {
    op->pending[u] = plan.units[u].pending;
    const Plan::Unit& unit = plan.units[u];
    if (plan.schedule.steps[unit.first].kind == StepKind::kReceive) {
      Operation::Receive& r = op->receives[unit.ordinal];
      r.arrived = r.held = false;
      r.users = unit.users;
    }
  }
  if (!condemned.ok()) Fail(op, condemned);
  if (!status_.ok()) Fail(op, About(*op, status_));
  if (!op->failing && FailpointHit("engine.start_op")) {
    Fail(op, absl::InternalError(op->ToString() + ": failpoint engine.start_op"));
  }
  if (!op->failing) {
    // The name and what it stands for, to whom it is new.
    op->name->described.resize(static_cast<size_t>(size_));
    std::string text;
    for (const int peer : plan.peers) {
      std::vector<uint64_t>& told = op->name->described[peer];
      if (std::find(told.begin(), told.end(), op->description_hash) != told.end()) continue;
      // Of an optimizer the peer keeps the latest only.
      if (!told.empty() && (op->hooks != nullptr || told.size() == Match::kDescriptions)) {
        told.erase(told.begin());
      }
      told.push_back(op->description_hash);
      if (text.empty()) {
        text = (op->hooks != nullptr ? op->hooks->Label() : op->name->name) + '\0' + op->Describe();
      }
      ++stats_->control_messages;
      SendControl(peer, HeaderOf(*op, MessageKind::kDescribe), std::as_bytes(std::span(text)));
    }
    // Both ends announce themselves where data waits for it, and receivers also where the call
    // names its own ranks: a partner that lists somebody else is found at once.
    if (op->needs_posts || op->dynamic) {
      for (const Plan::Inbound& in : plan.inbound) Post(op, in.peer, kReceivesFromYou);
    }
    if (op->needs_posts) {
      for (const int peer : plan.destinations) Post(op, peer, kSendsToYou);
    }
    for (size_t u = 0; u < plan.units.size() && !op->failing; ++u) {
      if (plan.units[u].pending == 0) MakeReady(op, static_cast<int32_t>(u));
    }
  }
  for (Match::Early e; match_.TakeEarly(*op, &e);) {
    Deliver(op, e.peer, e.header, e.view, std::move(e.copy), e.copied);
  }
  for (const int peer : plan.peers) {
    if (!peer_status_[peer].ok() && Needs(*op, peer)) Fail(op, About(*op, peer_status_[peer]));
  }
  if (!op->failing && plan.produces == 0 && op->hooks != nullptr) op->hooks->OnProduced();
  FinishIfQuiet(op);
}

void Executor::OpenGates(Operation* op, bool produce, bool consume) {
  const bool closed = !op->produce_open || !op->consume_open;
  op->produce_open |= produce;
  op->consume_open |= consume;
  if (closed && op->produce_open && op->consume_open) {
    op->waits_since_ns = NowNs();
    op->next_report_ns = op->waits_since_ns + config_.stall_report_ms * kMillisecond;
  }
  // What stays closed is appended again behind the ones looked at.
  const size_t blocked = op->blocked.size();
  for (size_t i = 0; i < blocked; ++i) MakeReady(op, op->blocked[i]);
  op->blocked.erase(op->blocked.begin(),
                    op->blocked.begin() + static_cast<std::ptrdiff_t>(blocked));
}

void Executor::MakeReady(Operation* op, int32_t u) {
  if (op->failing) return;
  const Plan::Unit& unit = op->plan->units[u];
  const StepKind kind = op->plan->schedule.steps[unit.first].kind;
  switch (kind) {
    case StepKind::kReceive:
      break;  // Open from the start.
    case StepKind::kPublish:
      // In the schedule's order: results that others wait for go before later chunks.
      op->publishes_open.insert(
          std::upper_bound(op->publishes_open.begin(), op->publishes_open.end(), u), u);
      WakeSender(op);
      break;
    default:
      if ((kind == StepKind::kProduce && !op->produce_open) ||
          (unit.consume && !op->consume_open)) {
        op->blocked.push_back(u);
        break;
      }
      (unit.pending == 0 ? op->starts : op->ready).Push(u);
      ++ready_units_;
      if (op->computing) break;
      op->computing = true;
      computing_.Push(op);
  }
}

void Executor::CompleteUnit(Operation* op, int32_t u) {
  const Plan& plan = *op->plan;
  const Plan::Unit& unit = plan.units[u];
  --op->units_left;
  for (int32_t s = unit.first; s < unit.first + unit.count; ++s) {
    for (const collective::Source& source : plan.schedule.steps[s].sources) {
      if (source.receive < 0) continue;
      Operation::Receive& r = op->receives[plan.units[plan.unit_of_step[source.receive]].ordinal];
      if (--r.users == 0) ReleaseReceive(op, r);
    }
  }
  for (int32_t d = unit.dependents_begin; d < unit.dependents_end; ++d) {
    const int32_t next = plan.dependents[d];
    if (--op->pending[next] == 0) MakeReady(op, next);
  }
  const StepKind kind = plan.schedule.steps[unit.first].kind;
  if (kind == StepKind::kProduce && --op->produces_left == 0 && op->hooks != nullptr) {
    op->hooks->OnProduced();
  }
  if (unit.answers && --op->answers_left == 0 && op->hooks != nullptr) {
    Answered(op);
    if (plan.consumes > 0) op->hooks->OnConsumed();
  }
}

void Executor::Answered(Operation* op) {
  if (!op->unanswered) return;
  op->unanswered = false;
  if (--unanswered_ == 0) stats_->busy_ns += NowNs();
}

bool Executor::Run() {
  bool moved = false;
  if (outbox_count_ > 0) {
    for (int peer = 0; peer < size_; ++peer) {
      if (outbox_[peer].empty()) continue;
      const size_t before = outbox_[peer].size();
      FlushOutbox(peer);
      moved |= outbox_[peer].size() != before;
    }
  }
  copied_ = false;
  moved |= RunSenders();
  Operation* op = NextToCompute();
  if (op == nullptr) return moved;
  const int32_t u = (op->ready.size() > 0 ? op->ready : op->starts).Pop();
  --ready_units_;
  const Status status = Guarded(*op, [&] { return Compute(op, op->plan->units[u]); });
  if (!status.ok()) {
    Fail(op, status);
  } else if (op->broken.empty() && !op->failing) {
    if (op->ahead > 0) {
      --op->ahead;
      --ahead_;
    }
    CompleteUnit(op, u);
  }
  FinishIfQuiet(op);
  RunSenders();  // What it made ready leaves in this turn.
  return true;
}

Operation* Executor::NextToCompute() {
  Operation* op = nullptr;
  while ((op = computing_.Top()) != nullptr && op->ready.size() + op->starts.size() == 0) {
    op->computing = false;
    computing_.Pop();
  }
  return op;
}

std::string Operation::ToString() const {
  if (hooks != nullptr) return hooks->Label() + ", step " + std::to_string(step);
  return std::string(NameOf(op)) + " '" + (name == nullptr ? "?" : name->name) + "'";
}

std::string Operation::Describe() const {
  if (hooks != nullptr) return hooks->Describe();
  return std::string(NameOf(op)) + " " + input.ToString();
}

}  // namespace bluefog
