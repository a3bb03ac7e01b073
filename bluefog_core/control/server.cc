#include "control/server.h"

#include <grpcpp/server_posix.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <deque>
#include <utility>

#include "base/clock.h"

namespace bluefog::control {
namespace {

constexpr int kMaxMessageBytes = 128 << 10;
constexpr size_t kMaxTextBytes = 4 << 10;
constexpr int64_t kMaxSilentOpenNs =
    10'000 * kMillisecond;  // A stream must say who it is within this time.

std::string Rank(int rank) { return "rank " + std::to_string(rank); }

}  // namespace

// One rank's stream. gRPC allows one write at a time, so messages queue here. Send and End are
// called with the server's lock held, which keeps the stream from being done meanwhile.
class Server::Stream final : public grpc::ServerBidiReactor<v1::FromRank, v1::ToRank> {
 public:
  explicit Stream(Server& server) : server_(server) { StartRead(&in_); }

  void Send(std::shared_ptr<const v1::ToRank> message) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    if (end_) return;
    if (!message->has_pulse()) {
      server_.messages_.fetch_add(1, std::memory_order_relaxed);
    } else if (!queue_.empty()) {
      return;  // A reader that does not keep up needs no second sign of life.
    }
    queue_.push_back(std::move(message));
    Pump();
  }
  void Send(v1::ToRank message) { Send(std::make_shared<const v1::ToRank>(std::move(message))); }
  /// Ends the stream with `status` behind what is queued. The first call counts.
  void End(grpc::Status status) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    if (end_) return;
    end_ = std::move(status);
    Pump();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return server_.OnEnd(*this);
    server_.OnMessage(*this, in_);
    StartRead(&in_);
  }
  void OnWriteDone(bool ok) override {
    MutexLock lock(mu_);
    writing_ = false;
    queue_.pop_front();
    if (!ok) queue_.clear();
    Pump();
  }
  void OnDone() override {
    server_.OnDone(this);
    delete this;
  }

  const int64_t opened_ns = NowNs();

 private:
  void Pump() REQUIRES(mu_) {
    if (writing_ || finished_) return;
    if (!queue_.empty()) {
      writing_ = true;
      StartWrite(queue_.front().get());
    } else if (end_) {
      finished_ = true;
      Finish(*end_);
    }
  }

  Server& server_;
  v1::FromRank in_;
  Mutex mu_;
  std::deque<std::shared_ptr<const v1::ToRank>> queue_ GUARDED_BY(mu_);
  bool writing_ GUARDED_BY(mu_) = false;
  bool finished_ GUARDED_BY(mu_) = false;
  std::optional<grpc::Status> end_ GUARDED_BY(mu_);
};

StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options) {
  StatusOr<Endpoint> endpoint = ResolveEndpoint(options.coordinator);
  if (!endpoint.ok()) return endpoint.status();
  StatusOr<int> listen_fd = ListenAt(*endpoint, options.coordinator);
  if (!listen_fd.ok()) return listen_fd.status();
  std::unique_ptr<Server> server(new Server(options, *listen_fd));

  grpc::ServerBuilder builder;
  builder.RegisterService(server.get());
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 2);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr) return absl::InternalError("gRPC cannot start a server");
  server->watcher_ = std::thread(&Server::Watch, server.get());
  return server;
}

Server::Server(const ServerOptions& options, int listen_fd)
    : options_(options),
      listen_fd_(listen_fd),
      wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      members_(static_cast<size_t>(options.size)),
      checked_ns_(NowNs()) {
  sockets_.Add(listen_fd);
}

Server::~Server() {
  Stop(/*orderly=*/false);
  close(wake_fd_);
}

void Server::Close() { Stop(/*orderly=*/true); }

