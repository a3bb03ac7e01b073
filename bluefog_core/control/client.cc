#include "control/client.h"

#include <grpcpp/create_channel_posix.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/clock.h"

namespace bluefog::control {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;  // The address book of a very large job.
constexpr int64_t kBackoffMs = 10, kMaxBackoffMs = 200;
constexpr int64_t kInterruptMs = 100;
constexpr int64_t kServerGraceNs =
    1'000 * kMillisecond;  // The server knows better why a join ran out of time.

std::chrono::steady_clock::time_point At(int64_t ns) {
  return std::chrono::steady_clock::time_point(std::chrono::nanoseconds(ns));
}

}  // namespace

Client::Client(const ClientOptions& options)
    : options_(options), told_(static_cast<size_t>(options.join.size())) {}

Client::~Client() { Disconnect(/*orderly=*/false); }

Status Client::Join() {
  const int64_t deadline = NowNs() + options_.join.timeout_ms() * kMillisecond;
  int64_t backoff_ms = kBackoffMs;
  while (true) {
    bool again = false;
    Status status = Attempt(deadline, &again);
    if (status.ok() || !again) return status;
    bool interrupted = false;
    WaitForChange(Phase::kIdle, std::min(deadline, NowNs() + backoff_ms * kMillisecond),
                  &interrupted);
    if (interrupted)
      return absl::CancelledError("interrupted while nobody served the control plane yet");
    if (NowNs() >= deadline) {
      return absl::DeadlineExceededError(
          "nobody served the control plane at " + options_.coordinator +
          " within BLUEFOG_JOIN_TIMEOUT_MS=" + std::to_string(options_.join.timeout_ms()) + " (" +
          std::string(status.message()) + "): rank 0 did not start, or it ended");
    }
    backoff_ms = std::min(2 * backoff_ms, kMaxBackoffMs);
  }
}

StatusOr<std::shared_ptr<grpc::Channel>> Client::Connect(int64_t deadline_ns) {
  // Somebody who took the connection and is silent gets as long as the server would take.
  StatusOr<int> fd = Dial(options_.coordinator, options_.caller, deadline_ns, options_.interrupted);
  if (!fd.ok()) return fd.status();
  sockets_.Add(*fd);
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  return grpc::CreateCustomInsecureChannelFromFd("bluefog-control", *fd, arguments);
}

bool Client::WaitForChange(Phase phase, int64_t until_ns, bool* interrupted) {
  while (!(*interrupted = options_.interrupted())) {
    MutexLock lock(mu_);
    if (phase_ != phase) return true;
    const int64_t now = NowNs();
    if (now >= until_ns) return false;
    changed_.WaitUntil(mu_, At(std::min(until_ns, now + kInterruptMs * kMillisecond)));
  }
  return false;
}

