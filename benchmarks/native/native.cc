// What the benchmark scripts call through ctypes in the process of each rank: the engine through
// its C++ interface, and the same work without an engine (bare), which is the limit. Not
// thread-safe; every rank makes the same calls in the same order. Tensors are float32.
#include "native/native.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <bluefog/communicator.h>
#include <bluefog/distributed_optimizer.h>
#include <bluefog/elementwise.h>

#include "base/clock.h"
#include "kernels/kernels.h"
#include "perf.h"

namespace bluefog::benchmarks {
namespace {

using tools::BareExchange;
using tools::PerfArea;
using tools::PerfOptions;

constexpr DType kType = DType::kFloat32;
constexpr int64_t kTile = (32 << 10) / 4;
constexpr int64_t kChunk = (128 << 10) / 4;
/// Chunks in the ring of payloads; 1 MiB in all stays in cache.
constexpr uint32_t kRingDepth = 8;

struct Bench {
  int rank = 0;
  PerfOptions options;
  Neighborhood neighborhood;
  std::vector<int> sources, readers;
  std::optional<PerfArea> area;
  std::optional<BareExchange> bare;
  std::unique_ptr<Communicator> comm;
  std::unique_ptr<DistributedOptimizer> optimizer;
  std::vector<std::shared_ptr<std::byte>> memory;
  std::vector<std::string> names;
  std::vector<ParameterBinding> bindings;
  std::string error;
};
Bench& bench() {
  static Bench* const instance = new Bench;  // The script leaves; nothing is destroyed behind it.
  return *instance;
}

Status Average(const void* in, void* out, int64_t count) {
  OpSpec spec;
  spec.name = "bench" + std::to_string(count);  // A name stands for one shape.
  spec.input = TensorView::Of(const_cast<void*>(in), count, kType);
  spec.output = TensorView::Of(out, count, kType);
  StatusOr<std::shared_ptr<Work>> work = bench().comm->Submit(std::move(spec));
  return work.ok() ? (*work)->Wait() : work.status();
}

// DecentLaM: y = x - lr g; v = beta v + (x - mix(y)); x = x - v. The kernels of the engine and the
// plugin, chunk by chunk, so that x is still in cache when it is updated. `ring`: the payload lies
// in a short ring; else it is as large as the parameter.
Status BareStep(float* x, const float* g, float* v, int64_t count, const Hyper& hyper, bool ring) {
  Bench& b = bench();
  const auto chunks = static_cast<uint32_t>((count + kChunk - 1) / kChunk);
  const uint32_t depth = ring ? kRingDepth : chunks;
  const auto payload = [&](int rank, uint32_t c) {
    return reinterpret_cast<float*>(b.area->data(rank, 1)) + c % depth * kChunk;
  };
  const auto stage = [&](uint32_t c) {
    const int64_t begin = c * kChunk, n = std::min(kChunk, count - begin);
    elementwise::MulAdd(kType, n, payload(b.rank, c), -hyper.lr, g + begin, x + begin);
  };
  alignas(64) static float mixed[kTile];
  std::vector<kernels::Term> terms;
  const auto use = [&](uint32_t c) -> Status {
    const int64_t end = std::min(kChunk, count - c * kChunk);
    for (int64_t begin = 0; begin < end; begin += kTile) {
      const int64_t n = std::min(kTile, end - begin);
      terms.assign(1, {payload(b.rank, c) + begin, b.neighborhood.self_weight});
      for (const Edge& e : b.neighborhood.in) {
        terms.push_back({payload(e.rank, c) + begin, e.weight});
      }
      Status status = b.neighborhood.uniform ? kernels::SumDivide(kType, n, mixed, terms,
                                                                  static_cast<double>(terms.size()))
                                             : kernels::WeightedSum(kType, n, mixed, terms);
      if (!status.ok()) return status;
      const int64_t at = c * kChunk + begin;
      elementwise::HeavyBall(kType, n, x + at, v + at, hyper.momentum, mixed);
    }
    return absl::OkStatus();
  };
  return b.bare->pipeline().Run(b.sources, b.readers, chunks, depth, stage, use);
}

}  // namespace

int64_t Checked(absl::FunctionRef<Status()> body) {
  const Status status = body();
  if (status.ok()) return 0;
  bench().error = status.ToString();
  return -1;
}

int64_t Timed(absl::FunctionRef<Status()> body) {
  bench().area->Barrier();
  const int64_t start = NowNs();
  const int64_t code = Checked(body);
  return code < 0 ? code : NowNs() - start;
}

}  // namespace bluefog::benchmarks

using namespace bluefog;              // NOLINT
using namespace bluefog::benchmarks;  // NOLINT

