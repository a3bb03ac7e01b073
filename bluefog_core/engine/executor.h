// Replays schedules: takes an operation's units as they become runnable, stages and publishes
// payloads, hands views to combines, runs plugins tile by tile, releases what was read. Used under
// the progress lock; nothing here waits for others. The first staged chunks reserve their memory.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include <bluefog/config.h>

#include "base/trace.h"
#include "engine/match.h"
#include "engine/operation.h"
#include "engine/slot_pool.h"
#include "engine/turn_queue.h"
#include "kernels/kernels.h"
#include "transport/transport.h"

namespace bluefog {

/// Handler of an active message (MessageKind::kUser): served on whatever thread drives progress.
using UserHandler =
    std::function<void(int peer, const WireHeader& header, std::span<const std::byte> payload)>;

/// Of one slot: a codec may need a little more than the elements themselves.
inline int64_t SlotBytes(const Config& config) { return config.chunk_bytes + 4096; }

/// Of the transport: what is eager, and texts of errors, which are cut beyond it.
inline int64_t InlineLimit(const Config& config) {
  return std::max<int64_t>(config.eager_bytes, 2048);
}

class Executor {
 public:
  Executor(const Config& config, int rank, int size, std::shared_ptr<transport::Arena> arena,
           Trace* trace, EngineStats* stats);
  ~Executor();

  /// The transport that reaches each rank; null for the own rank.
  void SetPeers(std::vector<transport::Transport*> by_peer) { peers_ = std::move(by_peer); }
  /// The transports are about to go. A caller that was past all checks may still start something.
  void LosePeers(const Status& status);

  /// An operation to fill in and pass to Start; recycled memory.
  Operation* NewOperation();
  void Start(Operation* op);
  void OpenGates(Operation* op, bool produce, bool consume);

  // What came in, from the transports' upcalls.
  void OnMessage(int peer, const transport::Header& header, const transport::View& view);
  void OnSendDone(uint64_t cookie, const Status& status);
  void OnFetchDone(uint64_t cookie, const Status& status);

  /// Publishes what can be published and runs one unit of computation. True if anything moved.
  bool Run();
  /// True if Run would find something to compute or to send.
  bool runnable() const {
    return ready_units_ > 0 || !woken_.empty() || !copying_.empty() ||
           (!no_slot_.empty() && slots_.releases() != releases_seen_);
  }
  bool idle() const { return active_.empty() && outbox_count_ == 0 && refused_.empty(); }
  /// Operations that somebody waits for.
  int64_t active_count() const { return static_cast<int64_t>(active_.size()) - completed_; }
  /// Of the active ones, those whose result is still to come here.
  int64_t unanswered() const { return unanswered_; }

  /// Fails one operation: peers are told unless they are the ones who said so.
  void Fail(Operation* op, const Status& status, int except_peer = -1);
  /// Fails it from outside the executor: may end it at once.
  void Abandon(Operation* op, const Status& status);
  /// Fails everything, now and from now on.
  void FailAll(const Status& status);
  /// Of the operations that `which` picks, fails those that have more left to do than to send and
  /// to be released.
  void FailUnfinished(const std::function<bool(const Operation&)>& which, const Status& status);
  /// `peer` is gone: operations that need it fail now and from now on. What it had sent counts,
  /// unless it died.
  void FailPeer(int peer, const Status& status, bool died);
  /// Operations of this name fail from now on, here and at whoever sends to them; at `tell` the
  /// next one that they submit.
  void Condemn(NameEntry* name, const Status& status, std::span<const int> tell);
  /// Use number `use` of `name` is refused here: those who wait for this rank in it are told why.
  void Reject(const NameEntry& name, uint64_t use, const Status& why, std::span<const int> peers);
  /// What is still under way, and for whom it waits; of several the oldest. Empty if nothing is.
  std::string Outstanding() const;
  /// Stall reports and time-outs. Returns when to look again (ns), or INT64_MAX.
  int64_t CheckDeadlines(int64_t now);

  /// An active message; false on back-pressure.
  bool SendUser(int peer, uint8_t handler, int64_t value, std::span<const std::byte> payload);
  void SetUserHandler(uint8_t handler, UserHandler fn) { user_handlers_[handler] = std::move(fn); }

  /// Works whose last reference must go on a caller's thread.
  std::vector<std::shared_ptr<WorkImpl>>& finished() { return finished_; }

 private:
  struct Outgoing {
    WireHeader header;
    std::vector<std::byte> payload;
    uint64_t cookie;
  };

  // executor.cc: life of an operation.
  Operation* NextToCompute();
  void MakeReady(Operation* op, int32_t unit);
  void CompleteUnit(Operation* op, int32_t unit);
  void Answered(Operation* op);

