// For LD_PRELOAD: counts the heap allocations of every thread of a process.
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>

extern "C" {
void* __libc_malloc(size_t);            // NOLINT: glibc's names
void* __libc_calloc(size_t, size_t);    // NOLINT
void* __libc_realloc(void*, size_t);    // NOLINT
void* __libc_memalign(size_t, size_t);  // NOLINT
}

namespace {

constexpr int kThreads = 1024;
struct Counter {
  std::atomic<int> thread{0};
  std::atomic<long> count{0};
};
Counter counters[kThreads];
thread_local Counter* mine __attribute__((tls_model("initial-exec"))) = nullptr;

void Count() {
  if (mine == nullptr) {
    const int thread = gettid();
    int i = 0;
    for (int none = 0; i < kThreads - 1; none = 0, ++i) {
      if (counters[i].thread.compare_exchange_strong(none, thread) || none == thread) break;
    }
    mine = &counters[i];
  }
  mine->count.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

extern "C" {

/// Allocations so far of one thread, or of all for 0.
long bench_mallocs(int thread) {
  long sum = 0;
  for (const Counter& c : counters) {
    if (thread == 0 || c.thread == thread) sum += c.count;
  }
  return sum;
}

void* malloc(size_t bytes) {
  Count();
  return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
  Count();
  return __libc_calloc(count, bytes);
}
void* realloc(void* p, size_t bytes) {
  Count();
  return __libc_realloc(p, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  Count();
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  *out = memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}

}  // extern "C"
