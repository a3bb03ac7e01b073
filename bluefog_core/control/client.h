// A rank's end of the control plane: joins, sends heartbeats, hears who failed or left. Two
// connections per membership: heartbeats wait behind nothing. It never reconnects, because a broken
// session is the sign of death.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "bluefog/v1/control.grpc.pb.h"
#include "control/client_stream.h"
#include "control/handshake.h"
#include "control/socket.h"

namespace bluefog::control {

struct ClientOptions {
  std::string coordinator;
  Caller caller;
  v1::Join join;
  bool serves = false;  ///< The server is in this process: neither can outlive the other.
  int64_t heartbeat_ms = 0, suspect_ms = 0, dead_ms = 0;
  // From the client's thread and gRPC's, failures and departures from one of them; see
  // control_abi.h.
  std::function<void(int rank, const std::string& text)> rank_failed;
  std::function<void(int rank)> rank_left;
  std::function<int64_t()> progress;
  std::function<void(const std::string&)> notice;
  std::function<bool()> interrupted;
};

/// Thread-safe after Join.
class Client {
 public:
  explicit Client(const ClientOptions& options);
  /// Without Leave before it the others see this rank as failed.
  ~Client();

  /// Blocks until all ranks have joined; once. Retries while nobody serves yet.
  Status Join();
  /// Of rank i at [i]. After Join.
  const std::vector<std::string>& addresses() const { return addresses_; }
  void ReportFailure(int rank, const std::string& text);
  /// No callback runs afterwards. At most dead_ms, if the server does not answer.
  void Leave();

  int64_t messages() const { return messages_.load(std::memory_order_relaxed); }
  int64_t heartbeats() const { return heartbeats_.load(std::memory_order_relaxed); }

 private:
  enum class Phase { kIdle, kAsked, kAccepted, kJoined, kEnded };

  using SessionStream = ClientStream<v1::FromRank, v1::ToRank>;
  using HeartbeatStream = ClientStream<v1::Heartbeat, v1::Pulse>;

  // One attempt: OK once joined. *again: nobody serves this job yet.
  Status Attempt(int64_t deadline_ns, bool* again);
  StatusOr<std::shared_ptr<grpc::Channel>> Connect(int64_t deadline_ns);
  // Waits for a phase other than `phase`; false if `until_ns` came first or the caller was
  // interrupted.
  bool WaitForChange(Phase phase, int64_t until_ns, bool* interrupted) EXCLUDES(mu_);
  // False if the stream is over.
  bool Write(const v1::FromRank& message) EXCLUDES(session_mu_);
  void Handle(const v1::ToRank& message);
  void Ended(const grpc::Status& status);
  void Tell(int rank, const std::string& text);
  void OnPulse() EXCLUDES(mu_);
  void Beat();
  // A silence of the server that counts as death.
  int64_t patience_ns() const REQUIRES(mu_);
  /// Ends the streams (the session with a Leave in front if `orderly`) and the thread.
  void Disconnect(bool orderly);

  const ClientOptions options_;
  ForkClosedSockets sockets_;

  // Of the present attempt. Made before the thread starts, dropped after it has ended.
  std::shared_ptr<grpc::Channel> channel_, beat_channel_;
  std::unique_ptr<HeartbeatStream> heartbeat_stream_;
  std::thread beater_;

  // Of the session's callbacks; `addresses_` is everybody's once the phase is kJoined.
  std::vector<std::string> addresses_;
  std::vector<bool> told_;  // By rank: its failure was reported.

  Mutex session_mu_;  // Never held together with mu_.
  std::unique_ptr<SessionStream> session_ GUARDED_BY(session_mu_);

  Mutex mu_;
  CondVar changed_;
  Phase phase_ GUARDED_BY(mu_) = Phase::kIdle;
  grpc::Status end_ GUARDED_BY(mu_);
  bool leaving_ GUARDED_BY(mu_) = false;
  bool server_closing_ GUARDED_BY(mu_) = false;
  bool silent_ GUARDED_BY(mu_) = false;  // The server was, for dead_ms.
  int64_t seen_ns_ GUARDED_BY(mu_) = 0;

  std::atomic<int64_t> messages_{0}, heartbeats_{0};
};

}  // namespace bluefog::control
