// `bluefog perf`: times one operation on this host beside its limit. Starts itself once per rank,
// as `bluefog run` would, with a piece of shared memory for the ranks to meet in.
#include "perf.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <memory>

#include <CLI/CLI.hpp>

#include "commands.h"
#include "format.h"
#include "kernels/kernels.h"
#include "launcher.h"

namespace bluefog::tools {
namespace {

constexpr Op kOps[] = {Op::kNeighborAllreduce, Op::kHierarchicalNeighborAllreduce,
                       Op::kAllreduce,         Op::kBroadcast,
                       Op::kAllgather,         Op::kBarrier};
constexpr size_t kMaxSizes = 32;

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Status Bad(const std::string& text) { return absl::InvalidArgumentError("perf: " + text); }

StatusOr<int> Start(const PerfOptions& options) {
  StatusOr<Config> config = Config::FromEnvironment();
  if (!config.ok()) return config.status();
  const int per_machine =
      options.nodes_per_machine > 0 ? options.nodes_per_machine : config->nodes_per_machine;
  int nodes = options.ranks;
  if (options.op == Op::kHierarchicalNeighborAllreduce) {
    nodes = per_machine > 0 ? (nodes + per_machine - 1) / per_machine : 1;
  }
  if (StatusOr<TopologySequence> topology = MakeTopology(options.topology, nodes); !topology.ok()) {
    return topology.status();
  }
  if (!options.json.empty() && !std::ofstream(options.json, std::ios::app)) {
    return Bad("--json: cannot write " + options.json + "; name a file in a folder that exists");
  }
  const PerfArea area(options);
  // Inherited by the ranks under the same number.
  const int fd = memfd_create("bluefog-perf", 0);
  if (fd < 0 || ftruncate(fd, area.bytes()) != 0) {
    return absl::ResourceExhaustedError("perf: no shared memory of " +
                                        std::to_string(area.bytes()) +
                                        " bytes; use smaller --bytes");
  }
  LaunchOptions launch;
  launch.ranks = options.ranks;
  launch.tag = false;
  if (config->log_level == "info") launch.env.emplace_back("BLUEFOG_LOG_LEVEL", "warn");
  if (!options.hierarchy.empty()) {
    launch.env.emplace_back("BLUEFOG_HIERARCHY", options.hierarchy);
  }
  if (options.nodes_per_machine > 0) {
    launch.env.emplace_back("BLUEFOG_NODES_PER_MACHINE", std::to_string(per_machine));
  }
  launch.command = {"/proc/self/exe",
                    "perf",
                    options.op_name,
                    "--np=" + std::to_string(options.ranks),
                    "--bytes=" + options.bytes_text,
                    "--buffers=" + options.buffers_text,
                    "--dtype=" + options.dtype_name,
                    "--topology=" + options.topology,
                    "--iterations=" + std::to_string(options.iterations),
                    "--rounds=" + std::to_string(options.rounds),
                    "--area=" + std::to_string(fd)};
  if (!options.json.empty()) launch.command.push_back("--json=" + options.json);
  if (options.blocked) launch.command.push_back("--blocked");
  if (options.latency_distribution) launch.command.push_back("--latency-distribution");
  if (options.slow_rank >= 0) {
    launch.command.push_back("--slow-rank=" + std::to_string(options.slow_rank));
    launch.command.push_back(fmt::format("--factor={}", options.factor));
    launch.command.push_back(fmt::format("--compute-us={}", options.compute_us));
  }
  if (!options.message_dtype_name.empty()) {
    launch.command.push_back("--message-dtype=" + options.message_dtype_name);
  }
  return Launch(launch);
}

void RunPerf(PerfOptions& options) {
  if (Status s = options.Parse(); !s.ok()) Fail(s);
  if (options.area_fd >= 0) Exit(RunPerfRank(options));
  const StatusOr<int> code = Start(options);
  if (!code.ok()) Fail(code.status());
  Exit(*code);
}

}  // namespace

Status PerfOptions::Parse() {
  std::string known;
  bool found = false;
  for (const Op candidate : kOps) {
    known += std::string(known.empty() ? "" : ", ") + NameOf(candidate);
    if (op_name != NameOf(candidate)) continue;
    op = candidate;
    found = true;
  }
  if (!found) return Bad("there is no operation '" + op_name + "'; it is one of " + known);
  if (ranks < 1 || ranks > kMaxPerfRanks) {
    return Bad("-np " + std::to_string(ranks) + ": takes 1 to " + std::to_string(kMaxPerfRanks) +
               " ranks, all on this host");
  }
  if (!hierarchy.empty() && hierarchy != "auto" && hierarchy != "flat" &&
      hierarchy != "hierarchical") {
    return Bad("--hierarchy '" + hierarchy + "': use auto, flat or hierarchical");
  }
  if (nodes_per_machine < 0) {
    return Bad("--nodes-per-machine " + std::to_string(nodes_per_machine) + ": at least 1");
  }
  if (iterations < 0 || rounds < 1) {
    return Bad("--rounds must be at least 1 and --iterations at least 0 (chosen by size)");
  }
  if (slow_rank < -1 || slow_rank >= ranks) {
    return Bad("--slow-rank " + std::to_string(slow_rank) + ": ranks go from 0 to " +
               std::to_string(ranks - 1));
  }
  if (!(factor >= 1 && factor <= 1000) || !(compute_us >= 0 && compute_us <= 1e7)) {
    return Bad("--factor must be 1 to 1000 and --compute-us 0 (as long as an operation) to 1e7");
  }
  if (dtype_name == "float32") {
    dtype = DType::kFloat32;
  } else if (dtype_name == "float64") {
    dtype = DType::kFloat64;
  } else {
    return Bad("--dtype '" + dtype_name + "': use float32 or float64");
  }
  message_dtype = dtype;
  if (!message_dtype_name.empty() && message_dtype_name != dtype_name) {
    for (const DType narrow : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
      if (message_dtype_name == NameOf(narrow)) message_dtype = narrow;
    }
    if (op != Op::kNeighborAllreduce || !kernels::CanNarrow(dtype, message_dtype)) {
      return Bad("--message-dtype '" + message_dtype_name +
                 "': of neighbor_allreduce, float16 or bfloat16 for float32 tensors, these or "
                 "float32 for float64 ones");
    }
  }
  if (op == Op::kBarrier) {  // Has no tensors.
    bytes = {0};
    in_arena = {false};
    return absl::OkStatus();
  }
  for (const std::string& text : Split(bytes_text)) {
    const int64_t size = ParseSize(text);
    if (size < 0 || size > int64_t{16} << 30) {
      return Bad("--bytes '" + text +
                 "': use numbers up to 16G with or without K, M, G, separated by "
                 "commas, as in 4K,1M,64M");
    }
    if (size % SizeOf(dtype) != 0) {
      return Bad("--bytes " + text + " is not a whole number of " + dtype_name +
                 " elements; use a "
                 "multiple of " +
                 std::to_string(SizeOf(dtype)));
    }
    bytes.push_back(size);
  }
  for (const std::string& text : Split(buffers_text)) {
    if (text != "arena" && text != "private") {
      return Bad("--buffers '" + text + "': use arena, private or arena,private");
    }
    in_arena.push_back(text == "arena");
  }
  if (bytes.size() * in_arena.size() > kMaxSizes) {
    return Bad("more than " + std::to_string(kMaxSizes) + " combinations of --bytes and --buffers");
  }
  return absl::OkStatus();
}

void AddPerf(CLI::App& app) {
  auto options = std::make_shared<PerfOptions>();
  CLI::App* command = app.add_subcommand(
      "perf", "Time an operation on this host, beside what the memory would allow");
  command
      ->add_option("operation", options->op_name,
                   "neighbor_allreduce, hierarchical_neighbor_allreduce, allreduce, broadcast, "
                   "allgather or barrier")
      ->required();
  command->add_option("-n,--np", options->ranks, "Number of ranks")
      ->type_name("RANKS")
      ->capture_default_str();
  command->add_option("--bytes", options->bytes_text, "Tensor sizes, binary units")
      ->type_name("SIZE,…")
      ->capture_default_str();
  command
      ->add_option("--buffers", options->buffers_text,
                   "Where inputs lie: arena (peers read them in place) or private (staged)")
      ->type_name("PLACE,…")
      ->capture_default_str();
  command->add_option("--dtype", options->dtype_name, "float32 or float64")
      ->type_name("NAME")
      ->capture_default_str();
  command
      ->add_option("--message-dtype", options->message_dtype_name,
                   "What travels: float16, bfloat16; default: the tensors' own type")
      ->type_name("NAME");
  command
      ->add_option("--topology", options->topology,
                   "Of neighbor_allreduce, or between machines; bluefog topo --list names them")
      ->type_name("NAME")
      ->capture_default_str();
  command
      ->add_option("--nodes-per-machine", options->nodes_per_machine,
                   "Let this host look like several with so many ranks each")
      ->type_name("RANKS");
  command
      ->add_option("--hierarchy", options->hierarchy,
                   "Form of operations over several machines: auto, flat or hierarchical")
      ->type_name("FORM");
  command->add_option("--iterations", options->iterations, "Per round; 0: more for small sizes")
      ->type_name("COUNT")
      ->capture_default_str();
  command
      ->add_option("--rounds", options->rounds,
                   "Of the operation and its limit in turn, for the ratio")
      ->type_name("COUNT")
      ->capture_default_str();
  command->add_flag("--blocked", options->blocked,
                    "Every wait blocks at once, as when the cores have other work");
  command->add_flag("--latency-distribution", options->latency_distribution,
                    "Percentiles up to 99.9 and a histogram of the times");
  command
      ->add_option("--slow-rank", options->slow_rank,
                   "What the others lose when this rank computes longer between operations; also "
                   "with allreduce")
      ->type_name("RANK");
  command->add_option("--factor", options->factor, "So many times as long, with --slow-rank")
      ->type_name("TIMES")
      ->capture_default_str();
  command
      ->add_option("--compute-us", options->compute_us,
                   "Computing (asleep) between operations, with --slow-rank; 0: as long as one")
      ->type_name("US")
      ->capture_default_str();
  command->add_option("--json", options->json, "Write the rows to this file")->type_name("FILE");
  command->add_option("--area", options->area_fd)->group("");
  command->callback([options] { RunPerf(*options); });
}

}  // namespace bluefog::tools