  // executor_receive.cc: what comes in.
  void Deliver(Operation* op, int peer, const WireHeader& header, const transport::View& view,
               std::vector<std::byte> copy, bool copied);
  bool ReadAtOnce(const Operation& op, int32_t receive) const;
  void Arrived(Operation* op, int32_t unit);
  bool NextToFetch(const Operation& op, int32_t unit) const;
  void TryFetch(Operation* op);
  void ReleaseReceive(Operation* op, Operation::Receive& receive);

  // executor_send.cc: what goes out. Control messages keep their order, and go before later data.
  enum class Outcome { kDone, kBlocked, kAwaitsSlot, kAwaitsCopy };
  void WakeSender(Operation* op);
  bool RunSenders();
  bool RunPublishes(Operation* op);
  bool MayCopy() const;
  bool MaySend(Operation* op, int peer);
  void GetInLine(Operation* op, int peer);
  Outcome Publish(Operation* op, int32_t unit, bool* moved);
  StatusOr<Outcome> Prepare(Operation* op, const Plan::Unit& unit);
  void Post(Operation* op, int peer, uint8_t role);
  void SendControl(int peer, const WireHeader& header, std::span<const std::byte> payload,
                   uint64_t cookie = 0);
  bool FlushOutbox(int peer);
  WireHeader HeaderOf(const Operation& op, MessageKind kind) const;
  void Abort(const WireHeader& about, int peer, const Status& status, uint64_t cookie = 0);
  void Refuse(const WireHeader& header, int peer, const Status& status,
              const transport::View* view);

  // executor_compute.cc: units that touch memory.
  Status Compute(Operation* op, const Plan::Unit& unit);
  Status ComputeGroup(Operation* op, const Plan::Unit& unit);
  Status CombineInto(Operation* op, const collective::Step& step, int64_t begin, int64_t count,
                     std::byte* out, bool streaming);
  Status Encode(Operation* op, const collective::Step& step, int32_t ordinal);
  std::span<const std::byte> Bytes(const Operation& op, const collective::Step& step) const;
  bool IsCoded(const Operation& op, const collective::Step& step) const;
  Status CombineCoded(Operation* op, const collective::Step& step, int64_t begin, int64_t count,
                      std::byte* out);
  std::byte* At(const Operation& op, const collective::Range& range, int64_t offset = 0) const;
  const std::byte* Read(const Operation& op, const collective::Source& source,
                        int64_t offset) const;
  void NeedTiles(size_t buffers, int64_t bytes);

  // executor_end.cc: how operations end.
  void FinishIfQuiet(Operation* op);
  bool Settled(const Operation& op) const;
  Status Complete(Operation* op, Status status);
  void Finish(Operation* op);
  void Break(Operation* op, int peer);
  bool Needs(const Operation& op, int peer) const;
  std::string PeersMissing(const Operation& op) const;

  const Config config_;
  const int rank_, size_;
  Trace* const trace_;
  EngineStats* const stats_;
  Match match_;
  SlotPool slots_;
  std::vector<transport::Transport*> peers_;
  std::vector<Status> peer_status_;  ///< Not Ok: gone.
  Status status_;                    ///< Sticky.
  std::vector<std::unique_ptr<Operation>> slab_;
  std::vector<uint32_t> free_;
  std::vector<Operation*> active_;  ///< In order of submission.
  int64_t active_bytes_ = 0;        ///< Of their inputs.
  uint64_t started_ = 0;            ///< Operations, ever.
  // Of the active ones, those with something to send: woken, for a copy, for a slot, and by peer in
  // line for room there. And those with units to compute.
  TurnQueue woken_, copying_, no_slot_;
  std::vector<TurnQueue> lines_;
  bool lines_used_ = false;    ///< Somebody may be in one.
  int64_t releases_seen_ = 0;  ///< Of slots.
  TurnQueue computing_;
  int64_t completed_ = 0;  ///< Of the active ones.
  int64_t ready_units_ = 0, unanswered_ = 0;
  // Private tensors: chunks copied to be sent and not yet combined; whether this turn has made a
  // copy.
  int64_t ahead_ = 0;
  bool copied_ = false;
  std::vector<int64_t> owed_;  ///< Messages that each peer has not released yet.
  std::vector<std::deque<Outgoing>> outbox_;
  int64_t outbox_count_ = 0;
  std::unordered_map<uint64_t, transport::View> refused_;  ///< By the cookie of the refusal.
  uint64_t last_refusal_ = 0;
  std::array<UserHandler, 256> user_handlers_;
  std::vector<std::shared_ptr<WorkImpl>> finished_;
  std::vector<kernels::Term> terms_;
  std::vector<std::vector<std::byte>> tiles_;
  std::vector<const std::byte*> mixed_;
  std::vector<Codec::Message> messages_;
  std::vector<Operation*> sweep_;              ///< CheckDeadlines.
  std::vector<std::vector<std::byte>> spare_;  ///< For copies of early messages.
};

}  // namespace bluefog
