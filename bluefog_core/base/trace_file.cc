#include "base/trace_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

namespace bluefog {
namespace {

constexpr int64_t kFirstCapacity = 64 << 10;
constexpr int64_t kMaxGrowth = 64 << 20;  // Bounds the blanks.
constexpr int64_t kBlock = 256 << 10;
constexpr std::string_view kSeparator = ",\n";
constexpr std::string_view kEnd = "\n]\n";

/// Writes all bytes; 0 or errno.
int WriteAt(int fd, std::string_view bytes, int64_t offset) {
  while (!bytes.empty()) {
    const ssize_t n = pwrite(fd, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : ENOSPC;
    bytes.remove_prefix(static_cast<size_t>(n));
    offset += n;
  }
  return 0;
}

int CopyPrefix(int from, int to, int64_t bytes) {
  std::string block(kBlock, '\0');
  for (int64_t offset = 0; offset < bytes;) {
    const auto want = static_cast<size_t>(std::min(bytes - offset, kBlock));
    const ssize_t n = pread(from, block.data(), want, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : EIO;
    if (int e = WriteAt(to, {block.data(), static_cast<size_t>(n)}, offset); e != 0) return e;
    offset += n;
  }
  return 0;
}

/// Blanks from `offset` on, then the end of the array.
int WriteTail(int fd, int64_t offset, int64_t capacity) {
  const std::string blanks(kBlock, ' ');
  const int64_t end = capacity - static_cast<int64_t>(kEnd.size());
  while (offset < end) {
    const auto n = std::min(end - offset, kBlock);
    if (int e = WriteAt(fd, {blanks.data(), static_cast<size_t>(n)}, offset); e != 0) return e;
    offset += n;
  }
  return WriteAt(fd, kEnd, end);
}

}  // namespace

Status TraceFile::Open(const std::string& path, const std::string& first_record) {
  (void)Close();
  path_ = path;
  written_ = 0;
  pending_ = "[\n" + first_record;
  status_ = absl::OkStatus();
  return Flush();
}

bool TraceFile::Add(std::string_view record) {
  const auto size = static_cast<int64_t>(kSeparator.size() + record.size());
  if (size > kPage) return false;
  if (!status_.ok() || path_.empty()) return true;
  const int64_t in_page = (written_ + static_cast<int64_t>(pending_.size())) % kPage;
  if (in_page + size > kPage) pending_.append(static_cast<size_t>(kPage - in_page), ' ');
  pending_.append(kSeparator).append(record);
  return true;
}

Status TraceFile::Flush() {
  if (!status_.ok() || pending_.empty()) return status_;
  const int64_t needed = written_ + static_cast<int64_t>(pending_.size() + kEnd.size());
  if (needed > capacity_) {
    // Doubling, while it is small, makes the copies cost O(1) per byte.
    const int64_t room = std::clamp(needed, kFirstCapacity, kMaxGrowth);
    status_ = Replace((needed + room + kPage - 1) / kPage * kPage);
  } else if (int e = WriteAt(fd_, pending_, written_); e != 0) {
    status_ = absl::ErrnoToStatus(e, "cannot write " + path_);
  } else {
    written_ += static_cast<int64_t>(pending_.size());
    pending_.clear();
  }
  return status_;
}

Status TraceFile::Close() {
  if (path_.empty()) return status_;
  if (Flush().ok()) status_ = Replace(written_ + static_cast<int64_t>(kEnd.size()));
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
  capacity_ = 0;
  path_.clear();
  return status_;
}

Status TraceFile::Replace(int64_t capacity) {
  struct stat now {};
  if (fd_ >= 0 && fstat(fd_, &now) == 0 && now.st_nlink == 0) {
    return absl::NotFoundError(path_ + " was removed while it was written");
  }
  const std::string fresh_path = path_ + ".tmp";
  const int fresh = open(fresh_path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fresh < 0) return absl::ErrnoToStatus(errno, "cannot create " + fresh_path);
  const auto pending = static_cast<int64_t>(pending_.size());
  int e = CopyPrefix(fd_, fresh, written_);
  if (e == 0) e = WriteAt(fresh, pending_, written_);
  if (e == 0) e = WriteTail(fresh, written_ + pending, capacity);
  if (e == 0 && rename(fresh_path.c_str(), path_.c_str()) != 0) e = errno;
  if (e != 0) {
    close(fresh);
    unlink(fresh_path.c_str());
    return absl::ErrnoToStatus(e, "cannot write " + path_);
  }
  if (fd_ >= 0) close(fd_);
  fd_ = fresh;
  capacity_ = capacity;
  written_ += pending;
  pending_.clear();
  return absl::OkStatus();
}

}  // namespace bluefog
