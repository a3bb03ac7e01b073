#include "base/leave_note.h"

#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace bluefog {
namespace {

/// An abstract name: it lies in no file system and ends with its socket. 0 if it is too long.
socklen_t AddressOf(const std::string& job_id, sockaddr_un* address) {
  const std::string name = "bluefog-run-" + job_id;
  *address = {};
  address->sun_family = AF_UNIX;
  if (name.size() >= sizeof(address->sun_path)) return 0;
  std::copy(name.begin(), name.end(), address->sun_path + 1);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

int Socket() { return socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }

}  // namespace

void SendLeaveNote(const std::string& job_id, int rank) {
  sockaddr_un address;
  const socklen_t length = AddressOf(job_id, &address);
  const int fd = length == 0 ? -1 : Socket();
  if (fd < 0) return;
  const auto note = static_cast<int32_t>(rank);
  // Nobody there: the job was not started by the launcher.
  [[maybe_unused]] const ssize_t sent =
      sendto(fd, &note, sizeof note, MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&address), length);
  close(fd);
}

LeaveNotes::LeaveNotes(const std::string& job_id) {
  sockaddr_un address;
  const socklen_t length = AddressOf(job_id, &address);
  socket_ = length == 0 ? -1 : Socket();
  if (socket_ >= 0 && bind(socket_, reinterpret_cast<sockaddr*>(&address), length) != 0) {
    close(socket_);
    socket_ = -1;
  }
}

LeaveNotes::~LeaveNotes() {
  if (socket_ >= 0) close(socket_);
}

const std::vector<int>& LeaveNotes::ranks() {
  int32_t rank;
  while (socket_ >= 0 && recv(socket_, &rank, sizeof rank, 0) == sizeof rank) {
    std::erase(ranks_, rank);
    ranks_.push_back(rank);
  }
  return ranks_;
}

}  // namespace bluefog
