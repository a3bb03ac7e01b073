// The hosts of a job: how -H and a hostfile name them, which of them is this one, and which ranks
// each runs.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <bluefog/status.h>

namespace bluefog::tools {

struct HostSlots {
  std::string name;  ///< As ssh takes it: [user@]host.
  int slots = 1;     ///< Ranks that it takes.
};

/// The ranks first … first + count − 1 run on this host.
struct HostRanks {
  std::string name;
  bool local = false;  ///< This host: no ssh is needed.
  int slots = 1, first = 0, count = 0;
};

/// "host1:4,host2": names, a colon and the slots (1 without). IPv6 addresses with slots stand in
/// brackets: "[fd00::1]:4".
StatusOr<std::vector<HostSlots>> ParseHosts(std::string_view text);
/// A host a line: "host slots=4" or "host:4"; # begins a comment. Errors name the line.
StatusOr<std::vector<HostSlots>> ReadHostfile(const std::string& path);

/// Fills the hosts in their order with `ranks` ranks; 0: as many as there are slots. A host that is
/// named twice has the sum of its slots. `ssh_always`: none counts as this host.
StatusOr<std::vector<HostRanks>> PlaceRanks(const std::vector<HostSlots>& hosts, int ranks,
                                            bool ssh_always);

/// The name of this host.
std::string OwnName();
/// "host", without "user@".
std::string WithoutUser(const std::string& name);
/// True for localhost, this host's own name, and names that mean one of its addresses.
bool IsThisHost(const std::string& host);
/// True for localhost and addresses that lead to the asking host itself.
bool IsLoopback(const std::string& host);

/// On the host that others know by `name`: that name, unless it means loopback here (Debian writes
/// a host's own name beside 127.0.1.1); then the address at which ssh came in, if it did.
std::string ReachableName(const std::string& name);
/// The address of this host from which packets go to `host`. NotFound if there is none.
StatusOr<std::string> AddressTowards(const std::string& host);
/// "host:port", "[v6]:port".
std::string JoinHostPort(const std::string& host, int port);

}  // namespace bluefog::tools
