#include "engine/executor.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <sstream>

#include "base/clock.h"
#include "base/failpoint.h"
#include "base/hash.h"
#include "base/log.h"

namespace bluefog {

using collective::Step;
using collective::StepKind;
using transport::SendResult;

namespace {

// A cookie names an operation, one of its publishes (or a receive to fetch) and the target. Without
// an operation it is the number of a refusal, or 0 for control messages that nobody waits for.
struct Cookie {
  uint32_t index;   ///< Of the operation, 22 bits.
  int32_t ordinal;  ///< 26 bits.
  int32_t target;   ///< 14 bits.
  uint64_t Pack() const {
    return (uint64_t{index} + 1) << 40 | static_cast<uint64_t>(ordinal) << 14 |
           static_cast<uint64_t>(target);
  }
  static bool IsControl(uint64_t bits) { return bits >> 40 == 0; }
  static Cookie Unpack(uint64_t bits) {
    return {static_cast<uint32_t>(bits >> 40) - 1,
            static_cast<int32_t>(bits >> 14 & ((1 << 26) - 1)),
            static_cast<int32_t>(bits & ((1 << 14) - 1))};
  }
};

// Of an arrow, the same on both ranks; with from = to of the operation itself.
uint64_t TraceId(const Key& key, int from, int to, uint32_t message) {
  return StableHash().Add(key.name_hash).Add(key.use).Add(from).Add(to).Add(message).value();
}

// Chunks that are staged before the first of them is combined, over all operations.
constexpr int64_t kStageAhead = 2;

// Roles of a kPost, in its code.
constexpr uint8_t kReceivesFromYou = 0, kSendsToYou = 1;

constexpr int64_t kMillisecond = 1'000'000;

template <typename T>
std::span<T> FirstOf(std::vector<T>* memory, int count) {
  const auto n = static_cast<size_t>(count);
  if (memory->size() < n) memory->resize(n);
  return {memory->data(), n};
}

// Plugins, codecs and the heap may throw: no exception crosses the engine.
template <typename Fn>
auto Guarded(const Operation& op, Fn fn) -> decltype(fn()) {
  try {
    return fn();
  } catch (const std::exception& e) {
    return absl::InternalError(op.ToString() + ": exception: " + e.what());
  } catch (...) {
    return absl::InternalError(op.ToString() + ": exception of unknown type");
  }
}

Status About(const Operation& op, const Status& status) {
  return Status(status.code(), op.ToString() + ": " + std::string(status.message()));
}

}  // namespace

Executor::Executor(const Config& config, int rank, int size,
                   std::shared_ptr<transport::Arena> arena, Trace* trace, EngineStats* stats)
    : config_(config),
      rank_(rank),
      size_(size),
      trace_(trace),
      stats_(stats),
      match_(rank, size),
      slots_(std::move(arena), SlotBytes(config), config.slot_bytes),
      peers_(static_cast<size_t>(size), nullptr),
      peer_status_(static_cast<size_t>(size)),
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
  op->failing = op->completed = false;
  op->failure = absl::OkStatus();
  op->pending.resize(plan.units.size());
  op->starts.Clear();
  op->ready.Clear();
  op->blocked.clear();
  op->publishes_open.clear();
  op->publishes = FirstOf(&op->publish_memory, plan.publishes);
  for (Operation::Publish& p : op->publishes) p.prepared = p.is_encoded = false;
  op->receives = FirstOf(&op->receive_memory, plan.receives);
  op->posted.assign(plan.destinations.size(), 0);
  op->inflight.clear();
  op->broken.clear();
  op->units_left = static_cast<int32_t>(plan.units.size());
  op->produces_left = plan.produces;
  op->consumes_left = plan.consumes;
  op->send_slots = op->fetch_slots = op->fetching = op->ahead = 0;
  op->fetch_waiting.clear();
  op->started_ns = NowNs();
  op->next_report_ns = op->started_ns + config_.stall_report_ms * kMillisecond;
  op->probed = false;
  op->needs_posts =
      !op->dedicated && plan.largest_message * op->element_bytes > config_.eager_bytes;
  active_.push_back(op);
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
    op->name->described.resize(static_cast<size_t>(size_), 0);
    std::string text;
    for (const int peer : plan.peers) {
      if (op->name->described[peer] == op->description_hash) continue;
      op->name->described[peer] = op->description_hash;
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
  op->produce_open |= produce;
  op->consume_open |= consume;
  // What stays closed is appended again behind the ones looked at.
  const size_t blocked = op->blocked.size();
  for (size_t i = 0; i < blocked; ++i) MakeReady(op, op->blocked[i]);
  op->blocked.erase(op->blocked.begin(),
                    op->blocked.begin() + static_cast<std::ptrdiff_t>(blocked));
}

void Executor::Post(Operation* op, int peer, uint8_t role) {
  ++stats_->posts_sent;
  WireHeader header = HeaderOf(*op, MessageKind::kPost);
  header.code = role;
  SendControl(peer, header, {});
}

void Executor::MakeReady(Operation* op, int32_t u) {
  const Plan::Unit& unit = op->plan->units[u];
  const StepKind kind = op->plan->schedule.steps[unit.first].kind;
  switch (kind) {
    case StepKind::kReceive:
      break;  // Open from the start.
    case StepKind::kPublish:
      op->publishes_open.push_back(u);
      break;
    default:
      if ((kind == StepKind::kProduce && !op->produce_open) ||
          (unit.consume && !op->consume_open)) {
        op->blocked.push_back(u);
        break;
      }
      (unit.pending == 0 ? op->starts : op->ready).Push(u);
      ++ready_units_;
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
  if (unit.consume && --op->consumes_left == 0 && op->hooks != nullptr) {
    Answered(op);
    op->hooks->OnConsumed();
  }
}

void Executor::Answered(Operation* op) {
  if (!op->unanswered) return;
  op->unanswered = false;
  if (--unanswered_ == 0) stats_->busy_ns += NowNs();
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

// ---- What comes in
// ---------------------------------------------------------------------------------

void Executor::OnMessage(int peer, const transport::Header& packed, const transport::View& view) {
  const WireHeader header = Unpack(packed);
  transport::Transport* transport = peers_[peer];
  const auto payload = std::span(view.data, static_cast<size_t>(view.readable() ? view.size : 0));
  switch (header.kind) {
    case MessageKind::kUser:
      if (user_handlers_[header.code]) user_handlers_[header.code](peer, header, payload);
      transport->Release(view);
      return;
    case MessageKind::kDescribe: {
      const std::string text(reinterpret_cast<const char*>(payload.data()), payload.size());
      const size_t cut = std::min(text.find('\0'), text.size());
      match_.SetDescription(peer, header.key.name_hash, text.substr(0, cut),
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
  if (header.kind == MessageKind::kPost || header.kind == MessageKind::kAbort ||
      (view.data != nullptr && view.size <= transport->inline_limit() &&
       match_.ShouldCopy(peer, view.size))) {
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
    op->posted[destination] = 1;
    return;
  }
  const int in = plan.InboundOf(peer);
  if (in < 0) {
    return refuse(absl::InvalidArgumentError(
        op->ToString() + ": rank " + std::to_string(peer) + " sends to rank " +
        std::to_string(rank_) +
        ", which does not expect it. Both ends of an edge must name each other"));
  }
  if (header.kind == MessageKind::kPost) return drop();
  if (Status same = match_.CompareEdge(*op, peer, plan.inbound[in].weight, header); !same.ok()) {
    return refuse(same);
  }
  const std::vector<int32_t>& receives = plan.inbound[in].receives;
  const int32_t u = header.message < receives.size() ? receives[header.message] : -1;
  const Step* step = u < 0 ? nullptr : &plan.schedule.steps[plan.units[u].first];
  const int64_t bytes = copied ? static_cast<int64_t>(copy.size()) : view.size;
  const Codec* codec = op->hooks == nullptr ? nullptr : op->hooks->codec();
  if (step == nullptr || op->receives[plan.units[u].ordinal].arrived ||
      header.elements != step->range.count ||
      (codec == nullptr ? bytes != step->range.count * op->element_bytes
                        : bytes > codec->MaxBytes(op->dtype, step->range.count))) {
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
    r.copy = std::move(copy);
    r.data = r.copy.data();
  } else if (fetch) {
    op->fetch_waiting.push_back(u);
  } else if (bytes <= transport->inline_limit() && plan.DestinationOf(peer) < 0) {
    // Released at once, which ends the sender's wait (see Settled): with more ranks than cores a
    // turn of all of them lies between here and the combine.
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
    if (!slot.ok()) return Fail(op, slot.status());
    // What is used first is fetched first, whatever the order of arrival.
    const auto next = std::min_element(
        op->fetch_waiting.begin(), op->fetch_waiting.end(),
        [&](int32_t a, int32_t b) { return plan.FirstUser(a) < plan.FirstUser(b); });
    const int32_t u = *next;
    if (*slot == nullptr && NextToFetch(*op, u)) slot = slots_.Acquire(0, 1);
    if (!slot.ok()) return Fail(op, slot.status());
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

// ---- What goes out
// ---------------------------------------------------------------------------------

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
        if (op->posted[op->plan->DestinationOf(target.peer)] == 0) return false;
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
  if (!slot.ok()) return slot.status();
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
        FlushOutbox(target.peer)
            ? peers_[target.peer]->Send(target.peer, Pack(header), p.payload,
                                        Cookie{op->index, unit.ordinal, t}.Pack())
            : SendResult::kBusy;
    if (sent != SendResult::kAccepted) {
      ++i;  // A peer that is down: FailPeer follows, with the reason.
      continue;
    }
    op->inflight.push_back({target.peer, unit.ordinal, t});
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
  while (!op->publishes_open.empty() && !op->failing) {
    if (!Publish(op, op->publishes_open.front(), &moved)) break;
    if (op->failing) break;
    op->publishes_open.erase(op->publishes_open.begin());
  }
  return moved;
}

// ---- The loop
// --------------------------------------------------------------------------------------

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
  copied_ = may_copy_ = false;
  for (size_t i = 0; i < active_.size(); ++i) {
    if (!active_[i]->publishes_open.empty()) moved |= RunPublishes(active_[i]);
  }
  // Failing inside RunPublishes leaves operations to be ended.
  for (size_t i = 0; i < active_.size();) {
    Operation* op = active_[i];
    FinishIfQuiet(op);
    if (i < active_.size() && active_[i] == op) ++i;
  }
  if (ready_units_ == 0) return moved;
  for (Operation* op : active_) {
    UnitQueue& queue = op->ready.size() > 0 ? op->ready : op->starts;
    if (queue.size() == 0) continue;
    const int32_t u = queue.Pop();
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
      if (!op->publishes_open.empty()) RunPublishes(op);
    }
    FinishIfQuiet(op);
    return true;
  }
  return moved;
}

void Executor::Fail(Operation* op, const Status& status, int except_peer) {
  if (op->failing) return;
  op->failing = true;
  op->failure = status;
  ready_units_ -= static_cast<int64_t>(op->starts.size() + op->ready.size());
  op->starts.Clear();
  op->ready.Clear();
  op->blocked.clear();
  op->publishes_open.clear();
  op->fetch_waiting.clear();
  for (const int peer : op->plan->peers) {
    if (peer != except_peer && !op->completed)
      Abort(HeaderOf(*op, MessageKind::kAbort), peer, status);
  }
  for (const Operation::Inflight& f : op->inflight) {
    peers_[f.peer]->Revoke(f.peer, Cookie{op->index, f.publish, f.target}.Pack());
  }
  for (Operation::Publish& p : op->publishes) {
    if (!p.prepared) continue;
    p.unreleased -= static_cast<int32_t>(p.unsent.size());
    p.unsent.clear();
    if (p.unreleased == 0 && p.slot != nullptr) {
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
  active_.erase(std::find(active_.begin(), active_.end(), op));
  if (!op->completed) status = Complete(op, std::move(status));
  --completed_;
  op->scratch_memory = nullptr;
  PluginHooks* hooks = op->hooks;
  op->hooks = nullptr;
  op->plan = nullptr;
  free_.push_back(op->index);
  if (hooks != nullptr) hooks->OnDone(status);  // May start the next operation.
}

void Executor::FailAll(const Status& status) {
  if (status_.ok()) status_ = status;
  for (const std::vector<Operation*> all = active_; Operation * op : all) {
    if (!op->active) continue;
    Fail(op, About(*op, status_));
    FinishIfQuiet(op);
  }
}

void Executor::Abandon(Operation* op, const Status& status) {
  Fail(op, status);
  FinishIfQuiet(op);
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
  if (missing.empty() && op.needs_posts) {
    for (size_t d = 0; d < op.posted.size(); ++d) {
      if (op.posted[d] == 0) missing.push_back(op.plan->destinations[d]);
    }
    why = " to submit it";
  }
  if (missing.empty()) return "a local gate";
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  std::string text = missing.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < missing.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(missing[i]);
  }
  return text + why;
}

int64_t Executor::CheckDeadlines(int64_t now) {
  int64_t next = INT64_MAX;
  sweep_.assign(active_.begin(), active_.end());  // What fails is taken out of active_.
  for (Operation* op : sweep_) {
    if (!op->active || op->failing || op->completed) continue;
    if (!op->produce_open || !op->consume_open) continue;  // Waits for its own caller.
    const int64_t timeout = op->started_ns + config_.op_timeout_ms * kMillisecond;
    if (now >= timeout) {
      Fail(op, absl::DeadlineExceededError(
                   op->ToString() + ": rank " + std::to_string(rank_) + " waited " +
                   std::to_string((now - op->started_ns) / kMillisecond / 1000) + " s for " +
                   PeersMissing(*op) +
                   ". Every rank must submit the operation under the same name; see "
                   "BLUEFOG_OP_TIMEOUT_MS"));
      FinishIfQuiet(op);
      continue;
    }
    if (now >= op->next_report_ns) {
      BLUEFOG_LOG(kWarning) << "stall: " << op->ToString() << " waits since "
                            << (now - op->started_ns) / kMillisecond / 1000 << " s for "
                            << PeersMissing(*op);
      op->next_report_ns = now + config_.stall_report_ms * kMillisecond;
      if (!op->probed && !op->needs_posts) {
        // A partner that finished without this rank answers with a refusal.
        op->probed = true;
        for (const Plan::Inbound& in : op->plan->inbound) Post(op, in.peer, kReceivesFromYou);
      }
    }
    next = std::min({next, timeout, op->next_report_ns});
  }
  return next;
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

std::string Operation::ToString() const {
  if (hooks != nullptr) return hooks->Label() + ", step " + std::to_string(step);
  return std::string(NameOf(op)) + " '" + (name == nullptr ? "?" : name->name) + "'";
}

std::string Operation::Describe() const {
  if (hooks != nullptr) return hooks->Describe();
  return std::string(NameOf(op)) + " " + input.ToString();
}

}  // namespace bluefog
