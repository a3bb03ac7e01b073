#include "base/port.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>
#include <random>

namespace bluefog {
namespace {

bool IsFree(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_ANY);
  const bool free =
      fd >= 0 && bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  if (fd >= 0) close(fd);
  return free;
}

}  // namespace

StatusOr<int> FreePort() {
  constexpr int kLow = 10'240;
  int ephemeral_low = 32'768;
  std::ifstream("/proc/sys/net/ipv4/ip_local_port_range") >> ephemeral_low;
  const int high = ephemeral_low > kLow + 1'000 ? ephemeral_low : 65'536;
  std::random_device random;
  std::uniform_int_distribution<int> ports(kLow, high - 1);
  for (int attempt = 0; attempt < 1'000; ++attempt) {
    const int port = ports(random);
    if (IsFree(port)) return port;
  }
  return absl::ResourceExhaustedError("no free TCP port between " + std::to_string(kLow) + " and " +
                                      std::to_string(high));
}

}  // namespace bluefog
