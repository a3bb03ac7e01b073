#include "control/door.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/clock.h"
#include "control/socket.h"

namespace bluefog::control {
namespace {

constexpr size_t kMaxVisitors = 512;
constexpr int64_t kMaxSilenceNs = 5'000 * kMillisecond;
// With the house full, who came first goes after this time.
constexpr int64_t kMinStayNs = 250 * kMillisecond;

size_t MostVisitors() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return kMaxVisitors / 4;
  return std::clamp<size_t>(limit.rlim_cur / 4, 8, kMaxVisitors);
}

}  // namespace

Door::Door(DoorOptions options) : options_(std::move(options)), most_visitors_(MostVisitors()) {}

Door::~Door() {
  for (const Visitor& visitor : visitors_) close(visitor.fd);
  close(options_.listen_fd);
}

bool Door::HasRoom() {
  if (visitors_.size() < most_visitors_) return true;
  if (NowNs() - visitors_.front().since_ns < kMinStayNs) return false;
  Settle(visitors_.begin(), Reception::Result::kStranger);
  return true;
}

void Door::Turn(int wake_fd, int timeout_ms) {
  const bool listens = !out_of_descriptors_ && HasRoom();
  if (!listens) timeout_ms = std::min(timeout_ms, 50);
  std::vector<pollfd> fds = {{wake_fd, POLLIN, 0}, {listens ? options_.listen_fd : -1, POLLIN, 0}};
  for (const Visitor& visitor : visitors_) fds.push_back({visitor.fd, POLLIN, 0});
  poll(fds.data(), fds.size(), timeout_ms);
  out_of_descriptors_ = false;
  size_t i = 2;
  for (auto visitor = visitors_.begin(); visitor != visitors_.end(); ++i) {
    Reception::Result result = Reception::Result::kWaiting;
    if (fds[i].revents != 0) result = visitor->reception.Receive();
    if (result == Reception::Result::kWaiting && NowNs() - visitor->since_ns > kMaxSilenceNs) {
      result = Reception::Result::kStranger;
    }
    visitor = Settle(visitor, result);
  }
  if (fds[1].revents != 0) Accept();
}

void Door::Accept() {
  while (HasRoom()) {
    const int fd = AcceptFrom(options_.listen_fd);
    if (fd < 0) {
      // Else the pending connection would keep poll from waiting.
      out_of_descriptors_ = errno != EAGAIN && errno != ECONNABORTED && errno != EINTR;
      return;
    }
    options_.came(fd);
    visitors_.push_back({fd, NowNs(), PeerOf(fd), Reception(fd, options_.job_id, options_.token)});
  }
}

Door::Visitors::iterator Door::Settle(Visitors::iterator visitor, Reception::Result result) {
  if (result == Reception::Result::kWaiting) return std::next(visitor);
  if (result == Reception::Result::kWelcome) {
    options_.welcome(visitor->fd);
  } else {
    if (visitor->reception.wrong_token()) {
      options_.refused(visitor->reception.rank(), visitor->address);
    }
    close(visitor->fd);
  }
  return visitors_.erase(visitor);
}

}  // namespace bluefog::control
