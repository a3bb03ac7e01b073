#include "control/server.h"

#include <grpcpp/server_posix.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
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
// So long the launcher may take to say why a rank ended, before everybody is told that it did.
constexpr int64_t kLauncherNs = 30 * kMillisecond;
constexpr int kMaxConnectionsPerRank = 2, kOtherDescriptors = 64;

std::string Rank(int rank) { return "rank " + std::to_string(rank); }

std::string DescriptorAdvice(int size, uint64_t limit) {
  return "rank 0 may open " + std::to_string(limit) +
         " file descriptors, and the control plane of " + std::to_string(size) +
         " ranks needs about " + std::to_string(kMaxConnectionsPerRank * size + kOtherDescriptors) +
         ": raise the limit where rank 0 is started (ulimit -n)";
}

/// Room for the connections of a job, as far as the system lets us make it.
Status ReserveDescriptors(int size) {
  rlimit limit{};
  const rlim_t needed = kMaxConnectionsPerRank * static_cast<rlim_t>(size) + kOtherDescriptors;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= needed) return absl::OkStatus();
  const rlim_t had = limit.rlim_cur;
  limit.rlim_cur = std::min(limit.rlim_max, needed);
  if (limit.rlim_cur == needed && setrlimit(RLIMIT_NOFILE, &limit) == 0) return absl::OkStatus();
  return absl::ResourceExhaustedError(DescriptorAdvice(size, had));
}

}  // namespace

// One rank's stream. gRPC allows one write at a time, so messages queue here. Send and End are
// called with the server's lock held, which keeps the stream from being done meanwhile.
class Server::Stream final : public grpc::ServerBidiReactor<v1::FromRank, v1::ToRank> {
 public:
  explicit Stream(Server& server) : server_(server) { StartRead(&in_); }

  void Send(std::shared_ptr<const v1::ToRank> message) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    if (end_) return;
    server_.messages_.fetch_add(1, std::memory_order_relaxed);
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

// One rank's heartbeats. A reader that does not keep up needs no second sign of life.
class Server::HeartbeatStream final : public grpc::ServerBidiReactor<v1::Heartbeat, v1::Pulse> {
 public:
  HeartbeatStream(Server& server, int size) : server_(server), size_(size) { StartRead(&in_); }

  void OnReadDone(bool ok) override {
    const bool known = ok && in_.rank() >= 0 && in_.rank() < size_;
    const bool answer = known && server_.OnHeartbeat(in_.rank(), in_.progress());
    MutexLock lock(mu_);
    if (!known) {
      over_ = true;
      if (!writing_) Finish(grpc::Status::OK);
      return;
    }
    if (answer && !writing_) {
      writing_ = true;
      StartWrite(&pulse_);
    }
    StartRead(&in_);
  }
  void OnWriteDone(bool) override {
    MutexLock lock(mu_);
    writing_ = false;
    if (over_) Finish(grpc::Status::OK);
  }
  void OnDone() override {
    server_.OnHeartbeatsDone();
    delete this;
  }

