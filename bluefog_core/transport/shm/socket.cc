#include "transport/shm/socket.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "base/abstract_address.h"

namespace bluefog::transport::shm {
namespace {

constexpr int kSocketType = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK;

}  // namespace

StatusOr<UniqueFd> ListenAbstract(const std::string& name, int backlog) {
  UniqueFd fd(socket(AF_UNIX, kSocketType, 0));
  if (!fd) return ErrnoStatus("socket", errno);
  const AbstractAddress address(name);
  if (bind(fd.get(), address.get(), address.length) != 0) {
    return ErrnoStatus("bind", errno);
  }
  if (listen(fd.get(), backlog) != 0) return ErrnoStatus("listen", errno);
  return fd;
}

SocketResult ConnectAbstract(const std::string& name, UniqueFd* out) {
  UniqueFd fd(socket(AF_UNIX, kSocketType, 0));
  if (!fd) return SocketResult::kStarved;
  const AbstractAddress address(name);
  if (connect(fd.get(), address.get(), address.length) != 0) {
    return errno == EAGAIN || errno == EINTR ? SocketResult::kAgain : SocketResult::kClosed;
  }
  *out = std::move(fd);
  return SocketResult::kOk;
}

SocketResult Accept(int listener, UniqueFd* out) {
  const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) {
    return errno == EMFILE || errno == ENFILE ? SocketResult::kStarved : SocketResult::kAgain;
  }
  *out = UniqueFd(fd);
  return SocketResult::kOk;
}

Status Starved() { return ErrnoStatus("a connection", EMFILE); }

SocketResult SendPacket(int socket, const Packet& packet, std::span<const int> fds) {
  iovec vector{const_cast<Packet*>(&packet), sizeof packet};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxPacketFds * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  ssize_t sent;
  do {
    sent = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  if (sent >= 0) return SocketResult::kOk;
  const bool again =
      errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == ETOOMANYREFS;
  return again ? SocketResult::kAgain : SocketResult::kClosed;
}

SocketResult ReceivePacket(int socket, ReceivedPacket* received) {
  iovec vector{&received->packet, sizeof received->packet};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxPacketFds * sizeof(int))];
  msghdr message{};
  message.msg_iov = &vector;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t got;
  // An end that was closed with packets unread reports that once, in front of what it had sent.
  bool reset = false;
  do {
    got = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (got < 0 && (errno == EINTR || (errno == ECONNRESET && !std::exchange(reset, true))));
  if (got < 0) return errno == EAGAIN ? SocketResult::kAgain : SocketResult::kClosed;
  // What came in is ours to close, whatever we think of the packet.
  received->fd_count = 0;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
      UniqueFd owned(fd);
      if (received->fd_count < kMaxPacketFds) {
        received->fds[received->fd_count++] = std::move(owned);
      }
    }
  }
  if (got == 0 && received->fd_count == 0) return SocketResult::kClosed;
  Packet& packet = received->packet;
  if ((message.msg_flags & MSG_CTRUNC) != 0 && !UniqueFd(dup(socket))) {
    return SocketResult::kStarved;
  }
  if (got != sizeof packet || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 ||
      packet.magic != kMagic || packet.abi != kAbi) {
    for (UniqueFd& fd : received->fds) fd.Reset();
    received->fd_count = 0;
    return SocketResult::kMalformed;
  }
  packet.job[sizeof packet.job - 1] = '\0';
  packet.text[sizeof packet.text - 1] = '\0';
  return SocketResult::kOk;
}

bool PeerCredentials(int socket, pid_t* pid, uid_t* uid) {
  ucred credentials;
  socklen_t length = sizeof credentials;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return false;
  *pid = credentials.pid;
  *uid = credentials.uid;
  return true;
}

Status CheckBell(int fd) {
  char name[32] = "";
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const bool known = readlink(link.c_str(), name, sizeof name - 1) > 0;
  const int flags = fcntl(fd, F_GETFL);
  if (known && flags >= 0 && (flags & O_NONBLOCK) != 0 &&
      strcmp(name, "anon_inode:[eventfd]") == 0) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("the peer's doorbell is no non-blocking eventfd");
}

UniqueFd OpenPidfd(pid_t pid) {
  if (pid <= 0) return {};
#ifdef SYS_pidfd_open
  return UniqueFd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));  // Always CLOEXEC.
#else
  return UniqueFd(static_cast<int>(syscall(434, pid, 0)));
#endif
}

std::string RandomHex(int bytes) {
  std::vector<unsigned char> random(static_cast<size_t>(bytes));
  size_t filled = 0;
  while (filled < random.size()) {
    const ssize_t got = getrandom(random.data() + filled, random.size() - filled, 0);
    if (got > 0) filled += static_cast<size_t>(got);
  }
  std::string text;
  for (const unsigned char byte : random) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

}  // namespace bluefog::transport::shm
