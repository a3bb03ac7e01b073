#include "collective/cost.h"

#include <algorithm>
#include <map>
#include <utility>

namespace bluefog::collective {
namespace {

class Counter {
 public:
  explicit Counter(const Placement& placement)
      : placement_(placement), hosts_(placement.RanksByHost()) {
    cost_.host_bytes.resize(hosts_.size());
    for (int r = 0; r < placement.size(); ++r) Nic(r);
  }

  int hosts() const { return static_cast<int>(hosts_.size()); }
  const std::vector<int>& RanksOf(int host) const { return hosts_[static_cast<size_t>(host)]; }
  bool AnyShared() const {
    return std::any_of(hosts_.begin(), hosts_.end(), [](auto& ranks) { return ranks.size() > 1; });
  }
  void Leave(int rank, double bytes) { Nic(rank).out += bytes; }
  void Enter(int rank, double bytes) { Nic(rank).in += bytes; }
  void Inside(int host, double bytes) { cost_.host_bytes[static_cast<size_t>(host)] += bytes; }
  /// An allreduce inside each host.
  void ReduceInHosts(double bytes, bool one_shot) {
    for (int h = 0; h < hosts(); ++h) {
      const auto ranks = static_cast<double>(RanksOf(h).size());
      Inside(h, (one_shot ? ranks : 2.0) * (ranks - 1) * bytes);
    }
    if (AnyShared()) cost_.host_hops = one_shot ? 1 : 2;
  }
  Cost Finish(int nic_hops) && {
    cost_.nic_hops = nic_hops;
    for (const auto& [where, nic] : nics_) cost_.nics.push_back(nic);
    return std::move(cost_);
  }
  Cost& cost() { return cost_; }

 private:
  NicBytes& Nic(int rank) {
    const auto r = static_cast<size_t>(rank);
    const std::pair where(placement_.host[r], placement_.nic[r]);
    NicBytes& nic = nics_[where];
    nic.host = where.first;
    nic.nic = where.second;
    return nic;
  }

  const Placement& placement_;
  const std::vector<std::vector<int>> hosts_;
  std::map<std::pair<int, int>, NicBytes> nics_;
  Cost cost_;
};

}  // namespace

double Cost::BusiestNic() const {
  double most = 0.0;
  for (const NicBytes& nic : nics) most = std::max({most, nic.out, nic.in});
  return most;
}

double Cost::BusiestHost() const {
  double most = 0.0;
  for (const double bytes : host_bytes) most = std::max(most, bytes);
  return most;
}

double Cost::Seconds(const Links& links) const {
  return host_hops * links.host_latency + nic_hops * links.nic_latency +
         std::max(BusiestNic() / links.nic_bandwidth, BusiestHost() / links.host_bandwidth);
}

Links LinksOf(const Config& config) {
  const auto seconds = [](int64_t us) { return static_cast<double>(us) * 1e-6; };
  const auto bytes = [](int64_t mbps) { return static_cast<double>(mbps) * 1e6 / 8; };
  return {seconds(config.host_latency_us), bytes(config.host_mbps), seconds(config.nic_latency_us),
          bytes(config.nic_mbps)};
}

Cost CostOfNeighborAllreduce(const Placement& placement, const Topology& ranks, double bytes) {
  Counter count(placement);
  bool inside = false, between = false;
  for (int r = 0; r < placement.size(); ++r) {
    const int host = placement.host[static_cast<size_t>(r)];
    for (const Edge& edge : ranks.neighborhood(r).out) {
      if (placement.host[static_cast<size_t>(edge.rank)] == host) {
        inside = true;
        count.Inside(host, bytes);
      } else {
        between = true;
        count.Leave(r, bytes);
        count.Enter(edge.rank, bytes);
      }
    }
  }
  // Both at the same time, of which that between hosts takes longer.
  count.cost().host_hops = inside && !between ? 1 : 0;
  return std::move(count).Finish(between ? 1 : 0);
}

Cost CostOfHierarchicalNeighborAllreduce(Form form, const Placement& placement,
                                         const Topology& machines, double bytes, bool one_shot) {
  Counter count(placement);
  const bool flat = form == Form::kFlat;
  count.ReduceInHosts(bytes, flat && one_shot);
  bool edges = false;
  for (int h = 0; h < count.hosts(); ++h) {
    const std::vector<int>& here = count.RanksOf(h);
    for (const Edge& edge : machines.neighborhood(h).out) {
      edges = true;
      const std::vector<int>& there = count.RanksOf(edge.rank);
      if (flat) {
        for (size_t l = 0; l < there.size(); ++l) {
          count.Leave(here[l % here.size()], bytes);
          count.Enter(there[l], bytes);
        }
        continue;
      }
      for (const int rank : here) count.Leave(rank, bytes / static_cast<double>(here.size()));
      for (const int rank : there) count.Enter(rank, bytes / static_cast<double>(there.size()));
    }
  }
  return std::move(count).Finish(edges ? 1 : 0);
}

Cost CostOfAllreduce(Form form, const Placement& placement, double bytes, bool one_shot) {
  Counter count(placement);
  const double n = placement.size();
  const int hosts = count.hosts();
  const bool several = hosts > 1;
  if (form == Form::kFlat) {
    const double each = one_shot ? bytes : 2 * bytes / n;  // To each other rank.
    for (int h = 0; h < hosts; ++h) {
      const auto ranks = static_cast<double>(count.RanksOf(h).size());
      count.Inside(h, ranks * (ranks - 1) * each);
      for (const int rank : count.RanksOf(h)) {
        count.Leave(rank, (n - ranks) * each);
        count.Enter(rank, (n - ranks) * each);
      }
    }
    const int hops = n == 1 ? 0 : one_shot ? 1 : 2;
    count.cost().host_hops = several ? 0 : hops;  // Those between hosts take longer.
    return std::move(count).Finish(several ? hops : 0);
  }
  count.ReduceInHosts(bytes, false);
  for (int h = 0; h < hosts && several; ++h) {
    const double each = (hosts == 2 ? 1.0 : 2.0 * (hosts - 1) / hosts) * bytes /
                        static_cast<double>(count.RanksOf(h).size());
    for (const int rank : count.RanksOf(h)) {
      count.Leave(rank, each);
      count.Enter(rank, each);
    }
  }
  return std::move(count).Finish(std::min(hosts - 1, 2));
}

Form ChooseHierarchicalNeighborAllreduce(const Placement& placement, double bytes, bool one_shot,
                                         const Links& links) {
  const int hosts = placement.hosts();
  const Topology machines =
      hosts > 1 ? *Ring(hosts, RingStyle::kRight) : *FullyConnected(std::max(1, hosts));
  const auto seconds = [&](Form form) {
    return CostOfHierarchicalNeighborAllreduce(form, placement, machines, bytes, one_shot)
        .Seconds(links);
  };
  // Where they are alike the flat one moves more inside each rank.
  return seconds(Form::kFlat) < seconds(Form::kHierarchical) ? Form::kFlat : Form::kHierarchical;
}

Form ChooseAllreduce(const Placement& placement, double bytes, bool one_shot, const Links& links) {
  const auto seconds = [&](Form form) {
    return CostOfAllreduce(form, placement, bytes, one_shot).Seconds(links);
  };
  const bool hierarchical =
      placement.hosts() > 1 && seconds(Form::kHierarchical) < seconds(Form::kFlat);
  return hierarchical ? Form::kHierarchical : Form::kFlat;
}

}  // namespace bluefog::collective
