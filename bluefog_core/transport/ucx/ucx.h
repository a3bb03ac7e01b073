// Transport between hosts, over UCX. The library itself is behind a component (ucx_abi.h): without
// it MakeUcx says what to install.
//
// Small payloads are copied and travel joined with whatever else goes to that peer in the same
// turn: other messages, releases, revocations. Large ones stay with the sender until the receiver
// fetches them. A peer that does not answer for `silence_ms` is taken for dead: UCX does not notice
// a stopped process, nor a link that is cut.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <bluefog/status.h>

#include "transport/transport.h"

namespace bluefog::transport {

struct UcxOptions {
  int rank = 0, size = 1;
  std::string job_id;
  int max_in_flight = kMaxInFlight;  ///< Equal on all ranks.
  int64_t inline_limit = 8 << 10;    ///< Equal on all ranks.
  int64_t inline_window = 1 << 20;   ///< Small payloads that one peer has not taken, in bytes.
  /// What is fetched from one peer at the same time, in bytes: at least, and at most where more
  /// costs no waiting.
  int64_t fetch_window = 512 << 10, fetch_window_max = 4 << 20;
  int64_t segment_bytes = 512 << 10;  ///< Of TCP; equal on all ranks.
  std::string transports;             ///< UCX_TLS. Empty: the variable, or "tcp".
  std::string devices;                ///< UCX_NET_DEVICES. Empty: the variable.
  std::string default_devices;        ///< Where neither it nor UCX_TLS is set. Empty: all.
  std::string component_dir;          ///< Where libbluefog_ucx.so lies; see base/component.h.
  std::string token;  ///< The job's (base/token.h); empty: none. Equal on all ranks.
  /// TCP sends again 1.4 s after what it lost: a link cut for a second goes on.
  int64_t silence_ms = 1750;
};

/// `receiver` is borrowed. NotFound: no UCX here.
StatusOr<std::unique_ptr<Transport>> MakeUcx(const UcxOptions& options, Receiver* receiver);

}  // namespace bluefog::transport