Status Client::Attempt(int64_t deadline_ns, bool* again) {
  StatusOr<std::shared_ptr<grpc::Channel>> channel = Connect(deadline_ns), beat_channel;
  if (channel.ok() && !options_.serves) beat_channel = Connect(deadline_ns);
  for (const auto* made : {&channel, &beat_channel}) {
    if (made->ok() || (made == &beat_channel && options_.serves)) continue;
    if (absl::IsCancelled(made->status())) {
      return absl::CancelledError("interrupted while rank 0 was called");
    }
    *again = absl::IsUnavailable(made->status());
    if (!absl::IsDeadlineExceeded(made->status())) return made->status();
    return absl::DeadlineExceededError(
        options_.coordinator + " took the connection and did not answer within " +
        "BLUEFOG_JOIN_TIMEOUT_MS=" + std::to_string(options_.join.timeout_ms()) +
        ": rank 0 is stopped, or something else listens there");
  }
  channel_ = *std::move(channel);
  auto session = std::make_unique<SessionStream>(
      channel_, [this](const v1::ToRank& message) { Handle(message); },
      [this](const grpc::Status& status) { Ended(status); });
  if (!options_.serves) {
    beat_channel_ = *std::move(beat_channel);
    heartbeat_stream_ = std::make_unique<HeartbeatStream>(
        beat_channel_, [this](const v1::Pulse&) { OnPulse(); }, [](const grpc::Status&) {});
    heartbeat_stream_->Start(&v1::Control::Stub::async::Heartbeats);
  }
  {
    MutexLock lock(mu_);
    phase_ = Phase::kAsked;
    leaving_ = false;
  }
  {
    MutexLock lock(session_mu_);
    session_ = std::move(session);
    session_->Start(&v1::Control::Stub::async::Session);
  }
  v1::FromRank message;
  *message.mutable_join() = options_.join;
  message.mutable_join()->set_timeout_ms(
      std::max<int64_t>(0, (deadline_ns - NowNs()) / kMillisecond));
  Write(message);

  const int64_t until = deadline_ns + kServerGraceNs;
  bool interrupted = false;
  bool accepted = false;
  if (WaitForChange(Phase::kAsked, until, &interrupted)) {
    MutexLock lock(mu_);
    accepted = phase_ == Phase::kAccepted || phase_ == Phase::kJoined;
    if (accepted && !options_.serves) beater_ = std::thread(&Client::Beat, this);
  }
  if (accepted) WaitForChange(Phase::kAccepted, until, &interrupted);
  grpc::Status end;
  {
    MutexLock lock(mu_);
    if (phase_ == Phase::kJoined && !interrupted) return absl::OkStatus();
    end = phase_ == Phase::kEnded ? end_ : grpc::Status::OK;
  }
  Disconnect(/*orderly=*/true);
  {
    MutexLock lock(mu_);
    phase_ = Phase::kIdle;
  }
  // A server that shuts down cancels a call that came too late for it; the next one is to come.
  *again = !accepted && !interrupted &&
           (end.error_code() == grpc::StatusCode::UNAVAILABLE ||
            end.error_code() == grpc::StatusCode::CANCELLED);
  if (interrupted) return absl::CancelledError("interrupted while the ranks were joining");
  if (end.ok()) {
    return absl::DeadlineExceededError(options_.coordinator +
                                       " took the connection and did not answer "
                                       "within BLUEFOG_JOIN_TIMEOUT_MS=" +
                                       std::to_string(options_.join.timeout_ms()));
  }
  if (accepted && (end.error_code() == grpc::StatusCode::UNAVAILABLE ||
                   end.error_code() == grpc::StatusCode::CANCELLED)) {
    return absl::UnavailableError("rank 0, which serves the control plane at " +
                                  options_.coordinator +
                                  ", ended or went silent while the ranks were joining");
  }
  return Status(static_cast<absl::StatusCode>(end.error_code()), end.error_message());
}

