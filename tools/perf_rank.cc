// One rank of `bluefog perf`: runs the operation and its limit in turn, round by round, with a
// barrier before every iteration. The time of an iteration is that of the slowest rank. Outputs are
// poisoned before every round and checked after it.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include <fmt/format.h>

#include "base/clock.h"
#include "format.h"
#include "perf.h"

namespace bluefog::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kPattern = 1021;

// Element i of rank r is Base(r) + Fraction(i), so that what comes out is a + b * Fraction(i).
double Base(int rank) { return 1.0 + 0.25 * rank; }
double Fraction(int64_t i) { return static_cast<double>(i % kPattern) / kPattern; }

template <typename T>
void FillAs(std::byte* data, int64_t count, int rank) {
  auto* p = reinterpret_cast<T*>(data);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(Base(rank) + Fraction(i));
}

/// What rounding to a type that numbers travel in may change, relatively.
double RoundingOf(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 8e-3;
    case DType::kFloat16:
      return 1e-3;
    case DType::kFloat32:
      return 1e-5;
    default:
      return 1e-13;
  }
}

/// Index of the first element that is not a + b * Fraction(i), or -1.
template <typename T>
int64_t FirstWrongAs(const std::byte* data, int64_t count, double a, double b, DType message) {
  const auto* p = reinterpret_cast<const T*>(data);
  const double tolerance = (std::abs(a) + std::abs(b)) * RoundingOf(message);
  for (int64_t i = 0; i < count; ++i) {
    if (!(std::abs(static_cast<double>(p[i]) - (a + b * Fraction(i))) <= tolerance)) return i;
  }
  return -1;
}

/// Private memory, zeroed, that is not recycled between cases.
class PrivateMemory {
 public:
  explicit PrivateMemory(int64_t bytes)
      : bytes_(static_cast<size_t>(std::max<int64_t>(bytes, 64))) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data_ = p == MAP_FAILED ? nullptr : static_cast<std::byte*>(p);
  }
  ~PrivateMemory() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  PrivateMemory(const PrivateMemory&) = delete;
  PrivateMemory& operator=(const PrivateMemory&) = delete;
  std::byte* data() const { return data_; }

 private:
  size_t bytes_;
  std::byte* data_;
};

int64_t OwnCpuNs() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto ns = [](const timeval& t) {
    return int64_t{t.tv_sec} * 1'000'000'000 + int64_t{t.tv_usec} * kMicrosecond;
  };
  return ns(usage.ru_utime) + ns(usage.ru_stime);
}

