// Transport between processes of one host through shared memory. Payloads are read where they lie
// in the sender's Arena; nothing is copied but small ones. No files, no names in a file system:
// after SIGKILL nothing stays behind. Needs Linux 5.3 (pidfd_open) and peers of the same user, job
// and network namespace.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <bluefog/status.h>

#include "transport/arena.h"
#include "transport/transport.h"

namespace bluefog::transport {

struct ShmOptions {
  int rank = 0;
  int size = 1;
  std::string job_id;                ///< At most 127 bytes; peers of another job are refused.
  int64_t inline_limit = 8 << 10;    ///< Larger payloads must lie in the arena.
  int64_t ring_bytes = 256 << 10;    ///< Per peer and direction; headers and inline payloads.
  int max_in_flight = kMaxInFlight;  ///< More are kBusy.
};

/// `receiver` is borrowed. Destroying the transport tells the peers that this rank left; in a
/// forked child it only closes its copies. InvalidArgument for options that cannot work;
/// Unavailable, ResourceExhausted from the system.
StatusOr<std::unique_ptr<Transport>> MakeShm(const ShmOptions& options,
                                             std::shared_ptr<Arena> arena, Receiver* receiver);

}  // namespace bluefog::transport
