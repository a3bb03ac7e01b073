// The plugin decides the algorithm, the engine decides the time. A plugin is one file in plugins/
// that includes <bluefog/…> only and registers itself by name.
//
// Per step the engine asks Plan, calls Produce on pieces of parameters as their gradients become
// ready, exchanges what was produced, and calls Consume on each piece as soon as its average
// exists, while it is still in cache. All calls come from one thread at a time; none may block or
// throw.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <bluefog/status.h>
#include <bluefog/tensor.h>
#include <bluefog/topology.h>

namespace bluefog {

inline constexpr int kMaxOwnHypers = 8;

/// Hyper-parameters of one parameter group, fixed for the length of a step and equal on all ranks.
struct Hyper {
  double lr = 0.0;
  double momentum = 0.0;
  double weight_decay = 0.0;
  std::array<double, kMaxOwnHypers> own{};  ///< Traits::hypers, in that order.
  friend bool operator==(const Hyper&, const Hyper&) = default;
};

inline constexpr int kMaxPayloads = 4;
inline constexpr int kMaxStates = 4;
inline constexpr int kMaxMeasures = 4;

/// A piece inside one parameter: `n` elements from `offset`. All pointers are already at the piece.
struct Segment {
  int param = 0;       ///< Index in registration order.
  int64_t offset = 0;  ///< In elements, from the start of the parameter.
  int64_t n = 0;
  void* x = nullptr;  ///< The parameter.
  const void* g =
      nullptr;  ///< The gradient; zeros where the parameter has none. Null outside its time.
  std::array<void*, kMaxStates> state{};  ///< Traits::states, in that order.
  std::array<void*, kMaxPayloads>
      payload{};  ///< Produce writes it; Consume may read what was sent.
  std::array<const void*, kMaxPayloads> mixed{};  ///< Consume: the average of the payload.
  const Hyper* hyper = nullptr;
  /// Measure adds here (fp64, one set per parameter, summed in a fixed order); Produce or Consume
  /// reads the total of the parameter, or of the whole model when Traits::measure_scope says so.
  double* measure = nullptr;
};

struct StepContext {
  int64_t step = 0;
  DType dtype = DType::kFloat32;
  Device device;
  void* stream = nullptr;
  int rank = 0, size = 1;
  bool exchanged = true;  ///< False on a silent step: mixed is then the payload itself.
};

enum class Collective : uint8_t { kNeighborAllreduce, kAllreduce, kHierarchicalNeighborAllreduce };
/// One exchange of a step.
struct Exchange {
  Collective collective = Collective::kNeighborAllreduce;
  int64_t round = 0;      ///< Of the TopologySequence.
  uint32_t payloads = 1;  ///< Which take part: bit p is payload p.
};
/// All exchanges of a step, none on a silent one. Made anew in every step, so without the heap.
class StepPlan {
 public:
  /// At most kMaxPayloads; what is beyond is left out.
  StepPlan(std::initializer_list<Exchange> exchanges) {
    for (const Exchange& e : exchanges) {
      if (size_ < list_.size()) list_[size_++] = e;
    }
  }
  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }
  const Exchange& operator[](size_t i) const { return list_[i]; }
  const Exchange* begin() const { return list_.data(); }
  const Exchange* end() const { return list_.data() + size_; }

 private:
  std::array<Exchange, kMaxPayloads> list_{};
  size_t size_ = 0;
};

enum class PayloadTime : uint8_t {
  kGradient,  ///< Needs the gradient: a bucket leaves as soon as its gradients exist.
  kEarly,     ///< Known before forward: leaves at the end of the previous step.
};
enum class ConsumeTrigger : uint8_t {
  kCombined,  ///< As soon as the average exists.
  kStep,      ///< Not before step() was called.
};
enum class MeasureScope : uint8_t {
  kNone,
  kParameter,  ///< After the combine, before Consume; per parameter (LARS).
  kModel,      ///< Over all gradients before any Produce (clipping): opens produce at step().
};

/// A hyper-parameter that a plugin has beside lr, momentum and weight_decay.
struct HyperInfo {
  std::string name;  ///< Of the keyword in Python, and in messages.
  double initial = 0.0;
  double lowest = 0.0;
  double highest = std::numeric_limits<double>::max();
};

