#include "base/leave_note.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>

#include "base/abstract_address.h"

namespace bluefog {
namespace {

AbstractAddress AddressOf(const std::string& job_id) {
  return AbstractAddress("bluefog-run-" + job_id);
}

int Socket() { return socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }

}  // namespace

void SendLeaveNote(const std::string& job_id, int rank) {
  const AbstractAddress address = AddressOf(job_id);
  const int fd = Socket();
  if (fd < 0) return;
  const auto note = static_cast<int32_t>(rank);
  // Nobody there: the job was not started by the launcher.
  [[maybe_unused]] const ssize_t sent =
      sendto(fd, &note, sizeof note, MSG_NOSIGNAL, address.get(), address.length);
  close(fd);
}

LeaveNotes::LeaveNotes(const std::string& job_id) : socket_(Socket()) {
  const AbstractAddress address = AddressOf(job_id);
  if (socket_ >= 0 && bind(socket_, address.get(), address.length) != 0) {
    close(socket_);
    socket_ = -1;
  }
}

LeaveNotes::~LeaveNotes() {
  if (socket_ >= 0) close(socket_);
}

std::vector<int> LeaveNotes::Take() {
  std::vector<int> ranks;
  int32_t rank;
  while (socket_ >= 0 && recv(socket_, &rank, sizeof rank, 0) == sizeof rank) ranks.push_back(rank);
  return ranks;
}

}  // namespace bluefog
