// Once plans and pools are warm, an operation takes nothing from the heap and sends no control
// message, whoever drives it. Counted in operator new, on all threads of the process; the control
// plane's component has an operator new of its own, so heartbeats do not count.
#include <execinfo.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "ranks.h"

namespace {

std::atomic<bool> counting{false};
std::atomic<int64_t> allocations{0};

void* Allocate(size_t bytes) {
  if (counting.load(std::memory_order_relaxed) && allocations.fetch_add(1) < 3) {
    counting = false;  // backtrace allocates.
    void* frames[24];
    backtrace_symbols_fd(frames, backtrace(frames, 24), STDERR_FILENO);
    counting = true;
  }
  return std::malloc(bytes == 0 ? 1 : bytes);
}

}  // namespace

// Not inlined, or GCC sees malloc in one and delete in another and warns of a mismatch.
[[gnu::noinline]] void* operator new(size_t bytes) {
  void* p = Allocate(bytes);
  if (p == nullptr) std::abort();
  return p;
}
void* operator new[](size_t bytes) { return operator new(bytes); }
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }

#if defined(__SANITIZE_ADDRESS__)
// Libraries take memory from the sanitizer's operator new and give it back to the one above.
extern "C" const char* __asan_default_options() { return "alloc_dealloc_mismatch=0"; }
#endif

namespace bluefog::testing {
namespace {

#if defined(BLUEFOG_SANITIZED)
constexpr int kWindows = 8, kRepeat = 5;  // The large operations take a second then.
#else
constexpr int kWindows = 8, kRepeat = 50;
#endif

/// Runs `body` often; an error if it never stops taking from the heap, or speaks out of turn.
Status ExpectSteady(Communicator& comm, const std::string& what,
                    const std::function<Status()>& body) {
  // Pools reach their depth, and operations the length of every plan, by the timing of the two
  // threads: warm is when a window passes without. What every operation takes shows in all windows.
  int64_t taken = 0, control = 0;
  bool steady = false;
  for (int window = 0; window < kWindows; ++window) {
    control = comm.stats().control_messages;
    allocations = 0;
    counting = true;
    Status status;
    for (int i = 0; i < kRepeat && status.ok(); ++i) status = body();
    counting = false;
    if (!status.ok()) return status;
    taken = allocations.load();
    // The other rank counts windows of its own: both go through all of them.
    if (taken == 0) steady = true;
  }
  if (!steady) {
    return absl::InternalError(what + ": " + std::to_string(taken) + " allocations in the last " +
                               std::to_string(kRepeat) + " operations");
  }
  // A heartbeat, perhaps.
  const int64_t sent = comm.stats().control_messages - control;
  if (sent > 1) {
    return absl::InternalError(what + ": " + std::to_string(sent) + " control messages");
  }
  return absl::OkStatus();
}

void SlowHeart(int, Config& config) {
  config.heartbeat_ms = 60'000;
  config.suspect_ms = config.dead_ms = 120'000;
}

Status Exchange(Communicator& comm, const OpSpec& spec) {
  auto work = comm.Submit(spec);
  return work.ok() ? (*work)->Wait() : work.status();
}

TEST(SteadyState, OperationsTakeNothingFromTheHeap) {
  Job job(2, SlowHeart);
  const auto ranks = job.Run([](Rank& me) -> Status {
    auto comm = JoinRing(me);
    if (!comm.ok()) return comm.status();
    std::vector<float> input(1 << 20, 1.0F);
    for (const int64_t count : {int64_t{1000}, int64_t{1} << 20}) {
      OpSpec spec;
      spec.input = TensorView::Of(input.data(), count, DType::kFloat32);
      for (const Op op : {Op::kNeighborAllreduce, Op::kAllreduce, Op::kAllgather, Op::kBroadcast}) {
        spec.op = op;
        const std::string what = std::string(NameOf(op)) + " of " + std::to_string(count);
        spec.output = {};
        spec.name = "";
        if (Status s = ExpectSteady(**comm, what, [&] { return Exchange(**comm, spec); }); !s.ok())
          return s;
        spec.name = "n" + std::to_string(count) + what.substr(0, 10);  // No string on the heap.
        spec.name.resize(std::min<size_t>(spec.name.size(), 15));
        if (op == Op::kAllgather) continue;
        if (op == Op::kNeighborAllreduce) {
          spec.message_dtype = DType::kBFloat16;
          if (Status s = ExpectSteady(**comm, what + ", bfloat16 messages",
                                      [&] { return Exchange(**comm, spec); });
              !s.ok())
            return s;
          spec.message_dtype.reset();
        }
        spec.output = spec.input;
        if (Status s = ExpectSteady(**comm, what + ", named, in place",
                                    [&] { return Exchange(**comm, spec); });
            !s.ok())
          return s;
      }
    }
    return absl::OkStatus();
  });
  for (const Outcome& r : ranks) EXPECT_TRUE(r.status.ok()) << r;
}

/// With `delayed` messages are rounded, too.
void ExpectSteadySteps(const std::vector<std::string>& plugins, bool delayed) {
  Job job(2, SlowHeart);
  const auto ranks = job.Run([&](Rank& me) -> Status {
    auto comm = JoinRing(me);
    if (!comm.ok()) return comm.status();
    for (const std::string& plugin : plugins) {
      constexpr int64_t kCounts[] = {1'000'000, 300'000, 10, 0, 5000};
      DistributedOptimizerOptions options;
      options.plugin = plugin;
      options.delayed = delayed;
      if (delayed) options.message_dtype = DType::kBFloat16;
      std::vector<std::vector<float>> x, g, state;
      std::vector<ParameterBinding> bindings;
      for (const int64_t count : kCounts) {
        options.params.emplace_back();
        options.params.back().name = "p" + std::to_string(x.size());
        options.params.back().count = count;
        x.emplace_back(count, 1.0F);
        g.emplace_back(count, 0.5F);
        state.emplace_back(count, 0.0F);
      }
      for (size_t i = 0; i < x.size(); ++i) {
        bindings.push_back({.x = x[i].data(), .g = g[i].data(), .state = {state[i].data()}});
      }
      auto optimizer = DistributedOptimizer::Create(comm->get(), std::move(options));
      if (!optimizer.ok()) return optimizer.status();
      const std::vector<Hyper> hypers = {{.lr = 0.01, .momentum = 0.9}};
      if (Status s = ExpectSteady(
              **comm, plugin,
              [&]() -> Status {
                for (size_t i = x.size(); i-- > 0;) {  // As backward does.
                  Status s = (*optimizer)->Ready(static_cast<int>(i), bindings[i], hypers);
                  if (!s.ok()) return s;
                }
                return (*optimizer)->Step(bindings, hypers);
              });
          !s.ok())
        return s;
    }
    return absl::OkStatus();
  });
  for (const Outcome& r : ranks) EXPECT_TRUE(r.status.ok()) << r;
}

TEST(SteadyState, StepsOfAnOptimizerTakeNothingFromTheHeap) {
  ExpectSteadySteps(OptimizerNames(), /*delayed=*/false);
}

TEST(SteadyState, DelayedStepsWithRoundedMessagesTakeNothingFromTheHeap) {
  ExpectSteadySteps({"decentlam"}, /*delayed=*/true);
}

}  // namespace
}  // namespace bluefog::testing
