// Toy optimizers, for tests only: each needs one thing of the engine that the built-in plugins do
// not. All work on float64, in plain loops, so that a reader can check them against their
// recursion.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <bluefog/optimizer.h>

namespace bluefog::spine {

inline double* X(const Segment& s) { return static_cast<double*>(s.x); }
inline const double* G(const Segment& s) { return static_cast<const double*>(s.g); }
inline double* State(const Segment& s, int k = 0) { return static_cast<double*>(s.state[k]); }
inline double* Sent(const Segment& s, int p = 0) { return static_cast<double*>(s.payload[p]); }
inline const double* Mixed(const Segment& s, int p = 0) {
  return static_cast<const double*>(s.mixed[p]);
}

class Toy : public Optimizer {
 public:
  explicit Toy(Traits traits) : traits_(std::move(traits)) {}
  const Traits& traits() const final { return traits_; }

  void Produce(const StepContext& ctx, std::span<const Segment> segments) final {
    for (const Segment& s : segments) {
      for (int64_t i = 0; i < s.n; ++i) ProduceAt(ctx, s, i);
    }
  }
  Status Consume(const StepContext& ctx, std::span<const Segment> segments) final {
    for (const Segment& s : segments) {
      for (int64_t i = 0; i < s.n; ++i) ConsumeAt(ctx, s, i);
    }
    return absl::OkStatus();
  }

 protected:
  virtual void ProduceAt(const StepContext&, const Segment& s, int64_t i) {
    Sent(s)[i] = X(s)[i] - s.hyper->lr * G(s)[i];
  }
  virtual void ConsumeAt(const StepContext&, const Segment& s, int64_t i) { X(s)[i] = Mixed(s)[i]; }

