#include "transport/interfaces.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>

#include "transport/memfd.h"

namespace bluefog::transport {
namespace {

/// An address without its port, comparable by bytes.
struct Address {
  std::vector<uint8_t> bytes;  ///< 4 or 16.
  friend bool operator==(const Address&, const Address&) = default;
};

struct Interface {
  std::string name;
  Address address;
  bool loopback = false;
};

std::optional<Address> AddressOf(const sockaddr* socket_address) {
  if (socket_address == nullptr) return std::nullopt;
  const auto bytes = [](const auto& raw) {
    const auto* at = reinterpret_cast<const uint8_t*>(&raw);
    return Address{{at, at + sizeof raw}};
  };
  if (socket_address->sa_family == AF_INET) {
    return bytes(reinterpret_cast<const sockaddr_in*>(socket_address)->sin_addr);
  }
  if (socket_address->sa_family == AF_INET6) {
    return bytes(reinterpret_cast<const sockaddr_in6*>(socket_address)->sin6_addr);
  }
  return std::nullopt;
}

std::string ToString(const Address& address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  inet_ntop(address.bytes.size() == 4 ? AF_INET : AF_INET6, address.bytes.data(), text.data(),
            text.size());
  return text.data();
}

/// Those that are up, once for each address.
std::vector<Interface> All() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return {};
  const std::unique_ptr<ifaddrs, decltype(&freeifaddrs)> guard(list, freeifaddrs);
  std::vector<Interface> all;
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    std::optional<Address> address = AddressOf(i->ifa_addr);
    if (!address || (i->ifa_flags & IFF_UP) == 0) continue;
    all.push_back({i->ifa_name, *std::move(address), (i->ifa_flags & IFF_LOOPBACK) != 0});
  }
  return all;
}

void AddOnce(const std::string& name, std::vector<std::string>* names) {
  if (std::find(names->begin(), names->end(), name) == names->end()) names->push_back(name);
}

struct Subnet {
  Address address;
  int bits = 0;
  bool Contains(const Address& other) const {
    if (other.bytes.size() != address.bytes.size()) return false;
    for (int bit = 0; bit < bits; ++bit) {
      const auto byte = static_cast<size_t>(bit / 8);
      const int mask = 0x80 >> bit % 8;
      if (((address.bytes[byte] ^ other.bytes[byte]) & mask) != 0) return false;
    }
    return true;
  }
};

std::optional<Subnet> ParseSubnet(std::string_view text) {
  const size_t slash = text.find('/');
  if (slash == std::string_view::npos) return std::nullopt;
  const std::string host(text.substr(0, slash));
  Subnet subnet;
  for (const auto& [family, bytes] : {std::pair(AF_INET, 4), std::pair(AF_INET6, 16)}) {
    subnet.address.bytes.assign(static_cast<size_t>(bytes), 0);
    if (inet_pton(family, host.c_str(), subnet.address.bytes.data()) != 1) continue;
    const char* const end = text.data() + text.size();
    const auto parsed = std::from_chars(text.data() + slash + 1, end, subnet.bits);
    if (parsed.ec != std::errc() || parsed.ptr != end || subnet.bits < 0 ||
        subnet.bits > 8 * bytes) {
      return std::nullopt;
    }
    return subnet;
  }
  return std::nullopt;
}

// "lo 127.0.0.1 ::1, eth0 10.1.0.2". Addresses that hold on one link only say nothing.
std::string Describe(const std::vector<Interface>& interfaces) {
  std::vector<std::string> names;
  for (const Interface& i : interfaces) AddOnce(i.name, &names);
  std::string text;
  for (const std::string& name : names) {
    text += (text.empty() ? "" : ", ") + name;
    for (const Interface& i : interfaces) {
      const std::string address = ToString(i.address);
      if (i.name == name && !address.starts_with("fe80:")) text += " " + address;
    }
  }
  return text.empty() ? "none" : text;
}

}  // namespace

StatusOr<std::vector<std::string>> FindInterfaces(const std::string& wanted) {
  const std::vector<Interface> all = All();
  std::vector<std::string> names;
  for (size_t begin = 0; begin <= wanted.size();) {
    const size_t end = std::min(wanted.find(',', begin), wanted.size());
    const std::string word = wanted.substr(begin, end - begin);
    begin = end + 1;
    const std::optional<Subnet> subnet = ParseSubnet(word);
    bool found = false;
    for (const Interface& i : all) {
      if (subnet ? !subnet->Contains(i.address) : i.name != word) continue;
      found = true;
      AddOnce(i.name, &names);
    }
    if (found) continue;
    return absl::InvalidArgumentError(std::string("no interface of this host is up and ") +
                                      (subnet ? "in the subnet '" : "named '") + word +
                                      "'; those that are: " + Describe(all) +
                                      ". Give names or subnets (10.1.0.0/16), separated by commas");
  }
  return names;
}

std::string InterfaceToward(const std::string& address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos) return "";
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &found) != 0) return "";
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> guard(found, freeaddrinfo);
  const std::vector<Interface> all = All();
  for (const addrinfo* to = found; to != nullptr; to = to->ai_next) {
    // To connect a datagram socket sends nothing; it asks the kernel for the way.
    const UniqueFd socket_fd(socket(to->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    sockaddr_storage own{};
    socklen_t bytes = sizeof own;
    if (!socket_fd || connect(socket_fd.get(), to->ai_addr, to->ai_addrlen) != 0 ||
        getsockname(socket_fd.get(), reinterpret_cast<sockaddr*>(&own), &bytes) != 0) {
      continue;
    }
    const std::optional<Address> from = AddressOf(reinterpret_cast<const sockaddr*>(&own));
    for (const Interface& i : all) {
      if (from && i.address == *from) return i.loopback ? "" : i.name;
    }
  }
  return "";
}

std::string DescribeInterfaces(const std::vector<std::string>& names) {
  std::vector<Interface> listed;
  for (const std::string& name : names) {
    for (Interface& i : All()) {
      if (i.name == name) listed.push_back(std::move(i));
    }
  }
  return Describe(listed);
}

}  // namespace bluefog::transport
