// Communicator: joins the job, puts transport, control plane and engine together, and forwards.
#include <bluefog/communicator.h>

#include "base/log.h"
#include "control/membership.h"
#include "engine/engine.h"
#include "transport/routes.h"

namespace bluefog {
namespace {

Placement MachinesOf(const Config& config, const std::vector<transport::Whereabouts>& ranks) {
  const int k = config.nodes_per_machine;
  return k > 0 ? Placement::Evenly(static_cast<int>(ranks.size()), k)
               : transport::PlacementOf(ranks);
}

}  // namespace

Communicator::Communicator(std::unique_ptr<Engine> engine) : engine_(std::move(engine)) {}
Communicator::~Communicator() {
  // Of a forked child nothing is its own: not the threads, and not the files, which it would end.
  if (engine_ != nullptr && engine_->in_forked_child()) {
    [[maybe_unused]] Engine* const left_alone = engine_.release();
  }
}

StatusOr<std::unique_ptr<Communicator>> Communicator::Create() {
  StatusOr<Config> config = Config::FromEnvironment();
  if (!config.ok()) return config.status();
  CommunicatorOptions options;
  options.config = *std::move(config);
  return Create(options);
}

StatusOr<std::unique_ptr<Communicator>> Communicator::Create(const CommunicatorOptions& options) {
  StatusOr<control::Place> place = control::FindPlace(options.config);
  if (!place.ok()) return place.status();
  if (Status s = PrepareProcess(options.config, place->size > 1 ? place->rank : -1); !s.ok()) {
    return s;
  }
  BLUEFOG_LOG(kInfo) << "rank " << place->rank << " of " << place->size << " ("
                     << place->launched_by << ")";
  auto engine = std::make_unique<Engine>(options.config, *place);
  std::vector<std::unique_ptr<transport::Transport>> transports;
  std::vector<transport::Transport*> by_rank(static_cast<size_t>(place->size), nullptr);
  if (place->size > 1) {
    transport::RouteOptions ways;
    ways.rank = place->rank;
    ways.size = place->size;
    ways.job_id = place->job_id;
    ways.inline_limit = InlineLimit(options.config);
    ways.transport = options.config.transport;
    ways.one_host = place->local_size == place->size;
    ways.network_interface = options.config.network_interface;
    ways.coordinator = place->coordinator;
    ways.component_dir = options.config.component_dir;
    ways.token = place->token;
    auto routes = transport::Routes::Open(ways, engine->arena(), engine->receiver());
    if (!routes.ok()) return routes.status();
    control::MembershipEvents events = engine->MembershipEvents();
    events.interrupted = options.interrupted;
    auto membership =
        control::Membership::Join(*place, options.config, routes->address(), std::move(events));
    if (!membership.ok()) return membership.status();
    if (Status s = routes->SetPeers((*membership)->addresses()); !s.ok()) return s;
    engine->SetPlacement(MachinesOf(options.config, routes->whereabouts));
    engine->SetMembership(*std::move(membership));
    engine->SetWhereabouts(std::move(routes->whereabouts));
    transports = std::move(routes->transports);
    by_rank = std::move(routes->by_rank);
  }
  if (Status s = engine->Start(std::move(transports), std::move(by_rank)); !s.ok()) return s;
  StatusOr<Topology> topology = Exponential(place->size);
  if (!topology.ok()) return topology.status();
  if (Status s = engine->SetTopology(TopologySequence(*std::move(topology))); !s.ok()) return s;
  return std::unique_ptr<Communicator>(new Communicator(std::move(engine)));
}

int Communicator::rank() const { return engine_->place().rank; }
int Communicator::size() const { return engine_->place().size; }
int Communicator::local_rank() const { return engine_->place().local_rank; }
int Communicator::local_size() const { return engine_->place().local_size; }
const Placement& Communicator::placement() const { return engine_->placement(); }
int Communicator::machine_rank() const { return engine_->machine(); }
int Communicator::machine_size() const { return placement().hosts(); }
bool Communicator::is_homogeneous() const { return placement().homogeneous(); }
const std::string& Communicator::launched_by() const { return engine_->place().launched_by; }

Status Communicator::SetTopology(TopologySequence topology) {
  return engine_->SetTopology(std::move(topology));
}
std::shared_ptr<const TopologySequence> Communicator::topology() const {
  return engine_->topology();
}
Status Communicator::SetMachineTopology(TopologySequence topology) {
  return engine_->SetTopology(std::move(topology), Engine::Nodes::kMachines);
}
std::shared_ptr<const TopologySequence> Communicator::machine_topology() const {
  return engine_->topology(Engine::Nodes::kMachines);
}
StatusOr<std::shared_ptr<Work>> Communicator::Submit(OpSpec spec) {
  return engine_->Submit(std::move(spec));
}
StatusOr<std::shared_ptr<std::byte>> Communicator::Allocate(int64_t bytes) {
  if (Status s = engine_->CheckUsable("empty"); !s.ok()) return s;
  return engine_->arena()->Allocate(bytes);
}
EngineStats Communicator::stats() const { return engine_->stats(); }
Status Communicator::status() const { return engine_->status(); }
void Communicator::Shutdown(const std::function<bool()>& interrupted) {
  engine_->Shutdown(interrupted);
}

}  // namespace bluefog
