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
#include "control/door.h"
#include "control/socket.h"

namespace bluefog::control {

struct ServerOptions {
  std::string coordinator, job_id, token;
  int rank = 0;  ///< Of this process, which sends no heartbeats to itself.
  int size = 0;
  int64_t heartbeat_ms = 0, suspect_ms = 0, dead_ms = 0;
  std::function<void(const std::string&)> notice;  ///< From the watching thread.
};

/// Thread-safe. A rank that closes its session without Leave, or sends no heartbeat for dead_ms,
/// has failed. Threads: one that watches, and gRPC's, whose number does not grow with the job.
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
  class HeartbeatStream;
  enum class State { kAbsent, kJoined, kLeft, kFailed };
  struct Member {
    State state = State::kAbsent;
    Stream* stream = nullptr;  // Null once its stream is over.
    v1::Join join;
    int64_t give_up_ns = 0;  // The end of its patience while the job is incomplete.
    int64_t seen_ns = 0;
    int64_t answered_ns = 0;  // Its last heartbeat that was answered.
    int64_t progress = 0;
    bool suspect = false;
    // It has ended, and everybody will be told at tell_ns what the launcher says by then, else
    // this.
    std::string end;
    int64_t tell_ns = 0;
    std::string refused;  // Who came as this rank with a wrong token.
  };

  Server(const ServerOptions& options, int listen_fd);
  grpc::ServerBidiReactor<v1::FromRank, v1::ToRank>* Session(
      grpc::CallbackServerContext* context) override;
  grpc::ServerBidiReactor<v1::Heartbeat, v1::Pulse>* Heartbeats(
      grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* ReportDeath(grpc::CallbackServerContext* context,
                                        const v1::Death* death, v1::Told* told) override;

  // Called by the streams.
  void OnMessage(Stream& stream, v1::FromRank& message) EXCLUDES(mu_);
  void OnEnd(Stream& stream) EXCLUDES(mu_);
  void OnDone(Stream* stream) EXCLUDES(mu_);
  // Whether the rank should hear that the server lives.
  bool OnHeartbeat(int rank, int64_t progress) EXCLUDES(mu_);
  void OnHeartbeatsDone() EXCLUDES(mu_);

  void OnJoin(Stream& stream, v1::Join& join) REQUIRES(mu_);
  // What is wrong with the join; OK if nothing. `all`: it concerns every rank of the job.
  grpc::Status CheckJoin(const v1::Join& join, bool* all) const REQUIRES(mu_);
  void SendAddressBook() REQUIRES(mu_);
  // "(process 12 on host a…)" behind what happened to a rank.
  std::string Whose(int rank) const REQUIRES(mu_);
  void Fail(int rank, const std::string& text) REQUIRES(mu_);
  // Fails the rank at once, or soon if a launcher may know more.
  void FailSoon(int rank, const std::string& text) REQUIRES(mu_);
  void FailPending() REQUIRES(mu_);
  // The job cannot come together: every rank that waits, and that comes yet, gets `status`.
  void Condemn(const grpc::Status& status) REQUIRES(mu_);
  void Broadcast(const v1::ToRank& message, int except) REQUIRES(mu_);

  DoorOptions MakeDoor(int listen_fd);
  void OnRefused(int rank, const std::string& address) EXCLUDES(mu_);
  void Watch();
  // What to log. *next_ns: when something is due again, at the latest.
  std::vector<std::string> CheckTime(int64_t now_ns, int64_t* next_ns) REQUIRES(mu_);
  grpc::Status MissingRanks(int waited) const REQUIRES(mu_);
  // A rank's silence that counts as death.
  int64_t patience_ns() const REQUIRES(mu_);
  void OutOfDescriptors() EXCLUDES(mu_);
  void Stop(bool orderly);

  const ServerOptions options_;
  const int wake_fd_;
  ForkClosedSockets sockets_;
  std::optional<Door> door_;  // Of the watching thread.
  std::unique_ptr<grpc::Server> server_;
  std::thread watcher_;

  Mutex mu_;  // Taken before a stream's own.
  CondVar changed_;
  std::map<Stream*, int> streams_ GUARDED_BY(mu_);  // With its rank; -1 before Join.
  int heartbeat_streams_ GUARDED_BY(mu_) = 0;
  std::vector<Member> members_ GUARDED_BY(mu_);
  int joined_ GUARDED_BY(mu_) = 0;         // Ranks, so far.
  bool complete_ GUARDED_BY(mu_) = false;  // All ranks have joined.
  bool closing_ GUARDED_BY(mu_) = false;
  std::optional<grpc::Status> verdict_ GUARDED_BY(mu_);
  int64_t checked_ns_ GUARDED_BY(mu_) = 0;

  std::atomic<int64_t> messages_{0};
};

}  // namespace bluefog::control
