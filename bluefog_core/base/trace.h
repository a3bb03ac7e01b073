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

/// Rows ("threads") of the picture. Spans of one row must nest or not meet at all: viewers draw
/// nothing else.
enum class TraceTrack : uint8_t { kCaller = 1, kEngine = 2, kNetwork = 3 };

/// One number that goes with an event, by name: {"peer", 3}. The name is a string literal.
struct TraceDetail {
  const char* name = nullptr;
  int64_t value = 0;
};

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

  /// A span [begin_ns, end_ns).
  void Span(TraceTrack track, const char* what, std::string_view operation, int64_t begin_ns,
            int64_t end_ns, TraceDetail detail = {}) {
    if (on()) Record({Kind::kSpan, track, what, begin_ns, end_ns, 0, detail}, operation);
  }
  void Instant(TraceTrack track, const char* what, std::string_view operation, int64_t at_ns,
               TraceDetail detail = {}) {
    if (on()) Record({Kind::kInstant, track, what, at_ns, at_ns, 0, detail}, operation);
  }
  /// A span in a row of its own, so that it may overlap any other. `id` tells those apart that are
  /// under way at the same time.
  void Async(const char* what, std::string_view operation, uint64_t id, int64_t begin_ns,
             int64_t end_ns, TraceDetail detail = {}) {
    if (on()) {
      Record({Kind::kAsync, TraceTrack::kEngine, what, begin_ns, end_ns, id, detail}, operation);
    }
  }
  /// Arrow from a send to its receipt on another rank: both ends give the same `id`. Viewers draw
  /// it only if `at_ns` lies within a span of the track.
  void FlowBegin(TraceTrack track, uint64_t id, int64_t at_ns) {
    if (on()) Record({Kind::kFlowBegin, track, "", at_ns, at_ns, id, {}}, {});
  }
  void FlowEnd(TraceTrack track, uint64_t id, int64_t at_ns) {
    if (on()) Record({Kind::kFlowEnd, track, "", at_ns, at_ns, id, {}}, {});
  }

 private:
  enum class Kind : uint8_t { kSpan, kInstant, kAsync, kFlowBegin, kFlowEnd };
  struct Event {
    Kind kind{};
    TraceTrack track{};
    const char* what = "";
    int64_t begin_ns = 0, end_ns = 0;
    uint64_t id = 0;  // Of flows and asynchronous spans.
    TraceDetail detail;
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
