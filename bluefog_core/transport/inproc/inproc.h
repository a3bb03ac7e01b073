// Transport between the ranks of one process: for tests of everything above transports, and for
// several engines in one process. `fetch_views` makes it behave as a network does: large payloads
// arrive unreadable and must be fetched.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include <bluefog/status.h>

#include "base/mutex.h"
#include "transport/transport.h"

namespace bluefog::transport {

class InprocMailbox;

struct InprocOptions {
  /// Payloads above inline_limit arrive unreadable (data == nullptr) and must be fetched.
  bool fetch_views = false;
  int max_in_flight = kMaxInFlight;  ///< More are kBusy.
  int64_t inline_limit = 8 << 10;
};

/// What the ranks share. Thread-safe.
class InprocHub {
 public:
  /// For tests: `rank` vanishes as if its process had been killed. Nothing it holds is released,
  /// its transport does nothing any more, peers that ever talked with it get PeerDown. Payloads
  /// that it sent must stay in memory until the receivers have released them. False if there is no
  /// such rank.
  bool Kill(int rank);

 private:
  friend class InprocTransport;
  friend StatusOr<std::unique_ptr<Transport>> MakeInproc(std::shared_ptr<InprocHub> hub, int rank,
                                                         Receiver* receiver, InprocOptions options);
  std::shared_ptr<InprocMailbox> Find(int rank) const;
  bool Enter(int rank, std::shared_ptr<InprocMailbox> mailbox);
  void Leave(int rank, const InprocMailbox* mailbox);

  mutable Mutex mu_;
  std::map<int, std::shared_ptr<InprocMailbox>> mailboxes_ GUARDED_BY(mu_);
};

/// `receiver` is borrowed. AlreadyExists if the hub has a living `rank`. The address is a
/// formality: whoever is in the hub can be reached.
StatusOr<std::unique_ptr<Transport>> MakeInproc(std::shared_ptr<InprocHub> hub, int rank,
                                                Receiver* receiver, InprocOptions options = {});

}  // namespace bluefog::transport
