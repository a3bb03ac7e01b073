// What goes out: posts, payloads in place or staged, control messages, refusals; and its releases.
#include <algorithm>
#include <cstring>

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
// unasked. From there on the peer must have submitted the operation, and each operation gets one at
// a time, so that one that both sides wait for always finds room behind many that only this side
// has submitted. What the link has beyond the second number is for posts and refusals.
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

StatusOr<bool> Executor::Prepare(Operation* op, const Plan::Unit& unit) {
  const Step& step = op->plan->schedule.steps[unit.first];
  Operation::Publish& p = op->publishes[unit.ordinal];
  const std::byte* source = At(*op, step.range);
  const int64_t bytes = step.range.count * op->element_bytes;
  p.payload = {source, static_cast<size_t>(bytes)};
  const Codec* codec = op->hooks == nullptr ? nullptr : op->hooks->codec();
  if (codec == nullptr) {
    bool in_place = true;
    for (const collective::Target& target : step.targets) {
      const transport::Transport* t = peers_[target.peer];
      in_place = in_place && (bytes <= t->inline_limit() || t->CanSendInPlace(p.payload));
    }
    if (op->needs_posts) {
      // A slot is taken, and a byte sent, only for partners that have submitted the operation too.
      for (const collective::Target& target : step.targets) {
        if (op->posted[op->plan->DestinationOf(target.peer)] != Operation::kPosted) return false;
      }
    }
    if (in_place) return true;
  }
  // As many as the schedule may have outstanding towards different peers at once.
  const auto guarantee = static_cast<int64_t>(std::max<size_t>(2, op->plan->destinations.size()));
  // Far ahead only when there is nothing better to do: the input is read again to be combined, and
  // should still be in cache then.
  // One at a time: a copy takes as long as a combine, and it is time to look what has come
  // meanwhile.
  if (copied_ || (ahead_ >= kStageAhead && ready_units_ > 0)) {
    may_copy_ = true;
    return false;
  }
  StatusOr<std::shared_ptr<std::byte>> slot = slots_.Acquire(op->send_slots, guarantee);
  if (!slot.ok()) return About(*op, rank_, slot.status());
  if (*slot == nullptr) return false;
  ++op->send_slots;
  ++op->ahead;
  ++ahead_;
  copied_ = true;
  p.slot = std::move(*slot);
  const int64_t begin_ns = trace_->on() ? NowNs() : 0;
  if (codec != nullptr) {
    const std::span<const std::byte> coded = Encoded(op, step.range);
    std::copy(coded.begin(), coded.end(), p.slot.get());
    p.payload = {p.slot.get(), coded.size()};
  } else {
    std::memcpy(p.slot.get(), source, static_cast<size_t>(bytes));
    p.payload = {p.slot.get(), static_cast<size_t>(bytes)};
  }
  if (trace_->on()) {
    trace_->Span(TraceTrack::kEngine, codec != nullptr ? "ENCODE" : "STAGE", op->name->name,
                 begin_ns, NowNs());
  }
  return true;
}

// Beyond the unasked window: is there room at destination `d` for one more message of `op`?
bool Executor::MaySend(Operation* op, int d) {
  const int peer = op->plan->destinations[d];
  if (op->posted[d] == Operation::kNotPosted) {
    op->posted[d] = Operation::kAsked;
    Post(op, peer, kSendsToYou);
  }
  return op->posted[d] == Operation::kPosted && owed_[peer] < kAskedWindow &&
         op->inflight.size() < op->plan->destinations.size();
}

// True when nothing is left to send for this unit.
bool Executor::Publish(Operation* op, int32_t u, bool* moved) {
  const Plan::Unit& unit = op->plan->units[u];
  const Step& step = op->plan->schedule.steps[unit.first];
  Operation::Publish& p = op->publishes[unit.ordinal];
  if (!p.prepared) {
    if (FailpointHit("engine.before_publish")) {
      Fail(op, absl::InternalError(op->ToString() + ": failpoint engine.before_publish"));
      return true;
    }
    StatusOr<bool> ready = Guarded(*op, [&] { return Prepare(op, unit); });
    if (!ready.ok()) {
      Fail(op, ready.status());
      return true;
    }
    if (!*ready) return false;
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
    const SendResult sent =
        (owed_[target.peer] < kUnaskedWindow ||
         MaySend(op, op->plan->DestinationOf(target.peer))) &&
                FlushOutbox(target.peer)
            ? peers_[target.peer]->Send(target.peer, Pack(header), p.payload,
                                        Cookie{op->index, unit.ordinal, t}.Pack())
            : SendResult::kBusy;
    if (sent != SendResult::kAccepted) {
      ++i;  // A peer that is down: FailPeer follows, with the reason.
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
      return true;
    }
  }
  return p.unsent.empty();
}

bool Executor::RunPublishes(Operation* op) {
  bool moved = false;
  const size_t window = kWindow * op->plan->destinations.size();
  while (!op->publishes_open.empty() && !op->failing && op->inflight.size() < window) {
    if (!Publish(op, op->publishes_open.front(), &moved)) break;
    if (op->failing) return true;
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
    --owed_[peer];
    op->inflight[i] = op->inflight.back();
    op->inflight.pop_back();
    if (!status.ok() && !op->failing && !op->completed) Break(op, peer);
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
