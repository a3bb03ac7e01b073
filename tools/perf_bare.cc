// The limits of `bluefog perf`: what the hardware gives when nothing is matched, checked or
// scheduled. Arena: the kernel reads this rank's and the peers' tensors where they lie. Private:
// chunks are copied to a ring in shared memory while the kernel works on those that have arrived;
// the ring is short, so that it stays in cache.
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "kernels/kernels.h"
#include "perf.h"

namespace bluefog::tools {
namespace {

constexpr int64_t kPage = 4096;
/// The ring of staged chunks, 1 MiB in all: from 4 MiB on it leaves the cache, which costs most
/// (64 MiB took 25 ms instead of 15). Below, neither size nor number of the chunks matters much.
constexpr int64_t kRingChunkBytes = 256 << 10;
constexpr uint32_t kRingDepth = 4;
/// As in the engine: above, the output is written past the caches.
constexpr int64_t kStreamingBytes = int64_t{16} << 20;

int64_t RoundUp(int64_t value) { return (value + kPage - 1) / kPage * kPage; }

/// About 20 us.
constexpr int kSpins = 500;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

bool Reached(uint32_t value, uint32_t target) { return static_cast<int32_t>(value - target) >= 0; }

}  // namespace

int PerfOptions::IterationsFor(int64_t size) const {
  if (iterations > 0) return iterations;
  return static_cast<int>(
      std::clamp<int64_t>((int64_t{64} << 20) / std::max<int64_t>(size, 1), 3, 200));
}

int64_t PerfOptions::LargestBytes() const { return *std::max_element(bytes.begin(), bytes.end()); }

PerfArea::PerfArea(const PerfOptions& options)
    : ranks_(options.ranks),
      blocked_(options.blocked),
      crowded_(options.ranks > sysconf(_SC_NPROCESSORS_ONLN)) {
  samples_ = 0;
  for (const int64_t bytes : options.bytes) {
    samples_ = std::max(samples_, int64_t{options.rounds} * options.IterationsFor(bytes));
  }
  times_offset_ = int64_t{sizeof(SharedWord)} * (3 * kMaxPerfRanks + ranks_ * ranks_);
  data_offset_ = RoundUp(times_offset_ + ranks_ * (kSeries * samples_ + kMaxPerfRanks + 1) * 8);
  data_bytes_ = RoundUp(std::max(options.LargestBytes(), kRingDepth * kRingChunkBytes) + 64);
  total_ = data_offset_ + 2 * ranks_ * data_bytes_;
}

Status PerfArea::Map(int fd) {
  void* p = mmap(nullptr, static_cast<size_t>(total_), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) {
    return absl::ResourceExhaustedError("cannot map " + std::to_string(total_) +
                                        " bytes of shared memory; use smaller --bytes");
  }
  base_ = static_cast<std::byte*>(p);
  return absl::OkStatus();
}

std::span<int64_t> PerfArea::times(int rank, int series) const {
  auto* p = reinterpret_cast<int64_t*>(base_ + times_offset_);
  return {p + (int64_t{rank} * kSeries + series) * samples_, static_cast<size_t>(samples_)};
}

std::span<int64_t> PerfArea::cpu(int rank) const {
  auto* p = reinterpret_cast<int64_t*>(base_ + times_offset_);
  return {p + int64_t{ranks_} * kSeries * samples_ + int64_t{rank} * kMaxPerfRanks, kMaxPerfRanks};
}

int64_t& PerfArea::note(int rank) const {
  auto* p = reinterpret_cast<int64_t*>(base_ + times_offset_);
  return p[int64_t{ranks_} * (kSeries * samples_ + kMaxPerfRanks) + rank];
}

bool PerfArea::Has(const SharedWord& word, uint32_t target) {
  return Reached(word.value.load(std::memory_order_acquire), target);
}

void PerfArea::WaitFor(const SharedWord& word, uint32_t target) const {
  // With a core for each rank a short wait is not worth giving it up.
  for (int i = 0; i < (blocked_ || crowded_ ? 0 : kSpins); ++i) {
    if (Has(word, target)) return;
    Pause();
  }
  for (uint32_t now; !Reached(now = word.value.load(std::memory_order_acquire), target);) {
    if (blocked_) {
      syscall(SYS_futex, &word.value, FUTEX_WAIT, now, nullptr, nullptr, 0);
    } else {
      sched_yield();
    }
  }
}

void PerfArea::Set(SharedWord& word, uint32_t value) const {
  word.value.store(value, std::memory_order_release);
  if (blocked_) syscall(SYS_futex, &word.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void PerfArea::Barrier() {
  SharedWord& arrived = Words(2)[0];
  SharedWord& generation = Words(2)[1];
  ++generation_;
  const uint32_t all = generation_ * static_cast<uint32_t>(ranks_);
  if (arrived.value.fetch_add(1, std::memory_order_acq_rel) + 1 == all) {
    Set(generation, generation_);
  } else {
    WaitFor(generation, generation_);
  }
}

BareExchange::BareExchange(const PerfOptions& options, const Config& config, PerfArea* area,
                           int rank)
    : op_(options.op),
      dtype_(options.dtype),
      message_dtype_(options.message_dtype),
      rank_(rank),
      size_(options.ranks),
      element_bytes_(SizeOf(options.dtype)),
      chunk_(std::max<int64_t>(1, config.chunk_bytes / element_bytes_)),
      eager_bytes_(config.eager_bytes),
      area_(area),
      pipeline_(area, rank) {}

Status BareExchange::Run(const Neighborhood& neighborhood, bool in_arena, const std::byte* in,
                         std::byte* out, int64_t count) {
  if (op_ == Op::kBarrier) {
    Meet();
    return absl::OkStatus();
  }
  if (op_ == Op::kAllreduce || op_ == Op::kHierarchicalNeighborAllreduce) {
    return Reduced(in_arena, in, out, count);
  }
  return Pipelined(neighborhood, in_arena, in, out, count);
}

void BareExchange::Meet() {
  area_->Set(area_->published(rank_), ++base_);
  for (int r = 0; r < size_; ++r) area_->WaitFor(area_->published(r), base_);
}

Status Pipeline::Run(std::span<const int> sources, std::span<const int> readers, uint32_t chunks,
                     uint32_t depth, const std::function<void(uint32_t)>& stage,
                     const std::function<Status(uint32_t)>& use) {
  uint32_t staged = 0;
  // The place of the next chunk is free once all readers are done with what lay there.
  const auto free_at = [&] { return base_ + staged + 1 - depth; };
  const auto stage_next = [&] {
    stage(staged);
    area_->Set(area_->published(rank_), base_ + ++staged);
  };
  const auto try_stage = [&] {
    if (staged == chunks) return false;
    for (const int r : readers) {
      if (staged >= depth && !area_->Has(area_->consumed(r, rank_), free_at())) return false;
    }
    stage_next();
    return true;
  };
  for (uint32_t c = 0; c < chunks; ++c) {
    // The next chunk is staged if that is possible without waiting, this one must be.
    while (staged <= c + 1 && try_stage()) {
    }
    if (staged <= c) {
      for (const int r : readers) area_->WaitFor(area_->consumed(r, rank_), free_at());
      stage_next();
    }
    for (const int s : sources) {
      SharedWord& published = area_->published(s);
      while (!area_->Has(published, base_ + c + 1) && try_stage()) {  // Better than idling.
      }
      area_->WaitFor(published, base_ + c + 1);
    }
    if (Status status = use(c); !status.ok()) return status;
    for (const int s : sources) area_->Set(area_->consumed(rank_, s), base_ + c + 1);
  }
  base_ += chunks;
  return absl::OkStatus();
}

// Publish, wait for the sources, combine; for neighbor_allreduce, broadcast and allgather.
Status BareExchange::Pipelined(const Neighborhood& neighborhood, bool in_arena, const std::byte* in,
                               std::byte* out, int64_t count) {
  std::vector<int> sources, readers;
  const bool everybody = op_ == Op::kAllgather;
  if (op_ == Op::kNeighborAllreduce) {
    for (const Edge& e : neighborhood.in) sources.push_back(e.rank);
    for (const Edge& e : neighborhood.out) readers.push_back(e.rank);
  } else {
    for (int r = 0; r < size_; ++r) {
      if (r == rank_) continue;
      if (everybody || r == 0) sources.push_back(r);
      if (everybody || rank_ == 0) readers.push_back(r);
    }
  }
  const bool narrow = message_dtype_ != dtype_;
  in_arena = in_arena && !narrow;
  const int64_t chunk = in_arena ? std::max<int64_t>(count, 1) : kRingChunkBytes / element_bytes_;
  const auto chunks = static_cast<uint32_t>(std::max<int64_t>(1, (count + chunk - 1) / chunk));
  const bool streaming =
      count * element_bytes_ * static_cast<int64_t>(sources.size() + 2) > kStreamingBytes;
  const auto bytes_of = [&](uint32_t c) {
    return static_cast<size_t>(std::min(chunk, count - c * chunk) * element_bytes_);
  };
  const auto ring = [&](int source, uint32_t c) {
    return area_->data(source, 1) + int64_t{c % kRingDepth} * chunk * element_bytes_;
  };
  const auto at = [&](int source, uint32_t c) -> const std::byte* {
    if (source == rank_) return in + c * chunk * element_bytes_;
    return in_arena ? area_->data(source, 0) : ring(source, c);
  };

  const auto stage = [&](uint32_t c) {
    if (narrow) {
      const int64_t n = static_cast<int64_t>(bytes_of(c)) / element_bytes_;
      return kernels::Narrow(dtype_, message_dtype_, n, at(rank_, c), ring(rank_, c));
    }
    if (in_arena || readers.empty()) return;
    std::memcpy(ring(rank_, c), at(rank_, c), bytes_of(c));
  };
  std::vector<kernels::Term> terms;
  const auto use = [&](uint32_t c) -> Status {
    std::byte* to = out + c * chunk * element_bytes_;
    const size_t bytes = bytes_of(c);
    if (op_ == Op::kNeighborAllreduce) {
      const int64_t n = static_cast<int64_t>(bytes) / element_bytes_;
      if (narrow) {
        terms.clear();
        for (const Edge& e : neighborhood.in) terms.push_back({at(e.rank, c), e.weight});
        kernels::MixNarrow(dtype_, message_dtype_, n, to, 1.0, at(rank_, c), ring(rank_, c), terms);
        return absl::OkStatus();
      }
      terms.assign(1, {at(rank_, c), neighborhood.self_weight});
      for (const Edge& e : neighborhood.in) terms.push_back({at(e.rank, c), e.weight});
      return neighborhood.uniform ? kernels::SumDivide(dtype_, n, to, terms,
                                                       static_cast<double>(terms.size()), streaming)
                                  : kernels::WeightedSum(dtype_, n, to, terms, streaming);
    }
    if (op_ == Op::kBroadcast) {
      std::memcpy(to, at(0, c), bytes);
    } else {
      for (int r = 0; r < size_; ++r) std::memcpy(to + r * count * element_bytes_, at(r, c), bytes);
    }
    return absl::OkStatus();
  };
  return pipeline_.Run(sources, readers, chunks, kRingDepth, stage, use);
}

// allreduce: small, everybody sums everything; large, each rank its own shard, which is then handed
// round.
Status BareExchange::Reduced(bool in_arena, const std::byte* in, std::byte* out, int64_t count) {
  const auto begin_of = [&](int rank) { return count * rank / size_; };
  const bool one_shot = count * element_bytes_ <= eager_bytes_;
  // Private tensors are staged shard by shard, all ranks' first chunks first.
  const int which = in_arena ? 0 : 1;
  const int64_t shard = one_shot ? count : count / size_ + 1;
  const int64_t chunk = std::min(chunk_, std::max<int64_t>(shard, 1));
  const auto chunks = static_cast<uint32_t>(std::max<int64_t>(1, (shard + chunk - 1) / chunk));
  const bool streaming = !one_shot && count * element_bytes_ * 3 > kStreamingBytes;
  const auto piece = [&](int rank, uint32_t c, int64_t* begin) {
    const int64_t end = one_shot ? count : begin_of(rank + 1);
    *begin = std::min(end, (one_shot ? 0 : begin_of(rank)) + int64_t{c} * chunk);
    return std::min(chunk, end - *begin) * element_bytes_;
  };
  const auto copy_out = [&](uint32_t c) {
    for (int r = 0; r < size_; ++r) {
      if (r == rank_) continue;
      int64_t begin = 0;
      const int64_t bytes = piece(r, c, &begin);
      area_->WaitFor(area_->reduced(r), reduced_ + c + 1);
      std::memcpy(out + begin * element_bytes_,
                  area_->data(r, in_arena ? 1 : 0) + begin * element_bytes_,
                  static_cast<size_t>(bytes));
    }
  };
  std::vector<kernels::Term> terms;
  for (uint32_t c = 0; c < chunks; ++c) {
    int64_t begin = 0;
    if (!in_arena) {
      for (int r = 0; r < size_; ++r) {
        if (r == rank_ && !one_shot) continue;
        const int64_t bytes = piece(r, c, &begin);
        std::memcpy(area_->data(rank_, 1) + begin * element_bytes_, in + begin * element_bytes_,
                    static_cast<size_t>(bytes));
        if (one_shot) break;
      }
    }
    area_->Set(area_->published(rank_), base_ + c + 1);
    for (int r = 0; r < size_; ++r) area_->WaitFor(area_->published(r), base_ + c + 1);
    const int64_t n = piece(rank_, c, &begin) / element_bytes_;
    terms.clear();
    for (int r = 0; r < size_; ++r) {
      terms.push_back({(r == rank_ ? in : area_->data(r, which)) + begin * element_bytes_, 1.0});
    }
    std::byte* to = one_shot ? out : area_->data(rank_, in_arena ? 1 : 0);
    to += begin * element_bytes_;
    if (Status s = kernels::SumDivide(dtype_, n, to, terms, size_, false); !s.ok()) return s;
    if (one_shot) continue;
    area_->Set(area_->reduced(rank_), reduced_ + c + 1);
    // Its own shard belongs into the output too.
    kernels::Term own{to, 1.0};
    if (Status s =
            kernels::WeightedSum(dtype_, n, out + begin * element_bytes_, {&own, 1}, streaming);
        !s.ok()) {
      return s;
    }
    if (c > 0) copy_out(c - 1);
  }
  if (!one_shot) copy_out(chunks - 1);
  base_ += chunks;
  reduced_ += chunks;
  return absl::OkStatus();
}

}  // namespace bluefog::tools