 private:
  Server& server_;
  const int size_;
  v1::Heartbeat in_;
  const v1::Pulse pulse_;
  Mutex mu_;
  bool writing_ GUARDED_BY(mu_) = false;
  bool over_ GUARDED_BY(mu_) = false;
};

StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options) {
  StatusOr<Endpoint> endpoint = ResolveEndpoint(options.coordinator);
  if (!endpoint.ok()) return endpoint.status();
  if (Status s = CheckExposure(*endpoint, options.coordinator, !options.token.empty()); !s.ok()) {
    return s;
  }
  if (Status s = ReserveDescriptors(options.size); !s.ok()) return s;
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
      wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      members_(static_cast<size_t>(options.size)),
      checked_ns_(NowNs()) {
  sockets_.Add(listen_fd);
  door_.emplace(MakeDoor(listen_fd));
}

DoorOptions Server::MakeDoor(int listen_fd) {
  DoorOptions door;
  door.listen_fd = listen_fd;
  door.job_id = options_.job_id;
  door.token = options_.token;
  door.came = [this](int fd) { sockets_.Add(fd); };
  door.welcome = [this](int fd) { grpc::AddInsecureChannelFromFd(server_.get(), fd); };
  door.refused = [this](int rank, const std::string& address) { OnRefused(rank, address); };
  return door;
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
  door_.reset();
  if (server_ == nullptr) return;
  {
    MutexLock lock(mu_);
    FailPending();
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
  while (!streams_.empty() || heartbeat_streams_ > 0) changed_.Wait(mu_);
}

grpc::ServerBidiReactor<v1::FromRank, v1::ToRank>* Server::Session(grpc::CallbackServerContext*) {
  auto* stream = new Stream(*this);
  MutexLock lock(mu_);
  streams_.emplace(stream, -1);
  return stream;
}

grpc::ServerBidiReactor<v1::Heartbeat, v1::Pulse>* Server::Heartbeats(
    grpc::CallbackServerContext*) {
  MutexLock lock(mu_);
  ++heartbeat_streams_;
  return new HeartbeatStream(*this, options_.size);
}

bool Server::OnHeartbeat(int rank, int64_t progress) {
  MutexLock lock(mu_);
  Member& member = members_[static_cast<size_t>(rank)];
  if (member.state != State::kJoined) return false;  // Fenced: the job has gone on without it.
  member.seen_ns = NowNs();
  member.suspect = false;
  member.progress = progress;
  // Not each is answered: it is enough that no rank comes to suspect the server.
  if (member.seen_ns - member.answered_ns < options_.suspect_ms * kMillisecond / 4) return false;
  member.answered_ns = member.seen_ns;
  return true;
}

void Server::OnHeartbeatsDone() {
  MutexLock lock(mu_);
  --heartbeat_streams_;
  changed_.NotifyAll();
}

grpc::ServerUnaryReactor* Server::ReportDeath(grpc::CallbackServerContext* context,
                                              const v1::Death* death, v1::Told*) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  if (death->rank() < 0 || death->rank() >= options_.size) {
    reactor->Finish(
        {grpc::StatusCode::INVALID_ARGUMENT, Rank(death->rank()) + " is outside the job of " +
                                                 std::to_string(options_.size) + " ranks"});
    return reactor;
  }
  {
    MutexLock lock(mu_);
    const int rank = death->rank();
    const std::string text = Rank(rank) + " died: " + death->text().substr(0, kMaxTextBytes);
    const State state = members_[static_cast<size_t>(rank)].state;
    if (state == State::kJoined) Fail(rank, text + Whose(rank));
    if (state == State::kAbsent && !closing_) {
      Condemn({grpc::StatusCode::ABORTED, text + " before it joined"});
    }
  }
  reactor->Finish(grpc::Status::OK);
  return reactor;
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
  if (message.has_join()) {
    Fail(rank, Rank(rank) + " broke the protocol of the control plane: it joined twice");
  } else if (message.has_report_failure()) {
    const v1::ReportFailure& report = message.report_failure();
    if (report.rank() < 0 || report.rank() >= options_.size) return;
    FailSoon(report.rank(),
             report.text().substr(0, kMaxTextBytes) + " (seen by " + Rank(rank) + ")");
  } else if (message.has_leave()) {
    FailPending();  // What it fled from is told before.
    if (member.state != State::kJoined) return;
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
    FailSoon(rank,
             Rank(rank) +
                 " ended without leaving the job: its connection to the control plane closed" +
                 Whose(rank));
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
  if (++joined_ == options_.size) {
    complete_ = true;
    SendAddressBook();
  }
}

void Server::SendAddressBook() {
  auto book = std::make_shared<v1::ToRank>();
  for (Member& member : members_) {
    *book->mutable_address_book()->add_address() = std::move(*member.join.mutable_address());
  }
  for (Member& member : members_) {
    member.seen_ns = NowNs();
    if (member.stream) member.stream->Send(book);
  }
}

void Server::Broadcast(const v1::ToRank& message, int except) {
  const auto shared = std::make_shared<const v1::ToRank>(message);
  for (int r = 0; r < options_.size; ++r) {
    const Member& member = members_[static_cast<size_t>(r)];
    if (r != except && member.state == State::kJoined && member.stream) member.stream->Send(shared);
  }
}

std::string Server::Whose(int rank) const {
  return " (" + members_[static_cast<size_t>(rank)].join.process() + ")";
}

void Server::Fail(int rank, const std::string& text) {
  Member& member = members_[static_cast<size_t>(rank)];
  if (member.state != State::kJoined) return;
  member.state = State::kFailed;
  member.tell_ns = 0;
  if (!complete_)
    return Condemn({grpc::StatusCode::ABORTED, text + " while the ranks were joining"});
  v1::ToRank failed;
  failed.mutable_rank_failed()->set_rank(rank);
  failed.mutable_rank_failed()->set_text(text);
  Broadcast(failed, rank);
  if (member.stream) member.stream->End({grpc::StatusCode::ABORTED, text});
}

void Server::FailSoon(int rank, const std::string& text) {
  Member& member = members_[static_cast<size_t>(rank)];
  if (member.state != State::kJoined || member.tell_ns != 0) return;
  if (!complete_ || !member.join.launcher_reports()) return Fail(rank, text);
  member.end = text;
  member.tell_ns = NowNs() + kLauncherNs;
  eventfd_write(wake_fd_, 1);
}

void Server::FailPending() {
  for (int r = 0; r < options_.size; ++r) {
    const Member& member = members_[static_cast<size_t>(r)];
    if (member.tell_ns != 0) Fail(r, member.end);
  }
}

void Server::Condemn(const grpc::Status& status) {
  if (!verdict_) verdict_ = status;
  for (const auto& [stream, rank] : streams_) {
    if (rank >= 0) stream->End(*verdict_);
  }
}

void Server::OnRefused(int rank, const std::string& address) {
  {
    MutexLock lock(mu_);
    if (rank < 0 || rank >= options_.size) return;
    Member& member = members_[static_cast<size_t>(rank)];
    const bool known = !member.refused.empty() || member.state != State::kAbsent;
    member.refused = "a process at " + address + " came as " + Rank(rank) +
                     " and was refused: its job token is missing or another one";
    if (known) return;
  }
  options_.notice("a process at " + address + " that calls itself " + Rank(rank) +
                  " was refused: its job token is missing or another one");
}

void Server::OutOfDescriptors() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  const std::string text = "no file descriptor is left for another rank's connection: " +
                           DescriptorAdvice(options_.size, limit.rlim_cur);
  MutexLock lock(mu_);
  if (!complete_ && !verdict_) Condemn({grpc::StatusCode::RESOURCE_EXHAUSTED, text});
}

void Server::Watch() {
  // Fine enough to see that this process was stopped, coarse enough to cost nothing.
  const int tick_ms = static_cast<int>(
      std::clamp<int64_t>(std::min(options_.heartbeat_ms, options_.dead_ms / 8), 1, 200));
  int timeout_ms = tick_ms;
  while (true) {
    door_->Turn(wake_fd_, timeout_ms);
    if (door_->out_of_descriptors()) OutOfDescriptors();
    std::vector<std::string> notices;
    {
      MutexLock lock(mu_);
      if (closing_) return;
      eventfd_t woken;
      eventfd_read(wake_fd_, &woken);
      const int64_t now = NowNs();
      // While this process itself was stopped or starved nobody could be heard: that time counts
      // for nobody's silence.
      const int64_t late = now - checked_ns_ - 2 * tick_ms * kMillisecond;
      for (Member& member : members_) {
        if (late > 0) member.seen_ns = std::min(now, member.seen_ns + late);
      }
      checked_ns_ = now;
      int64_t next_ns = now + tick_ms * kMillisecond;
      notices = CheckTime(now, &next_ns);
      timeout_ms = static_cast<int>((next_ns - now + kMillisecond - 1) / kMillisecond);
    }
    for (const std::string& notice : notices) options_.notice(notice);
  }
}

int64_t Server::patience_ns() const {
  if (!complete_) return kJoinPatience * options_.dead_ms * kMillisecond;
  // What was missed last may have been due almost an interval ago: so dead_ms after a rank stopped
  // everybody knows it.
  return options_.dead_ms * kMillisecond - options_.heartbeat_ms * kMillisecond / 2;
}

std::vector<std::string> Server::CheckTime(int64_t now_ns, int64_t* next_ns) {
  std::vector<std::string> notices;
  for (int r = 0; r < options_.size; ++r) {
    Member& member = members_[static_cast<size_t>(r)];
    if (member.state != State::kJoined) continue;
    if (member.tell_ns != 0) {
      if (now_ns >= member.tell_ns) {
        Fail(r, member.end);
        continue;
      }
      *next_ns = std::min(*next_ns, member.tell_ns);
    }
    // The rank of this process sends no heartbeats.
    const int64_t silent = r == options_.rank ? 0 : now_ns - member.seen_ns;
    if (silent >= patience_ns()) {
      Fail(r, Rank(r) + " was silent for " + Seconds(silent) +
                  " and counts as dead (BLUEFOG_DEAD_MS), after " +
                  std::to_string(member.progress) + " operations" + Whose(r));
      continue;
    }
    if (complete_ && silent >= options_.suspect_ms * kMillisecond && !member.suspect) {
      member.suspect = true;
      notices.push_back(Rank(r) + " has been silent for " + Seconds(silent) +
                        "; it counts as dead after " + Seconds(options_.dead_ms * kMillisecond));
    }
    if (r != options_.rank) *next_ns = std::min(*next_ns, member.seen_ns + patience_ns());
    if (!complete_ && !verdict_ && now_ns >= member.give_up_ns) Condemn(MissingRanks(r));
  }
  for (const auto& [stream, rank] : streams_) {
    if (rank < 0 && now_ns - stream->opened_ns > kMaxSilentOpenNs) {
      stream->End({grpc::StatusCode::DEADLINE_EXCEEDED, "no join"});
    }
  }
  return notices;
}

grpc::Status Server::MissingRanks(int waited) const {
  std::string missing, refused;
  for (int r = 0; r < options_.size; ++r) {
    const Member& member = members_[static_cast<size_t>(r)];
    if (member.state != State::kAbsent) continue;
    missing += (missing.empty() ? "" : ", ") + std::to_string(r);
    if (!member.refused.empty()) refused += "; " + member.refused;
  }
  return {grpc::StatusCode::DEADLINE_EXCEEDED,
          "of " + std::to_string(options_.size) + " ranks these did not join in time: " + missing +
              " (" + Rank(waited) + " waited for " +
              Seconds(members_[static_cast<size_t>(waited)].join.timeout_ms() * kMillisecond) +
              "; BLUEFOG_JOIN_TIMEOUT_MS)" + refused};
}

}  // namespace bluefog::control
