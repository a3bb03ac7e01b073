// Abstract Unix sockets that carry packets with descriptors. The names are not in any file system:
// nothing stays behind.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "transport/memfd.h"
#include "transport/shm/layout.h"

namespace bluefog::transport::shm {

inline constexpr size_t kMaxPacketFds = 3;

enum class SocketResult {
  kOk,
  kAgain,      ///< Nothing there, or no room.
  kClosed,     ///< The other end is gone.
  kMalformed,  ///< Not a packet of this protocol and version.
  kStarved,    ///< This process has no descriptor left; nothing can be said of the other end.
};

/// All descriptors are CLOEXEC, all calls non-blocking.
StatusOr<UniqueFd> ListenAbstract(const std::string& name, int backlog);
/// kAgain: the listener's queue is full. kClosed: nobody listens there.
SocketResult ConnectAbstract(const std::string& name, UniqueFd* socket);
SocketResult Accept(int listener, UniqueFd* socket);
/// What a caller that met kStarved says.
Status Starved();

SocketResult SendPacket(int socket, const Packet& packet, std::span<const int> fds = {});
struct ReceivedPacket {
  Packet packet;
  std::array<UniqueFd, kMaxPacketFds> fds;
  size_t fd_count = 0;
};
/// Descriptors that come with a malformed packet are closed.
SocketResult ReceivePacket(int socket, ReceivedPacket* received);

/// Who opened the other end; false if it cannot be told. `pid` is 0 if outside our pid namespace.
bool PeerCredentials(int socket, pid_t* pid, uid_t* uid);
/// InvalidArgument unless `fd` is an eventfd whose writes do not block: a doorbell.
Status CheckBell(int fd);
/// Becomes readable when the process ends.
UniqueFd OpenPidfd(pid_t pid);
std::string RandomHex(int bytes);

}  // namespace bluefog::transport::shm
