#include "hosts.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>

#include "format.h"

namespace bluefog::tools {
namespace {

constexpr int kMaxSlots = 4096;  // More is a slip of the finger, and would take the host down.

Status Bad(const std::string& text) { return absl::InvalidArgumentError(text); }

StatusOr<int> ParseSlots(std::string_view text) {
  const int64_t slots = ParseSize(text);
  if (slots < 1 || slots > kMaxSlots) {
    return Bad("'" + std::string(text) + "' is no number of slots: give 1 to " +
               std::to_string(kMaxSlots));
  }
  return static_cast<int>(slots);
}

Status CheckName(const std::string& name) {
  const std::string host = WithoutUser(name);
  const bool plain = std::none_of(name.begin(), name.end(), [](char c) {
    return std::isspace(static_cast<unsigned char>(c)) || std::strchr("'\"\\/,;[]=", c) != nullptr;
  });
  if (host.empty() || !plain || name.front() == '-' || host.front() == '-') {
    return Bad("'" + name + "' is no name of a host");
  }
  return absl::OkStatus();
}

// "name", "name:slots", "[v6]:slots", "v6".
StatusOr<HostSlots> ParseHost(std::string_view text) {
  HostSlots host{std::string(text)};
  std::string_view slots;
  if (const size_t bracket = text.find('['); bracket != std::string_view::npos) {
    const size_t end = text.find(']');
    if (end == std::string_view::npos || end < bracket) {
      return Bad("'" + std::string(text) + "' lacks its ]");
    }
    host.name = std::string(text.substr(0, bracket)) +
                std::string(text.substr(bracket + 1, end - bracket - 1));
    slots = text.substr(end + 1);
    if (!slots.empty() && slots[0] != ':') {
      return Bad("'" + std::string(text) + "' should be [address]:slots");
    }
  } else if (std::count(text.begin(), text.end(), ':') == 1) {
    host.name = text.substr(0, text.find(':'));
    slots = text.substr(text.find(':'));
  }
  if (Status s = CheckName(host.name); !s.ok()) return s;
  if (!slots.empty()) {
    StatusOr<int> number = ParseSlots(slots.substr(1));
    if (!number.ok()) return Bad("of " + host.name + " " + std::string(number.status().message()));
    host.slots = *number;
  }
  return host;
}

using Addresses = std::unique_ptr<addrinfo, void (*)(addrinfo*)>;

Addresses Resolve(const std::string& host) {
  addrinfo hints = {}, *found = nullptr;
  hints.ai_socktype = SOCK_DGRAM;
  if (getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0) found = nullptr;
  return {found, [](addrinfo* list) {
            if (list != nullptr) freeaddrinfo(list);
          }};
}

std::string Numeric(const sockaddr* address, socklen_t length) {
  char text[NI_MAXHOST] = "";
  getnameinfo(address, length, text, sizeof text, nullptr, 0, NI_NUMERICHOST);
  return text;
}

bool IsLoopbackAddress(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(address);
    return ntohl(v4->sin_addr.s_addr) >> 24 == 127;
  }
  return address->sa_family == AF_INET6 &&
         IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

}  // namespace

StatusOr<std::vector<HostSlots>> ParseHosts(std::string_view text) {
  std::vector<HostSlots> hosts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    StatusOr<HostSlots> host = ParseHost(text.substr(begin, end - begin));
    if (!host.ok()) return host.status();
    hosts.push_back(*std::move(host));
    begin = end + 1;
  }
  return hosts;
}

StatusOr<std::vector<HostSlots>> ReadHostfile(const std::string& path) {
  std::ifstream file(path);
  if (!file) return Bad(path + " cannot be read");
  std::vector<HostSlots> hosts;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const auto bad = [&](const std::string& text) {
      return Bad(fmt::format("{}, line {}: {}", path, number, text));
    };
    std::istringstream words(line.substr(0, line.find('#')));
    std::string name, word;
    if (!(words >> name)) continue;
    StatusOr<HostSlots> host = ParseHost(name);
    if (!host.ok()) return bad(std::string(host.status().message()));
    while (words >> word) {
      if (!word.starts_with("slots=")) {
        return bad("'" + word + "' is not understood; lines are 'host slots=4' or 'host:4'");
      }
      StatusOr<int> slots = ParseSlots(std::string_view(word).substr(6));
      if (!slots.ok()) return bad(std::string(slots.status().message()));
      host->slots = *slots;
    }
    hosts.push_back(*std::move(host));
  }
  if (hosts.empty()) return Bad(path + " names no host");
  return hosts;
}

