// What the parts of `bluefog perf` share: the options, which every rank process parses again, and
// the memory that all rank processes map. perf.cc starts the ranks, perf_rank.cc measures and
// reports, perf_bare.cc holds the limits that the engine is compared with, perf_distribution.cc and
// perf_slow_rank.cc what is asked for by --latency-distribution and --slow-rank.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include <bluefog/communicator.h>

namespace bluefog::tools {

inline constexpr int kMaxPerfRanks = 128;

struct PerfOptions {
  std::string op_name, bytes_text = "4K,1M,64M", buffers_text = "arena,private";
  std::string dtype_name = "float32", message_dtype_name, topology = "ring", json;
  std::string hierarchy;      ///< BLUEFOG_HIERARCHY of the ranks, if given.
  int nodes_per_machine = 0;  ///< BLUEFOG_NODES_PER_MACHINE of the ranks, if not 0.
  int ranks = 2;
  int iterations = 0;  ///< Per round; 0: by size.
  int rounds = 9;
  bool blocked = false;
  bool latency_distribution = false;
  int slow_rank = -1;  ///< Computes `factor` times as long between operations; -1: none.
  double factor = 2.0;
  double compute_us = 0.0;  ///< Between operations, with a slow rank; 0: as long as one takes.
  int area_fd = -1;         ///< Not -1: this process is a rank.

  // From the texts, by Parse.
  Op op = Op::kNeighborAllreduce;
  DType dtype = DType::kFloat32, message_dtype = DType::kFloat32;
  std::vector<int64_t> bytes;
  std::vector<bool> in_arena;
  Status Parse();
  int IterationsFor(int64_t size) const;
  int64_t LargestBytes() const;
};

/// A word that other processes wait for. Counts up; wraps.
struct alignas(64) SharedWord {
  std::atomic<uint32_t> value;
};

/// The memory all ranks map: words to meet at, times, and room for the bare exchanges. The same
/// layout on every rank, from the options alone; zeroed at the start. Pages that nobody touches
/// cost nothing.
class PerfArea {
 public:
  /// Times of one series of one rank: ours and bare.
  static constexpr int kSeries = 2;

  explicit PerfArea(const PerfOptions& options);
  int64_t bytes() const { return total_; }
  Status Map(int fd);

  static bool Has(const SharedWord& word, uint32_t target);
  /// Waits until `word` has reached `target`: by spinning and yielding, or (--blocked) asleep.
  void WaitFor(const SharedWord& word, uint32_t target) const;
  void Set(SharedWord& word, uint32_t value) const;
  /// Returns when all ranks have called it equally often.
  void Barrier();

  SharedWord& published(int rank) const { return Words(0)[rank]; }
  SharedWord& reduced(int rank) const { return Words(1)[rank]; }
  /// What `reader` no longer needs of `source`.
  SharedWord& consumed(int reader, int source) const { return Words(3)[reader * ranks_ + source]; }
  /// Nanoseconds by iteration of one case.
  std::span<int64_t> times(int rank, int series) const;
  /// CPU time of a rank by case.
  std::span<int64_t> cpu(int rank) const;
  /// One more number of a rank, for others to read after a barrier.
  int64_t& note(int rank) const;
  /// `data(rank, 0)`: its tensor; `data(rank, 1)`: its staging memory.
  std::byte* data(int rank, int which) const {
    return base_ + data_offset_ + (int64_t{rank} * 2 + which) * data_bytes_;
  }

 private:
  SharedWord* Words(int row) const {
    return reinterpret_cast<SharedWord*>(base_) + int64_t{row} * kMaxPerfRanks;
  }

  const int ranks_;
  const bool blocked_, crowded_;
  int64_t samples_, times_offset_, data_offset_, data_bytes_, total_;
  std::byte* base_ = nullptr;
  uint32_t generation_ = 0;
};

/// Works through chunks that the ranks hand each other in rings of `depth` places. All ranks call
/// Run equally often and meet at a barrier in between.
class Pipeline {
 public:
  Pipeline(PerfArea* area, int rank) : area_(area), rank_(rank) {}
  /// `stage(c)` puts this rank's chunk c where `readers` find it; `use(c)` works on chunk c of this
  /// rank and of all `sources`.
  Status Run(std::span<const int> sources, std::span<const int> readers, uint32_t chunks,
             uint32_t depth, const std::function<void(uint32_t)>& stage,
             const std::function<Status(uint32_t)>& use);

 private:
  PerfArea* const area_;
  const int rank_;
  uint32_t base_ = 0;  ///< Of all counters.
};

/// The same exchange without an engine: the limit. Driven by every rank at the same time.
class BareExchange {
 public:
  BareExchange(const PerfOptions& options, const Config& config, PerfArea* area, int rank);

  /// One exchange over `count` elements. `in` is this rank's tensor: area->data(rank, 0) with
  /// `in_arena`, private memory without. InvalidArgument where the kernels do not know the type.
  Status Run(const Neighborhood& neighborhood, bool in_arena, const std::byte* in, std::byte* out,
             int64_t count);
  /// For other work in the same area.
  Pipeline& pipeline() { return pipeline_; }

 private:
  Status Pipelined(const Neighborhood& neighborhood, bool in_arena, const std::byte* in,
                   std::byte* out, int64_t count);
  Status Reduced(bool in_arena, const std::byte* in, std::byte* out, int64_t count);
  void Meet();

  const Op op_;
  const DType dtype_, message_dtype_;
  const int rank_, size_;
  const int64_t element_bytes_, chunk_, eager_bytes_;
  PerfArea* const area_;
  Pipeline pipeline_;
  uint32_t base_ = 0;     ///< Of all published counters.
  uint32_t reduced_ = 0;  ///< Of all reduced counters.
};

/// By rank of order, `p` from 0 to 1. Not of nothing.
double Percentile(std::vector<double> values, double p);

/// How far the times spread: percentiles up to .999, and counts by classes of equal width on a
/// logarithmic scale.
nlohmann::ordered_json LatencyDistribution(const std::vector<double>& us);
/// The same as text, a bar for each class.
std::string DrawLatencyDistribution(const nlohmann::ordered_json& distribution);

/// What the other ranks lose when one computes longer between operations (--slow-rank), with `spec`
/// and, beside another operation, with an all-reduce of the same tensor. `op_us`: the time of the
/// operation alone, of rank 0. Rank 0 prints and fills `row`.
Status MeasureSlowRank(const PerfOptions& options, PerfArea* area, Communicator* comm,
                       const OpSpec& spec, double op_us, nlohmann::ordered_json* row);

/// The body of a rank process; returns its exit code. Rank 0 prints the table and writes the JSON.
int RunPerfRank(const PerfOptions& options);

}  // namespace bluefog::tools