/// What all processors of the machine have been busy, since it started.
int64_t MachineBusyNs() {
  std::ifstream stat("/proc/stat");
  std::string word;
  stat >> word;
  int64_t ticks = 0, value = 0;
  for (int column = 0; column < 8 && stat >> value; ++column) {
    if (column != 3 && column != 4) ticks += value;  // Idle, waiting for a disk.
  }
  return ticks * (1'000'000'000 / sysconf(_SC_CLK_TCK));
}

class Rank {
 public:
  Rank(const PerfOptions& options, const Config& config, PerfArea* area, Communicator* comm,
       const TopologySequence& topology, std::string form)
      : options_(options),
        area_(*area),
        comm_(*comm),
        topology_(topology),
        form_(std::move(form)),
        bare_(options, config, area, comm->rank()),
        rank_(comm->rank()) {}

  Status Run() {
    int number = 0;
    for (const int64_t bytes : options_.bytes) {
      for (const bool arena : options_.in_arena) {
        if (Status s = Case(bytes, arena, number++); !s.ok()) return s;
      }
    }
    return absl::OkStatus();
  }
  const Json& rows() const { return rows_; }

 private:
  Status Case(int64_t bytes, bool arena, int number) {
    const int64_t count = bytes / SizeOf(options_.dtype);
    const int64_t out_bytes = bytes * (options_.op == Op::kAllgather ? options_.ranks : 1);
    const PrivateMemory out(out_bytes);
    std::optional<PrivateMemory> private_in;
    std::shared_ptr<std::byte> arena_in;
    std::byte* bare_in = area_.data(rank_, 0);
    std::byte* in = nullptr;
    if (arena) {
      auto memory = comm_.Allocate(std::max<int64_t>(bytes, 64));
      if (!memory.ok()) return memory.status();
      arena_in = *std::move(memory);
      in = arena_in.get();
      Fill(bare_in, count);
    } else {
      private_in.emplace(bytes);
      in = bare_in = private_in->data();
    }
    if (in == nullptr || out.data() == nullptr) {
      return absl::ResourceExhaustedError("no memory for tensors of " +
                                          FormatBytes(static_cast<double>(bytes)));
    }
    Fill(in, count);

    OpSpec spec;
    spec.op = options_.op;
    spec.name = fmt::format("perf.{}", number);
    spec.input = TensorView::Of(in, count, options_.dtype);
    if (options_.message_dtype != options_.dtype) spec.message_dtype = options_.message_dtype;
    if (options_.op != Op::kBarrier) {
      spec.output = TensorView::Of(out.data(), out_bytes / SizeOf(options_.dtype), options_.dtype);
    }
    const auto ours = [&]() -> Status {
      ++calls_;
      auto work = comm_.Submit(spec);
      return work.ok() ? (*work)->Wait() : work.status();
    };
    const auto bare = [&]() -> Status {
      ++bare_calls_;
      return bare_.Run(topology_.at(bare_calls_ - 1).neighborhood(rank_), arena, bare_in,
                       out.data(), count);
    };

    const auto poison = [&] { std::memset(out.data(), 0xff, static_cast<size_t>(out_bytes)); };

    const int iterations = options_.IterationsFor(bytes);
    int64_t cpu = 0, busy = 0, begin = 0;
    for (int round = -1; round < options_.rounds; ++round) {  // Round -1 warms up.
      if (round == 0) {
        area_.Barrier();
        cpu = OwnCpuNs();
        busy = MachineBusyNs();
        begin = NowNs();
      }
      for (int series = 0; series < PerfArea::kSeries; ++series) {
        if (out_bytes > 0) poison();
        const std::span<int64_t> times = area_.times(rank_, series);
        // One more than is timed, on poisoned outputs like the first: it is the last that is
        // checked.
        const int last = round < 0 ? std::min(iterations, 3) : iterations;
        for (int i = -1; i <= last; ++i) {
          if (i == last && out_bytes > 0) poison();
          area_.Barrier();
          const int64_t start = NowNs();
          if (Status s = series == 0 ? ours() : bare(); !s.ok()) return s;
          // The first of a round meets caches full of the other series.
          if (i >= 0 && i < last && round >= 0) times[round * iterations + i] = NowNs() - start;
        }
        if (Status s = Check(series, out.data(), count); !s.ok()) return s;
      }
    }
    area_.cpu(rank_)[number] = OwnCpuNs() - cpu;
    area_.Barrier();
    if (rank_ == 0) {
      int64_t own = 0;
      for (int r = 0; r < options_.ranks; ++r) own += area_.cpu(r)[number];
      const auto capacity =
          static_cast<double>(NowNs() - begin) * static_cast<double>(sysconf(_SC_NPROCESSORS_ONLN));
      const double foreign = static_cast<double>(MachineBusyNs() - busy - own) / capacity;
      Report(bytes, arena, iterations, std::clamp(foreign, 0.0, 1.0));
    }
    area_.Barrier();
    if (options_.slow_rank < 0) return absl::OkStatus();
    const double op_us = rank_ == 0 ? rows_.back()["time_us"]["p50"].get<double>() : 0.0;
    return MeasureSlowRank(options_, &area_, &comm_, spec, op_us,
                           rank_ == 0 ? &rows_.back() : nullptr);
  }

  void Fill(std::byte* data, int64_t count) const {
    options_.dtype == DType::kFloat32 ? FillAs<float>(data, count, rank_)
                                      : FillAs<double>(data, count, rank_);
  }

  Status Check(int series, const std::byte* out, int64_t count) const {
    if (options_.op == Op::kBarrier) return absl::OkStatus();
    const int64_t call = series == 0 ? calls_ : bare_calls_;
    const Neighborhood& graph = topology_.at(call - 1).neighborhood(rank_);
    const int parts = options_.op == Op::kAllgather ? options_.ranks : 1;
    for (int part = 0; part < parts; ++part) {
      double a = 0.0, b = 1.0;
      // The limit of the hierarchical one is an allreduce in memory.
      const bool hierarchical = options_.op == Op::kHierarchicalNeighborAllreduce;
      if (options_.op == Op::kNeighborAllreduce || (hierarchical && series == 0)) {
        a = graph.self_weight * Base(rank_);
        b = graph.self_weight;
        for (const Edge& e : graph.in) {
          a += e.weight * Base(e.rank);
          b += e.weight;
        }
      } else if (options_.op == Op::kAllreduce || hierarchical) {
        for (int r = 0; r < options_.ranks; ++r) a += Base(r) / options_.ranks;
      } else {
        a = Base(part);
      }
      const std::byte* from = out + part * count * SizeOf(options_.dtype);
      const int64_t wrong = options_.dtype == DType::kFloat32
                                ? FirstWrongAs<float>(from, count, a, b, options_.message_dtype)
                                : FirstWrongAs<double>(from, count, a, b, options_.message_dtype);
      if (wrong < 0) continue;
      const double got = options_.dtype == DType::kFloat32
                             ? static_cast<double>(reinterpret_cast<const float*>(from)[wrong])
                             : reinterpret_cast<const double*>(from)[wrong];
      return absl::DataLossError(fmt::format("wrong result of {}: element {} is {}, expected {}",
                                             series == 0 ? options_.op_name : "the bare exchange",
                                             part * count + wrong, got, a + b * Fraction(wrong)));
    }
    return absl::OkStatus();
  }

  /// Bytes that a rank receives for each byte of its tensor, at most.
  double ReceivedShare() const {
    const double n = options_.ranks;
    switch (options_.op) {
      case Op::kNeighborAllreduce: {
        size_t most = 0;
        for (int round = 0; round < topology_.period(); ++round) {
          for (int r = 0; r < options_.ranks; ++r) {
            most = std::max(most, topology_.at(round).neighborhood(r).in.size());
          }
        }
        return static_cast<double>(most);
      }
      case Op::kHierarchicalNeighborAllreduce:
      case Op::kAllreduce:
        return 2 * (n - 1) / n;
      case Op::kAllgather:
        return n - 1;
      default:
        return n > 1 ? 1 : 0;
    }
  }

  void Report(int64_t bytes, bool arena, int iterations, double foreign) {
    std::vector<double> series[PerfArea::kSeries], ratios;
    for (int round = 0; round < options_.rounds; ++round) {
      double middle[PerfArea::kSeries];
      for (int s = 0; s < PerfArea::kSeries; ++s) {
        std::vector<double> slowest;
        for (int i = round * iterations; i < (round + 1) * iterations; ++i) {
          int64_t most = 0;
          for (int r = 0; r < options_.ranks; ++r) most = std::max(most, area_.times(r, s)[i]);
          slowest.push_back(static_cast<double>(most) / kMicrosecond);
        }
        middle[s] = Percentile(slowest, 0.5);
        series[s].insert(series[s].end(), slowest.begin(), slowest.end());
      }
      ratios.push_back(middle[0] / middle[1]);
    }
    const double p50 = Percentile(series[0], 0.5), p90 = Percentile(series[0], 0.9);
    const double limit = Percentile(series[1], 0.5), ratio = Percentile(ratios, 0.5);
    const double algbw = static_cast<double>(bytes) / p50 / 1e3;
    const double busbw = algbw * ReceivedShare();
    const std::string buffers = options_.op == Op::kBarrier ? "none" : arena ? "arena" : "private";
    if (rows_.empty()) {
      std::string types = options_.dtype_name;
      if (options_.message_dtype != options_.dtype) {
        types += fmt::format(" as {}", NameOf(options_.message_dtype));
      }
      std::cout << fmt::format(
                       "{}, {} ranks, {}, {}; {} rounds; limit: the bare exchange, in turn\n",
                       options_.op_name, options_.ranks, types, options_.topology, options_.rounds)
                << fmt::format("{:>9} {:>8} {:>11} {:>11} {:>8} {:>8} {:>11} {:>6} {:>13} {:>8}\n",
                               "size", "buffers", "p50 us", "p90 us", "algbw", "busbw", "limit us",
                               "ratio", "min … max  ", "foreign");
    }
    std::cout << fmt::format(
                     "{:>9} {:>8} {:>11.1f} {:>11.1f} {:>8.2f} {:>8.2f} {:>11.1f} {:>6.2f} {:>13} "
                     "{:>7.0f}%",
                     FormatBytes(static_cast<double>(bytes)), buffers, p50, p90, algbw, busbw,
                     limit, ratio,
                     fmt::format("{:.2f} … {:.2f}", Percentile(ratios, 0), Percentile(ratios, 1)),
                     foreign * 100)
              << std::endl;
    rows_.push_back({{"op", options_.op_name},
                     {"ranks", options_.ranks},
                     {"topology", options_.topology},
                     {"machines", comm_.machine_size()},
                     {"hierarchy", form_},
                     {"bytes", bytes},
                     {"buffers", buffers},
                     {"dtype", options_.dtype_name},
                     {"message_dtype", NameOf(options_.message_dtype)},
                     {"blocked", options_.blocked},
                     {"rounds", options_.rounds},
                     {"iterations", iterations},
                     {"time_us",
                      {{"p50", p50},
                       {"p90", p90},
                       {"min", Percentile(series[0], 0)},
                       {"max", Percentile(series[0], 1)}}},
                     {"algbw_GBps", algbw},
                     {"busbw_GBps", busbw},
                     {"limit_us", limit},
                     {"ratio_to_limit", ratio},
                     {"ratio_min", Percentile(ratios, 0)},
                     {"ratio_max", Percentile(ratios, 1)},
                     {"foreign_cpu_share", foreign}});
    if (options_.latency_distribution) {
      Json distribution = LatencyDistribution(series[0]);
      std::cout << DrawLatencyDistribution(distribution) << std::flush;
      rows_.back()["latency_distribution"] = std::move(distribution);
    }
  }

  const PerfOptions& options_;
  PerfArea& area_;
  Communicator& comm_;
  const TopologySequence& topology_;  ///< Between ranks.
  const std::string form_;
  BareExchange bare_;
  const int rank_;
  int64_t calls_ = 0, bare_calls_ = 0;
  Json rows_ = Json::array();
};

Status Measure(const PerfOptions& options) {
  StatusOr<Config> config = Config::FromEnvironment();
  if (!config.ok()) return config.status();
  if (options.blocked) config->drive_us = 0;
  PerfArea area(options);
  if (Status s = area.Map(options.area_fd); !s.ok()) return s;
  CommunicatorOptions communicator;
  communicator.config = *config;
  auto comm = Communicator::Create(communicator);
  if (!comm.ok()) return comm.status();
  const bool machines = options.op == Op::kHierarchicalNeighborAllreduce;
  StatusOr<TopologySequence> topology =
      MakeTopology(options.topology, machines ? (*comm)->machine_size() : options.ranks);
  if (!topology.ok()) return topology.status();
  if (Status s =
          machines ? (*comm)->SetMachineTopology(*topology) : (*comm)->SetTopology(*topology);
      !s.ok()) {
    return s;
  }
  if (machines) topology = OverRanks(*topology, (*comm)->placement());
  if (!topology.ok()) return topology.status();
  Rank rank(options, *config, &area, comm->get(), *topology, config->hierarchy);
  if (Status s = rank.Run(); !s.ok()) return s;
  if ((*comm)->rank() == 0 && !options.json.empty()) {
    std::ofstream file(options.json);
    file << rank.rows().dump(2) << "\n";
    if (!file.flush()) return absl::UnavailableError("cannot write " + options.json);
  }
  return absl::OkStatus();
}

}  // namespace

int RunPerfRank(const PerfOptions& options) {
  const Status status = Measure(options);
  if (status.ok()) return 0;
  std::cerr << "bluefog: " << status.message() << std::endl;
  return 1;
}

}  // namespace bluefog::tools
