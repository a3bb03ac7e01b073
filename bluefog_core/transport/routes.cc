#include "transport/routes.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <utility>

#include "base/log.h"
#include "transport/interfaces.h"
#include "transport/shm/shm.h"
#include "transport/ucx/ucx.h"

namespace bluefog::transport {
namespace {

// Changing what an entry holds means a new one.
constexpr char kEntryPrefix[] = "bluefog-at-2";

std::string Namespace(const char* kind) {
  struct stat info {};
  const std::string path = std::string("/proc/self/ns/") + kind;
  return stat(path.c_str(), &info) == 0 ? std::to_string(info.st_ino) : "";
}

template <typename W>
auto Fields(W& w) {
  return std::array{&w.host, &w.boot, &w.process_namespace, &w.network_namespace,
                    &w.shm,  &w.ucx,  &w.problem,           &w.network};
}

}  // namespace

bool Whereabouts::SameHost(const Whereabouts& other) const {
  return !boot.empty() && boot == other.boot && process_namespace == other.process_namespace &&
         network_namespace == other.network_namespace;
}

bool Whereabouts::SharesMemoryWith(const Whereabouts& other) const {
  return !shm.empty() && !other.shm.empty() && SameHost(other);
}

Placement PlacementOf(const std::vector<Whereabouts>& ranks) {
  Placement placement = Placement::OneHost(static_cast<int>(ranks.size()));
  std::vector<const Whereabouts*> hosts;  // The first rank of each.
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto host = std::find_if(hosts.begin(), hosts.end(), [&](const Whereabouts* first) {
      return first->SameHost(ranks[rank]);
    });
    placement.host[rank] = static_cast<int>(host - hosts.begin());
    if (host == hosts.end()) hosts.push_back(&ranks[rank]);
  }
  return placement;
}

std::string Pack(const Whereabouts& whereabouts) {
  std::string entry = kEntryPrefix;
  for (const std::string* field : Fields(whereabouts)) {
    const auto bytes = static_cast<uint32_t>(field->size());
    entry.append(reinterpret_cast<const char*>(&bytes), sizeof bytes).append(*field);
  }
  return entry;
}

StatusOr<Whereabouts> Unpack(const std::string& entry) {
  Whereabouts w;
  size_t at = strlen(kEntryPrefix);
  bool whole = entry.rfind(kEntryPrefix, 0) == 0;
  for (std::string* field : Fields(w)) {
    uint32_t bytes = 0;
    whole = whole && entry.size() - at >= sizeof bytes;
    if (!whole) break;
    std::memcpy(&bytes, entry.data() + at, sizeof bytes);
    at += sizeof bytes;
    whole = entry.size() - at >= bytes;
    if (!whole) break;
    field->assign(entry, at, bytes);
    at += bytes;
  }
  if (!whole || at != entry.size()) {
    return absl::InvalidArgumentError("an entry of " + std::to_string(entry.size()) +
                                      " bytes is not of this version of bluefog");
  }
  return w;
}

namespace {

Status ChooseInterfaces(const RouteOptions& options, UcxOptions* ucx, std::string* text) {
  std::vector<std::string> names;
  if (!options.network_interface.empty()) {
    StatusOr<std::vector<std::string>> found = FindInterfaces(options.network_interface);
    if (!found.ok()) {
      return Status(found.status().code(),
                    "BLUEFOG_NETWORK_INTERFACE: " + std::string(found.status().message()));
    }
    names = *std::move(found);
  } else if (std::string name = InterfaceToward(options.coordinator); !name.empty()) {
    names.push_back(std::move(name));
  }
  std::string& devices = options.network_interface.empty() ? ucx->default_devices : ucx->devices;
  for (const std::string& name : names) devices += (devices.empty() ? "" : ",") + name;
  *text = names.empty() ? "" : DescribeInterfaces(names);
  return absl::OkStatus();
}

}  // namespace

