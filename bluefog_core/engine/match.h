// Matching without negotiation: which operation a message belongs to, what came before its
// operation was submitted, and whether both ends mean the same. Used under the progress lock.
#pragma once

#include <array>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/operation.h"

namespace bluefog {

class Match {
 public:
  explicit Match(int rank) : rank_(rank) {}

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
  /// Makes `op` findable. What came early for it is then to be taken, in order of arrival. Not Ok:
  /// why it must fail (Condemn).
  Status Add(Operation* op);
  /// False if nothing (more) came early for `op`.
  bool TakeEarly(const Operation& op, Early* early);
  void Remove(const Operation& op);
  /// One of the last operations of this name ended here and did not send to `peer`. False if it is
  /// not known.
  bool FinishedWithout(const Key& key, int peer) const;
  /// Keeps a message.
  void Store(Early early);
  /// Everything stored from `peer`, forgotten.
  void Forget(int peer, std::vector<Early>* views);
  uint64_t NextUse(uint64_t name_hash) const;
  /// That use will not come. Returns what came early for it.
  std::vector<Early> Skip(const Key& key);
  /// From now on `name_hash` stands for failed operations only. Returns what came early for them.
  std::vector<Early> Condemn(uint64_t name_hash, const Status& status);
  /// Why operations of this name fail; Ok if they need not.
  Status Condemned(uint64_t name_hash) const;

  /// How many operations of one name a peer remembers the description of.
  static constexpr size_t kDescriptions = 32;
  void SetDescription(int peer, const WireHeader& header, std::string name,
                      std::string description);
  /// Ok if `peer`'s header and this rank's operation agree; else the error for both ranks.
  Status Compare(const Operation& op, int peer, const WireHeader& header) const;
  /// The same for the weight that this rank's topology has for the edge from `peer`.
  Status CompareEdge(const Operation& op, int peer, float weight, const WireHeader& header) const;
  /// The operation that a peer's header is about, as Operation::ToString has it.
  std::string ToString(const WireHeader& header) const;

 private:
  struct Description {
    uint64_t id;
    std::string text;
  };
  /// All that is known of a name, so that an operation costs one look-up and no allocation.
  struct Name {
    uint64_t next_use = 0;  ///< Activated so far.
    std::vector<Operation*> active;
    std::vector<Early> early;  ///< Of all uses to come.
    /// Of the last uses that ended here, by use modulo their number: as far as a neighbour can be
    /// behind with a question about one.
    struct Past {
      bool known = false;
      uint64_t use = 0;
      std::vector<int> destinations;  ///< Of its plan, which is large and would live on.
    };
    std::array<Past, 8> past;
    Status condemned;
    // As peers told; of a name that stands for many tensors the last ones, the latest at the end.
    std::string name;
    std::unordered_map<int, std::vector<Description>> descriptions;
  };
  const Name* Known(uint64_t name_hash) const {
    const auto it = names_.find(name_hash);
    return it == names_.end() ? nullptr : &it->second;
  }

  const int rank_;
  std::unordered_map<uint64_t, Name> names_;
};

}  // namespace bluefog