/// What a plugin needs; the engine plans from it and refuses what cannot work.
struct Traits {
  std::string name = {};     ///< Registry name, e.g. "decentlam".
  std::string summary = {};  ///< One line with the recursion.
  std::string source = {};   ///< Paper and equation.
  int payloads = 1;
  std::vector<std::string> states =
      {};  ///< State vectors, zero at the start, each as long as the parameter.
  std::vector<HyperInfo> hypers = {};
  PayloadTime payload_time = PayloadTime::kGradient;
  ConsumeTrigger consume = ConsumeTrigger::kCombined;
  MeasureScope measure_scope = MeasureScope::kNone;
  int measures = 0;  ///< Doubles per parameter.
  /// Delayed mode: what it makes of the recursion; empty where the method does not stand it.
  /// Neighbours get the model as a step leaves it, and have the whole next step for it: when the
  /// next gradient is there, Produce is called with the average W x in place of x, and at once
  /// Consume, with x and what Produce wrote for `mixed`. So W(x - lr g) becomes W x - lr g. Of one
  /// payload, without measures; Produce must not write x.
  std::string delayed = {};
  std::string delayed_reason = {};  ///< Why it is empty, with numbers; part of the refusal.
  // Requirements on the graph.
  bool uses_topology = true;
  bool needs_symmetric = false;
  bool needs_static = false;
  std::string needs_reason = {};  ///< Why, with numbers; part of the refusal.
};

/// Messages that are not the elements themselves: fewer bits, compression. Encode sees whole
/// messages, at most a chunk (BLUEFOG_CHUNK_BYTES).
class Codec {
 public:
  virtual ~Codec() = default;
  virtual const char* name() const = 0;
  virtual int64_t MaxBytes(DType dtype, int64_t n) const = 0;
  /// Not 0: a message is so many bytes for each element, and any part of it can be decoded by
  /// itself, while it is in cache.
  virtual int64_t ElementBytes() const { return 0; }
  /// Returns the bytes written to `out` (at most MaxBytes).
  virtual int64_t Encode(DType dtype, int64_t n, const void* x, std::byte* out) const = 0;
  /// acc += weight * decoded. Bytes come from a peer: malformed ones are an error, never a crash.
  virtual Status DecodeAdd(DType dtype, int64_t n, std::span<const std::byte> bytes, double weight,
                           void* acc) const = 0;

  struct Message {
    int rank;  ///< Whose it is, for errors.
    std::span<const std::byte> bytes;
    double weight;
  };
  /// out = total*x + sum of w_j (Q(x_j) - Q(x)), Q(x) being `own`. With the weights of a doubly
  /// stochastic matrix and their sum for `total`, 1, the mean over the ranks stays what it was,
  /// whatever Q is. `out` may be x. By default through DecodeAdd, for float32 and float64.
  virtual Status Mix(DType dtype, int64_t n, void* out, double total, const void* x,
                     std::span<const std::byte> own, std::span<const Message> messages) const;
};

class Optimizer {
 public:
  virtual ~Optimizer() = default;
  virtual const Traits& traits() const = 0;
  /// What is exchanged in this step by parameters with these hyper-parameters; empty on a silent
  /// step. Must be equal on all ranks.
  virtual StepPlan Plan(int64_t step, const Hyper&) const {
    return {Exchange{Collective::kNeighborAllreduce, step}};
  }
  virtual void Produce(const StepContext& ctx, std::span<const Segment> segments) = 0;
  virtual void Measure(const StepContext&, std::span<const Segment>) {}
  virtual Status Consume(const StepContext& ctx, std::span<const Segment> segments) = 0;
  virtual const Codec* codec() const { return nullptr; }
};

using OptimizerFactory = std::function<std::unique_ptr<Optimizer>()>;
/// Registers a plugin; use BLUEFOG_REGISTER_OPTIMIZER at namespace scope. The later of two equal
/// names is refused (and logged).
bool RegisterOptimizer(const std::string& name, OptimizerFactory factory);
/// NotFound lists the names that exist.
StatusOr<std::unique_ptr<Optimizer>> MakeOptimizer(const std::string& name);
std::vector<std::string> OptimizerNames();

/// Ok if the plugin may run on this graph; else InvalidArgument with the reason and the figures
/// that led to it. Plugins need doubly stochastic, connected graphs unless they say otherwise.
Status CheckTopology(const Traits& traits, const TopologySequence& topology);

#define BLUEFOG_REGISTER_OPTIMIZER(name, Class)                   \
  [[maybe_unused]] static const bool bluefog_registered_##Class = \
      ::bluefog::RegisterOptimizer(name, [] { return std::make_unique<Class>(); })

}  // namespace bluefog