StatusOr<Routes> Routes::Open(const RouteOptions& options, std::shared_ptr<Arena> arena,
                              Receiver* receiver) {
  Routes routes;
  routes.options_ = options;
  Whereabouts& self = routes.self_;
  std::array<char, 256> host{};
  if (gethostname(host.data(), host.size() - 1) == 0) self.host = host.data();
  std::ifstream("/proc/sys/kernel/random/boot_id") >> self.boot;
  self.process_namespace = Namespace("pid");
  self.network_namespace = Namespace("net");
  if (options.transport != "ucx") {
    ShmOptions shm;
    shm.rank = options.rank;
    shm.size = options.size;
    shm.job_id = options.job_id;
    shm.inline_limit = options.inline_limit;
    auto made = MakeShm(shm, std::move(arena), receiver);
    if (!made.ok()) return made.status();
    routes.shm_ = *std::move(made);
    self.shm = routes.shm_->address();
  }
  if (options.transport == "ucx" || (options.transport == "auto" && !options.one_host)) {
    UcxOptions ucx;
    ucx.rank = options.rank;
    ucx.size = options.size;
    ucx.job_id = options.job_id;
    ucx.inline_limit = options.inline_limit;
    ucx.component_dir = options.component_dir;
    ucx.token = options.token;
    if (Status s = ChooseInterfaces(options, &ucx, &self.network); !s.ok()) return s;
    auto made = MakeUcx(ucx, receiver);
    if (made.ok()) {
      routes.ucx_ = *std::move(made);
      self.ucx = routes.ucx_->address();
    } else {
      self.problem = std::string(made.status().message());
    }
  } else {
    self.problem = options.transport == "shm" ? "BLUEFOG_TRANSPORT=shm"
                                              : "all ranks were said to be on one host";
  }
  return routes;
}

Status Routes::SetPeers(const std::vector<std::string>& entries) {
  const auto size = static_cast<size_t>(options_.size);
  if (entries.size() != size) {
    return absl::InvalidArgumentError("an address book of " + std::to_string(entries.size()) +
                                      " entries for " + std::to_string(size) + " ranks");
  }
  std::vector<std::string> shm(size), ucx(size);
  by_rank.assign(size, nullptr);
  whereabouts.assign(size, self_);
  for (size_t rank = 0; rank < size; ++rank) {
    if (static_cast<int>(rank) == options_.rank) continue;
    StatusOr<Whereabouts> peer = Unpack(entries[rank]);
    if (!peer.ok()) {
      return Status(peer.status().code(),
                    "rank " + std::to_string(rank) + ": " + std::string(peer.status().message()));
    }
    whereabouts[rank] = *peer;
    if (self_.SharesMemoryWith(*peer)) {
      shm[rank] = peer->shm;
      by_rank[rank] = shm_.get();
    } else if (!self_.ucx.empty() && !peer->ucx.empty()) {
      ucx[rank] = peer->ucx;
      by_rank[rank] = ucx_.get();
    } else {
      const bool mine = self_.ucx.empty();
      return absl::FailedPreconditionError(
          "rank " + std::to_string(options_.rank) + " (host " + self_.host + ") and rank " +
          std::to_string(rank) + " (host " + peer->host + ") share no memory, and rank " +
          std::to_string(mine ? options_.rank : int(rank)) +
          " has no UCX: " + (mine ? self_.problem : peer->problem));
    }
  }
  for (auto& [transport, addresses] : {std::pair(&shm_, &shm), std::pair(&ucx_, &ucx)}) {
    bool used = false;
    for (const Transport* t : by_rank) used = used || (t != nullptr && t == transport->get());
    if (!used) {
      transport->reset();  // Nobody is reached that way.
      continue;
    }
    if (Status s = (*transport)->SetPeers(std::move(*addresses)); !s.ok()) return s;
    transports.push_back(std::move(*transport));
  }
  return absl::OkStatus();
}

}  // namespace bluefog::transport
