#include "transport/memfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace bluefog::transport {
namespace {

constexpr int kLengthSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

/// Rings and small segments are not worth a look at what is available.
constexpr int64_t kLargeBytes = int64_t{64} << 20;

}  // namespace

int64_t AvailableBytes(const std::string& meminfo, const std::string& cgroup) {
  int64_t available = INT64_MAX;
  std::ifstream memory(meminfo);
  for (std::string line; std::getline(memory, line);) {
    long long kib;
    if (sscanf(line.c_str(), "MemAvailable: %lld kB", &kib) == 1) available = kib * 1024;
  }
  // "max" is no number.
  int64_t limit, used;
  if (std::ifstream(cgroup + "/memory.max") >> limit &&
      std::ifstream(cgroup + "/memory.current") >> used) {
    // Files that were read count as used until somebody wants the memory.
    std::ifstream stat(cgroup + "/memory.stat");
    int64_t bytes;
    for (std::string name; stat >> name >> bytes;) {
      if (name == "active_file" || name == "inactive_file") used -= bytes;
    }
    available = std::min(available, limit - used);
  }
  return available;
}

void UniqueFd::Reset() {
  if (fd_ >= 0) close(std::exchange(fd_, -1));
}

Status ErrnoStatus(const char* call, int error) {
  std::string text = std::string(call) + ": " + strerror(error);
  switch (error) {
    case ENOMEM:
    case ENOSPC:
    case EFBIG:
      return absl::ResourceExhaustedError(text +
                                          " (shared memory; see ulimit -v and the memory cgroup)");
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(text + " (file descriptors; see ulimit -n)");
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(text);
    default:
      return absl::UnavailableError(text);
  }
}

int64_t PageBytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

SealedMemory& SealedMemory::operator=(SealedMemory&& other) noexcept {
  if (this == &other) return *this;
  Unmap();
  fd_ = std::move(other.fd_);
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  mapped_ = std::exchange(other.mapped_, 0);
  return *this;
}

void SealedMemory::Unmap() {
  if (data_ != nullptr) munmap(std::exchange(data_, nullptr), static_cast<size_t>(mapped_));
}

Status SealedMemory::DoMap(bool writable, int64_t bytes, int64_t mirrored) {
  // Address space for both images first, so that the second cannot land on somebody else's mapping.
  const auto total = static_cast<size_t>(bytes + mirrored);
  void* base = mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return ErrnoStatus("mmap", errno);
  data_ = static_cast<std::byte*>(base);
  bytes_ = bytes;
  mapped_ = bytes + mirrored;
  const int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  // The pages exist already; entering them in the page table now keeps faults off the data path.
  constexpr int kFlags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;
  if (mmap(data_, static_cast<size_t>(bytes), protection, kFlags, fd_.get(), 0) == MAP_FAILED ||
      (mirrored > 0 && mmap(data_ + bytes, static_cast<size_t>(mirrored), protection, kFlags,
                            fd_.get(), bytes - mirrored) == MAP_FAILED)) {
    return ErrnoStatus("mmap", errno);
  }
  return absl::OkStatus();
}

StatusOr<SealedMemory> SealedMemory::Create(const char* name, int64_t bytes, int64_t mirrored) {
  SealedMemory memory;
  memory.fd_ = UniqueFd(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.fd_) return ErrnoStatus("memfd_create", errno);
  if (const int64_t available = bytes < kLargeBytes ? INT64_MAX : AvailableBytes();
      bytes > available) {
    return absl::ResourceExhaustedError("shared memory: " + std::to_string(bytes) +
                                        " bytes are wanted and " + std::to_string(available) +
                                        " are available on this machine or in its memory cgroup");
  }
  int error;
  do {
    error = posix_fallocate(memory.fd(), 0, bytes);
  } while (error == EINTR);
  if (error != 0) return ErrnoStatus("posix_fallocate of a memfd", error);
  if (Status status = memory.DoMap(/*writable=*/true, bytes, mirrored); !status.ok()) return status;
  // From here on nobody, a peer that holds the descriptor included, can map it writable.
  if (fcntl(memory.fd(), F_ADD_SEALS, kLengthSeals | F_SEAL_FUTURE_WRITE) != 0) {
    return ErrnoStatus("sealing a memfd", errno);
  }
  return memory;
}

StatusOr<SealedMemory> SealedMemory::Map(UniqueFd fd, int64_t bytes, int64_t mirrored) {
  struct stat info;
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kLengthSeals) != kLengthSeals) {
    return absl::InvalidArgumentError("the peer's shared memory is not sealed");
  }
  if (fstat(fd.get(), &info) != 0) return ErrnoStatus("fstat", errno);
  if (bytes <= 0 || info.st_size != bytes) {
    return absl::InvalidArgumentError("the peer's shared memory has " +
                                      std::to_string(info.st_size) + " bytes, announced were " +
                                      std::to_string(bytes));
  }
  SealedMemory memory;
  memory.fd_ = std::move(fd);
  if (Status status = memory.DoMap(/*writable=*/false, bytes, mirrored); !status.ok())
    return status;
  return memory;
}

}  // namespace bluefog::transport
