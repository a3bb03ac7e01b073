// Speed of the kernels against what memory allows. Read ratios between rows of one run, not
// absolute figures: other processes share the memory.
//   kernels_bench --benchmark_enable_random_interleaving --benchmark_repetitions=9
// GB/s counts every byte read or written by the algorithm once ((k+1) x size for k terms); ordinary
// stores also read the lines they write, which is not counted, so streaming can look better than
// memcpy.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <benchmark/benchmark.h>
#include <bluefog/optimizer.h>

#include "kernels/kernels.h"

namespace bluefog {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kTileBytes = 16 << 10;

// Pages that exist and are not zero.
class Vector {
 public:
  explicit Vector(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)), data_(::operator new (bytes_, std::align_val_t{4096})) {
    madvise(data_, bytes_, MADV_HUGEPAGE);
    std::fill_n(floats(), bytes_ / sizeof(float), 0.5f);
  }
  ~Vector() { ::operator delete (data_, std::align_val_t{4096}); }
  Vector(const Vector&) = delete;
  Vector& operator=(const Vector&) = delete;
  float* floats() { return static_cast<float*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

std::vector<std::unique_ptr<Vector>> Vectors(size_t count, int64_t bytes) {
  std::vector<std::unique_ptr<Vector>> vectors;
  for (size_t i = 0; i < count; ++i) vectors.push_back(std::make_unique<Vector>(bytes));
  return vectors;
}

void Report(benchmark::State& state, int64_t bytes) {
  state.counters["GB/s"] = benchmark::Counter(static_cast<double>(bytes) * 1e-9,
                                              benchmark::Counter::kIsIterationInvariantRate);
  state.SetLabel(kernels::ActiveTarget());
}

void Memcpy(benchmark::State& state) {
  const int64_t bytes = state.range(0);
  auto v = Vectors(2, bytes);
  for (auto _ : state) {
    std::memcpy(v[0]->floats(), v[1]->floats(), static_cast<size_t>(bytes));
    benchmark::ClobberMemory();
  }
  Report(state, 2 * bytes);
}
BENCHMARK(Memcpy)->Arg(kTileBytes)->Arg(64 * kMiB);

// range: bytes, k, streaming
void WeightedSum(benchmark::State& state) {
  const int64_t bytes = state.range(0);
  const auto k = static_cast<size_t>(state.range(1));
  auto v = Vectors(k + 1, bytes);
  std::vector<kernels::Term> terms;
  for (size_t j = 1; j <= k; ++j) terms.push_back({v[j]->floats(), 1.0 / static_cast<double>(k)});
  for (auto _ : state) {
    kernels::WeightedSum(DType::kFloat32, bytes / 4, v[0]->floats(), terms, state.range(2) != 0)
        .IgnoreError();
    benchmark::ClobberMemory();
  }
  Report(state, static_cast<int64_t>(k + 1) * bytes);
}
BENCHMARK(WeightedSum)
    ->ArgNames({"bytes", "k", "streaming"})
    ->ArgsProduct({{64 * kMiB}, {1, 2, 3, 4, 5, 8}, {0, 1}})
    ->ArgsProduct({{kTileBytes}, {1, 2, 3, 4, 5, 8}, {0}});

void SumDivide(benchmark::State& state) {
  const int64_t bytes = state.range(0);
  const auto k = static_cast<size_t>(state.range(1));
  auto v = Vectors(k + 1, bytes);
  std::vector<kernels::Term> terms;
  for (size_t j = 1; j <= k; ++j) terms.push_back({v[j]->floats(), 1.0});
  for (auto _ : state) {
    kernels::SumDivide(DType::kFloat32, bytes / 4, v[0]->floats(), terms, static_cast<double>(k),
                       state.range(2) != 0)
        .IgnoreError();
    benchmark::ClobberMemory();
  }
  Report(state, static_cast<int64_t>(k + 1) * bytes);
}
BENCHMARK(SumDivide)
    ->ArgNames({"bytes", "k", "streaming"})
    ->ArgsProduct({{64 * kMiB}, {2, 3}, {0, 1}})
    ->ArgsProduct({{kTileBytes}, {2, 3}, {0}});

// Float32 rounded to messages. range: bytes of the tensor, type
void Narrow(benchmark::State& state) {
  const int64_t bytes = state.range(0);
  auto v = Vectors(2, bytes);
  for (auto _ : state) {
    kernels::Narrow(DType::kFloat32, static_cast<DType>(state.range(1)), bytes / 4, v[0]->floats(),
                    v[1]->floats());
    benchmark::ClobberMemory();
  }
  Report(state, bytes + bytes / 2);
}
// The average with one peer's rounded message.
void MixNarrow(benchmark::State& state) {
  const int64_t bytes = state.range(0);
  auto v = Vectors(4, bytes);
  const kernels::Term term{v[3]->floats(), 0.5};
  for (auto _ : state) {
    kernels::MixNarrow(DType::kFloat32, static_cast<DType>(state.range(1)), bytes / 4,
                       v[0]->floats(), 1.0, v[1]->floats(), v[2]->floats(), {&term, 1});
    benchmark::ClobberMemory();
  }
  Report(state, 3 * bytes);
}
const std::vector<int64_t> kMessages = {static_cast<int64_t>(DType::kFloat16),
                                        static_cast<int64_t>(DType::kBFloat16)};
BENCHMARK(Narrow)->ArgNames({"bytes", "type"})->ArgsProduct({{kTileBytes, 64 * kMiB}, kMessages});
BENCHMARK(MixNarrow)
    ->ArgNames({"bytes", "type"})
    ->ArgsProduct({{kTileBytes, 64 * kMiB}, kMessages});

// A step of one optimizer on 64 MiB of parameters as the engine runs it: produce in tiles, then per
// tile the average with one peer's payload and consume.
void Step(benchmark::State& state, const char* name) {
  const int64_t bytes = 64 * kMiB;
  const int64_t tile = kTileBytes / 4;
  auto v = Vectors(5, bytes);  // x, g, state, own payload, the peer's payload
  Vector mixed(kTileBytes);
  auto optimizer = MakeOptimizer(name);
  if (!optimizer.ok())
    return state.SkipWithError(std::string(optimizer.status().message()).c_str());
  const Hyper hyper{.lr = 1e-3, .momentum = 0.9, .weight_decay = 0.0};
  StepContext context;
  context.size = 2;
  const auto segment = [&](int64_t i) {
    Segment s;
    s.n = tile;
    s.x = v[0]->floats() + i;
    s.g = v[1]->floats() + i;
    s.state[0] = v[2]->floats() + i;
    s.payload[0] = v[3]->floats() + i;
    s.mixed[0] = mixed.floats();
    s.hyper = &hyper;
    return s;
  };
  for (auto _ : state) {
    for (int64_t i = 0; i < bytes / 4; i += tile) {
      const Segment s = segment(i);
      (*optimizer)->Produce(context, std::span(&s, 1));
    }
    for (int64_t i = 0; i < bytes / 4; i += tile) {
      const Segment s = segment(i);
      const kernels::Term terms[] = {{s.payload[0], 1.0}, {v[4]->floats() + i, 1.0}};
      kernels::SumDivide(DType::kFloat32, tile, mixed.floats(), terms, 2.0).IgnoreError();
      (*optimizer)->Consume(context, std::span(&s, 1)).IgnoreError();
    }
    benchmark::ClobberMemory();
  }
  Report(state, bytes);
}
BENCHMARK_CAPTURE(Step, dsgd, "dsgd");
BENCHMARK_CAPTURE(Step, pmsgd, "pmsgd");
BENCHMARK_CAPTURE(Step, dmsgd, "dmsgd");
BENCHMARK_CAPTURE(Step, decentlam, "decentlam");

// What a loop written for DecentLaM alone needs: the bound for Step/decentlam. The compiler
// vectorises it for the machine it runs on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NATIVE \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), optimize("O3")))
#else
#define NATIVE
#endif
NATIVE void FusedProduce(int64_t n, const float* x, const float* g, float lr, float* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] - lr * g[i];
}
NATIVE void FusedConsume(int64_t n, const float* own, const float* peer, float beta, float* x,
                         float* v) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    v[i] = beta * v[i] + (x[i] - 0.5f * (own[i] + peer[i]));
    x[i] -= v[i];
  }
}
void FusedDecentlam(benchmark::State& state) {
  const int64_t bytes = 64 * kMiB;
  auto v = Vectors(5, bytes);
  for (auto _ : state) {
    FusedProduce(bytes / 4, v[0]->floats(), v[1]->floats(), 1e-3f, v[3]->floats());
    FusedConsume(bytes / 4, v[3]->floats(), v[4]->floats(), 0.9f, v[0]->floats(), v[2]->floats());
    benchmark::ClobberMemory();
  }
  Report(state, bytes);
}
BENCHMARK(FusedDecentlam);

}  // namespace
}  // namespace bluefog