 private:
  const Traits traits_;
};

/// m~ = beta m + g + wd x;  x+ = W(x - lr m~);  m+ = W m~
class TwoPayloads final : public Toy {
 public:
  TwoPayloads() : Toy({.name = "two payloads", .payloads = 2, .states = {"m"}}) {}
  StepPlan Plan(int64_t step, const Hyper&) const override {
    return {Exchange{Collective::kNeighborAllreduce, step, 0b11}};
  }
  void ProduceAt(const StepContext&, const Segment& s, int64_t i) override {
    const double m = s.hyper->momentum * State(s)[i] + G(s)[i] + s.hyper->weight_decay * X(s)[i];
    Sent(s, 0)[i] = X(s)[i] - s.hyper->lr * m;
    Sent(s, 1)[i] = m;
  }
  void ConsumeAt(const StepContext&, const Segment& s, int64_t i) override {
    X(s)[i] = Mixed(s, 0)[i];
    State(s)[i] = Mixed(s, 1)[i];
  }
};

/// x+ = W(x - lr g) in every `period`-th step, x - lr g in the others; the state counts exchanges.
class Periodic final : public Toy {
 public:
  Periodic()
      : Toy({.name = "periodic",
             .states = {"exchanges"},
             .hypers = {{.name = "period", .initial = 3.0, .lowest = 1.0}}}) {}
  StepPlan Plan(int64_t step, const Hyper& hyper) const override {
    const auto period = static_cast<int64_t>(hyper.own[0]);
    if (step % period != period - 1) return {};
    return {Exchange{Collective::kNeighborAllreduce, step}};
  }
  void ConsumeAt(const StepContext& ctx, const Segment& s, int64_t i) override {
    X(s)[i] = Mixed(s)[i];
    State(s)[i] += ctx.exchanged ? 1.0 : 0.0;
  }
};

/// x+ = W(x - lr g), and the mean over all ranks in every fourth step.
class GlobalEveryFourth final : public Toy {
 public:
  GlobalEveryFourth() : Toy({.name = "global every fourth"}) {}
  StepPlan Plan(int64_t step, const Hyper&) const override {
    return {
        Exchange{step % 4 == 3 ? Collective::kAllreduce : Collective::kNeighborAllreduce, step}};
  }
};

/// v+ = beta v - lr g;  x+ = W x + v+
class Early final : public Toy {
 public:
  Early() : Toy({.name = "early", .states = {"v"}, .payload_time = PayloadTime::kEarly}) {}
  void ProduceAt(const StepContext&, const Segment& s, int64_t i) override { Sent(s)[i] = X(s)[i]; }
  void ConsumeAt(const StepContext&, const Segment& s, int64_t i) override {
    State(s)[i] = s.hyper->momentum * State(s)[i] - s.hyper->lr * G(s)[i];
    X(s)[i] = Mixed(s)[i] + State(s)[i];
  }
};

/// x+ = x - lr |x|/|Wg| Wg, norms per parameter.
class LayerWise final : public Toy {
 public:
  LayerWise()
      : Toy({.name = "layer-wise", .measure_scope = MeasureScope::kParameter, .measures = 2}) {}
  void ProduceAt(const StepContext&, const Segment& s, int64_t i) override { Sent(s)[i] = G(s)[i]; }
  void Measure(const StepContext&, std::span<const Segment> segments) override {
    for (const Segment& s : segments) {
      for (int64_t i = 0; i < s.n; ++i) {
        s.measure[0] += Mixed(s)[i] * Mixed(s)[i];
        s.measure[1] += X(s)[i] * X(s)[i];
      }
    }
  }
  void ConsumeAt(const StepContext&, const Segment& s, int64_t i) override {
    const double scale = std::sqrt(s.measure[1]) / (std::sqrt(s.measure[0]) + 1e-9);
    X(s)[i] -= s.hyper->lr * scale * Mixed(s)[i];
  }
};

/// x+ = W(x - lr g min(1, limit/|g|)), the norm over the whole model of this rank.
class Clipping final : public Toy {
 public:
  Clipping()
      : Toy({.name = "clipping",
             .hypers = {{.name = "limit", .initial = 3.0}},
             .measure_scope = MeasureScope::kModel,
             .measures = 1}) {}
  void Measure(const StepContext&, std::span<const Segment> segments) override {
    for (const Segment& s : segments) {
      for (int64_t i = 0; i < s.n; ++i) s.measure[0] += G(s)[i] * G(s)[i];
    }
  }
  void ProduceAt(const StepContext&, const Segment& s, int64_t i) override {
    const double scale = std::min(1.0, s.hyper->own[0] / std::sqrt(s.measure[0]));
    Sent(s)[i] = X(s)[i] - s.hyper->lr * scale * G(s)[i];
  }
};

/// x+ = W(x - lr (g + wd x)); delayed W x - lr (g + wd W x). The state counts silent steps: in
/// every fourth step nothing is exchanged.
class Plain final : public Toy {
 public:
  Plain() : Toy({.name = "plain", .states = {"silent"}, .delayed = "x+ = W x - lr (g + wd W x)"}) {}
  StepPlan Plan(int64_t step, const Hyper&) const override {
    if (step % 4 == 2) return {};
    return {Exchange{Collective::kNeighborAllreduce, step}};
  }
  void ProduceAt(const StepContext& ctx, const Segment& s, int64_t i) override {
    Sent(s)[i] = X(s)[i] - s.hyper->lr * (G(s)[i] + s.hyper->weight_decay * X(s)[i]);
    State(s)[i] += ctx.exchanged ? 0.0 : 1.0;
  }
};

/// x+ = W(x - lr g), but x stays as it is until step() was called.
class AtStep final : public Toy {
 public:
  AtStep() : Toy({.name = "at step", .consume = ConsumeTrigger::kStep}) {}
};

/// Keeps the entries above the message's mean magnitude, as (index, float) pairs: the number of
/// bytes depends on the data.
class LargestEntries final : public Codec {
 public:
  struct Entry {
    uint32_t index;
    float value;
  };
  static std::vector<Entry> Pick(int64_t n, const double* x) {
    double mean = 0.0;
    for (int64_t i = 0; i < n; ++i) mean += std::fabs(x[i]) / static_cast<double>(n);
    std::vector<Entry> entries;
    for (int64_t i = 0; i < n; ++i) {
      if (std::fabs(x[i]) > mean) {
        entries.push_back({static_cast<uint32_t>(i), static_cast<float>(x[i])});
      }
    }
    return entries;
  }
  const char* name() const override { return "largest entries"; }
  int64_t MaxBytes(DType, int64_t n) const override {
    return n * static_cast<int64_t>(sizeof(Entry));
  }
  int64_t Encode(DType, int64_t n, const void* x, std::byte* out) const override {
    const std::vector<Entry> entries = Pick(n, static_cast<const double*>(x));
    if (!entries.empty()) std::memcpy(out, entries.data(), entries.size() * sizeof(Entry));
    return static_cast<int64_t>(entries.size() * sizeof(Entry));
  }
  Status DecodeAdd(DType, int64_t n, std::span<const std::byte> bytes, double weight,
                   void* acc) const override {
    for (size_t at = 0; at + sizeof(Entry) <= bytes.size(); at += sizeof(Entry)) {
      Entry entry;
      std::memcpy(&entry, bytes.data() + at, sizeof entry);
      if (entry.index >= n) return absl::InvalidArgumentError("index out of range");
      static_cast<double*>(acc)[entry.index] += weight * static_cast<double>(entry.value);
    }
    return absl::OkStatus();
  }
};

/// x+ = y + sum w_ij (Q(y_j) - Q(y_i)) with y = x - lr g.
class Compressed final : public Toy {
 public:
  Compressed() : Toy({.name = "compressed"}) {}
  const Codec* codec() const override { return &codec_; }

 private:
  LargestEntries codec_;
};

}  // namespace bluefog::spine
