// The timeline: events go into a fixed ring per engine without locks on the hot path and are
// written as Chrome-trace / Perfetto JSON, one file per rank. Off: one predictable branch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include <bluefog/status.h>

#include "base/mutex.h"

namespace bluefog {

/// Rows ("threads") of the picture.
enum class TraceTrack : uint8_t { kCaller = 1, kEngine = 2, kNetwork = 3 };

/// Trace of one engine. Recording is thread-safe, may go on beside Start and Stop, and never waits
/// for the disk: when the ring is full, events are dropped and counted. `what` is a string literal;
/// the name of the operation is copied the first time it is seen. Times are base/clock.h's.
class Trace {
 public:
  Trace();
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  /// Starts writing `<prefix><rank>.json`, in place of an older one. It may be read at any time (at
  /// once or by whole pages, see trace_file.h): it is valid JSON and shows an event within
  /// milliseconds. FailedPrecondition if on already; an error that names the file if it cannot be
  /// written.
  Status Start(const std::string& prefix, int rank);
  /// Writes what is left and, last, how many events were dropped. Safe to call again.
  void Stop();
  bool on() const { return on_.load(std::memory_order_relaxed); }

  /// A span [begin_ns, end_ns). `detail` may be a chunk or peer number, -1: none.
  void Span(TraceTrack track, const char* what, std::string_view operation, int64_t begin_ns,
            int64_t end_ns, int64_t detail = -1) {
    if (on()) Record({Kind::kSpan, track, what, begin_ns, end_ns, detail}, operation);
  }
  void Instant(TraceTrack track, const char* what, std::string_view operation, int64_t at_ns,
               int64_t detail = -1) {
    if (on()) Record({Kind::kInstant, track, what, at_ns, at_ns, detail}, operation);
  }
  /// Arrow from a send to its receipt on another rank: both ends give the same `id`. Viewers attach
  /// an end to the span of its track in which `at_ns` lies.
  void FlowBegin(TraceTrack track, uint64_t id, int64_t at_ns) {
    if (on()) Record({Kind::kFlowBegin, track, "", at_ns, at_ns, static_cast<int64_t>(id)}, {});
  }
  void FlowEnd(TraceTrack track, uint64_t id, int64_t at_ns) {
    if (on()) Record({Kind::kFlowEnd, track, "", at_ns, at_ns, static_cast<int64_t>(id)}, {});
  }

 private:
  enum class Kind : uint8_t { kSpan, kInstant, kFlowBegin, kFlowEnd };
  struct Event {
    Kind kind{};
    TraceTrack track{};
    const char* what = "";
    int64_t begin_ns = 0, end_ns = 0;
    int64_t detail = -1;                     // Flows: the id.
    const std::string* operation = nullptr;  // Interned; escaped for JSON.
  };
  struct Impl;

  void Record(Event event, std::string_view operation);

  std::atomic<bool> on_{false};
  Mutex mu_;  // Start against Stop.
  // Made by the first Start: an engine without a timeline has no ring. Whoever sees on_ may use it.
  std::unique_ptr<Impl> impl_;
};

}  // namespace bluefog
