#include "control/socket.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "base/mutex.h"

namespace bluefog::control {
namespace {

std::string ErrnoText(int error) { return std::strerror(error); }

bool IsWildcard(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    return reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr == htonl(INADDR_ANY);
  }
  return IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

bool IsLoopback(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    return ntohl(v4.sin_addr.s_addr) >> 24 == IN_LOOPBACKNET;
  }
  const in6_addr& v6 = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
  return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
}

/// What is lost is sent again every 200 ms, not after twice as long each time: a heartbeat must not
/// wait for seconds behind a gap that has healed.
void SetUp(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  setsockopt(fd, IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, &on, sizeof(on));
}

struct Registry {
  struct Entry {
    const void* owner;
    int fd;
    ino_t inode;
  };
  Mutex mu;
  std::vector<Entry> entries GUARDED_BY(mu);
};

bool StillOpen(const Registry::Entry& entry) {
  struct stat st;
  return fstat(entry.fd, &st) == 0 && S_ISSOCK(st.st_mode) && st.st_ino == entry.inode;
}

Registry& GetRegistry() {
  static Registry* const registry = [] {
    auto* made = new Registry;  // Never destroyed: a fork may come at exit.
    pthread_atfork([]() NO_THREAD_SAFETY_ANALYSIS { GetRegistry().mu.Lock(); },
                   []() NO_THREAD_SAFETY_ANALYSIS { GetRegistry().mu.Unlock(); },
                   []() NO_THREAD_SAFETY_ANALYSIS {
                     for (const Registry::Entry& entry : GetRegistry().entries) {
                       if (StillOpen(entry)) close(entry.fd);
                     }
                     GetRegistry().mu.Unlock();
                   });
    return made;
  }();
  return *registry;
}

}  // namespace

StatusOr<Endpoint> ResolveEndpoint(const std::string& text) {
  const size_t colon = text.rfind(':');
  const std::string port = colon == std::string::npos ? "" : text.substr(colon + 1);
  std::string host = colon == std::string::npos ? "" : text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  const bool number =
      !port.empty() && port.size() <= 5 &&
      std::all_of(port.begin(), port.end(), [](char c) { return '0' <= c && c <= '9'; });
  if (host.empty() || !number || std::stoi(port) < 1 || std::stoi(port) > 65535) {
    return absl::InvalidArgumentError("the coordinator is '" + text +
                                      "' and should be host:port (BLUEFOG_COORDINATOR)");
  }
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found); error != 0) {
    const std::string problem = "the coordinator's host '" + host +
                                "' has no address: " + gai_strerror(error) +
                                " (BLUEFOG_COORDINATOR)";
    return error == EAI_AGAIN ? absl::UnavailableError(problem)
                              : absl::InvalidArgumentError(problem);
  }
  std::unique_ptr<addrinfo, void (*)(addrinfo*)> list(found, freeaddrinfo);
  const addrinfo* chosen = found;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    if (a->ai_family == AF_INET) {
      chosen = a;
      break;
    }
  }
  if (IsWildcard(chosen->ai_addr)) {
    return absl::InvalidArgumentError(
        "the coordinator is '" + text +
        "', which would open the control plane to every network: name one address of rank 0's host "
        "(BLUEFOG_COORDINATOR)");
  }
  Endpoint endpoint;
  std::memcpy(&endpoint.address, chosen->ai_addr, chosen->ai_addrlen);
  endpoint.length = chosen->ai_addrlen;
  return endpoint;
}

Status CheckExposure(const Endpoint& endpoint, const std::string& text, bool has_token) {
  if (has_token || IsLoopback(endpoint.address)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "the control plane at " + text +
      " can be reached from the network, and this job has no token that keeps strangers out: put "
      "32 random bytes into a file, (umask 077; head -c 32 /dev/urandom > FILE), bring it to every "
      "host, and set BLUEFOG_TOKEN_FILE=FILE for every rank (`bluefog run` does this by itself)");
}

StatusOr<int> ListenAt(const Endpoint& endpoint, const std::string& text) {
  const int fd =
      socket(endpoint.address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP);
  if (fd < 0) return absl::ResourceExhaustedError("no socket: " + ErrnoText(errno));
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));  // Init again right after shutdown.
  if (bind(fd, reinterpret_cast<const sockaddr*>(&endpoint.address), endpoint.length) == 0 &&
      listen(fd, SOMAXCONN) == 0) {
    return fd;
  }
  const int error = errno;
  close(fd);
  if (error == EADDRINUSE) {
    return absl::FailedPreconditionError("rank 0 cannot serve the control plane at " + text +
                                         ": the port is taken by another process; set "
                                         "BLUEFOG_COORDINATOR=host:port to a free port, the "
                                         "same on all ranks (under torchrun: or --master-port)");
  }
  return absl::FailedPreconditionError(
      "rank 0 cannot serve the control plane at " + text + ": " + ErrnoText(error) +
      "; BLUEFOG_COORDINATOR must name an address of rank 0's own host");
}

StatusOr<int> ConnectTo(const Endpoint& endpoint, int timeout_ms) {
  const int fd =
      socket(endpoint.address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP);
  if (fd < 0) return absl::ResourceExhaustedError("no socket: " + ErrnoText(errno));
  int error = 0;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&endpoint.address), endpoint.length) != 0) {
    error = errno;
    if (error == EINPROGRESS || error == EINTR) {
      pollfd ready = {fd, POLLOUT, 0};
      socklen_t length = sizeof(error);
      error = poll(&ready, 1, timeout_ms) == 1 ? 0 : ETIMEDOUT;
      if (error == 0) getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    }
  }
  if (error == 0) {
    // While nobody listens, a socket whose own port happens to be the wanted one connects to
    // itself.
    Endpoint self;
    self.length = sizeof(self.address);
    getsockname(fd, reinterpret_cast<sockaddr*>(&self.address), &self.length);
    if (self.length == endpoint.length &&
        std::memcmp(&self.address, &endpoint.address, self.length) == 0) {
      error = ECONNREFUSED;
    }
  }
  if (error != 0) {
    close(fd);
    return absl::UnavailableError(ErrnoText(error));
  }
  SetUp(fd);
  return fd;
}

int AcceptFrom(int listen_fd) {
  const int fd = accept4(listen_fd, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd >= 0) SetUp(fd);
  return fd;
}

std::string PeerOf(int fd) {
  Endpoint peer;
  peer.length = sizeof(peer.address);
  char host[NI_MAXHOST] = "";
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer.address), &peer.length) != 0 ||
      getnameinfo(reinterpret_cast<sockaddr*>(&peer.address), peer.length, host, sizeof(host),
                  nullptr, 0, NI_NUMERICHOST) != 0) {
    return "an unknown address";
  }
  return host;
}

ForkClosedSockets::~ForkClosedSockets() {
  Registry& registry = GetRegistry();
  MutexLock lock(registry.mu);
  std::erase_if(registry.entries, [this](const Registry::Entry& e) { return e.owner == this; });
}

void ForkClosedSockets::Add(int fd) {
  struct stat st;
  if (fstat(fd, &st) != 0) return;
  Registry& registry = GetRegistry();
  MutexLock lock(registry.mu);
  // Connections that were closed since make room before the list would grow.
  if (registry.entries.size() == registry.entries.capacity()) {
    std::erase_if(registry.entries, [](const Registry::Entry& e) { return !StillOpen(e); });
  }
  registry.entries.push_back({this, fd, st.st_ino});
}

}  // namespace bluefog::control
