// Runs the ranks of a job as forked processes and says how each of them ended. The process that
// runs the tests never joins a job itself: gRPC does not survive a fork.
#pragma once

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include <bluefog/communicator.h>
#include <bluefog/distributed_optimizer.h>

namespace bluefog::testing {

/// What a rank leaves behind, in memory that its process shares with the test's.
struct Record {
  int64_t marked_ns;  ///< When the body called Mark; 0: never.
  int32_t code;       ///< The body's status; -1 while it has not returned.
  int32_t pid;
  char text[4096];
};

/// A rank as its body sees it.
struct Rank {
  int rank = 0;
  CommunicatorOptions options;  ///< With the place in the job.
  Record* record = nullptr;
  /// Now is the moment the test asks about, e.g. that of the first error.
  void Mark() const;
  /// The process of rank `r`.
  int pid(int r) const { return (record - rank + r)->pid; }
};

/// How a rank's process ended.
struct Outcome {
  Status status;      ///< What the body returned; Unknown if it did not.
  int exit_code = 0;  ///< 128 + signal if it was killed.
  int64_t ended_ns = 0, marked_ns = 0;
  std::string log;  ///< Standard error.
};
std::ostream& operator<<(std::ostream& out, const Outcome& outcome);

class Job {
 public:
  using Body = std::function<Status(Rank&)>;
  using Tweak = std::function<void(int rank, Config&)>;

  /// A job of `size` ranks at a port of its own.
  explicit Job(int size, Tweak tweak = {});
  ~Job();
  void Start(const Body& body);
  /// Ranks still running after `seconds` are killed; their exit code is 128 + SIGKILL then, and
  /// their status says "hangs".
  std::vector<Outcome> Join(int seconds = 40);
  std::vector<Outcome> Run(const Body& body, int seconds = 40) {
    Start(body);
    return Join(seconds);
  }
  const std::string& id() const { return id_; }
  int port() const { return port_; }

 private:
  struct Process;
  const int size_;
  const Tweak tweak_;
  const int port_;
  const std::string id_;
  Record* records_;
  std::vector<Process> processes_;
};

/// Files of ours in /dev/shm and /tmp.
std::vector<std::string> FilesLeft(const std::string& job);

/// Lets one rank wait for another; made before the ranks start.
class Gate {
 public:
  Gate();
  void Open() const;
  void Pass() const;  ///< Each Open lets one pass.

 private:
  int fds_[2];
};

// ---- For bodies
// ------------------------------------------------------------------------------------

/// Joins, and takes the ring as topology.
StatusOr<std::unique_ptr<Communicator>> JoinRing(const Rank& me);
/// Submits neighbor_allreduce of `x` under `name` and waits.
Status Average(Communicator& comm, const std::string& name, std::vector<float>& x);
StatusOr<std::shared_ptr<Work>> SubmitAverage(Communicator& comm, const std::string& name,
                                              std::vector<float>& x);
/// Averages small and large tensors with the neighbours, in flight together, takes a step of
/// DecentLaM and averages with everybody, until one of them fails or `rounds` are over. Marks the
/// first failure.
Status Train(Rank& me, Communicator& comm, int rounds);

}  // namespace bluefog::testing
