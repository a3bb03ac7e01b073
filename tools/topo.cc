// `bluefog topo`: who talks to whom with what weight, what the mathematics says of it, and what a
// step costs.
#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include <bluefog/topology.h>

#include "commands.h"
#include "format.h"
#include "matrix_file.h"
#include "topo_placement.h"

namespace bluefog::tools {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxRanks = 10'000;
constexpr int kRanksInFull = 32;  // Above, the table shows the first and the last ranks.
constexpr int kLinesInFull = 48;  // Above, of a sequence only one round is shown.

struct Options {
  std::string name, matrix, placement;
  std::optional<int> n;
  int64_t round = -1;
  int64_t bytes = 1 << 20;
  bool json = false, list = false, all = false;
};

void PrintGenerators(bool json) {
  Json list = Json::array();
  for (const TopologyGenerator& generator : TopologyGenerators()) {
    if (json) {
      list.push_back({{"name", generator.name},
                      {"dynamic", generator.dynamic},
                      {"summary", generator.summary}});
    } else {
      std::cout << "  " << Pad(generator.name, 24) << generator.summary << "\n";
    }
  }
  if (json) std::cout << list.dump(2) << "\n";
}

TopologySequence Load(const Options& options) {
  if (!options.matrix.empty()) {
    if (!options.name.empty()) {
      Fail(absl::InvalidArgumentError("give a topology's name or --matrix, not both"));
    }
    StatusOr<Topology> topology = ReadMatrix(options.matrix);
    if (!topology.ok()) Fail(topology.status());
    if (options.n.has_value() && *options.n != topology->size()) {
      Fail(
          absl::InvalidArgumentError(fmt::format("{} is a matrix for {} ranks, but -n {} was given",
                                                 options.matrix, topology->size(), *options.n)));
    }
    return TopologySequence(*std::move(topology));
  }
  if (options.name.empty()) {
    Fail(absl::InvalidArgumentError(
        "which topology? Give a name and -n RANKS, or --matrix FILE; --list names the topologies"));
  }
  if (options.n.value_or(0) > kMaxRanks) {
    Fail(absl::InvalidArgumentError(
        fmt::format("-n {}: at most {} ranks can be shown", *options.n, kMaxRanks)));
  }
  StatusOr<TopologySequence> topology = MakeTopology(options.name, options.n.value_or(0));
  if (!topology.ok()) {
    const bool no_size = !options.n.has_value() && !absl::IsNotFound(topology.status());
    Fail(no_size ? absl::InvalidArgumentError("how many ranks? Give -n RANKS") : topology.status());
  }
  return *std::move(topology);
}

// "1, 7 (1/3)"; equal weights that follow each other are written once, runs of ranks as "2–9".
std::string FormatEdges(const std::vector<Edge>& edges) {
  if (edges.empty()) return "–";
  std::string text;
  for (size_t i = 0; i < edges.size();) {
    if (i > 0) text += "  ";
    size_t end = i;
    while (end < edges.size() && edges[end].weight == edges[i].weight) ++end;
    std::vector<int> ranks;
    for (size_t e = i; e < end; ++e) ranks.push_back(edges[e].rank);
    text += fmt::format("{} ({})", FormatRanks(ranks), FormatWeight(edges[i].weight));
    i = end;
  }
  return text;
}

void PrintNeighbors(const Topology& topology, bool symmetric, bool all) {
  struct Row {
    std::string rank, self, in, out;
  };
  std::vector<Row> rows{{"rank", "self",
                         symmetric ? "neighbours (weight)" : "receives from (weight)",
                         symmetric ? "" : "sends to (weight)"}};
  const int n = topology.size();
  const int head = all || n <= kRanksInFull ? n : 8;
  for (int rank = 0; rank < n; ++rank) {
    if (rank == head) {
      rows.push_back({"…", "", fmt::format("{} ranks more, --all shows them", n - head - 1), ""});
      rank = n - 1;
    }
    const Neighborhood& ranks = topology.neighborhood(rank);
    rows.push_back({std::to_string(rank), FormatWeight(ranks.self_weight), FormatEdges(ranks.in),
                    symmetric ? "" : FormatEdges(ranks.out)});
  }
  size_t self_width = 0, in_width = 0;
  for (const Row& row : rows) {
    self_width = std::max(self_width, Width(row.self));
    if (!symmetric) in_width = std::max(in_width, Width(row.in));
  }
  for (const Row& row : rows) {
    std::string line = "  " + PadLeft(row.rank, 5) + "  " + PadLeft(row.self, self_width) + "   " +
                       Pad(row.in, in_width) + (row.out.empty() ? "" : "   " + row.out);
    line.erase(line.find_last_not_of(' ') + 1);
    std::cout << line << "\n";
  }
}

void Print(const TopologySequence& topology, const TopologyAnalysis& analysis,
           const Options& options) {
  const int period = topology.period();
  std::cout << fmt::format("{} · {} rank{}{}\n\n", topology.name(), topology.size(),
                           topology.size() == 1 ? "" : "s",
                           period > 1 ? fmt::format(" · period of {} rounds", period) : "");
  const int64_t first = options.round < 0 ? 0 : options.round;
  const bool every =
      options.round < 0 && (options.all || int64_t{topology.size()} * period <= kLinesInFull);
  for (int64_t round = first; round < (every ? period : first + 1); ++round) {
    if (period > 1) {
      std::cout << fmt::format("  round {}{}\n", round,
                               every || options.round >= 0 ? "" : "   (--round R shows another)");
    }
    PrintNeighbors(topology.at(round), analysis.symmetric, options.all);
    std::cout << "\n";
  }

  const auto line = [](const std::string& label, const std::string& value) {
    std::cout << "  " << Pad(label, 20) << value << "\n";
  };
  const auto answer = [](bool yes, const std::string& reason) {
    return yes ? std::string("yes") : reason.empty() ? "no" : "no: " + reason;
  };
  line("symmetric", answer(analysis.symmetric, analysis.asymmetry));
  line("doubly stochastic", answer(analysis.doubly_stochastic, analysis.problem));
  line(period > 1 ? "connected (union)" : "connected", answer(analysis.connected, analysis.cut));
  if (analysis.spectrum_known) {
    const bool modulus = !analysis.symmetric || period > 1;
    line(modulus ? "|λ₂|" : "λ₂",
         fmt::format("{:.6g}{}", analysis.lambda2,
                     period > 1 ? "  per round, of the product of a period" : ""));
    line("λmin", fmt::format("{:.6g}{}", analysis.lambda_min,
                             period > 1           ? "  of the worst round"
                             : analysis.symmetric ? ""
                                                  : "  (real part)"));
    line("spectral gap",
         fmt::format("{:.6g}{}", analysis.spectral_gap, period > 1 ? "  per round" : ""));
    line("exact average", !analysis.exact_average ? "no"
                          : period == 1           ? "yes, in every step"
                                        : fmt::format("yes, after every {} rounds", period));
  } else {
    line("spectrum", fmt::format("not computed beyond {} ranks", kMaxSpectrumSize));
  }
  line("messages per step", fmt::format("{:.6g} by the busiest rank", analysis.messages_per_step));
  line("bytes per step",
       fmt::format("{} by the busiest rank, with a payload of {}",
                   FormatBytes(analysis.messages_per_step * static_cast<double>(options.bytes)),
                   FormatBytes(static_cast<double>(options.bytes))));
}

Json EdgesAsJson(const std::vector<Edge>& edges) {
  Json list = Json::array();
  for (const Edge& edge : edges) list.push_back({{"rank", edge.rank}, {"weight", edge.weight}});
  return list;
}

Json AsJson(const TopologySequence& topology, const TopologyAnalysis& analysis,
            const Options& options) {
  const auto spectral = [&](auto value) { return analysis.spectrum_known ? Json(value) : Json(); };
  const int64_t first = options.round < 0 ? 0 : options.round;
  const int64_t end = options.round < 0 ? topology.period() : options.round + 1;
  Json rounds = Json::array();
  for (int64_t round = first; round < end; ++round) {
    Json ranks = Json::array();
    for (int rank = 0; rank < topology.size(); ++rank) {
      const Neighborhood& ranks_of = topology.at(round).neighborhood(rank);
      ranks.push_back({{"rank", rank},
                       {"self_weight", ranks_of.self_weight},
                       {"in", EdgesAsJson(ranks_of.in)},
                       {"out", EdgesAsJson(ranks_of.out)}});
    }
    rounds.push_back({{"round", round}, {"neighborhoods", std::move(ranks)}});
  }
  return {
      {"name", topology.name()},
      {"ranks", topology.size()},
      {"period", topology.period()},
      {"symmetric", analysis.symmetric},
      {"doubly_stochastic", analysis.doubly_stochastic},
      {"row_stochastic", analysis.row_stochastic},
      {"column_stochastic", analysis.column_stochastic},
      {"connected", analysis.connected},
      {"problem", analysis.problem},
      {"asymmetry", analysis.asymmetry},
      {"lambda2", spectral(analysis.lambda2)},
      {"lambda_min", spectral(analysis.lambda_min)},
      {"spectral_gap", spectral(analysis.spectral_gap)},
      {"exact_average", spectral(analysis.exact_average)},
      {"max_in_degree", analysis.max_in_degree},
      {"max_out_degree", analysis.max_out_degree},
      {"payload_bytes", options.bytes},
      {"messages_per_step", analysis.messages_per_step},
      {"bytes_per_step", analysis.messages_per_step * static_cast<double>(options.bytes)},
      {"rounds", std::move(rounds)},
  };
}

// The graph between ranks, or (a matrix with a row for each host) between machines; of a name both.
PlacementRequest RequestOf(const Options& options, NamedPlacement hosts,
                           const TopologySequence& topology) {
  StatusOr<Config> config = Config::FromEnvironment();
  if (!config.ok()) Fail(config.status());
  const int machines = hosts.placement.hosts(), ranks = hosts.placement.size();
  if (topology.size() != ranks && (options.matrix.empty() || topology.size() != machines)) {
    Fail(absl::InvalidArgumentError(
        fmt::format("the graph has {} nodes; --placement {} has {} ranks on {} hosts",
                    topology.size(), options.placement, ranks, machines)));
  }
  PlacementRequest request;
  request.hosts = std::move(hosts);
  request.bytes = static_cast<double>(options.bytes);
  request.config = *std::move(config);
  if (topology.size() == ranks) request.ranks = topology;
  if (topology.size() == machines) request.machines = topology;
  if (!options.name.empty()) {
    if (auto graph = MakeTopology(options.name, machines); graph.ok()) request.machines = *graph;
  }
  return request;
}

void RunTopo(Options options) {
  if (options.list) return PrintGenerators(options.json);
  std::optional<NamedPlacement> hosts;
  if (!options.placement.empty()) {
    StatusOr<NamedPlacement> parsed = ParsePlacement(options.placement);
    if (!parsed.ok()) Fail(parsed.status());
    hosts = *std::move(parsed);
    if (!options.n.has_value() && options.matrix.empty()) options.n = hosts->placement.size();
  }
  const TopologySequence topology = Load(options);
  std::optional<PlacementRequest> request;
  if (hosts.has_value()) request = RequestOf(options, *std::move(hosts), topology);
  const TopologyAnalysis analysis = Analyze(topology);
  if (options.json) {
    Json document = AsJson(topology, analysis, options);
    if (request.has_value()) document["placement"] = PlacementAsJson(*request);
    std::cout << document.dump(2) << "\n";
    return;
  }
  Print(topology, analysis, options);
  if (request.has_value()) PrintPlacement(*request);
}

}  // namespace

void AddTopo(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("topo", "Neighbours, weights and spectrum of a topology");
  command->add_option("name", options->name, "The topology; --list names them all");
  command->add_option("-n,--np", options->n, "Number of ranks")->type_name("RANKS");
  command->add_option("--round", options->round, "Show this round of a sequence")
      ->check(CLI::NonNegativeNumber.description(""))
      ->type_name("ROUND");
  command
      ->add_option("--matrix", options->matrix,
                   "Read the weights from a CSV file instead: row i holds W[i][j] on the edge "
                   "i → j; fractions like 1/3 are read too; \"-\" is standard input")
      ->type_name("FILE");
  command->add_option("--bytes", options->bytes, "Payload, e.g. 64M (binary units)")
      ->transform(Size())
      ->type_name("SIZE")
      ->default_str("1M");
  command
      ->add_option("--placement", options->placement,
                   "What a step costs on these hosts: 2x4, or host1:4,host2:4")
      ->type_name("HOSTS");
  command->add_flag("--json", options->json, "Machine-readable, with full precision");
  command->add_flag("--all", options->all, "Every rank and round, however many");
  command->add_flag("--list", options->list, "List the topologies");
  command->callback([options] { RunTopo(*options); });
}

}  // namespace bluefog::tools
