// Several ranks inside one process, over the in-process transport.
#include <bluefog/communicator.h>

#include <algorithm>

#include "base/failpoint.h"
#include "base/log.h"
#include "engine/engine.h"
#include "transport/inproc/inproc.h"

namespace bluefog {

Status PrepareProcess(const Config& config, int rank) {
  SetLogLevel(config.log_level, config.log_hide_time);
  SetLogRank(rank);
  return config.failpoints.empty() ? absl::OkStatus() : SetFailpoints(config.failpoints);
}

StatusOr<std::vector<std::unique_ptr<Communicator>>> Communicator::CreateInProcess(
    int size, const CommunicatorOptions& options) {
  if (size < 1) return absl::InvalidArgumentError("size must be at least 1");
  if (Status s = PrepareProcess(options.config, -1); !s.ok()) return s;
  auto hub = std::make_shared<transport::InprocHub>();
  std::vector<std::unique_ptr<Engine>> engines;
  std::vector<std::unique_ptr<transport::Transport>> transports;
  for (int rank = 0; rank < size; ++rank) {
    control::Place place;
    place.rank = place.local_rank = rank;
    place.size = place.local_size = size;
    if (const int k = options.config.nodes_per_machine; k > 0) {
      place.local_rank = rank % k;
      place.local_size = std::min(k, size - rank / k * k);
    }
    place.launched_by = "in process";
    engines.push_back(std::make_unique<Engine>(options.config, place));
    if (const int k = options.config.nodes_per_machine; k > 0) {
      engines.back()->SetPlacement(Placement::Evenly(size, k));
    }
    transport::InprocOptions inproc;
    inproc.fetch_views = options.fetch_views;
    inproc.inline_limit = InlineLimit(options.config);
    auto transport = transport::MakeInproc(hub, rank, engines.back()->receiver(), inproc);
    if (!transport.ok()) return transport.status();
    transports.push_back(*std::move(transport));
  }
  std::vector<std::unique_ptr<Communicator>> all;
  for (int rank = 0; rank < size; ++rank) {
    if (Status s = transports[rank]->SetPeers(std::vector<std::string>(size)); !s.ok()) return s;
    std::vector<transport::Transport*> by_rank(static_cast<size_t>(size), transports[rank].get());
    by_rank[rank] = nullptr;
    std::vector<std::unique_ptr<transport::Transport>> own;
    own.push_back(std::move(transports[rank]));
    if (Status s = engines[rank]->Start(std::move(own), std::move(by_rank)); !s.ok()) return s;
    StatusOr<Topology> topology = Exponential(size);
    if (!topology.ok()) return topology.status();
    if (Status s = engines[rank]->SetTopology(TopologySequence(*topology)); !s.ok()) return s;
    all.push_back(std::unique_ptr<Communicator>(new Communicator(std::move(engines[rank]))));
  }
  return all;
}

}  // namespace bluefog
