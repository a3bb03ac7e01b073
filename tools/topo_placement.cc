#include "topo_placement.h"

#include <charconv>
#include <functional>
#include <iostream>
#include <numeric>
#include <set>

#include "collective/cost.h"
#include "format.h"

namespace bluefog::tools {
namespace {

using collective::Cost;
using collective::Form;
using Json = nlohmann::ordered_json;

constexpr int kMaxRanks = 10'000;
constexpr size_t kHostsInFull = 32;  // Above, the table shows the first 8.

Status Bad(const std::string& text, const std::string& why) {
  return absl::InvalidArgumentError("--placement '" + text + "': " + why +
                                    "; give HOSTSxRANKS, as in 2x4, or host1:4,host2:4");
}

/// A whole number from 1 to kMaxRanks, or 0.
int ParseCount(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && value >= 1 &&
                 value <= kMaxRanks
             ? value
             : 0;
}

/// One way to do one operation; means over the rounds of a sequence.
struct Row {
  std::string operation, form;
  Cost cost;
  double seconds = 0.0;
  bool chosen = false;
};

class Report {
 public:
  explicit Report(const PlacementRequest& request)
      : request_(request),
        placement_(request.hosts.placement),
        links_(collective::LinksOf(request.config)),
        one_shot_(request.bytes <= static_cast<double>(request.config.eager_bytes)) {
    if (request.ranks.has_value()) {
      Add("neighbor_allreduce", "", *request.ranks, [this](const Topology& graph) {
        return collective::CostOfNeighborAllreduce(placement_, graph, request_.bytes);
      });
    }
    if (request.machines.has_value()) {
      const Form chosen = Chosen(collective::ChooseHierarchicalNeighborAllreduce(
          placement_, request.bytes, one_shot_, links_));
      for (const Form form : {Form::kFlat, Form::kHierarchical}) {
        Add("hierarchical_neighbor_allreduce", NameOf(form), *request.machines,
            [this, form](const Topology& graph) {
              return collective::CostOfHierarchicalNeighborAllreduce(form, placement_, graph,
                                                                     request_.bytes, one_shot_);
            });
        rows_.back().chosen = form == chosen;
      }
    }
    const Form chosen =
        Chosen(collective::ChooseAllreduce(placement_, request.bytes, one_shot_, links_));
    for (const Form form : {Form::kFlat, Form::kHierarchical}) {
      Row row{"allreduce", NameOf(form),
              collective::CostOfAllreduce(form, placement_, request.bytes, one_shot_)};
      row.seconds = row.cost.Seconds(links_);
      row.chosen = form == chosen;
      rows_.push_back(std::move(row));
    }
  }

  const std::vector<Row>& rows() const { return rows_; }
  const collective::Links& links() const { return links_; }
  bool forced() const { return request_.config.hierarchy != "auto"; }

 private:
  Form Chosen(Form by_cost) const {
    if (!forced()) return by_cost;
    return request_.config.hierarchy == "flat" ? Form::kFlat : Form::kHierarchical;
  }

  void Add(const char* operation, const char* form, const TopologySequence& graph,
           const std::function<Cost(const Topology&)>& cost_of) {
    Row row{operation, form, {}};
    const int period = graph.period();
    for (int round = 0; round < period; ++round) {
      const Cost cost = cost_of(graph.at(round));
      row.seconds += cost.Seconds(links_) / period;
      if (round == 0) {
        row.cost = cost;
        continue;
      }
      row.cost.host_hops = std::max(row.cost.host_hops, cost.host_hops);
      row.cost.nic_hops = std::max(row.cost.nic_hops, cost.nic_hops);
      for (size_t i = 0; i < cost.nics.size(); ++i) {
        row.cost.nics[i].out += cost.nics[i].out;
        row.cost.nics[i].in += cost.nics[i].in;
      }
      for (size_t h = 0; h < cost.host_bytes.size(); ++h) {
        row.cost.host_bytes[h] += cost.host_bytes[h];
      }
    }
    for (auto& nic : row.cost.nics) {
      nic.out /= period;
      nic.in /= period;
    }
    for (double& bytes : row.cost.host_bytes) bytes /= period;
    rows_.push_back(std::move(row));
  }

  const PlacementRequest& request_;
  const Placement& placement_;
  const collective::Links links_;
  const bool one_shot_;
  std::vector<Row> rows_;
};

std::string FormatSeconds(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.4g} us", seconds * 1e6);
  if (seconds < 1.0) return fmt::format("{:.4g} ms", seconds * 1e3);
  return fmt::format("{:.4g} s", seconds);
}

/// "0–3, 8".
std::string FormatRanks(const std::vector<int>& ranks) {
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    text += fmt::format("{}{}", i > 0 ? ", " : "", ranks[i]);
    if (last > i) text += fmt::format("–{}", ranks[last]);
    i = last + 1;
  }
  return text;
}

/// By host, what leaves its interfaces and stays inside, for each row.
void PrintHosts(const PlacementRequest& request, const Report& report) {
  const auto ranks = request.hosts.placement.RanksByHost();
  const auto cell = [](double bytes) { return PadLeft(FormatBytes(bytes), 11); };
  std::cout << "  " << Pad("host", 12) << Pad("ranks", 12) << "leaves the host in one step, and "
            << "stays inside it\n";
  for (size_t h = 0; h < ranks.size(); ++h) {
    if (h == 8 && ranks.size() > kHostsInFull) {
      std::cout << fmt::format("  … {} hosts more; --json shows them\n", ranks.size() - h);
      break;
    }
    std::cout << "  " << Pad(request.hosts.names[h], 12) << FormatRanks(ranks[h]) << "\n";
    for (const Row& row : report.rows()) {
      double out = 0.0;
      for (const auto& nic : row.cost.nics) out += nic.host == static_cast<int>(h) ? nic.out : 0;
      std::cout << "  " << Pad("", 12) << Pad(row.operation, 33) << Pad(row.form, 14) << cell(out)
                << "  " << cell(row.cost.host_bytes[h]) << "\n";
    }
  }
}