extern "C" {

const char* bench_error() { return bench().error.c_str(); }

/// Maps the file `path`, of which every rank uses `bytes` twice. `blocked`: barriers sleep.
int64_t bench_open(const char* path, int rank, int ranks, int64_t bytes, int blocked) {
  return Checked([&]() -> Status {
    Bench& b = bench();
    b.rank = rank;
    b.options.ranks = ranks;
    b.options.blocked = blocked != 0;
    b.options.bytes = {bytes};
    StatusOr<TopologySequence> topology = MakeTopology("ring", ranks);
    if (!topology.ok()) return topology.status();
    b.neighborhood = topology->at(0).neighborhood(rank);
    for (const Edge& e : b.neighborhood.in) b.sources.push_back(e.rank);
    for (const Edge& e : b.neighborhood.out) b.readers.push_back(e.rank);
    b.area.emplace(b.options);
    const int fd = open(path, O_RDWR);
    if (fd < 0 || ftruncate(fd, b.area->bytes()) != 0) {
      return absl::ResourceExhaustedError(std::string("cannot use ") + path);
    }
    if (Status s = b.area->Map(fd); !s.ok()) return s;
    close(fd);
    b.bare.emplace(b.options, Config(), &*b.area, rank);
    return absl::OkStatus();
  });
}

/// Time of `n` barriers: how far from each other the cores of the ranks are.
int64_t bench_barriers(int n) {
  return Timed([&]() -> Status {
    for (int i = 0; i < n; ++i) bench().area->Barrier();
    return absl::OkStatus();
  });
}
void bench_barrier() { bench().area->Barrier(); }
/// This rank's tensor in the area, which the bare exchange reads in place.
void* bench_tensor() { return bench().area->data(bench().rank, 0); }

/// Joins a job of its own, beside that of the Python module. `names`: for bench_average_many.
int64_t bench_join(const char* coordinator, const char* job, int names) {
  return Checked([&]() -> Status {
    StatusOr<Config> config = Config::FromEnvironment();
    if (!config.ok()) return config.status();
    CommunicatorOptions options;
    options.config = *config;
    options.config.coordinator = coordinator;
    options.config.job_id = job;
    // One job's heartbeats in a process are enough.
    options.config.heartbeat_ms = 600'000;
    options.config.suspect_ms = 1'200'000;
    options.config.dead_ms = 1'800'000;
    auto comm = Communicator::Create(options);
    if (!comm.ok()) return comm.status();
    bench().comm = *std::move(comm);
    for (int i = 0; i < names; ++i) bench().names.push_back("many." + std::to_string(i));
    StatusOr<TopologySequence> topology = MakeTopology("ring", bench().options.ranks);
    return topology.ok() ? bench().comm->SetTopology(*std::move(topology)) : topology.status();
  });
}

void bench_leave() {
  bench().optimizer.reset();
  bench().memory.clear();
  bench().comm.reset();
}

/// Memory in the arena; null on failure.
void* bench_allocate(int64_t bytes) {
  auto memory = bench().comm->Allocate(bytes);
  if (!memory.ok()) return nullptr;
  bench().memory.push_back(*std::move(memory));
  return bench().memory.back().get();
}

int64_t bench_average(const void* in, void* out, int64_t count) {
  return Timed([&] { return Average(in, out, count); });
}

/// `repeat` averages, one after the other.
int64_t bench_averages(const void* in, void* out, int64_t count, int repeat) {
  return Timed([&]() -> Status {
    for (int i = 0; i < repeat; ++i) {
      if (Status s = Average(in, out, count); !s.ok()) return s;
    }
    return absl::OkStatus();
  });
}

/// `n` averages, in flight together.
int64_t bench_average_many(int n, void* const* in, void* const* out, const int64_t* counts) {
  return Timed([&]() -> Status {
    std::vector<std::shared_ptr<Work>> works;
    works.reserve(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
      OpSpec spec;
      spec.name = bench().names[static_cast<size_t>(i)];
      spec.input = TensorView::Of(in[i], counts[i], kType);
      spec.output = TensorView::Of(out[i], counts[i], kType);
      auto work = bench().comm->Submit(std::move(spec));
      if (!work.ok()) return work.status();
      works.push_back(*std::move(work));
    }
    for (const auto& work : works) {
      if (Status s = work->Wait(); !s.ok()) return s;
    }
    return absl::OkStatus();
  });
}

/// The limit. `arena`: `in` is bench_tensor().
int64_t bench_bare(int arena, const void* in, void* out, int64_t count) {
  return Timed([&] {
    return bench().bare->Run(bench().neighborhood, arena != 0, static_cast<const std::byte*>(in),
                             static_cast<std::byte*>(out), count);
  });
}

int64_t bench_optimizer(int n, const int64_t* counts) {
  return Checked([&]() -> Status {
    DistributedOptimizerOptions options;
    options.plugin = "decentlam";
    for (int i = 0; i < n; ++i) {
      ParameterInfo& info = options.params.emplace_back();
      info.name = "p" + std::to_string(i);
      info.count = counts[i];
    }
    auto optimizer = DistributedOptimizer::Create(bench().comm.get(), std::move(options));
    if (!optimizer.ok()) return optimizer.status();
    bench().optimizer = *std::move(optimizer);
    bench().bindings.resize(static_cast<size_t>(n));
    return absl::OkStatus();
  });
}

/// `repeat` steps of the optimizer over its parameters.
int64_t bench_step(void* const* x, void* const* g, void* const* v, double lr, double momentum,
                   int repeat) {
  const Hyper hyper{.lr = lr, .momentum = momentum};
  for (size_t i = 0; i < bench().bindings.size(); ++i) {
    bench().bindings[i] = {.x = x[i], .g = g[i], .state = {v[i]}};
  }
  return Timed([&]() -> Status {
    for (int i = 0; i < repeat; ++i) {
      if (Status s = bench().optimizer->Step(bench().bindings, {&hyper, 1}); !s.ok()) return s;
    }
    return absl::OkStatus();
  });
}

int64_t bench_bare_step(float* x, const float* g, float* v, int64_t count, double lr,
                        double momentum, int ring) {
  return Timed(
      [&] { return BareStep(x, g, v, count, {.lr = lr, .momentum = momentum}, ring != 0); });
}

int64_t bench_control_messages() { return bench().comm->stats().control_messages; }
int64_t bench_engine_allocations() { return bench().comm->stats().allocations; }

}  // extern "C"