StatusOr<std::vector<HostRanks>> PlaceRanks(const std::vector<HostSlots>& hosts, int ranks,
                                            bool ssh_always) {
  std::vector<HostRanks> placed;
  int slots = 0;
  std::string list;
  for (const HostSlots& host : hosts) {
    const bool local = !ssh_always && IsThisHost(host.name);
    const auto same = std::find_if(placed.begin(), placed.end(), [&](const HostRanks& other) {
      return other.name == host.name || (local && other.local);
    });
    if (same != placed.end()) {
      same->slots += host.slots;
    } else {
      placed.push_back({host.name, local, host.slots});
    }
    slots += host.slots;
    list += (list.empty() ? "" : ",") + host.name + ":" + std::to_string(host.slots);
  }
  if (ranks == 0) ranks = slots;
  if (ranks > slots) {
    return Bad("-np is " + std::to_string(ranks) + ", but the hosts have " + std::to_string(slots) +
               " slots: " + list);
  }
  int first = 0;
  for (HostRanks& host : placed) {
    host.first = first;
    host.count = std::min(host.slots, ranks - first);
    first += host.count;
  }
  std::erase_if(placed, [](const HostRanks& host) { return host.count == 0; });
  return placed;
}

std::string OwnName() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

std::string WithoutUser(const std::string& name) {
  const size_t at = name.rfind('@');
  return at == std::string::npos ? name : name.substr(at + 1);
}

bool IsThisHost(const std::string& host) {
  // Another user's processes are not ours to start without ssh.
  if (host.find('@') != std::string::npos) return false;
  if (host == "localhost" || host == OwnName() || IsLoopback(host)) return true;
  const Addresses meant = Resolve(host);
  ifaddrs* own = nullptr;
  if (getifaddrs(&own) != 0) return false;
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> list(own, freeifaddrs);
  for (const addrinfo* a = meant.get(); a != nullptr; a = a->ai_next) {
    for (const ifaddrs* i = own; i != nullptr; i = i->ifa_next) {
      if (i->ifa_addr == nullptr || i->ifa_addr->sa_family != a->ai_family) continue;
      if (Numeric(i->ifa_addr, a->ai_addrlen) == Numeric(a->ai_addr, a->ai_addrlen)) return true;
    }
  }
  return false;
}

bool IsLoopback(const std::string& host) {
  const Addresses list = Resolve(host);
  for (const addrinfo* a = list.get(); a != nullptr; a = a->ai_next) {
    if (IsLoopbackAddress(a->ai_addr)) return true;
  }
  return false;
}

std::string ReachableName(const std::string& name) {
  if (Resolve(name) != nullptr && !IsLoopback(name)) return name;
  // "client port server port"
  const char* connection = std::getenv("SSH_CONNECTION");
  std::istringstream words(connection == nullptr ? "" : connection);
  std::string client, port, server;
  if (!(words >> client >> port >> server)) return name;
  const bool link_local = server.find('%') != std::string::npos;
  return link_local || IsLoopback(server) ? name : server;
}

StatusOr<std::string> AddressTowards(const std::string& host) {
  const Addresses list = Resolve(host);
  for (const addrinfo* a = list.get(); a != nullptr; a = a->ai_next) {
    sockaddr_storage to = {}, from = {};
    std::memcpy(&to, a->ai_addr, a->ai_addrlen);
    reinterpret_cast<sockaddr_in&>(to).sin_port = htons(9);  // Nothing is sent.
    socklen_t length = sizeof from;
    const int fd = socket(a->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const bool routed = fd >= 0 &&
                        connect(fd, reinterpret_cast<const sockaddr*>(&to), a->ai_addrlen) == 0 &&
                        getsockname(fd, reinterpret_cast<sockaddr*>(&from), &length) == 0;
    if (fd >= 0) close(fd);
    if (routed) return Numeric(reinterpret_cast<const sockaddr*>(&from), length);
  }
  return absl::NotFoundError("no address of this host leads to " + host);
}

std::string JoinHostPort(const std::string& host, int port) {
  const bool v6 = host.find(':') != std::string::npos;
  return (v6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

}  // namespace bluefog::tools