bool Client::Write(const v1::FromRank& message) {
  MutexLock lock(session_mu_);
  if (session_ == nullptr || !session_->Send(message)) return false;
  messages_.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void Client::Handle(const v1::ToRank& message) {
  {
    MutexLock lock(mu_);
    seen_ns_ = NowNs();
    if (message.has_accepted()) phase_ = Phase::kAccepted;
    if (message.has_address_book()) {
      const auto& book = message.address_book().address();
      addresses_.assign(book.begin(), book.end());
      phase_ = Phase::kJoined;
    }
    if (message.has_server_closing()) server_closing_ = true;
    changed_.NotifyAll();
    if (leaving_) return;
  }
  if (message.has_rank_failed()) {
    Tell(message.rank_failed().rank(), message.rank_failed().text());
  } else if (message.has_rank_left()) {
    const int rank = message.rank_left().rank();
    if (rank >= 0 && rank < options_.join.size()) options_.rank_left(rank);
  } else if (message.has_server_closing()) {
    {
      MutexLock lock(session_mu_);
      if (session_ != nullptr) session_->Close();
    }
    options_.rank_left(0);
  }
}

void Client::Ended(const grpc::Status& status) {
  bool silent;
  {
    MutexLock lock(mu_);
    const bool expected = phase_ != Phase::kJoined || leaving_ || server_closing_;
    phase_ = Phase::kEnded;
    end_ = status;
    silent = silent_;
    changed_.NotifyAll();
    if (expected) return;
  }
  if (silent) {
    Tell(0, "rank 0 was silent for " + Seconds(options_.dead_ms * kMillisecond) +
                " and counts as dead (BLUEFOG_DEAD_MS)");
  } else if (status.error_code() == grpc::StatusCode::ABORTED) {
    Tell(options_.join.rank(), status.error_message());
  } else {
    Tell(0, "rank 0 ended without leaving the job (its control plane at " + options_.coordinator +
                " closed)");
  }
}

void Client::Tell(int rank, const std::string& text) {
  if (rank < 0 || rank >= options_.join.size() || told_[static_cast<size_t>(rank)]) return;
  told_[static_cast<size_t>(rank)] = true;
  options_.rank_failed(rank, text);
}

void Client::OnPulse() {
  MutexLock lock(mu_);
  seen_ns_ = NowNs();
}

int64_t Client::patience_ns() const {
  if (phase_ != Phase::kJoined) return kJoinPatience * options_.dead_ms * kMillisecond;
  return options_.dead_ms * kMillisecond - options_.heartbeat_ms * kMillisecond / 2;
}

void Client::Beat() {
  bool suspect = false, dead = false, joined = false;
  v1::Heartbeat heartbeat;
  heartbeat.set_rank(options_.join.rank());
  while (true) {
    int64_t silent;
    {
      MutexLock lock(mu_);
      // On the beat of the clock, which is one for all ranks of a host: the server wakes up once
      // for all of them. Fewer beats until the job is complete, as there is more patience.
      int64_t interval = 0, due = 0;
      const auto schedule = [&]() REQUIRES(mu_) {
        joined = phase_ == Phase::kJoined;
        interval = options_.heartbeat_ms * kMillisecond * (joined ? 1 : kJoinPatience);
        due = (NowNs() / interval + 1) * interval;
      };
      const auto over = [this]() REQUIRES(mu_) {
        return phase_ == Phase::kEnded || leaving_ || server_closing_;
      };
      int64_t now = 0;
      schedule();
      while (!over() && (now = NowNs()) < std::min(due, seen_ns_ + patience_ns())) {
        changed_.WaitUntil(mu_, At(std::min(due, seen_ns_ + patience_ns())));
        if (!joined && phase_ == Phase::kJoined) schedule();
      }
      if (over()) return;
      // While this process itself was stopped or starved it could hear nobody.
      if (now - due > interval) seen_ns_ = std::min(now, seen_ns_ + now - due);
      silent = now - seen_ns_;
      silent_ = dead = silent >= patience_ns();
    }
    if (dead) {
      MutexLock lock(session_mu_);
      if (session_ != nullptr) session_->Cancel();
      return;
    }
    if (joined && silent >= options_.suspect_ms * kMillisecond && !suspect) {
      options_.notice("rank 0 has been silent for " + Seconds(silent) +
                      "; it counts as dead after " + Seconds(options_.dead_ms * kMillisecond));
    }
    suspect = silent >= options_.suspect_ms * kMillisecond;
    heartbeat.set_progress(options_.progress());
    heartbeats_.fetch_add(1, std::memory_order_relaxed);
    // While the last one is still on its way, the server hears that.
    heartbeat_stream_->Send(heartbeat, /*skip=*/true);
  }
}

void Client::ReportFailure(int rank, const std::string& text) {
  v1::FromRank message;
  message.mutable_report_failure()->set_rank(rank);
  message.mutable_report_failure()->set_text(text.substr(0, 4 << 10));
  Write(message);
}

void Client::Leave() { Disconnect(/*orderly=*/true); }

void Client::Disconnect(bool orderly) {
  {
    MutexLock lock(mu_);
    if (leaving_ || phase_ == Phase::kIdle) return;
    leaving_ = true;
    changed_.NotifyAll();
  }
  v1::FromRank message;
  message.mutable_leave();
  if (orderly && Write(message)) {
    // The answer is the end of the stream: then the server knows that this was no failure. Who does
    // not answer by then is dead by the job's own rule.
    MutexLock lock(mu_);
    const int64_t until = NowNs() + options_.dead_ms * kMillisecond;
    while (phase_ != Phase::kEnded && changed_.WaitUntil(mu_, At(until))) {
    }
  }
  std::unique_ptr<SessionStream> session;
  {
    MutexLock lock(session_mu_);
    session = std::move(session_);
  }
  session.reset();
  if (beater_.joinable()) beater_.join();
  heartbeat_stream_.reset();
  beat_channel_.reset();
  channel_.reset();
}

}  // namespace bluefog::control
