// The core's side of the control plane: finds this rank's place, joins the job through the component,
// hears of failures. Off the data path: nothing here is called per step.
#pragma once

#include <atomic>
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
};
/// From the variables of `bluefog run`, else torchrun's, else alone. Half a set of variables is an error
/// that names what is missing.
StatusOr<Place> FindPlace(const Config& config);

struct MembershipEvents {
  std::function<void(int rank, const std::string& text)> rank_failed;  ///< From another thread.
  std::function<void(int rank)> rank_left;                             ///< From another thread.
  std::function<int64_t()> progress;                                   ///< From another thread.
};

class Membership {
 public:
  /// Blocks until every rank has joined. `address`: this rank's entry of the book.
  static StatusOr<std::unique_ptr<Membership>> Join(const Place& place, const Config& config,
                                                    const std::string& address,
                                                    MembershipEvents events);
  virtual ~Membership() = default;
  virtual const std::vector<std::string>& addresses() const = 0;
  virtual void ReportFailure(int rank, const std::string& text) = 0;
  virtual void Leave() = 0;
  virtual int64_t messages() const = 0;
};

}  // namespace bluefog::control
