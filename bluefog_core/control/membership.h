// The core's side of the control plane: finds this rank's place, joins the job through the
// component, hears of failures. Off the data path: nothing here is called per step.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <bluefog/config.h>
#include <bluefog/status.h>

namespace bluefog::control {

/// This process's place in a job.
struct Place {
  int rank = 0, size = 1, local_rank = 0, local_size = 1;
  std::string job_id;       ///< Equal on all ranks of the job, different between jobs.
  std::string coordinator;  ///< host:port of the control plane; empty when alone.
  std::string launched_by;  ///< "bluefog run", "torchrun", "alone".
  std::string token = {};   ///< The job's secret (base/token.h); empty: none. Never logged.
};
/// From the variables of `bluefog run`, else torchrun's, else alone. Half a set of variables is an
/// error that names what is missing, and so is a token that cannot be read. Under torchrun the
/// coordinator is MASTER_ADDR at the port after MASTER_PORT (which PyTorch's own store holds)
/// unless BLUEFOG_COORDINATOR says otherwise.
StatusOr<Place> FindPlace(const Config& config);

/// Called from a thread of the control plane, one at a time; none may call Leave or destroy the
/// Membership. Any may be empty.
struct MembershipEvents {
  /// A rank died, went silent or gave up; at most once per rank. `rank` is this process's own when
  /// the job has declared it dead (it was stopped for too long): the others go on without it.
  std::function<void(int rank, const std::string& text)> rank_failed;
  std::function<void(int rank)> rank_left;
  /// Operations done so far; read at every heartbeat.
  std::function<int64_t()> progress;
  /// Asked about every 100 ms by the thread that is in Join: true gives up with Cancelled (Ctrl-C).
  std::function<bool()> interrupted;
};

/// Thread-safe. In a forked child every call, the destructor included, does nothing.
class Membership {
 public:
  /// Blocks until every rank has joined. `address`: this rank's entry of the book, opaque bytes.
  /// Errors name the ranks and both values where two differ, the ranks that are missing after
  /// join_timeout_ms, and the port that is taken. Without a coordinator or with size 1 nothing is
  /// loaded.
  static StatusOr<std::unique_ptr<Membership>> Join(const Place& place, const Config& config,
                                                    const std::string& address,
                                                    MembershipEvents events);
  /// Without Leave before it the others see this rank as failed.
  virtual ~Membership() = default;
  virtual const std::vector<std::string>& addresses() const = 0;
  /// Tells every rank that `rank` failed, as seen by this one.
  virtual void ReportFailure(int rank, const std::string& text) = 0;
  /// Leaves in good order; no event runs afterwards. Takes milliseconds, and
  /// at most BLUEFOG_DEAD_MS if the server does not answer.
  virtual void Leave() = 0;
  /// Messages sent so far, heartbeats not counted.
  virtual int64_t messages() const = 0;
};

/// For a launcher, which is no member: tells the job that the process of `rank` died, and why
/// ("killed by SIGKILL on host a"). Of `place` job_id, coordinator and token count. Blocks until
/// the job was told, at most `timeout_ms`. Unavailable: nobody serves the job's control plane.
Status ReportDeath(const Place& place, const Config& config, int rank, const std::string& text,
                   int timeout_ms = 1000);

}  // namespace bluefog::control
