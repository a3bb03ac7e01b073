// A bucket: parameters of one group and dtype that travel as one operation, in reverse registration
// order. BucketStep is one step's passage of a bucket through the executor: it cuts ranges into
// segments and calls the plugin.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include <bluefog/distributed_optimizer.h>

#include "engine/engine.h"

namespace bluefog {

class BucketStep;

/// What the buckets of one optimizer share. Written by the caller between steps only.
struct OptimizerShared {
  Engine* engine = nullptr;
  std::unique_ptr<Optimizer> plugin;
  std::string name;
  std::vector<NameEntry*> bucket_names;
  std::vector<ParameterInfo> params;
  std::vector<ParameterBinding> bindings;  ///< Of the step under way.
  std::vector<Hyper> hypers;               ///< By group.
  std::vector<Hyper> hypers_no_decay;      ///< For parameters without gradient.
  std::vector<double> model_measure;       ///< Totals, MeasureScope::kModel.
  std::vector<std::byte> zeros;            ///< Stands for a gradient that does not exist.
  // How far the step is: buckets to go.
  std::atomic<int> to_produce{0}, to_consume{0};
  Completion produced, consumed;
  mutable Mutex mu;
  Status failure GUARDED_BY(mu);  ///< First of the optimizer.
  std::atomic<int> in_flight{0};  ///< Operations not done.
  Completion quiet;

  void Fail(const Status& status);
  void CountProduced() {
    if (to_produce.fetch_sub(1) == 1) produced.Set();
  }
  void CountConsumed() {
    if (to_consume.fetch_sub(1) == 1) consumed.Set();
  }
};

struct Bucket {
  int index = 0;
  std::vector<int> params;       ///< Indices into OptimizerShared::params.
  std::vector<int64_t> offsets;  ///< Of each, in elements; one more at the end: the total.
  int64_t count = 0;
  DType dtype = DType::kFloat32;
  int group = 0;
  NameEntry* name = nullptr;
  uint64_t uses = 0;
  /// Payload slots in the arena: two steps, each all payloads; and the averages where they are
  /// kept.
  static constexpr int kDepth = 2;
  std::array<std::shared_ptr<std::byte>, kDepth> payload, mixed, coded;
  const Codec* codec = nullptr;  ///< Of messages to neighbours.
  int64_t coded_stride = 0;      ///< Of `coded`, in bytes an element.
  int64_t coded_bytes = 0;       ///< Of one payload there.
  bool exchanged = true;         ///< Not silent: the last one that was submitted.
  std::array<std::shared_ptr<std::byte>, kDepth> scratch;  ///< Of the exchange, likewise.
  int64_t scratch_count = 0;                               ///< Elements for each payload.
  int ready = 0;                  ///< Parameters of this step that are ready.
  bool submitted = false;         ///< In this step.
  BucketStep* current = nullptr;  ///< Of this step (early payloads: made in the last one).
  std::vector<std::unique_ptr<BucketStep>> steps;
  // Under the progress lock: who occupies each payload slot, and who waits for one.
  std::array<BucketStep*, kDepth> occupant{};
  std::vector<BucketStep*> waiting;  ///< In order of submission.
};

class BucketStep final : public PluginHooks {
 public:
  BucketStep(OptimizerShared* shared, Bucket* bucket) : shared_(shared), bucket_(bucket) {}

  bool in_use() const { return in_use_.load(std::memory_order_acquire); }
  enum class Mode : uint8_t {
    kAtOnce,
    kEarly,    ///< The payload is known before the gradient.
    kModel,    ///< Delayed: the model as it is.
    kUpdated,  ///< Delayed: the model after a gradient step that takes the average before.
  };
  /// On the caller's thread. All modes but the first produce only when the operation before is
  /// done.
  void Begin(const StepContext& ctx, std::shared_ptr<const Plan> plan, Mode mode, bool consume_open,
             uint64_t plan_hash);
  /// Under the progress lock.
  void Start(Executor* executor);
  void OpenConsume(Executor* executor);
  void Abandon(Executor* executor, const Status& status);

  void Produce(int64_t begin, int64_t count) override;
  void Measure(int ordinal, int64_t begin, int64_t count,
               std::span<const std::byte* const> mixed) override;
  Status Consume(int64_t begin, int64_t count, std::span<const std::byte* const> mixed) override;
  void OnProduced() override;
  void OnConsumed() override;
  void OnDone(const Status& status) override;
  std::string Label() const override;
  std::string Describe() const override;

 private:
  std::span<const Segment> Segments(int64_t begin, int64_t count,
                                    std::span<const std::byte* const> mixed);
  bool MayProduce() const;
  /// Delayed: the gradient step on these elements.
  void Update(int64_t begin, int64_t count);
  void CountNonFinite(std::span<const Segment> segments);
  int slot() const { return static_cast<int>(ctx_.step % Bucket::kDepth); }
  int slot_before() const { return (slot() + Bucket::kDepth - 1) % Bucket::kDepth; }

  OptimizerShared* const shared_;
  Bucket* const bucket_;
  std::atomic<bool> in_use_{false};
  StepContext ctx_;
  bool exchanged_before_ = true;  ///< By the operation before.
  std::shared_ptr<const Plan> plan_;
  std::shared_ptr<std::byte> scratch_;
  Mode mode_ = Mode::kAtOnce;
  bool consume_open_ = true;
  uint64_t plan_hash_ = 1;
  Hyper hyper_;  ///< What its messages stand for; the caller may be at the next step's.
  Operation* op_ = nullptr;
  Executor* executor_ = nullptr;
  bool produced_ = false, consumed_ = false, reduced_ = false;
  std::vector<Segment> segments_;
  std::vector<double> partials_,
      totals_;  ///< [measure step][parameter][measure], [parameter][measure]
};

}  // namespace bluefog
