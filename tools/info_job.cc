// `bluefog info --job`, run as the command of a job: which rank is where, and how each reaches the
// others. Rank 0 prints it; what both ends of a pair choose follows from the address book.
#include <iostream>
#include <nlohmann/json.hpp>

#include <bluefog/communicator.h>

#include "commands.h"
#include "engine/engine.h"
#include "format.h"
#include "transport/routes.h"

namespace bluefog::tools {
namespace {

using Json = nlohmann::ordered_json;
using transport::Whereabouts;

struct Ways {
  std::vector<int> shared, network;
};

Ways WaysOf(size_t rank, const std::vector<Whereabouts>& all) {
  Ways ways;
  for (size_t other = 0; other < all.size(); ++other) {
    if (other == rank) continue;
    (all[rank].SharesMemoryWith(all[other]) ? ways.shared : ways.network)
        .push_back(static_cast<int>(other));
  }
  return ways;
}

Json AsJson(const Communicator& job, const std::vector<Whereabouts>& all) {
  Json ranks = Json::array();
  for (size_t rank = 0; rank < all.size(); ++rank) {
    const Ways ways = WaysOf(rank, all);
    ranks.push_back({{"rank", rank},
                     {"host", all[rank].host},
                     {"network", all[rank].network},
                     {"shm", ways.shared},
                     {"ucx", ways.network}});
  }
  return {{"launched_by", job.launched_by()}, {"size", job.size()}, {"ranks", std::move(ranks)}};
}

void Print(const Communicator& job, const std::vector<Whereabouts>& all) {
  std::vector<std::vector<std::string>> rows = {
      {"rank", "host", "shared memory with", "UCX to", "over"}};
  for (size_t rank = 0; rank < all.size(); ++rank) {
    const Ways ways = WaysOf(rank, all);
    const std::string& network = all[rank].network;
    rows.push_back({std::to_string(rank), all[rank].host, FormatRanks(ways.shared),
                    FormatRanks(ways.network),
                    ways.network.empty() ? ""
                    : network.empty()    ? "what UCX chooses"
                                         : network});
  }
  std::vector<size_t> widths(rows[0].size());
  for (const auto& row : rows) {
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], Width(row[c]));
  }
  if (job.size() == 1) {
    std::cout << "1 rank, " << job.launched_by()
              << "; `bluefog run -np N bluefog info --job` shows a job\n";
    return;
  }
  std::cout << fmt::format("{} ranks, started by {}\n", job.size(), job.launched_by());
  for (const auto& row : rows) {
    std::string line = PadLeft(row[0], widths[0]);
    for (size_t c = 1; c < row.size(); ++c) line += "  " + Pad(row[c], widths[c]);
    std::cout << line.substr(0, line.find_last_not_of(' ') + 1) << "\n";
  }
}

}  // namespace

void DescribeJob(bool json) {
  StatusOr<std::unique_ptr<Communicator>> job = Communicator::Create();
  if (!job.ok()) Fail(job.status(), 1);
  std::vector<Whereabouts> all = (*job)->engine()->whereabouts();
  if (all.empty()) all.emplace_back();  // Alone.
  if ((*job)->rank() == 0) {
    if (json) {
      std::cout << AsJson(**job, all).dump(2) << "\n";
    } else {
      Print(**job, all);
    }
  }
  (*job)->Shutdown();
}

}  // namespace bluefog::tools
