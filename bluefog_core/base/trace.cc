// The writer of the timeline: a thread that sleeps until an event comes, then collects for two
// milliseconds and writes, as long as there is something to write.
#include "base/trace.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <thread>
#include <utility>

#include "base/log.h"
#include "base/trace_file.h"
#include "base/trace_names.h"
#include "base/trace_ring.h"

namespace bluefog {
namespace {

constexpr uint64_t kRingEvents = 1 << 14;
constexpr int kCollectMs = 2;
constexpr uint64_t kFlushEvents = kRingEvents / 4;  // Under load, so that memory stays bounded.

std::string Metadata(const char* name, int rank, int track, const std::string& args) {
  return std::string(R"({"ph":"M","name":")") + name + R"(","pid":)" + std::to_string(rank) +
         R"(,"tid":)" + std::to_string(track) + R"(,"args":{)" + args + "}}";
}

}  // namespace

struct Trace::Impl {
  TraceNames names;
  TraceRing<Event, kRingEvents> ring;
  std::atomic<int64_t> dropped{0};
  // The doorbell: rung by the first event after the writer went to sleep, and by Stop.
  int doorbell = -1;
  std::atomic<bool> asleep{false};
  std::atomic<bool> stopping{false};

  std::thread writer;  // Touched under mu_ only.
  // The writer's alone between Start and Stop.
  TraceFile file;
  int rank = 0;
  std::string record;  // Reused.

  ~Impl() {
    if (doorbell >= 0) close(doorbell);
  }
  void Ring() const {
    const uint64_t one = 1;
    while (write(doorbell, &one, sizeof(one)) < 0 && errno == EINTR) {
    }
  }
  void Sleep(int timeout_ms) const {
    pollfd fd{doorbell, POLLIN, 0};
    uint64_t ignored;
    if (poll(&fd, 1, timeout_ms) > 0) (void)!read(doorbell, &ignored, sizeof(ignored));
  }

  /// `phase` is the inside of the value of "ph", or what stands for it.
  void Add(const Event& event, const char* phase, int64_t at_ns);
  void Drain();
  void Write();
};

/// Chrome's trace event format; times are microseconds.
void Trace::Impl::Add(const Event& event, const char* phase, int64_t at_ns) {
  const auto microseconds = [](int64_t ns) {
    char text[32];
    std::snprintf(text, sizeof(text), "%lld.%03d", static_cast<long long>(ns / 1000),
                  static_cast<int>(ns % 1000));
    return std::string(text);
  };
  const bool flow = event.kind == Kind::kFlowBegin || event.kind == Kind::kFlowEnd;
  record = R"({"name":")";
  record += flow ? "message" : event.what;
  record += R"(","ph":")";
  record += phase;
  if (flow || event.kind == Kind::kAsync) {
    // A string: JavaScript viewers would round the number.
    char id[64];
    std::snprintf(id, sizeof(id), R"(","cat":"%s","id":"0x%llx)", flow ? "message" : "operation",
                  static_cast<unsigned long long>(event.id));
    record += id;
  }
  record += R"(","ts":)" + microseconds(at_ns);
  if (event.kind == Kind::kSpan) {
    record += R"(,"dur":)" + microseconds(std::max<int64_t>(event.end_ns - event.begin_ns, 0));
  }
  record += R"(,"pid":)" + std::to_string(rank);
  record += R"(,"tid":)" + std::to_string(static_cast<int>(event.track));
  if (!flow) {
    record += R"(,"args":{"operation":")";
    record += *event.operation;
    record += '"';
    if (event.detail.name != nullptr) {
      record += std::string(",\"") + event.detail.name + "\":" + std::to_string(event.detail.value);
    }
    record += '}';
  }
  record += '}';
  if (!file.Add(record)) dropped.fetch_add(1, std::memory_order_relaxed);
}

