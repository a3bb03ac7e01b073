// The timeline: events go into a fixed ring per process without locks on the hot path and are written as
// Chrome-trace / Perfetto JSON, one file per rank. Off: one predictable branch.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include <bluefog/status.h>

namespace bluefog {

/// Rows ("threads") of the picture.
enum class TraceTrack : uint8_t { kCaller = 1, kEngine = 2, kNetwork = 3 };

/// Trace of one engine. Thread-safe. Event names and categories are string literals; the operation's name
/// is interned.
class Trace {
 public:
  Trace();
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  /// Starts writing `<prefix><rank>.json`. A valid JSON file exists within milliseconds after each event:
  /// a writer thread appends and keeps the closing bracket in place.
  Status Start(const std::string& prefix, int rank);
  void Stop();
  bool on() const { return on_.load(std::memory_order_relaxed); }

  /// A span [begin_ns, end_ns) of base/clock.h's clock. `detail` may be a chunk or peer number, -1: none.
  void Span(TraceTrack track, const char* what, const std::string& operation, int64_t begin_ns,
            int64_t end_ns, int64_t detail = -1);
  void Instant(TraceTrack track, const char* what, const std::string& operation, int64_t at_ns,
               int64_t detail = -1);
  /// Arrow from a send to its receipt on another rank: both ends give the same `id`.
  void FlowBegin(TraceTrack track, uint64_t id, int64_t at_ns);
  void FlowEnd(TraceTrack track, uint64_t id, int64_t at_ns);

 private:
  struct Impl;
  std::atomic<bool> on_{false};
  Impl* impl_;
};

}  // namespace bluefog
