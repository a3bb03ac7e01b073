// The serving end of the control plane, inside rank 0: collects the ranks, hands out the address
// book, watches the heartbeats and tells everybody who failed or left. Its cost is one small
// message per rank and heartbeat; nothing of the data path waits for it.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "bluefog/v1/control.grpc.pb.h"
#include "control/socket.h"

namespace bluefog::control {

struct ServerOptions {
  std::string coordinator, job_id;
  int rank = 0;  ///< Of this process, which sends no heartbeats to itself.
  int size = 0;
  int64_t heartbeat_ms = 0, suspect_ms = 0, dead_ms = 0;
  std::function<void(const std::string&)> notice;  ///< From the watching thread.
};

/// Thread-safe. A rank that closes its stream without Leave, or is silent for dead_ms, has failed.
class Server final : private v1::Control::CallbackService {
 public:
  /// Serves from now on. FailedPrecondition names the port that is taken.
  static StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options);
  /// Without Close before it the ranks see rank 0 as failed.
  ~Server() override;
  /// Tells all ranks that the control plane ends in good order, and ends. At most dead_ms, for
  /// ranks that do not answer.
  void Close();
  /// Messages sent so far, without answers to heartbeats.
  int64_t messages() const { return messages_.load(std::memory_order_relaxed); }

 private:
  class Stream;
  enum class State { kAbsent, kJoined, kLeft, kFailed };
  struct Member {
    State state = State::kAbsent;
    Stream* stream = nullptr;  // Null once its stream is over.
    v1::Join join;
    int64_t give_up_ns = 0;  // The end of its patience while the job is incomplete.
    int64_t seen_ns = 0;
    int64_t answered_ns = 0;  // Its last heartbeat that was answered.
    bool suspect = false;
  };

  Server(const ServerOptions& options, int listen_fd);
  grpc::ServerBidiReactor<v1::FromRank, v1::ToRank>* Session(
      grpc::CallbackServerContext* context) override;

  // Called by the streams.
  void OnMessage(Stream& stream, v1::FromRank& message) EXCLUDES(mu_);
  void OnEnd(Stream& stream) EXCLUDES(mu_);
  void OnDone(Stream* stream) EXCLUDES(mu_);

  void OnJoin(Stream& stream, v1::Join& join) REQUIRES(mu_);
  // What is wrong with the join; OK if nothing. `all`: it concerns every rank of the job.
  grpc::Status CheckJoin(const v1::Join& join, bool* all) const REQUIRES(mu_);
  void SendAddressBook() REQUIRES(mu_);
  void Fail(int rank, const std::string& text) REQUIRES(mu_);
  // The job cannot come together: every rank that waits, and that comes yet, gets `status`.
  void Condemn(const grpc::Status& status) REQUIRES(mu_);
  void Broadcast(const v1::ToRank& message, int except) REQUIRES(mu_);

  void Watch();
  std::vector<std::string> CheckTime(int64_t now_ns) REQUIRES(mu_);
  void Stop(bool orderly);

  const ServerOptions options_;
  const int listen_fd_, wake_fd_;
  ForkClosedSockets sockets_;
  std::unique_ptr<grpc::Server> server_;
  std::thread watcher_;

  Mutex mu_;  // Taken before a stream's own.
  CondVar changed_;
  std::map<Stream*, int> streams_ GUARDED_BY(mu_);  // With its rank; -1 before Join.
  std::vector<Member> members_ GUARDED_BY(mu_);
  bool complete_ GUARDED_BY(mu_) = false;  // All ranks have joined.
  bool closing_ GUARDED_BY(mu_) = false;
  std::optional<grpc::Status> verdict_ GUARDED_BY(mu_);
  int64_t checked_ns_ GUARDED_BY(mu_) = 0;

  std::atomic<int64_t> messages_{0};
};

}  // namespace bluefog::control