void Server::Stop(bool orderly) {
  {
    MutexLock lock(mu_);
    if (closing_) return;
    closing_ = true;
  }
  eventfd_write(wake_fd_, 1);
  if (watcher_.joinable()) watcher_.join();
  close(listen_fd_);
  if (server_ == nullptr) return;
  {
    MutexLock lock(mu_);
    for (const auto& [stream, rank] : streams_) {
      if (!complete_) {
        stream->End({grpc::StatusCode::ABORTED, "rank 0 gave up while the ranks were joining"});
      } else if (orderly && rank >= 0) {
        // The rank ends the stream from its side, so that no message of its own can still be on the
        // way and turn the end into a reset.
        v1::ToRank message;
        message.mutable_server_closing();
        stream->Send(std::move(message));
      }
    }
    const auto deadline =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(options_.dead_ms);
    while ((orderly || !complete_) && !streams_.empty() && changed_.WaitUntil(mu_, deadline)) {
    }
  }
  server_->Shutdown(std::chrono::system_clock::now());
  MutexLock lock(mu_);
  while (!streams_.empty()) changed_.Wait(mu_);
}

grpc::ServerBidiReactor<v1::FromRank, v1::ToRank>* Server::Session(grpc::CallbackServerContext*) {
  auto* stream = new Stream(*this);
  MutexLock lock(mu_);
  streams_.emplace(stream, -1);
  return stream;
}

void Server::OnMessage(Stream& stream, v1::FromRank& message) {
  MutexLock lock(mu_);
  const int rank = streams_.at(&stream);
  if (rank < 0) {
    if (message.has_join()) return OnJoin(stream, *message.mutable_join());
    return stream.End({grpc::StatusCode::INVALID_ARGUMENT, "a rank must join first"});
  }
  Member& member = members_[static_cast<size_t>(rank)];
  if (member.state != State::kJoined) return;  // Fenced: the job has gone on without it.
  member.seen_ns = NowNs();
  member.suspect = false;
  if (message.has_heartbeat()) {
    // Not each is answered: it is enough that no rank comes to suspect the server.
    if (member.seen_ns - member.answered_ns < options_.suspect_ms * kMillisecond / 2) return;
    member.answered_ns = member.seen_ns;
    v1::ToRank pulse;
    pulse.mutable_pulse();
    stream.Send(std::move(pulse));
  } else if (message.has_report_failure()) {
    const v1::ReportFailure& report = message.report_failure();
    if (report.rank() < 0 || report.rank() >= options_.size) return;
    Fail(report.rank(), report.text().substr(0, kMaxTextBytes) + " (seen by " + Rank(rank) + ")");
  } else if (message.has_leave()) {
    member.state = State::kLeft;
    if (!complete_) {
      Condemn({grpc::StatusCode::ABORTED, Rank(rank) + " gave up while the ranks were joining"});
    }
    v1::ToRank left;
    left.mutable_rank_left()->set_rank(rank);
    Broadcast(left, rank);
    stream.End(grpc::Status::OK);
  }
}

void Server::OnEnd(Stream& stream) {
  MutexLock lock(mu_);
  if (const int rank = streams_.at(&stream); rank >= 0 && !closing_) {
    Fail(rank, Rank(rank) +
                   " ended without leaving the job (its connection to the control plane closed)");
  }
  stream.End(grpc::Status::OK);
}

void Server::OnDone(Stream* stream) {
  MutexLock lock(mu_);
  if (const int rank = streams_.at(stream); rank >= 0) {
    members_[static_cast<size_t>(rank)].stream = nullptr;
  }
  streams_.erase(stream);
  changed_.NotifyAll();
}

