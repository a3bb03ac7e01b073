// What comes in: messages find their operation, payloads their receive.
#include <algorithm>

#include "base/clock.h"
#include "base/failpoint.h"
#include "base/log.h"
#include "engine/executor.h"
#include "engine/executor_detail.h"

namespace bluefog {

using collective::Step;
using collective::StepKind;

void Executor::OnMessage(int peer, const transport::Header& packed, const transport::View& view) {
  const WireHeader header = Unpack(packed);
  transport::Transport* transport = peers_[peer];
  const auto payload = std::span(view.data, static_cast<size_t>(view.readable() ? view.size : 0));
  switch (header.kind) {
    case MessageKind::kUser:
      if (user_handlers_[header.code]) {
        const Status status = bluefog::Guarded(
            [&] { return "handler " + std::to_string(header.code) + " of active messages"; },
            [&] {
              user_handlers_[header.code](peer, header, payload);
              return absl::OkStatus();
            });
        if (!status.ok()) BLUEFOG_LOG(kError) << status.message();
      }
      transport->Release(view);
      return;
    case MessageKind::kDescribe: {
      const std::string text(reinterpret_cast<const char*>(payload.data()), payload.size());
      const size_t cut = std::min(text.find('\0'), text.size());
      match_.SetDescription(peer, header, text.substr(0, cut),
                            cut < text.size() ? text.substr(cut + 1) : "");
      transport->Release(view);
      return;
    }
    case MessageKind::kData:
    case MessageKind::kPost:
    case MessageKind::kAbort:
      break;
    default:
      BLUEFOG_LOG(kWarning) << "rank " << peer << " sent a message of unknown kind "
                            << static_cast<int>(header.kind) << "; dropped";
      transport->Release(view);
      return;
  }
  if (Operation* op = match_.Find(header.key); op != nullptr) {
    Deliver(op, peer, header, view, {}, false);
    FinishIfQuiet(op);
    return;
  }
  if (match_.IsPast(header.key)) {
    // The operation is over here. An abort comes too late; so does a post that crossed with the
    // data; anything else came from a partner that this rank never listed.
    const bool crossed = header.kind == MessageKind::kPost && header.code == kReceivesFromYou &&
                         !match_.FinishedWithout(header.key, peer);
    if (header.kind == MessageKind::kAbort || crossed) return transport->Release(view);
    return Refuse(
        header, peer,
        absl::InvalidArgumentError(match_.ToString(header) + ": rank " + std::to_string(rank_) +
                                   " finished this operation without rank " + std::to_string(peer) +
                                   ". Both ends of an edge must name each other"),
        &view);
  }
  if (Status condemned = match_.Condemned(header.key.name_hash); !condemned.ok()) {
    if (header.kind == MessageKind::kAbort) return transport->Release(view);
    return Refuse(header, peer, condemned, &view);
  }
  Match::Early early{peer, header, view, {}, false};
  // Small messages lie in the peer's ring, which is freed in order: what stayed there would keep
  // out the one that this rank waits for.
  if (header.kind == MessageKind::kPost || header.kind == MessageKind::kAbort ||
      (view.data != nullptr && view.size <= transport->inline_limit())) {
    if (header.kind == MessageKind::kData && !spare_.empty()) {
      early.copy = std::move(spare_.back());
      spare_.pop_back();
    }
    early.copy.assign(payload.begin(), payload.end());
    early.copied = true;
    if (header.kind == MessageKind::kData) {
      transport->Detach(view);
    } else {
      transport->Release(view);
    }
  }
  match_.Store(std::move(early));
}

void Executor::Deliver(Operation* op, int peer, const WireHeader& header,
                       const transport::View& view, std::vector<std::byte> copy, bool copied) {
  transport::Transport* transport = peers_[peer];
  const bool owed = header.kind == MessageKind::kData || !copied;  // Is a release still to be made?
  const auto drop = [&] {
    if (owed) transport->Release(view);
  };
  const auto refuse = [&](const Status& status) {
    Fail(op, status, peer);
    Refuse(header, peer, status, owed ? &view : nullptr);
  };
  if (header.kind == MessageKind::kAbort) {
    const std::string text =
        copied
            ? std::string(reinterpret_cast<const char*>(copy.data()), copy.size())
            : std::string(reinterpret_cast<const char*>(view.data), static_cast<size_t>(view.size));
    drop();
    if (op->completed) return;  // Too late; what is still out will be released all the same.
    // "Ok" is no reason to give up.
    const auto code =
        header.code == 0 ? absl::StatusCode::kInternal : static_cast<absl::StatusCode>(header.code);
    Fail(op, Status(code, text), peer);
    return;
  }
  if (op->failing) return refuse(op->failure);
  if (Status same = match_.Compare(*op, peer, header); !same.ok()) return refuse(same);
  const Plan& plan = *op->plan;
  if (header.kind == MessageKind::kPost && header.code == kReceivesFromYou) {
    const int destination = plan.DestinationOf(peer);
    if (destination < 0) {
      return refuse(absl::InvalidArgumentError(
          op->ToString() + ": rank " + std::to_string(peer) + " expects data from rank " +
          std::to_string(rank_) +
          ", which does not send to it. Both ends of an edge must name each other"));
    }
    drop();
    op->posted[destination] = Operation::kPosted;
    WakeSender(op);
    return;
  }
  const int in = plan.InboundOf(peer);
  if (in < 0) {
    return refuse(absl::InvalidArgumentError(
        op->ToString() + ": rank " + std::to_string(peer) + " sends to rank " +
        std::to_string(rank_) +
        ", which does not expect it. Both ends of an edge must name each other"));
  }
  if (header.kind == MessageKind::kPost) {
    // It asks, with much on the way to here: else it would have sent.
    if (!op->needs_posts && !op->completed) Post(op, peer, kReceivesFromYou);
    return drop();
  }
  if (Status same = match_.CompareEdge(*op, peer, plan.inbound[in].weight, header); !same.ok()) {
    return refuse(same);
  }
  const std::vector<int32_t>& receives = plan.inbound[in].receives;
  const int32_t u = header.message < receives.size() ? receives[header.message] : -1;
  const Step* step = u < 0 ? nullptr : &plan.schedule.steps[plan.units[u].first];
  const int64_t bytes = copied ? static_cast<int64_t>(copy.size()) : view.size;
  const Codec* codec =
      step == nullptr || step->range.role != collective::Role::kCoded ? nullptr : op->codec;
  const bool any_size = codec != nullptr && codec->ElementBytes() == 0;
  const StatusOr<int64_t> most = Guarded(*op, [&]() -> StatusOr<int64_t> {
    if (step == nullptr) return -1;
    return codec == nullptr ? step->range.count * op->element_bytes
                            : codec->MaxBytes(op->dtype, step->range.count);
  });
  if (!most.ok()) return refuse(most.status());
  if (step == nullptr || op->receives[plan.units[u].ordinal].arrived ||
      header.elements != step->range.count || (any_size ? bytes > *most : bytes != *most)) {
    return refuse(absl::InternalError(op->ToString() + ": rank " + std::to_string(peer) +
                                      " sent message " + std::to_string(header.message) + " of " +
                                      std::to_string(bytes) + " bytes, which was not planned"));
  }
  Operation::Receive& r = op->receives[plan.units[u].ordinal];
  r.arrived = true;
  r.view = view;
  r.held = true;
  r.bytes = bytes;
  r.weight = header.weight;
  const int64_t arrived_ns = trace_->on() ? NowNs() : 0;
  const bool fetch = !copied && !view.readable();
  if (copied) {
    r.copy.swap(copy);
    r.data = r.copy.data();
    spare_.push_back(std::move(copy));
  } else if (fetch) {
    op->fetch_waiting.push_back(u);
  } else if (bytes <= transport->inline_limit() &&
             (plan.DestinationOf(peer) < 0 || !ReadAtOnce(*op, u))) {
    // Released at once. The ring is free for other operations, also while this one waits for other
    // peers. And it ends the sender's wait, if nothing is sent back (see Settled): with more ranks
    // than cores a turn of all of them lies between here and the combine.
    r.copy.assign(view.data, view.data + bytes);
    r.data = r.copy.data();
    r.held = false;
    transport->Release(view);
  } else {
    r.data = view.data;
  }
  if (trace_->on()) {
    trace_->Span(TraceTrack::kNetwork, "RECEIVE", op->name->name, arrived_ns, NowNs(),
                 {"peer", peer});
    trace_->FlowEnd(TraceTrack::kNetwork, TraceId(op->key, peer, rank_, header.message),
                    arrived_ns);
  }
  fetch ? TryFetch(op) : Arrived(op, u);
}

// Nothing else is awaited by the computations that read what arrives in `receive`.
bool Executor::ReadAtOnce(const Operation& op, int32_t receive) const {
  const Plan& plan = *op.plan;
  const Plan::Unit& unit = plan.units[receive];
  if (op.hooks != nullptr) return false;  // Gates may be closed.
  for (int32_t d = unit.dependents_begin; d < unit.dependents_end; ++d) {
    const int32_t next = plan.dependents[d];
    const StepKind kind = plan.schedule.steps[plan.units[next].first].kind;
    if (op.pending[next] > 1 || kind == StepKind::kPublish) return false;
  }
  return true;
}

void Executor::Arrived(Operation* op, int32_t u) {
  if (FailpointHit("engine.after_receive")) {
    return Fail(op, absl::InternalError(op->ToString() + ": failpoint engine.after_receive"));
  }
  Operation::Receive& r = op->receives[op->plan->units[u].ordinal];
  if (r.users == 0) ReleaseReceive(op, r);
  CompleteUnit(op, u);
}

// Nothing that was fetched is needed before it: were it to wait for a slot, it could wait for ever.
bool Executor::NextToFetch(const Operation& op, int32_t unit) const {
  const Plan& plan = *op.plan;
  for (const Plan::Inbound& in : plan.inbound) {
    for (const int32_t u : in.receives) {
      if (u >= 0 && op.receives[plan.units[u].ordinal].fetched != nullptr &&
          plan.FirstUser(u) < plan.FirstUser(unit)) {
        return false;
      }
    }
  }
  return true;
}

void Executor::TryFetch(Operation* op) {
  const Plan& plan = *op->plan;
  const auto guarantee = static_cast<int64_t>(std::max<size_t>(2, op->plan->inbound.size()));
  while (!op->fetch_waiting.empty() && !op->failing) {
    StatusOr<std::shared_ptr<std::byte>> slot = slots_.Acquire(op->fetch_slots, guarantee);
    if (!slot.ok()) return Fail(op, About(*op, rank_, slot.status()));
    // What is used first is fetched first, whatever the order of arrival.
    const auto next = std::min_element(
        op->fetch_waiting.begin(), op->fetch_waiting.end(),
        [&](int32_t a, int32_t b) { return plan.FirstUser(a) < plan.FirstUser(b); });
    const int32_t u = *next;
    if (*slot == nullptr && NextToFetch(*op, u)) slot = slots_.Acquire(0, 1);
    if (!slot.ok()) return Fail(op, About(*op, rank_, slot.status()));
    if (*slot == nullptr) return;
    op->fetch_waiting.erase(next);
    Operation::Receive& r = op->receives[op->plan->units[u].ordinal];
    r.fetched = std::move(*slot);
    r.data = r.fetched.get();
    ++op->fetch_slots;
    ++op->fetching;
    peers_[r.view.peer]->Fetch(r.view, r.fetched.get(), Cookie{op->index, u, 0}.Pack());
  }
}

void Executor::OnFetchDone(uint64_t cookie, const Status& status) {
  const auto [index, u, target] = Cookie::Unpack(cookie);
  Operation* op = slab_[index].get();
  --op->fetching;
  if (op->failing) {
    ReleaseReceive(op, op->receives[op->plan->units[u].ordinal]);
  } else if (absl::IsCancelled(status) || absl::IsUnavailable(status)) {
    Break(op, op->receives[op->plan->units[u].ordinal].view.peer);
  } else if (!status.ok()) {
    Fail(op, status);
  } else {
    Arrived(op, u);
  }
  FinishIfQuiet(op);
}

void Executor::ReleaseReceive(Operation* op, Operation::Receive& r) {
  if (r.held) {
    r.held = false;
    peers_[r.view.peer]->Release(r.view);
  }
  if (r.fetched != nullptr) {
    slots_.Release(std::move(r.fetched));
    r.fetched = nullptr;
    --op->fetch_slots;
    if (!op->fetch_waiting.empty()) TryFetch(op);
  }
  r.copy.clear();
  r.data = nullptr;
}

}  // namespace bluefog
