// std::mutex with clang's thread-safety annotations. (ThreadSanitizer reports false races through
// the packaged absl::Mutex, hence our own wrapper.)
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

// abseil's headers define some of these names too, with the same meaning: after them, ours count.
#include <absl/base/thread_annotations.h>
#undef GUARDED_BY
#undef PT_GUARDED_BY
#undef NO_THREAD_SAFETY_ANALYSIS

#if defined(__clang__)
#define BLUEFOG_TS(x) __attribute__((x))
#else
#define BLUEFOG_TS(x)
#endif
#define GUARDED_BY(x) BLUEFOG_TS(guarded_by(x))
#define PT_GUARDED_BY(x) BLUEFOG_TS(pt_guarded_by(x))
#define REQUIRES(...) BLUEFOG_TS(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) BLUEFOG_TS(locks_excluded(__VA_ARGS__))
#define ACQUIRE(...) BLUEFOG_TS(acquire_capability(__VA_ARGS__))
#define TRY_ACQUIRE(...) BLUEFOG_TS(try_acquire_capability(__VA_ARGS__))
#define RELEASE(...) BLUEFOG_TS(release_capability(__VA_ARGS__))
#define NO_THREAD_SAFETY_ANALYSIS BLUEFOG_TS(no_thread_safety_analysis)

namespace bluefog {

class BLUEFOG_TS(capability("mutex")) Mutex {
 public:
  void Lock() ACQUIRE() { mu_.lock(); }
  void Unlock() RELEASE() { mu_.unlock(); }
  bool TryLock() TRY_ACQUIRE(true) { return mu_.try_lock(); }

 private:
  friend class CondVar;
  std::mutex mu_;
};

class BLUEFOG_TS(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mu) ACQUIRE(mu) : mu_(mu) { mu_.Lock(); }
  ~MutexLock() RELEASE() { mu_.Unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mu_;
};

class CondVar {
 public:
  void Wait(Mutex& mu) REQUIRES(mu) {
    std::unique_lock<std::mutex> lock(mu.mu_, std::adopt_lock);
    cv_.wait(lock);
    lock.release();
  }
  /// False on time-out.
  bool WaitUntil(Mutex& mu, std::chrono::steady_clock::time_point deadline) REQUIRES(mu) {
    std::unique_lock<std::mutex> lock(mu.mu_, std::adopt_lock);
    const bool woken = cv_.wait_until(lock, deadline) == std::cv_status::no_timeout;
    lock.release();
    return woken;
  }
  void NotifyOne() { cv_.notify_one(); }
  void NotifyAll() { cv_.notify_all(); }

 private:
  std::condition_variable cv_;
};

}  // namespace bluefog
