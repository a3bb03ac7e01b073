// Anonymous shared memory (memfd) with seals: its length is fixed, so that a mapper's read never
// faults, and only its creator can write it. Reserved with posix_fallocate: a full memory is an
// error at creation and not a SIGBUS later. Linux 5.1 or newer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include <bluefog/status.h>

namespace bluefog::transport {

/// Owns a file descriptor.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      Reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~UniqueFd() { Reset(); }
  void Reset();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

/// "call: text of errno", with the code that fits errno.
Status ErrnoStatus(const char* call, int error);

/// A mapping of a sealed memfd. Movable; unmaps when it goes. If `mirrored` > 0, the last
/// `mirrored` bytes follow once more behind the end: what wraps around a ring there is contiguous.
class SealedMemory {
 public:
  SealedMemory() = default;
  SealedMemory(SealedMemory&& other) noexcept { *this = std::move(other); }
  SealedMemory& operator=(SealedMemory&& other) noexcept;
  ~SealedMemory() { Unmap(); }

  /// Zeroed, writable for this process only. `bytes` and `mirrored` are multiples of PageBytes().
  /// ResourceExhausted if the memory cannot be had.
  static StatusOr<SealedMemory> Create(const char* name, int64_t bytes, int64_t mirrored = 0);
  /// Maps a peer's memory read-only. InvalidArgument if it is not sealed or not `bytes` long.
  static StatusOr<SealedMemory> Map(UniqueFd fd, int64_t bytes, int64_t mirrored = 0);

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  int fd() const { return fd_.get(); }
  /// The mapping does not need the descriptor.
  void CloseFd() { fd_.Reset(); }

 private:
  Status DoMap(bool writable, int64_t bytes, int64_t mirrored);
  void Unmap();

  UniqueFd fd_;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t mapped_ = 0;
};

/// What can be had without the kernel having to kill somebody: a memfd has no limit of its own, so
/// posix_fallocate would go on to that point. INT64_MAX where nobody says. The cgroup is that of a
/// container; elsewhere the root has no such files.
int64_t AvailableBytes(const std::string& meminfo = "/proc/meminfo",
                       const std::string& cgroup = "/sys/fs/cgroup");

int64_t PageBytes();
inline int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace bluefog::transport
