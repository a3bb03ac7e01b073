// What goes out: posts, payloads in place or staged, control messages, refusals; and its releases.
#include <algorithm>
#include <cstring>
#include <utility>

#include "base/clock.h"
#include "base/failpoint.h"
#include "engine/executor.h"
#include "engine/executor_detail.h"

namespace bluefog {

using collective::Step;
using transport::SendResult;

namespace {

// Messages of one operation that a peer may owe releases for: no operation takes all that the link
// has, and another one, which the peer wants first, can pass.
constexpr size_t kWindow = 64;
// Messages that a peer may owe releases for, over all operations. Up to the first number they go
// unasked. From there on the peer must have submitted the operation, and each operation gets one
// chunk at a time, so that one that both sides wait for always finds room behind many that only
// this side has submitted. What the link has beyond the second number is for posts and refusals.
constexpr int64_t kUnaskedWindow = transport::kMaxInFlight / 2;
constexpr int64_t kAskedWindow = transport::kMaxInFlight / 8 * 7;
// Chunks that are staged before the first of them is combined, over all operations.
constexpr int64_t kStageAhead = 2;

}  // namespace

void Executor::Post(Operation* op, int peer, uint8_t role) {
  ++stats_->posts_sent;
  WireHeader header = HeaderOf(*op, MessageKind::kPost);
  header.code = role;
  SendControl(peer, header, {});
}

WireHeader Executor::HeaderOf(const Operation& op, MessageKind kind) const {
  WireHeader h;
  h.kind = kind;
  h.op = op.op;
  h.dtype = op.dtype;
  h.key = op.key;
  h.count = op.input.count;
  h.layout_hash = op.layout_hash;
  h.plan_hash = op.plan_hash;
  h.value = op.value;
  h.step = op.step;
  return h;
}

void Executor::SendControl(int peer, const WireHeader& header, std::span<const std::byte> payload,
                           uint64_t cookie) {
  if (!peer_status_[peer].ok()) return;
  payload =
      payload.first(std::min(payload.size(), static_cast<size_t>(peers_[peer]->inline_limit())));
  if (FlushOutbox(peer) &&
      peers_[peer]->Send(peer, Pack(header), payload, cookie) != SendResult::kBusy) {
    return;
  }
  outbox_[peer].push_back({header, {payload.begin(), payload.end()}, cookie});
  ++outbox_count_;
}

bool Executor::FlushOutbox(int peer) {
  std::deque<Outgoing>& box = outbox_[peer];
  while (!box.empty()) {
    if (peers_[peer]->Send(peer, Pack(box.front().header), box.front().payload,
                           box.front().cookie) == SendResult::kBusy) {
      return false;
    }
    box.pop_front();
    --outbox_count_;
  }
  return true;
}

void Executor::Abort(const WireHeader& about, int peer, const Status& status, uint64_t cookie) {
  WireHeader h = about;
  h.kind = MessageKind::kAbort;
  h.code = static_cast<uint8_t>(status.code());
  ++stats_->nacks_sent;
  SendControl(peer, h, std::as_bytes(std::span(status.message().data(), status.message().size())),
              cookie);
}

// `view`, if a release is still owed, is kept until the peer has read why: a release before would
// let it end its operation well.
void Executor::Refuse(const WireHeader& header, int peer, const Status& status,
                      const transport::View* view) {
  if (view == nullptr || header.kind != MessageKind::kData || !peer_status_[peer].ok()) {
    Abort(header, peer, status);
    if (view != nullptr) peers_[peer]->Release(*view);
    return;
  }
  refused_[++last_refusal_] = *view;
  Abort(header, peer, status, last_refusal_);
}

bool Executor::MayCopy() const {
  // One a turn: a copy takes as long as a combine, and it is time to look what has come meanwhile.
  // Far ahead only when there is nothing better to do: the input is read again to be combined, and
  // should still be in cache then.
  return !copied_ && (ahead_ < kStageAhead || ready_units_ == 0);
}

StatusOr<Executor::Outcome> Executor::Prepare(Operation* op, const Plan::Unit& unit) {
  const Step& step = op->plan->schedule.steps[unit.first];
  Operation::Publish& p = op->publishes[unit.ordinal];
  p.payload = Bytes(*op, step);
  const auto bytes = static_cast<int64_t>(p.payload.size());
  bool in_place = true;
  for (const collective::Target& target : step.targets) {
    const transport::Transport* t = peers_[target.peer];
    in_place = in_place && (bytes <= t->inline_limit() || t->CanSendInPlace(p.payload));
  }
  if (op->needs_posts) {
    // A slot is taken, and a byte sent, only for partners that have submitted the operation too.
    for (const collective::Target& target : step.targets) {
      if (op->posted[op->plan->DestinationOf(target.peer)] != Operation::kPosted) {
        return Outcome::kBlocked;
      }
    }
  }
  if (in_place) return Outcome::kDone;
  // As many as the schedule may have outstanding towards different peers at once.
  const auto guarantee = static_cast<int64_t>(std::max<size_t>(2, op->plan->destinations.size()));
  if (!MayCopy()) return Outcome::kAwaitsCopy;
  StatusOr<std::shared_ptr<std::byte>> slot = slots_.Acquire(op->send_slots, guarantee);
  if (!slot.ok()) return About(*op, rank_, slot.status());
  if (*slot == nullptr) return Outcome::kAwaitsSlot;
  ++op->send_slots;
  ++op->ahead;
  ++ahead_;
  copied_ = true;
  p.slot = std::move(*slot);
  const int64_t begin_ns = trace_->on() ? NowNs() : 0;
  std::memcpy(p.slot.get(), p.payload.data(), p.payload.size());
  p.payload = {p.slot.get(), p.payload.size()};
  if (trace_->on()) {
    trace_->Span(TraceTrack::kEngine, "STAGE", op->name->name, begin_ns, NowNs());
  }
  return Outcome::kDone;
}

// Is there room at `peer` for one more message of `op`? If not, an event of its own will wake it,
// or it is in line, or the peer is about to have much room (OnSendDone).
bool Executor::MaySend(Operation* op, int peer) {
  if (owed_[peer] < kUnaskedWindow) return true;
  const int d = op->plan->DestinationOf(peer);
  if (op->posted[d] == Operation::kNotPosted) {
    op->posted[d] = Operation::kAsked;
    Post(op, peer, kSendsToYou);
  }
  const auto mine = std::count_if(op->inflight.begin(), op->inflight.end(),
                                  [peer](const Operation::Inflight& f) { return f.peer == peer; });
  // All payloads of a chunk: the peer may release none before it has all.
  if (op->posted[d] != Operation::kPosted || mine >= op->plan->schedule.buffers) return false;
  if (owed_[peer] >= kAskedWindow) GetInLine(op, peer);
  return owed_[peer] < kAskedWindow;
}

void Executor::GetInLine(Operation* op, int peer) {
  std::vector<bool>::reference in_line = op->in_line[op->plan->DestinationOf(peer)];
  if (in_line) return;
  in_line = true;
  lines_[peer].Push(op);
  lines_used_ = true;
}

// kDone: nothing is left to send for this unit, or the operation failed.
Executor::Outcome Executor::Publish(Operation* op, int32_t u, bool* moved) {
  const Plan::Unit& unit = op->plan->units[u];
  const Step& step = op->plan->schedule.steps[unit.first];
  Operation::Publish& p = op->publishes[unit.ordinal];
  if (!p.prepared) {
    if (FailpointHit("engine.before_publish")) {
      Fail(op, absl::InternalError(op->ToString() + ": failpoint engine.before_publish"));
      return Outcome::kDone;
    }
    const StatusOr<Outcome> prepared = Guarded(*op, [&] { return Prepare(op, unit); });
    if (!prepared.ok()) {
      Fail(op, prepared.status());
      return Outcome::kDone;
    }
    if (*prepared != Outcome::kDone) return *prepared;
    p.prepared = true;
    p.unsent.clear();
    for (size_t t = 0; t < step.targets.size(); ++t) p.unsent.push_back(static_cast<int32_t>(t));
    p.unreleased = static_cast<int32_t>(step.targets.size());
    *moved = true;
  }
  WireHeader header = HeaderOf(*op, MessageKind::kData);
  header.elements = step.range.count;
  for (size_t i = 0; i < p.unsent.size();) {
    const int32_t t = p.unsent[i];
    const collective::Target& target = step.targets[t];
    header.message = static_cast<uint32_t>(target.message);
    header.weight = target.weight;
    if (const std::vector<float>& weights = op->plan->edge_weights; !weights.empty()) {
      header.edge_weight = weights[op->plan->DestinationOf(target.peer)];
    }
    const int64_t begin_ns = trace_->on() ? NowNs() : 0;
    const bool may = MaySend(op, target.peer);
    const bool sent = may && FlushOutbox(target.peer) &&
                      peers_[target.peer]->Send(target.peer, Pack(header), p.payload,
                                                Cookie{op->index, unit.ordinal, t}.Pack()) ==
                          SendResult::kAccepted;
    if (!sent) {
      // A peer that is down is no other case: FailPeer follows, with the reason.
      if (may) GetInLine(op, target.peer);
      ++i;
      continue;
    }
    op->inflight.push_back({target.peer, unit.ordinal, t});
    ++owed_[target.peer];
    ++stats_->messages_sent;
    stats_->bytes_sent += static_cast<int64_t>(p.payload.size());
    if (begin_ns != 0) {
      trace_->Span(TraceTrack::kNetwork, "PUBLISH", op->name->name, begin_ns, NowNs(),
                   {"peer", target.peer});
      // From the beginning: the peer may have it before Send returns.
      trace_->FlowBegin(TraceTrack::kNetwork, TraceId(op->key, rank_, target.peer, header.message),
                        begin_ns);
    }
    p.unsent.erase(p.unsent.begin() + static_cast<std::ptrdiff_t>(i));
    *moved = true;
    if (FailpointHit("engine.after_publish")) {
      Fail(op, absl::InternalError(op->ToString() + ": failpoint engine.after_publish"));
      return Outcome::kDone;
    }
  }
  return p.unsent.empty() ? Outcome::kDone : Outcome::kBlocked;
}

// After an event of its own.
void Executor::WakeSender(Operation* op) {
  if (op->publishes_open.empty() || op->listed) return;
  op->listed = true;
  woken_.Push(op);
}

bool Executor::RunSenders() {
  bool moved = false;
  const auto run = [&](Operation* op) {
    op->listed = false;
    if (!RunPublishes(op)) return;
    moved = true;
    FinishIfQuiet(op);
  };
  const bool look = std::exchange(lines_used_, false);
  for (int peer = 0; look && peer < size_; ++peer) {
    // When there is no room for the first, there is none for the others.
    while (Operation* const op = lines_[peer].Pop()) {
      const int d = op->plan->DestinationOf(peer);
      const uint64_t order = op->order;
      op->in_line[d] = false;
      if (!op->listed) run(op);
      if (op->active && op->order == order && op->in_line[d]) break;
    }
    lines_used_ |= !lines_[peer].empty();
  }
  if (slots_.releases() != releases_seen_) {
    releases_seen_ = slots_.releases();
    while (Operation* const op = no_slot_.Pop()) {
      op->listed = false;
      WakeSender(op);
    }
  }
  while (MayCopy()) {
    Operation* const op = copying_.Pop();
    if (op == nullptr) break;
    run(op);
  }
  while (Operation* const op = woken_.Pop()) run(op);
  return moved;
}

// Sends what can go, and sees to it that the rest gets its turn.
bool Executor::RunPublishes(Operation* op) {
  bool moved = false;
  const size_t window = kWindow * op->plan->destinations.size();
  while (!op->publishes_open.empty() && !op->failing && op->inflight.size() < window) {
    const Outcome outcome = Publish(op, op->publishes_open.front(), &moved);
    if (op->failing) return true;
    if (outcome == Outcome::kAwaitsSlot) no_slot_.Push(op);
    if (outcome == Outcome::kAwaitsCopy) copying_.Push(op);
    op->listed = outcome == Outcome::kAwaitsSlot || outcome == Outcome::kAwaitsCopy;
    if (outcome != Outcome::kDone) break;
    op->publishes_open.erase(op->publishes_open.begin());
  }
  return moved;
}

void Executor::OnSendDone(uint64_t cookie, const Status& status) {
  if (Cookie::IsControl(cookie)) {
    const auto it = refused_.find(cookie);
    if (it == refused_.end()) return;
    peers_[it->second.peer]->Release(it->second);
    refused_.erase(it);
    return;
  }
  const auto [index, ordinal, target] = Cookie::Unpack(cookie);
  Operation* op = slab_[index].get();
  for (size_t i = 0; i < op->inflight.size(); ++i) {
    if (op->inflight[i].publish != ordinal || op->inflight[i].target != target) continue;
    const int peer = op->inflight[i].peer;
    // Those that could not send unasked. Not at once, or each message beyond would wake them all.
    if (--owed_[peer] == kUnaskedWindow / 2) {
      for (Operation* waiting : active_) WakeSender(waiting);
    }
    op->inflight[i] = op->inflight.back();
    op->inflight.pop_back();
    if (!status.ok() && !op->failing && !op->completed) Break(op, peer);
    WakeSender(op);
    break;
  }
  Operation::Publish& p = op->publishes[ordinal];
  if (--p.unreleased == 0 && p.unsent.empty() && p.slot != nullptr) {
    slots_.Release(std::move(p.slot));
    p.slot = nullptr;
    --op->send_slots;
  }
  if (!op->failing && op->broken.empty() && p.unreleased == 0 && p.unsent.empty()) {
    CompleteUnit(op, op->plan->publish_units[ordinal]);
  }
  FinishIfQuiet(op);
}

bool Executor::SendUser(int peer, uint8_t handler, int64_t value,
                        std::span<const std::byte> payload) {
  WireHeader h;
  h.kind = MessageKind::kUser;
  h.code = handler;
  h.count = value;
  return peer_status_[peer].ok() && FlushOutbox(peer) &&
         peers_[peer]->Send(peer, Pack(h), payload, 0) == SendResult::kAccepted;
}

}  // namespace bluefog
