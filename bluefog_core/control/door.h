// Where connections to the control plane come in. Each has to say within seconds who it is
// (handshake.h); those that have not yet are few and bounded, whatever comes from the network, and
// cost the job nothing.
#pragma once

#include <poll.h>

#include <cstdint>
#include <functional>
#include <list>
#include <string>
#include <vector>

#include "control/handshake.h"

namespace bluefog::control {

struct DoorOptions {
  int listen_fd = -1;  ///< Closed at the end.
  std::string job_id, token;
  std::function<void(int fd)> came;     ///< A new connection, still to be asked.
  std::function<void(int fd)> welcome;  ///< Its descriptor is the callee's.
  /// Somebody with a wrong token claimed to be `rank`, from `address`.
  std::function<void(int rank, const std::string& address)> refused;
};

/// For one thread.
class Door {
 public:
  explicit Door(DoorOptions options);
  ~Door();
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;
  /// Waits for at most `timeout_ms`, or until `wake_fd` is readable, and handles what came.
  void Turn(int wake_fd, int timeout_ms);
  /// No descriptor was left for a connection in the last turn.
  bool out_of_descriptors() const { return out_of_descriptors_; }

 private:
  struct Visitor {
    int fd;
    int64_t since_ns;
    std::string address;
    Reception reception;
  };
  using Visitors = std::list<Visitor>;  // The one that came first in front.

  void Accept();
  bool HasRoom();
  // Ends or hands on the visitor, if that is what `result` says. Returns the next one.
  Visitors::iterator Settle(Visitors::iterator visitor, Reception::Result result);

  const DoorOptions options_;
  const size_t most_visitors_;
  Visitors visitors_;
  bool out_of_descriptors_ = false;
};

}  // namespace bluefog::control
