#include "control/handshake.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/clock.h"
#include "base/token.h"
#include "control/socket.h"

namespace bluefog::control {
namespace {

constexpr std::string_view kMagic = "BFCTRL01";
constexpr size_t kHello = kMagic.size() + kNonceBytes + 4 + 2;
constexpr size_t kChallenge = kMagic.size() + kNonceBytes + kProofBytes;
constexpr int64_t kConnectMs = 500, kInterruptMs = 100;
constexpr char kClient[] = "control client", kServer[] = "control server";

void Append(std::string& bytes, uint64_t value, int size) {
  for (int i = 0; i < size; ++i) bytes += static_cast<char>(value >> (8 * i));
}
uint64_t Number(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = bytes.size(); i > 0; --i) {
    value = value << 8 | static_cast<unsigned char>(bytes[i - 1]);
  }
  return value;
}

std::string Context(const std::string& job_id, int rank) {
  return "rank " + std::to_string(rank) + " of job " + job_id;
}

bool BeginsLikeUs(std::string_view bytes) {
  const size_t n = std::min(bytes.size(), kMagic.size());
  return bytes.substr(0, n) == kMagic.substr(0, n);
}

/// The client's reads and writes: blocking, but for the deadline and the interruption.
class Wire {
 public:
  Wire(int fd, int64_t deadline_ns, const std::function<bool()>& interrupted)
      : fd_(fd), deadline_ns_(deadline_ns), interrupted_(interrupted) {}

  Status Write(std::string_view bytes) const {
    // A fresh socket has room for so little.
    const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    return n == static_cast<ssize_t>(bytes.size()) ? absl::OkStatus() : Closed();
  }
  StatusOr<std::string> Read(size_t size) const {
    std::string bytes(size, '\0');
    for (size_t done = 0; done < size;) {
      const ssize_t n = recv(fd_, bytes.data() + done, size - done, 0);
      if (n > 0) {
        done += static_cast<size_t>(n);
      } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
        return Closed();
      } else if (Status s = Wait(); !s.ok()) {
        return s;
      }
    }
    return bytes;
  }

 private:
  static Status Closed() {
    return absl::UnavailableError("the connection was closed before it was answered");
  }
  Status Wait() const {
    while (!interrupted_()) {
      const int64_t left_ms = (deadline_ns_ - NowNs()) / kMillisecond;
      if (left_ms <= 0) return absl::DeadlineExceededError("no answer");
      pollfd ready = {fd_, POLLIN, 0};
      if (poll(&ready, 1, static_cast<int>(std::min(left_ms, kInterruptMs))) == 1) {
        return absl::OkStatus();
      }
    }
    return absl::CancelledError("interrupted");
  }

  const int fd_;
  const int64_t deadline_ns_;
  const std::function<bool()>& interrupted_;
};

Status Greet(const Wire& wire, const Caller& caller) {
  StatusOr<std::string> nonce = RandomBytes(kNonceBytes);
  if (!nonce.ok()) return nonce.status();
  std::string hello = std::string(kMagic) + *nonce;
  Append(hello, static_cast<uint32_t>(caller.rank), 4);
  Append(hello, caller.job_id.size(), 2);
  if (Status s = wire.Write(hello + caller.job_id); !s.ok()) return s;

  StatusOr<std::string> magic = wire.Read(kMagic.size());
  if (!magic.ok()) return magic.status();
  if (*magic != kMagic) {
    return absl::FailedPreconditionError(
        "what listens there is not the control plane of this version of bluefog: give the job a "
        "port of its own (BLUEFOG_COORDINATOR), and all ranks the same version");
  }
  StatusOr<std::string> challenge = wire.Read(kChallenge - kMagic.size());
  if (!challenge.ok()) return challenge.status();
  const std::string context = Context(caller.job_id, caller.rank);
  const bool right =
      CheckProof(caller.token, kServer, context, *nonce, challenge->substr(kNonceBytes));
  // The server hears from a rank with the wrong token, too, so that rank 0 can say who it was.
  const std::string theirs = challenge->substr(0, kNonceBytes);
  if (Status s = wire.Write(Prove(caller.token, kClient, context, theirs)); !s.ok()) return s;

  StatusOr<std::string> verdict = wire.Read(3);
  if (!verdict.ok()) return right ? verdict.status() : absl::UnauthenticatedError(kTokenRefused);
  if (!right) return absl::UnauthenticatedError(kTokenRefused);
  StatusOr<std::string> text = wire.Read(Number(verdict->substr(1)));
  if (!text.ok()) return text.status();
  return Status(static_cast<absl::StatusCode>(verdict->front()), *text);
}

}  // namespace

