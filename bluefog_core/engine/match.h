// Matching without negotiation: which operation a message belongs to, what came before its
// operation was submitted, and whether both ends mean the same. Used under the progress lock.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "engine/operation.h"

namespace bluefog {

class Match {
 public:
  Match(int rank, int size) : rank_(rank), held_bytes_(static_cast<size_t>(size), 0) {}

  /// A message whose operation is not submitted yet. Its view is held, or copied out and detached.
  struct Early {
    int peer = -1;
    WireHeader header;
    transport::View view;
    std::vector<std::byte> copy;
    bool copied = false;
  };

  Operation* Find(const Key& key) const;
  /// Submitted here before, and complete or failed since.
  bool IsPast(const Key& key) const;
  /// Makes `op` findable and returns what came early for it, in order of arrival.
  std::vector<Early> Add(Operation* op);
  void Remove(const Operation& op);
  /// The last operation of this name ended here and did not send to `peer`. False if it is not
  /// known.
  bool FinishedWithout(const Key& key, int peer) const;
  /// Keeps a message; true if the caller should copy it out and detach the view, because the peer's
  /// buffer is filling with messages that wait.
  bool ShouldCopy(int peer, int64_t bytes) const { return held_bytes_[peer] + bytes > kHoldBytes; }
  void Store(Early early);
  /// Everything stored from `peer`, forgotten.
  void Forget(int peer, std::vector<Early>* views);

  void SetDescription(int peer, uint64_t name_hash, std::string name, std::string description);
  /// Ok if `peer`'s header and this rank's operation agree; else the error for both ranks.
  Status Compare(const Operation& op, int peer, const WireHeader& header) const;
  /// The name that a peer gave for a hash, or "?".
  std::string NameOf(uint64_t name_hash) const;
  const std::unordered_map<Key, std::vector<Early>, KeyHash>& early() const { return early_; }

 private:
  static constexpr int64_t kHoldBytes = 32 << 10;

  const int rank_;
  std::unordered_map<Key, Operation*, KeyHash> active_;
  std::unordered_map<uint64_t, uint32_t> next_use_;  ///< By name: activated so far.
  std::unordered_map<Key, std::vector<Early>, KeyHash> early_;
  std::unordered_map<uint64_t, std::pair<uint32_t, std::shared_ptr<const Plan>>>
      last_;  ///< By name.
  std::vector<int64_t> held_bytes_;
  std::unordered_map<uint64_t, std::string> names_;
  std::unordered_map<uint64_t, std::unordered_map<int, std::string>> descriptions_;
};

}  // namespace bluefog
