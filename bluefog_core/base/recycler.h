// Small objects that are made and dropped once per operation (Works, control blocks of shared
// pointers): their memory is kept and handed out again, so that the steady state takes none from
// the heap.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "base/mutex.h"

namespace bluefog {

/// Blocks of one size. Thread-safe.
class Recycler {
 public:
  explicit Recycler(size_t block_bytes) : block_bytes_(block_bytes) {}
  ~Recycler() {
    for (void* block : free_) ::operator delete(block);
  }
  Recycler(const Recycler&) = delete;
  Recycler& operator=(const Recycler&) = delete;

  void* Take(size_t bytes) {
    if (bytes > block_bytes_) return ::operator new(bytes);
    {
      MutexLock lock(mu_);
      if (!free_.empty()) {
        void* block = free_.back();
        free_.pop_back();
        return block;
      }
    }
    return ::operator new(block_bytes_);
  }
  void Give(void* block, size_t bytes) {
    if (bytes > block_bytes_) return ::operator delete(block);
    MutexLock lock(mu_);
    free_.push_back(block);
  }

 private:
  const size_t block_bytes_;
  Mutex mu_;
  std::vector<void*> free_ GUARDED_BY(mu_);
};

/// For allocate_shared and the control blocks of shared_ptr, which it may outlive everything else.
template <typename T>
class RecyclingAllocator {
 public:
  using value_type = T;
  explicit RecyclingAllocator(std::shared_ptr<Recycler> recycler)
      : recycler_(std::move(recycler)) {}
  template <typename U>
  RecyclingAllocator(const RecyclingAllocator<U>& other)  // NOLINT: allocators convert.
      : recycler_(other.recycler()) {}

  T* allocate(size_t n) {
    static_assert(alignof(T) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__);
    return static_cast<T*>(recycler_->Take(n * sizeof(T)));
  }
  void deallocate(T* block, size_t n) { recycler_->Give(block, n * sizeof(T)); }
  const std::shared_ptr<Recycler>& recycler() const { return recycler_; }
  friend bool operator==(const RecyclingAllocator& a, const RecyclingAllocator& b) {
    return a.recycler_ == b.recycler_;
  }

 private:
  std::shared_ptr<Recycler> recycler_;
};

}  // namespace bluefog