std::string Why(const Report& report, const Row& chosen, const Row& other) {
  if (report.forced()) return "BLUEFOG_HIERARCHY says so";
  if (chosen.seconds == other.seconds) return "the other one is no faster";
  if (chosen.seconds < other.seconds) {
    return fmt::format("{:.3g} times faster than {} by the model", other.seconds / chosen.seconds,
                       other.form);
  }
  // Of a graph with no or several neighbours the sizes at which they are alike differ a little.
  return "chosen as for one neighbouring machine, since a call may bring its own weights";
}

}  // namespace

StatusOr<NamedPlacement> ParsePlacement(const std::string& text) {
  NamedPlacement parsed;
  std::vector<int> counts;
  if (const size_t x = text.find('x');
      x != std::string::npos && text.find(':') == std::string::npos) {
    const int hosts = ParseCount(std::string_view(text).substr(0, x));
    const int ranks = ParseCount(std::string_view(text).substr(x + 1));
    if (hosts == 0 || ranks == 0) return Bad(text, "both must be whole numbers from 1");
    counts.assign(static_cast<size_t>(hosts), ranks);
    for (int h = 0; h < hosts; ++h) parsed.names.push_back(std::to_string(h));
  } else {
    std::set<std::string> seen;
    for (size_t begin = 0; begin <= text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      const std::string entry = text.substr(begin, end - begin);
      const size_t colon = entry.rfind(':');
      const int ranks =
          colon == std::string::npos ? 0 : ParseCount(std::string_view(entry).substr(colon + 1));
      if (ranks == 0 || colon == 0) return Bad(text, "'" + entry + "' is no host with its ranks");
      if (!seen.insert(entry.substr(0, colon)).second) {
        return Bad(text, "host '" + entry.substr(0, colon) + "' stands there twice");
      }
      parsed.names.push_back(entry.substr(0, colon));
      counts.push_back(ranks);
      begin = end + 1;
    }
  }
  if (std::accumulate(counts.begin(), counts.end(), int64_t{0}) > kMaxRanks) {
    return Bad(text, fmt::format("at most {} ranks can be shown", kMaxRanks));
  }
  parsed.placement = Placement::OfCounts(counts);
  return parsed;
}

void PrintPlacement(const PlacementRequest& request) {
  const Report report(request);
  const Config& c = request.config;
  std::cout << fmt::format("\n{} ranks on {} hosts · payload of {}\n\n",
                           request.hosts.placement.size(), request.hosts.placement.hosts(),
                           FormatBytes(request.bytes));
  PrintHosts(request, report);
  std::cout << fmt::format(
      "\n  links: {} Mbit/s and {} us from host to host, {} Mbit/s and {} us inside one "
      "(BLUEFOG_NIC_MBPS, …; see bluefog info --config)\n",
      c.nic_mbps, c.nic_latency_us, c.host_mbps, c.host_latency_us);
  for (const Row& row : report.rows()) {
    std::cout << "  " << Pad(row.operation, 33) << Pad(row.form, 14)
              << PadLeft(FormatSeconds(row.seconds), 11)
              << fmt::format("  busiest interface {}{}", FormatBytes(row.cost.BusiestNic()),
                             row.chosen ? "  <- chosen" : "")
              << "\n";
  }
  const std::vector<Row>& rows = report.rows();
  for (size_t i = 0; i + 1 < rows.size(); ++i) {
    if (rows[i].form.empty() || rows[i].operation != rows[i + 1].operation) continue;
    const Row& chosen = rows[i].chosen ? rows[i] : rows[i + 1];
    const Row& other = rows[i].chosen ? rows[i + 1] : rows[i];
    std::cout << fmt::format("  {} is {}: {}\n", chosen.operation, chosen.form,
                             Why(report, chosen, other));
  }
}

Json PlacementAsJson(const PlacementRequest& request) {
  const Report report(request);
  const auto ranks = request.hosts.placement.RanksByHost();
  Json hosts = Json::array();
  for (size_t h = 0; h < ranks.size(); ++h) {
    hosts.push_back({{"name", request.hosts.names[h]}, {"ranks", ranks[h]}});
  }
  Json operations = Json::array();
  for (const Row& row : report.rows()) {
    Json nics = Json::array();
    for (const auto& nic : row.cost.nics) {
      nics.push_back({{"host", request.hosts.names[static_cast<size_t>(nic.host)]},
                      {"nic", nic.nic},
                      {"bytes_out", nic.out},
                      {"bytes_in", nic.in}});
    }
    operations.push_back({{"operation", row.operation},
                          {"form", row.form.empty() ? Json() : Json(row.form)},
                          {"seconds", row.seconds},
                          {"chosen", row.form.empty() ? Json() : Json(row.chosen)},
                          {"host_hops", row.cost.host_hops},
                          {"nic_hops", row.cost.nic_hops},
                          {"nics", std::move(nics)},
                          {"bytes_inside", row.cost.host_bytes}});
  }
  const collective::Links& links = report.links();
  return {{"hosts", std::move(hosts)},
          {"hierarchy", request.config.hierarchy},
          {"links",
           {{"nic_latency_s", links.nic_latency},
            {"nic_bytes_per_s", links.nic_bandwidth},
            {"host_latency_s", links.host_latency},
            {"host_bytes_per_s", links.host_bandwidth}}},
          {"operations", std::move(operations)}};
}

}  // namespace bluefog::tools
