// Addresses of Unix sockets that lie in no file system and end with their sockets.
#pragma once

#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <string_view>

namespace bluefog {

struct AbstractAddress {
  /// Of a name longer than 107 bytes the first 107 count.
  explicit AbstractAddress(std::string_view name) {
    name = name.substr(0, sizeof(path.sun_path) - 1);
    path.sun_family = AF_UNIX;
    std::copy(name.begin(), name.end(), path.sun_path + 1);  // Behind a zero: abstract.
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&path); }

  sockaddr_un path{};
  socklen_t length = 0;
};

}  // namespace bluefog
