// `bluefog perf --slow-rank`: ranks compute and average in turn, without a barrier, first all
// alike, then one of them slower. Computing is sleeping, as if an accelerator did it: ranks that
// share cores would slow each other down otherwise.
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <iostream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "perf.h"

namespace bluefog::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kSteps = 10;
/// A sleep is about 0.1 ms late.
constexpr double kLeastComputeUs = 1000;

void Compute(double us) {
  const auto ns = static_cast<int64_t>(us * 1e3);
  timespec left{ns / 1'000'000'000, ns % 1'000'000'000};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

}  // namespace

Status MeasureSlowRank(const PerfOptions& options, PerfArea* area, Communicator* comm,
                       const OpSpec& spec, double op_us, Json* row) {
  const int rank = comm->rank();
  if (rank == 0) {
    const double compute =
        options.compute_us > 0 ? options.compute_us : std::max(op_us, kLeastComputeUs);
    area->note(0) = static_cast<int64_t>(compute);
  }
  area->Barrier();
  const auto compute_us = static_cast<double>(area->note(0));
  struct Contest {
    std::string name;
    OpSpec spec;
    std::vector<double> even, slowed;  ///< Milliseconds a step by round, of the other ranks.
  };
  std::vector<Contest> contests = {{options.op_name, spec, {}, {}}};
  if (options.op == Op::kNeighborAllreduce) {
    contests[0].name += ", " + options.topology;
    contests.push_back({NameOf(Op::kAllreduce), spec, {}, {}});
    contests[1].spec.op = Op::kAllreduce;
    contests[1].spec.name += ".all";
  }
  for (int round = -1; round < options.rounds; ++round) {  // Round -1 warms up.
    for (Contest& contest : contests) {
      for (const bool slow : {false, true}) {
        const double mine = compute_us * (slow && rank == options.slow_rank ? options.factor : 1);
        area->Barrier();
        const int64_t begin = NowNs();
        for (int step = 0; step < kSteps; ++step) {
          Compute(mine);
          auto work = comm->Submit(contest.spec);
          if (Status s = work.ok() ? (*work)->Wait() : work.status(); !s.ok()) return s;
        }
        area->note(rank) = NowNs() - begin;
        area->Barrier();
        double others = 0;
        for (int r = 0; r < options.ranks; ++r) {
          if (r != options.slow_rank) others += static_cast<double>(area->note(r));
        }
        const double ms = others / std::max(options.ranks - 1, 1) / kSteps / kMillisecond;
        if (round >= 0) (slow ? contest.slowed : contest.even).push_back(ms);
      }
    }
  }
  if (rank != 0) return absl::OkStatus();
  std::cout << fmt::format(
      "  rank {} computes {:g} times as long as the others ({:.1f} ms), {} steps; a step of the "
      "others:\n",
      options.slow_rank, options.factor, compute_us / 1e3, kSteps);
  for (const Contest& contest : contests) {
    std::vector<double> slowdown;
    for (size_t i = 0; i < contest.even.size(); ++i) {
      slowdown.push_back(contest.slowed[i] / contest.even[i]);
    }
    const double even = Percentile(contest.even, 0.5), slowed = Percentile(contest.slowed, 0.5);
    std::cout << fmt::format("  {:42} {:>9.2f} ms → {:>9.2f} ms, × {:.2f} ({:.2f} … {:.2f})\n",
                             contest.name, even, slowed, Percentile(slowdown, 0.5),
                             Percentile(slowdown, 0), Percentile(slowdown, 1));
    (*row)["slow_rank"].push_back({{"operation", contest.name},
                                   {"rank", options.slow_rank},
                                   {"factor", options.factor},
                                   {"compute_us", compute_us},
                                   {"step_ms", even},
                                   {"slowed_step_ms", slowed},
                                   {"slowdown", Percentile(slowdown, 0.5)}});
  }
  std::cout << std::flush;
  return absl::OkStatus();
}

}  // namespace bluefog::tools