grpc::Status Server::CheckJoin(const v1::Join& join, bool* all) const {
  *all = false;
  if (closing_) return {grpc::StatusCode::UNAVAILABLE, "rank 0 is leaving"};
  if (join.job_id() != options_.job_id) {
    return {grpc::StatusCode::FAILED_PRECONDITION,
            options_.coordinator + " serves job '" + options_.job_id + "' and " +
                Rank(join.rank()) + " belongs to job '" + join.job_id().substr(0, 256) +
                "': give every job its own BLUEFOG_COORDINATOR"};
  }
  *all = true;
  if (verdict_) return *verdict_;
  if (join.size() != options_.size) {
    return {grpc::StatusCode::INVALID_ARGUMENT,
            Rank(join.rank()) + " was started for a job of " + std::to_string(join.size()) +
                " ranks and rank 0 for one of " + std::to_string(options_.size)};
  }
  if (join.rank() < 0 || join.rank() >= options_.size) {
    return {grpc::StatusCode::INVALID_ARGUMENT, Rank(join.rank()) + " is outside the job of " +
                                                    std::to_string(options_.size) + " ranks"};
  }
  const Member& old = members_[static_cast<size_t>(join.rank())];
  if (old.state == State::kLeft) {  // Init again before rank 0 did: its next server is to come.
    return {grpc::StatusCode::UNAVAILABLE,
            Rank(join.rank()) + " left this job and rank 0 has not yet"};
  }
  if (old.state == State::kFailed) {
    return {grpc::StatusCode::FAILED_PRECONDITION,
            Rank(join.rank()) + " failed in this job and cannot come back: start the job again"};
  }
  if (old.state == State::kJoined) {
    return {grpc::StatusCode::ALREADY_EXISTS, "two processes joined as " + Rank(join.rank()) +
                                                  ": " + old.join.process() + " and " +
                                                  join.process()};
  }
  for (int r = 0; r < options_.size; ++r) {
    const Member& other = members_[static_cast<size_t>(r)];
    if (other.state != State::kJoined || other.join.fingerprint() == join.fingerprint()) continue;
    return {grpc::StatusCode::FAILED_PRECONDITION,
            Rank(r) + " and " + Rank(join.rank()) +
                " differ in version or settings, which must be equal on all ranks: " + Rank(r) +
                " has \"" + other.join.fingerprint_text() + "\", " + Rank(join.rank()) + " has \"" +
                join.fingerprint_text() + "\""};
  }
  return grpc::Status::OK;
}

void Server::OnJoin(Stream& stream, v1::Join& join) {
  bool all = false;
  if (grpc::Status status = CheckJoin(join, &all); !status.ok()) {
    if (all && !complete_) Condemn(status);
    return stream.End(status);
  }
  streams_[&stream] = join.rank();
  Member& member = members_[static_cast<size_t>(join.rank())];
  member.state = State::kJoined;
  member.stream = &stream;
  member.seen_ns = NowNs();
  member.give_up_ns =
      member.seen_ns + std::clamp<int64_t>(join.timeout_ms(), 0, INT32_MAX) * kMillisecond;
  member.join = std::move(join);
  v1::ToRank accepted;
  accepted.mutable_accepted();
  stream.Send(std::move(accepted));
  if (std::all_of(members_.begin(), members_.end(),
                  [](const Member& m) { return m.state == State::kJoined; })) {
    complete_ = true;
    SendAddressBook();
  }
}

void Server::SendAddressBook() {
  auto book = std::make_shared<v1::ToRank>();
  for (Member& member : members_) {
    *book->mutable_address_book()->add_address() = std::move(*member.join.mutable_address());
  }
  for (Member& member : members_) member.stream->Send(book);
}

void Server::Broadcast(const v1::ToRank& message, int except) {
  const auto shared = std::make_shared<const v1::ToRank>(message);
  for (int r = 0; r < options_.size; ++r) {
    const Member& member = members_[static_cast<size_t>(r)];
    if (r != except && member.state == State::kJoined && member.stream) member.stream->Send(shared);
  }
}

void Server::Fail(int rank, const std::string& text) {
  Member& member = members_[static_cast<size_t>(rank)];
  if (member.state != State::kJoined) return;
  member.state = State::kFailed;
  if (!complete_)
    return Condemn({grpc::StatusCode::ABORTED, text + " while the ranks were joining"});
  v1::ToRank failed;
  failed.mutable_rank_failed()->set_rank(rank);
  failed.mutable_rank_failed()->set_text(text);
  Broadcast(failed, rank);
  if (member.stream) member.stream->End({grpc::StatusCode::ABORTED, text});
}