StatusOr<int> Dial(const std::string& coordinator, const Caller& caller, int64_t deadline_ns,
                   const std::function<bool()>& interrupted) {
  if (caller.job_id.size() > kMaxJobId) {
    return absl::InvalidArgumentError("BLUEFOG_JOB_ID has " + std::to_string(caller.job_id.size()) +
                                      " bytes and may have " + std::to_string(kMaxJobId));
  }
  StatusOr<Endpoint> endpoint = ResolveEndpoint(coordinator);
  if (!endpoint.ok()) return endpoint.status();
  if (Status s = CheckExposure(*endpoint, coordinator, !caller.token.empty()); !s.ok()) return s;
  const int64_t left_ms =
      std::clamp<int64_t>((deadline_ns - NowNs()) / kMillisecond, 1, kConnectMs);
  StatusOr<int> fd = ConnectTo(*endpoint, static_cast<int>(left_ms));
  if (!fd.ok()) return fd;
  if (Status s = Greet(Wire(*fd, deadline_ns, interrupted), caller); !s.ok()) {
    close(*fd);
    return Status(s.code(), coordinator + ": " + std::string(s.message()));
  }
  return fd;
}

Reception::Reception(int fd, const std::string& job_id, const std::string& token)
    : fd_(fd), job_id_(job_id), token_(token) {}

bool Reception::Fill(size_t size) {
  while (in_.size() < size && !gone_) {
    char bytes[kHello + kMaxJobId];
    const ssize_t n = recv(fd_, bytes, std::min(size - in_.size(), sizeof(bytes)), 0);
    if (n > 0) {
      in_.append(bytes, static_cast<size_t>(n));
    } else if (n < 0 && errno == EAGAIN) {
      return false;
    } else if (n == 0 || errno != EINTR) {
      gone_ = true;
    }
  }
  return in_.size() >= size;
}

bool Reception::Write(const std::string& bytes) const {
  return send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) ==
         static_cast<ssize_t>(bytes.size());
}

Reception::Result Reception::Receive() {
  const Result unfinished = Result::kWaiting;
  if (!challenged_) {
    const bool whole = Fill(kHello);
    if (!BeginsLikeUs(in_)) return Result::kStranger;
    if (!whole) return gone_ ? Result::kStranger : unfinished;
    const size_t job_bytes = Number(std::string_view(in_).substr(kHello - 2, 2));
    if (job_bytes > kMaxJobId) return Result::kStranger;
    if (!Fill(kHello + job_bytes)) return gone_ ? Result::kStranger : unfinished;
    rank_ = static_cast<int>(Number(std::string_view(in_).substr(kHello - 6, 4)));
    caller_job_ = in_.substr(kHello);
    StatusOr<std::string> nonce = RandomBytes(kNonceBytes);
    if (!nonce.ok()) return Result::kStranger;
    nonce_ = *std::move(nonce);
    const std::string theirs = in_.substr(kMagic.size(), kNonceBytes);
    if (!Write(std::string(kMagic) + nonce_ +
               Prove(token_, kServer, Context(caller_job_, rank_), theirs))) {
      return Result::kStranger;
    }
    in_.clear();
    challenged_ = true;
  }
  if (!Fill(kProofBytes)) return gone_ ? Result::kStranger : unfinished;
  return Answer();
}

Reception::Result Reception::Answer() {
  Status status;
  if (!CheckProof(token_, kClient, Context(caller_job_, rank_), nonce_, in_)) {
    wrong_token_ = true;
    status = absl::UnauthenticatedError(kTokenRefused);
  } else if (caller_job_ != job_id_) {
    status = absl::FailedPreconditionError(
        "it serves job '" + job_id_ + "' and " + (rank_ < 0 ? "this launcher" : "this rank") +
        " belongs to job '" + caller_job_ + "': give every job its own BLUEFOG_COORDINATOR");
  }
  std::string verdict;
  Append(verdict, static_cast<uint64_t>(status.code()), 1);
  Append(verdict, status.message().size(), 2);
  verdict.append(status.message().data(), status.message().size());
  if (!Write(verdict)) return Result::kStranger;
  return status.ok() ? Result::kWelcome : Result::kRefused;
}

}  // namespace bluefog::control
