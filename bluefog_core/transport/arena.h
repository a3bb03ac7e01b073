// Memory that peers on this host can map: memfd segments, sealed against shrinking (the mapper
// checks the seal, so that a peer's read never faults), reserved with posix_fallocate so that a
// full memory is an error here and not a SIGBUS later. Nothing has a name: after SIGKILL nothing
// stays behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <bluefog/status.h>

#include "base/mutex.h"

namespace bluefog::transport {

/// Thread-safe. Blocks keep their segment mapped, also after the Arena itself is gone.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  /// Segments are at least `segment_bytes` long; a larger block gets one of its own.
  static std::shared_ptr<Arena> Create(int64_t segment_bytes = int64_t{64} << 20);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// `bytes` ≥ 0, aligned to 64, contents undefined. The block returns to the arena when the last
  /// copy of the pointer goes. ResourceExhausted if the memory cannot be had.
  StatusOr<std::shared_ptr<std::byte>> Allocate(int64_t bytes);

  struct Location {
    uint32_t segment;  ///< Unique within this arena, never used again.
    int64_t offset;
  };
  /// Where `[data, data+bytes)` lies; false if not wholly inside one segment.
  bool Find(const void* data, int64_t bytes, Location* location) const;
  /// Descriptor and length of a segment; -1 if it is gone.
  int SegmentFd(uint32_t segment, int64_t* bytes) const;
  /// Bytes of all segments, that is: pinned on this rank.
  int64_t bytes_reserved() const;
  int64_t bytes_used() const;

 private:
  struct Segment;
  Arena() = default;
  void Free(const std::shared_ptr<Segment>& segment, int64_t offset, int64_t bytes);

  int64_t segment_bytes_ = 0;
  mutable Mutex mu_;
  std::vector<std::shared_ptr<Segment>> segments_ GUARDED_BY(mu_);
  uint32_t next_segment_ GUARDED_BY(mu_) = 1;
  int64_t bytes_used_ GUARDED_BY(mu_) = 0;
};

}  // namespace bluefog::transport
