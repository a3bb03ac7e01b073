// One submitted operation on its way through the executor. Everything here belongs to whoever holds
// the progress lock, except what WorkImpl guards itself.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <bluefog/communicator.h>
#include <bluefog/optimizer.h>

#include "engine/completion.h"
#include "engine/plan.h"
#include "engine/wire.h"
#include "transport/transport.h"

namespace bluefog {

class Engine;
struct NameEntry;

class WorkImpl final : public Work {
 public:
  WorkImpl(Engine* engine, NameEntry* name) : engine_(engine), name_(name) {}

  bool done() const override { return completion_.done(); }
  Status Wait(std::chrono::nanoseconds timeout) override;
  TensorView output() const override { return output_; }
  std::shared_ptr<std::byte> output_memory() const override { return output_memory_; }

  // The engine's side; the fields are written before Complete and not after.
  void Complete(Status status);
  void BindOutput(const TensorView& output, std::shared_ptr<std::byte> memory) {
    output_ = output;
    output_memory_ = std::move(memory);
  }
  void BindKeepAlive(std::shared_ptr<void> keep_alive) { keep_alive_ = std::move(keep_alive); }
  /// On a caller's thread, after done(): the deleter may take the GIL.
  void DropKeepAlive() {
    if (!dropped_.exchange(true)) keep_alive_.reset();
  }

 private:
  Engine* engine_;
  NameEntry* const name_;
  Completion completion_;
  Status status_;
  TensorView output_;
  std::shared_ptr<std::byte> output_memory_;
  std::shared_ptr<void> keep_alive_;
  std::atomic<bool> dropped_{false};  ///< Several threads may wait.
};

/// What the executor calls for produce, measure and consume steps. All calls under the progress
/// lock.
class PluginHooks {
 public:
  virtual ~PluginHooks() = default;
  virtual void Produce(int64_t begin, int64_t count) = 0;
  /// `ordinal`: which measure step, so that partials add up in a fixed order.
  virtual void Measure(int ordinal, int64_t begin, int64_t count,
                       std::span<const std::byte* const> mixed) = 0;
  /// `mixed[p]` points at element `begin` of payload p's average.
  virtual Status Consume(int64_t begin, int64_t count, std::span<const std::byte* const> mixed) = 0;
  virtual void OnProduced() = 0;
  virtual void OnConsumed() = 0;
  /// Last call. On failure OnProduced and OnConsumed may not have come.
  virtual void OnDone(const Status& status) = 0;
  /// What stands for the operation's name in error messages.
  virtual std::string Label() const = 0;
  /// What others are told of this operation, for their error messages.
  virtual std::string Describe() const = 0;
};

/// A name under which operations are submitted. Lives as long as the engine.
struct NameEntry {
  std::string name;
  uint64_t hash = 0;
  std::atomic<bool> in_flight{false};
  std::atomic<bool> proven{false};  ///< An operation succeeded.
  // Guarded by the engine's inbox mutex.
  uint64_t next_use = 0;
  int64_t topologies = 0;  ///< How many had been set at the last use.
  int64_t round = 0;       ///< Uses since then that went along that topology.
  std::string first_use;   ///< Operation and tensor of the first use; empty before.
  uint64_t first_hash = 0;
  // Under the progress lock, by peer: the descriptions that it was sent and still remembers.
  std::vector<std::vector<uint64_t>> described;
};

inline constexpr int kMaxBuffers = kMaxPayloads;

/// First in, first out; its memory is used again.
class UnitQueue {
 public:
  size_t size() const { return units_.size() - head_; }
  void Push(int32_t unit) { units_.push_back(unit); }
  /// For so many until it is cleared, or empty again.
  void Reserve(size_t units) { units_.reserve(units); }
  int32_t Pop() {
    const int32_t unit = units_[head_++];
    if (head_ == units_.size()) Clear();
    return unit;
  }
  void Clear() {
    units_.clear();
    head_ = 0;
  }

