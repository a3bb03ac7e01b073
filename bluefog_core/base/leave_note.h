// How `bluefog run` learns in which order its ranks leave: of several that fail, the one that left
// first is the cause, and the others fail because of it. One datagram for each rank.
#pragma once

#include <string>
#include <vector>

namespace bluefog {

/// Tells the launcher of this job, if there is one, that `rank` leaves now.
void SendLeaveNote(const std::string& job_id, int rank);

/// The launcher's end.
class LeaveNotes {
 public:
  explicit LeaveNotes(const std::string& job_id);
  ~LeaveNotes();
  LeaveNotes(const LeaveNotes&) = delete;
  LeaveNotes& operator=(const LeaveNotes&) = delete;
  /// Becomes readable when a note comes; -1 if none can.
  int fd() const { return socket_; }
  /// The ranks that have left since the last call, in order.
  std::vector<int> Take();

 private:
  int socket_ = -1;
};

}  // namespace bluefog