void Trace::Impl::Drain() {
  Event event;
  uint64_t unflushed = 0;
  while (ring.Pop(&event)) {
    switch (event.kind) {
      case Kind::kSpan:
        Add(event, "X", event.begin_ns);
        break;
      case Kind::kInstant:
        Add(event, R"(i","s":"t)", event.begin_ns);
        break;
      case Kind::kAsync:
        Add(event, "b", event.begin_ns);
        Add(event, "e", event.end_ns);
        break;
      case Kind::kFlowBegin:
        Add(event, "s", event.begin_ns);
        break;
      case Kind::kFlowEnd:
        Add(event, R"(f","bp":"e)", event.begin_ns);
        break;
    }
    if (++unflushed == kFlushEvents) {
      (void)file.Flush();
      unflushed = 0;
    }
  }
  (void)file.Flush();
}

void Trace::Impl::Write() {
  pthread_setname_np(pthread_self(), "bluefog-trace");
  while (!stopping.load()) {
    asleep.store(true);
    if (ring.Empty()) Sleep(-1);
    asleep.store(false);
    if (!stopping.load()) Sleep(kCollectMs);
    Drain();
  }
}

Trace::Trace() = default;
Trace::~Trace() { Stop(); }

Status Trace::Start(const std::string& prefix, int rank) {
  MutexLock lock(mu_);
  if (impl_ == nullptr) impl_ = std::make_unique<Impl>();
  Impl& impl = *impl_;
  const std::string path = prefix + std::to_string(rank) + ".json";
  if (impl.writer.joinable()) {
    return absl::FailedPreconditionError("cannot write the timeline " + path +
                                         ": another one is being written; stop it first");
  }
  if (impl.doorbell < 0) impl.doorbell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (impl.doorbell < 0) return absl::ErrnoToStatus(errno, "no eventfd for the timeline " + path);
  const std::string number = std::to_string(rank);
  if (Status s = impl.file.Open(
          path, Metadata("process_name", rank, 0, R"("name":"rank )" + number + '"'));
      !s.ok()) {
    return Status(s.code(), "timeline: " + std::string(s.message()) +
                                "; BLUEFOG_TIMELINE is a prefix whose folder must exist");
  }
  impl.file.Add(Metadata("process_sort_index", rank, 0, R"("sort_index":)" + number));
  constexpr std::pair<TraceTrack, const char*> kTracks[] = {{TraceTrack::kCaller, "caller"},
                                                            {TraceTrack::kEngine, "engine"},
                                                            {TraceTrack::kNetwork, "network"}};
  for (const auto& [track, name] : kTracks) {
    const int tid = static_cast<int>(track);
    impl.file.Add(Metadata("thread_name", rank, tid, std::string(R"("name":")") + name + '"'));
    impl.file.Add(
        Metadata("thread_sort_index", rank, tid, R"("sort_index":)" + std::to_string(tid)));
  }
  (void)impl.file.Flush();

  for (Event late; impl.ring.Pop(&late);) {
  }  // Recorded in the course of the last Stop.
  impl.rank = rank;
  impl.dropped = 0;
  impl.stopping = false;
  // Signals are for the threads of the application: Ctrl-C must interrupt its main thread.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  impl.writer = std::thread([&impl] { impl.Write(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  on_.store(true, std::memory_order_release);
  return absl::OkStatus();
}

void Trace::Stop() {
  MutexLock lock(mu_);
  if (impl_ == nullptr || !impl_->writer.joinable()) return;
  Impl& impl = *impl_;
  on_.store(false, std::memory_order_relaxed);
  impl.stopping = true;
  impl.Ring();
  impl.writer.join();
  impl.Drain();
  impl.file.Add(Metadata("bluefog_events_dropped", impl.rank, 0,
                         R"("count":)" + std::to_string(impl.dropped.load())));
  if (Status s = impl.file.Close(); !s.ok()) {
    BLUEFOG_LOG(kWarning) << "timeline incomplete: " << s.message();
  }
}

void Trace::Record(Event event, std::string_view operation) {
  if (!on_.load(std::memory_order_acquire)) return;  // Orders impl_ after Start.
  Impl& impl = *impl_;
  event.operation = impl.names.Intern(operation);
  if (!impl.ring.Push(event)) {
    impl.dropped.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  // One system call per burst: the writer comes back to sleep milliseconds later.
  if (impl.asleep.load() && impl.asleep.exchange(false)) impl.Ring();
}

}  // namespace bluefog