 private:
  std::vector<int32_t> units_;
  size_t head_ = 0;
};

/// What was asked for: made by a caller, carried through the inbox, not changed by the executor.
struct Submission {
  Op op = Op::kBarrier;
  NameEntry* name = nullptr;
  Key key;
  std::shared_ptr<const Plan> plan;
  TensorView input;          ///< For descriptions.
  uint32_t layout_hash = 0;  ///< Of input.
  int64_t element_bytes = 1;
  DType dtype = DType::kFloat32;
  std::array<std::byte*, kMaxBuffers> in{}, out{}, scratch{}, coded{};
  std::shared_ptr<std::byte> scratch_memory, coded_memory;
  const Codec* codec = nullptr;  ///< Of what is coded in the plan.
  int64_t coded_stride = 0;      ///< Of `coded`, in bytes an element.
  uint64_t plan_hash = 1;
  uint64_t description_hash = 1;  ///< When it changes, peers are told anew what Describe says.
  double value = 0.0;
  int64_t step = 0;
  /// Payload memory that is this operation's own and lies in the arena: no posts, no staging.
  bool dedicated = false;
  bool dynamic = false;  ///< The call names its ranks itself.
  PluginHooks* hooks = nullptr;
  std::shared_ptr<WorkImpl> work;
  bool produce_open = true, consume_open = true;  ///< Gates; Executor::OpenGates.
};

/// A submission and where it stands.
struct Operation : Submission {
  struct Inflight {
    int peer;
    int32_t publish;  ///< Ordinal.
    int32_t target;
  };
  struct Publish {
    bool prepared = false;
    std::span<const std::byte> payload;
    std::shared_ptr<std::byte> slot;
    std::vector<int32_t> unsent;  ///< Targets.
    int32_t unreleased = 0;
  };
  struct Receive {
    bool arrived = false;
    transport::View view;
    bool held = false;  ///< The view must be released.
    std::shared_ptr<std::byte> fetched;
    std::vector<std::byte> copy;
    const std::byte* data = nullptr;
    int64_t bytes = 0;
    double weight = 1.0;
    int32_t users = 0;
  };
  uint32_t index = 0;  ///< In the executor's slab.
  uint64_t order = 0;  ///< Of submission.
  /// In one of the executor's queues with what it has to send: woken, for a copy, for a slot. Else
  /// only an event of its own helps, or room at a peer.
  bool listed = false;
  bool computing = false;  ///< In the queue of those with units to compute.
  bool active = false, failing = false;
  bool completed = false;   ///< For its caller; releases may still be to come.
  bool unanswered = false;  ///< The result is still to come here, neighbours' releases aside.
  Status failure;
  std::vector<int32_t> pending;
  /// Compute units whose turn has come: those that wait for nothing from the start (produce, a copy
  /// to be sent), and the others, which go first: what they read is still in cache.
  UnitQueue starts, ready;
  std::vector<int32_t> blocked;         ///< Units behind a closed gate.
  std::vector<int32_t> publishes_open;  ///< Units that have something left to send.
  // As many as the plan has, of memory that never shrinks: what they hold is used again.
  std::span<Publish> publishes;
  std::span<Receive> receives;
  std::vector<Publish> publish_memory;
  std::vector<Receive> receive_memory;
  std::vector<int64_t> encoded_bytes;  ///< By encoding.
  /// What is known of each destination: nothing, that it was asked, that it has submitted this too.
  enum Posted : uint8_t { kNotPosted, kAsked, kPosted };
  std::vector<Posted> posted;
  std::vector<bool> in_line;  ///< By destination: it waits in the line for room there.
  std::vector<Inflight> inflight;
  /// Peers that gave up or are gone. The operation waits for the reason, which is on its way.
  std::vector<int> broken;
  int32_t units_left = 0, produces_left = 0, answers_left = 0;
  int64_t send_slots = 0, fetch_slots = 0, fetching = 0;
  int64_t ahead = 0;                   ///< Chunks copied to be sent, less units computed since.
  std::vector<int32_t> fetch_waiting;  ///< Receives without a slot yet.
  int64_t started_ns = 0, next_report_ns = 0;
  int64_t waits_since_ns = 0;  ///< For others: its start, or when its own caller opened its gates.
  bool probed = false;  ///< Posts were sent although eager, to find a partner that never will.

  bool needs_posts = false;
  std::string ToString() const;  ///< "neighbor_allreduce 'x'", "dsgd, parameter 'w', step 3".
  std::string Describe() const;  ///< Operation, tensor and what else must be equal.
};

}  // namespace bluefog
