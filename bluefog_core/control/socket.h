// The TCP sockets under gRPC. They are made here and handed to gRPC as descriptors: so a taken port
// is a plain errno (gRPC shares ports), nothing resolves names, uses proxies or reconnects behind
// our back, and a forked child can close its copies (a DataLoader worker that holds the socket of a
// killed rank would hide its death).
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include <bluefog/status.h>

namespace bluefog::control {

struct Endpoint {
  sockaddr_storage address = {};
  socklen_t length = 0;
};

/// "host:port" or "[v6]:port". Refuses a wildcard: nobody may reach the control plane unasked.
/// InvalidArgument for a name without address; Unavailable if no name server answers now.
StatusOr<Endpoint> ResolveEndpoint(const std::string& text);
/// Whether other hosts can reach `endpoint` (what `text` stands for): then the job needs a token.
Status CheckExposure(const Endpoint& endpoint, const std::string& text, bool has_token);
/// A listening socket (non-blocking). FailedPrecondition if the port is taken.
StatusOr<int> ListenAt(const Endpoint& endpoint, const std::string& text);
/// A connected socket (non-blocking). Unavailable if nobody listens or answers within `timeout_ms`.
StatusOr<int> ConnectTo(const Endpoint& endpoint, int timeout_ms);
/// The next waiting connection (non-blocking socket), -1 if there is none.
int AcceptFrom(int listen_fd);

/// The other end's address, for messages.
std::string PeerOf(int fd);

/// Descriptors that a forked child closes at once. Thread-safe. A descriptor that was closed
/// meanwhile and is somebody else's now is left alone (the inode tells).
class ForkClosedSockets {
 public:
  ForkClosedSockets() = default;
  ~ForkClosedSockets();
  ForkClosedSockets(const ForkClosedSockets&) = delete;
  ForkClosedSockets& operator=(const ForkClosedSockets&) = delete;
  void Add(int fd);
};

}  // namespace bluefog::control
