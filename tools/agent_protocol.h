// What the launcher and the agent on a host say to each other, over the agent's standard input and
// output (ssh) or two pipes (this host). The agent's first line tells its version, so that each
// side speaks only to its like; then come frames. What ranks print is payload and can be no frame.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <bluefog/status.h>

namespace bluefog::tools {

enum class FrameKind : uint8_t {
  // To the agent.
  kJob = 1,  ///< text: HostJob. Check it and get ready.
  kStart,    ///< text: where the control plane is. Start the ranks.
  kSignal,   ///< value: to all ranks of the host and what they started.
  kHold,     ///< value 1: no more output for now; 0: go on.
  kAlive,    ///< value: silence for more than so many seconds is the launcher's end; 0: any.
  // To the launcher.
  kReady,   ///< text: HostReady.
  kFailed,  ///< rank, and value: the errno that kept it from starting. None after it is started.
  kOutput,  ///< value: 1 or 2, the stream it goes to.
  kLeft,    ///< rank left the job.
  kEnded,   ///< rank, and value: its exit code, or minus the signal that killed it.
};

struct Frame {
  FrameKind kind = FrameKind::kAlive;
  int32_t rank = 0, value = 0;
  std::string text;
};

std::string Pack(const Frame& frame);

/// Bytes in, frames out.
class FrameReader {
 public:
  void Add(std::string_view bytes);
  /// Nothing until one is complete. InvalidArgument: these are no frames.
  StatusOr<std::optional<Frame>> Next();

 private:
  std::string bytes_;
  size_t begin_ = 0;  // What is before it was read.
};

/// The part of a job that one host runs.
struct HostJob {
  std::string job_id;
  std::string token;                        ///< Random bytes that only ranks of this job know.
  int size = 1, first_rank = 0, ranks = 1;  ///< Of the job; on this host.
  std::vector<std::string> command;         ///< Not empty.
  std::string program;  ///< Where the launcher finds command[0]; taken if it is there here, too.
  std::string cwd;      ///< Empty: as it is.
  std::vector<std::pair<std::string, std::string>> env;
  std::string tag_suffix;  ///< "[rank<suffix>] " in front of every line.
  bool tag = true;
  bool inherit = false;  ///< Ranks get the agent's own output, and rank 0 its input.
  /// Where rank 0 is: the name of this host for the others, if a port is to be chosen here.
  std::string coordinator_host;
  bool choose_host = false;  ///< … or a better one, should the name mean the host itself only.
};

/// The agent's answer.
struct HostReady {
  int error = 0;        ///< An errno: the job cannot start here.
  std::string problem;  ///< With it, what concerns the command, else a folder or the host.
  std::string program;  ///< What command[0] is here.
  std::string coordinator;
};

std::string Pack(const HostJob& job);
std::string Pack(const HostReady& ready);
StatusOr<HostJob> UnpackJob(const std::string& text);
StatusOr<HostReady> UnpackReady(const std::string& text);

/// The agent's first line, without its end: mark, version, number of the protocol. Shells may print
/// something before it.
inline constexpr char kGreetingMark[] = "\036bluefog-agent ";
std::string Greeting();

}  // namespace bluefog::tools