void Server::Condemn(const grpc::Status& status) {
  if (!verdict_) verdict_ = status;
  for (const auto& [stream, rank] : streams_) {
    if (rank >= 0) stream->End(*verdict_);
  }
}

void Server::Watch() {
  // Fine enough for dead_ms to be kept, coarse enough to cost nothing.
  const int tick_ms = static_cast<int>(
      std::clamp<int64_t>(std::min(options_.heartbeat_ms, options_.dead_ms / 8), 1, 200));
  bool out_of_fds = false;
  while (true) {
    pollfd fds[2] = {{wake_fd_, POLLIN, 0}, {out_of_fds ? -1 : listen_fd_, POLLIN, 0}};
    poll(fds, 2, tick_ms);
    std::vector<std::string> notices;
    {
      MutexLock lock(mu_);
      if (closing_) return;
      const int64_t now = NowNs();
      // While this process itself was stopped or starved nobody could be heard: that time counts
      // for nobody's silence.
      const int64_t late = now - checked_ns_ - 2 * tick_ms * kMillisecond;
      for (Member& member : members_) {
        if (late > 0) member.seen_ns = std::min(now, member.seen_ns + late);
      }
      checked_ns_ = now;
      notices = CheckTime(now);
    }
    for (const std::string& notice : notices) options_.notice(notice);
    out_of_fds = false;
    if (fds[1].revents == 0) continue;
    int fd;
    while ((fd = AcceptFrom(listen_fd_)) >= 0) {
      sockets_.Add(fd);
      grpc::AddInsecureChannelFromFd(server_.get(), fd);
    }
    out_of_fds = errno != EAGAIN;  // Then the pending connection must not keep poll from waiting.
  }
}

std::vector<std::string> Server::CheckTime(int64_t now_ns) {
  std::vector<std::string> notices;
  for (int r = 0; r < options_.size; ++r) {
    Member& member = members_[static_cast<size_t>(r)];
    if (member.state != State::kJoined) continue;
    // The rank of this process sends no heartbeats.
    const int64_t silent = r == options_.rank ? 0 : now_ns - member.seen_ns;
    if (silent >= options_.dead_ms * kMillisecond) {
      Fail(r, Rank(r) + " was silent for " + Seconds(silent) +
                  " and counts as dead (BLUEFOG_DEAD_MS)");
    } else if (silent >= options_.suspect_ms * kMillisecond && !member.suspect) {
      member.suspect = true;
      notices.push_back(Rank(r) + " has been silent for " + Seconds(silent) +
                        "; it counts as dead after " + Seconds(options_.dead_ms * kMillisecond));
    }
    if (!complete_ && !verdict_ && now_ns >= member.give_up_ns) {
      std::string missing;
      for (int m = 0; m < options_.size; ++m) {
        if (members_[static_cast<size_t>(m)].state != State::kAbsent) continue;
        missing += (missing.empty() ? "" : ", ") + std::to_string(m);
      }
      Condemn({grpc::StatusCode::DEADLINE_EXCEEDED,
               "of " + std::to_string(options_.size) +
                   " ranks these did not join in time: " + missing + " (" + Rank(r) +
                   " waited for " + Seconds(member.join.timeout_ms() * kMillisecond) +
                   "; BLUEFOG_JOIN_TIMEOUT_MS)"});
    }
  }
  for (const auto& [stream, rank] : streams_) {
    if (rank < 0 && now_ns - stream->opened_ns > kMaxSilentOpenNs) {
      stream->End({grpc::StatusCode::DEADLINE_EXCEEDED, "no join"});
    }
  }
  return notices;
}

}  // namespace bluefog::control
