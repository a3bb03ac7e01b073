#include "transport/arena.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "transport/memfd.h"

namespace bluefog::transport {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kLargestBlock = int64_t{1} << 46;  // Keeps the sums below clear of overflow.

}  // namespace

struct Arena::Segment {
  uint32_t id = 0;
  SealedMemory memory;
  std::map<int64_t, int64_t>
      free;  ///< offset → bytes; neighbours are merged. Under the arena's lock.

  /// First fit; -1 if there is none.
  int64_t Take(int64_t bytes) {
    for (auto it = free.begin(); it != free.end(); ++it) {
      if (it->second < bytes) continue;
      const auto [offset, length] = *it;
      free.erase(it);
      if (length > bytes) free.emplace(offset + bytes, length - bytes);
      return offset;
    }
    return -1;
  }
  void Give(int64_t offset, int64_t bytes) {
    auto next = free.lower_bound(offset);
    if (next != free.end() && offset + bytes == next->first) {
      bytes += next->second;
      next = free.erase(next);
    }
    if (next != free.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == offset) {
        previous->second += bytes;
        return;
      }
    }
    free.emplace(offset, bytes);
  }
  bool empty() const { return free.size() == 1 && free.begin()->second == memory.bytes(); }
};

std::shared_ptr<Arena> Arena::Create(int64_t segment_bytes) {
  std::shared_ptr<Arena> arena(new Arena);
  arena->segment_bytes_ =
      RoundUp(std::clamp(segment_bytes, PageBytes(), kLargestBlock), PageBytes());
  return arena;
}

Arena::~Arena() = default;

StatusOr<std::shared_ptr<std::byte>> Arena::Allocate(int64_t bytes) {
  if (bytes < 0 || bytes > kLargestBlock) {
    return absl::InvalidArgumentError("cannot allocate " + std::to_string(bytes) +
                                      " bytes in the arena");
  }
  const int64_t taken = RoundUp(std::max(bytes, int64_t{1}), kAlignment);
  std::shared_ptr<Segment> segment;
  int64_t offset = -1;
  {
    MutexLock lock(mu_);
    for (auto it = segments_.begin(); it != segments_.end() && offset < 0; ++it) {
      offset = (*it)->Take(taken);
      segment = *it;
    }
    if (offset >= 0) bytes_used_ += taken;
  }
  if (offset < 0) {
    // Takes milliseconds: outside the lock, which the data path takes for Find.
    const int64_t length = std::max(segment_bytes_, RoundUp(taken, PageBytes()));
    auto memory = SealedMemory::Create("bluefog-arena", length);
    if (!memory.ok()) {
      return absl::ResourceExhaustedError("no arena segment of " + std::to_string(length) +
                                          " bytes: " + std::string(memory.status().message()));
    }
    segment = std::make_shared<Segment>();
    segment->memory = *std::move(memory);
    segment->free.emplace(0, length);
    offset = segment->Take(taken);
    MutexLock lock(mu_);
    segment->id = next_segment_++;
    segments_.push_back(segment);
    bytes_used_ += taken;
  }
  std::byte* data = segment->memory.data() + offset;
  return std::shared_ptr<std::byte>(
      data, [weak = weak_from_this(), segment = std::move(segment), offset, taken](std::byte*) {
        if (auto arena = weak.lock()) arena->Free(segment, offset, taken);
      });
}

void Arena::Free(const std::shared_ptr<Segment>& segment, int64_t offset, int64_t bytes) {
  MutexLock lock(mu_);
  segment->Give(offset, bytes);
  bytes_used_ -= bytes;
  // One large tensor that goes gives its memory back; ordinary segments stay for the next block.
  if (segment->empty() && segment->memory.bytes() > segment_bytes_) std::erase(segments_, segment);
}

bool Arena::Find(const void* data, int64_t bytes, Location* location) const {
  const auto address = reinterpret_cast<uintptr_t>(data);
  MutexLock lock(mu_);
  for (const auto& segment : segments_) {
    const auto base = reinterpret_cast<uintptr_t>(segment->memory.data());
    const auto length = static_cast<uintptr_t>(segment->memory.bytes());
    if (address < base || address - base > length) continue;
    const auto offset = static_cast<int64_t>(address - base);
    if (bytes < 0 || bytes > segment->memory.bytes() - offset) continue;
    *location = {segment->id, offset};
    return true;
  }
  return false;
}

int Arena::SegmentFd(uint32_t segment, int64_t* bytes) const {
  MutexLock lock(mu_);
  for (const auto& candidate : segments_) {
    if (candidate->id != segment) continue;
    *bytes = candidate->memory.bytes();
    return candidate->memory.fd();
  }
  return -1;
}

int64_t Arena::bytes_reserved() const {
  MutexLock lock(mu_);
  int64_t sum = 0;
  for (const auto& segment : segments_) sum += segment->memory.bytes();
  return sum;
}

int64_t Arena::bytes_used() const {
  MutexLock lock(mu_);
  return bytes_used_;
}

}  // namespace bluefog::transport
