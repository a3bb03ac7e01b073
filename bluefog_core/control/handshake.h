// What comes first on every connection to the control plane, before gRPC sees a byte of it: who
// calls, of which job, and the proof of both ends that they have the job's token (base/token.h). So
// whatever a stranger sends is turned away here, and no RPC can come from one. Little-endian:
//
//   client  "BFCTRL01" nonce[32] rank:i32 length:u16 job[length]
//   server  "BFCTRL01" nonce[32] proof[32]     of the server, for the client's nonce
//   client  proof[32]                          for the server's nonce
//   server  code:u8 length:u16 text[length]    0: welcome, the rest is gRPC
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include <bluefog/status.h>

namespace bluefog::control {

inline constexpr size_t kMaxJobId = 256;
/// While hundreds of ranks join, processors are busy: silence counts as death after so many times
/// the usual. The end of a connection tells of most deaths anyway.
inline constexpr int64_t kJoinPatience = 5;

struct Caller {
  std::string job_id;
  int rank = -1;  ///< -1: no rank, but a launcher.
  std::string token;
};

/// A connection (non-blocking socket) to `coordinator` that has been welcomed. Unavailable: nobody
/// serves there yet, or no more; any other error will not go away. Gives up at `deadline_ns`
/// (DeadlineExceeded if somebody took the connection) and when `interrupted` says so (Cancelled).
StatusOr<int> Dial(const std::string& coordinator, const Caller& caller, int64_t deadline_ns,
                   const std::function<bool()>& interrupted);

/// The serving end on one connection. Never blocks.
class Reception {
 public:
  /// `fd` is borrowed.
  Reception(int fd, const std::string& job_id, const std::string& token);
  enum class Result {
    kWaiting,   ///< For more bytes.
    kWelcome,   ///< The connection is gRPC's now.
    kStranger,  ///< Spoke something else, or went away.
    kRefused,   ///< Was told why.
  };
  /// What the bytes that have come make of it. To be called when there are some.
  Result Receive();
  /// Of who called; for messages, since only a proof shows that it is true. -1: no rank.
  int rank() const { return rank_; }
  bool wrong_token() const { return wrong_token_; }

 private:
  // Reads until `in_` has `size` bytes; false if they are not there yet (or never will: gone_).
  bool Fill(size_t size);
  bool Write(const std::string& bytes) const;
  Result Answer();

  const int fd_;
  const std::string &job_id_, &token_;
  std::string in_, nonce_, caller_job_;
  int rank_ = -1;
  bool gone_ = false, challenged_ = false, wrong_token_ = false;
};

}  // namespace bluefog::control
