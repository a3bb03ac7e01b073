#include "engine/match.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <sstream>
#include <utility>

#include "base/hash.h"

namespace bluefog {
namespace {

/// What a peer's description of an operation is found by. Of an optimizer only the latest counts,
/// as its plan differs from step to step.
uint64_t DescriptionOf(const WireHeader& header) {
  if (header.op == Op::kOptimizer) return 0;
  return StableHash().Add(header.plan_hash).Add(header.layout_hash).value();
}

}  // namespace

Operation* Match::Find(const Key& key) const {
  const Name* name = Known(key.name_hash);
  if (name == nullptr) return nullptr;
  for (Operation* op : name->active) {
    if (op->key == key) return op;
  }
  return nullptr;
}

uint64_t Match::NextUse(uint64_t name_hash) const {
  const Name* name = Known(name_hash);
  return name == nullptr ? 0 : name->next_use;
}

bool Match::IsPast(const Key& key) const { return key.use < NextUse(key.name_hash); }

Status Match::Add(Operation* op) {
  Name& name = names_[op->key.name_hash];
  name.active.push_back(op);
  name.next_use = op->key.use + 1;
  return name.condemned;
}

bool Match::TakeEarly(const Operation& op, Early* early) {
  std::vector<Early>& list = names_[op.key.name_hash].early;
  const auto it = std::find_if(list.begin(), list.end(),
                               [&](const Early& e) { return e.header.key == op.key; });
  if (it == list.end()) return false;
  *early = std::move(*it);
  list.erase(it);
  return true;
}

void Match::Remove(const Operation& op) {
  Name& name = names_[op.key.name_hash];
  name.active.erase(std::find(name.active.begin(), name.active.end(), &op));
  Name::Past& past = name.past[op.key.use % name.past.size()];
  past.known = true;
  past.use = op.key.use;
  past.destinations = op.plan->destinations;  // Takes no memory once it has as many.
}

bool Match::FinishedWithout(const Key& key, int peer) const {
  const Name* name = Known(key.name_hash);
  if (name == nullptr) return false;
  const Name::Past& past = name->past[key.use % name->past.size()];
  return past.known && past.use == key.use &&
         !std::binary_search(past.destinations.begin(), past.destinations.end(), peer);
}

void Match::Store(Early early) {
  names_[early.header.key.name_hash].early.push_back(std::move(early));
}

void Match::Forget(int peer, std::vector<Early>* views) {
  for (auto& [hash, name] : names_) {
    const auto forgotten = [&](const Early& e) {
      return e.peer == peer && e.header.kind != MessageKind::kAbort;
    };
    for (Early& e : name.early) {
      if (forgotten(e)) views->push_back(e);
    }
    std::erase_if(name.early, forgotten);
  }
}

std::vector<Match::Early> Match::Skip(const Key& key) {
  Name& name = names_[key.name_hash];
  name.next_use = key.use + 1;
  const auto others = std::stable_partition(name.early.begin(), name.early.end(),
                                            [&](const Early& e) { return e.header.key != key; });
  std::vector<Early> skipped(std::make_move_iterator(others),
                             std::make_move_iterator(name.early.end()));
  name.early.erase(others, name.early.end());
  return skipped;
}

std::vector<Match::Early> Match::Condemn(uint64_t name_hash, const Status& status) {
  Name& name = names_[name_hash];
  name.condemned = status;
  return std::exchange(name.early, {});
}

Status Match::Condemned(uint64_t name_hash) const {
  const Name* name = Known(name_hash);
  return name == nullptr ? absl::OkStatus() : name->condemned;
}

void Match::SetDescription(int peer, const WireHeader& header, std::string name,
                           std::string description) {
  Name& known = names_[header.key.name_hash];
  known.name = std::move(name);
  std::vector<Description>& all = known.descriptions[peer];
  const uint64_t id = DescriptionOf(header);
  std::erase_if(all, [id](const Description& d) { return d.id == id; });
  if (all.size() == kDescriptions) all.erase(all.begin());
  all.push_back({id, std::move(description)});
}

std::string Match::ToString(const WireHeader& header) const {
  const Name* known = Known(header.key.name_hash);
  const std::string name = known == nullptr || known->name.empty() ? "?" : known->name;
  if (header.op == Op::kOptimizer) return name + ", step " + std::to_string(header.step);
  return std::string(NameOf(header.op)) + " '" + name + "'";
}

Status Match::CompareEdge(const Operation& op, int peer, float weight,
                          const WireHeader& header) const {
  // What was computed on two machines may differ in the last place.
  constexpr float kRounding = 1e-6f;
  const float theirs = header.edge_weight;
  if (weight == 0.0f || theirs == 0.0f ||
      std::fabs(weight - theirs) <= kRounding * std::max(weight, theirs)) {
    return absl::OkStatus();
  }
  std::ostringstream text;
  text << op.ToString() << ": the weight of the edge from rank " << peer << " to rank " << rank_
       << " is " << theirs << " on rank " << peer << " and " << weight << " on rank " << rank_
       << ". All ranks must use the same topology, weights included";
  return absl::InvalidArgumentError(text.str());
}

Status Match::Compare(const Operation& op, int peer, const WireHeader& header) const {
  if (header.op == op.op && header.dtype == op.dtype && header.count == op.input.count &&
      header.layout_hash == op.layout_hash && header.plan_hash == op.plan_hash) {
    return absl::OkStatus();
  }
  std::string theirs;
  if (const Name* name = Known(op.key.name_hash); name != nullptr) {
    if (const auto it = name->descriptions.find(peer); it != name->descriptions.end()) {
      const uint64_t id = DescriptionOf(header);
      for (const Description& d : it->second) {
        if (d.id == id) theirs = d.text;
      }
    }
  }
  if (theirs.empty()) {
    theirs = std::string(NameOf(header.op)) + " " + NameOf(header.dtype) + "[" +
             std::to_string(header.count) + " elements]";
  }
  std::ostringstream text;
  text << op.ToString() << ": ";
  const std::string mine = op.Describe();
  if (op.op == Op::kOptimizer && header.op == Op::kOptimizer && mine == theirs) {
    if (header.step != op.step) {
      text << "rank " << rank_ << " is at step " << op.step << ", rank " << peer << " at step "
           << header.step << ". All ranks must start from the same step: load the same checkpoint";
    } else if (header.value != op.value) {
      text << "the learning rate is " << op.value << " on rank " << rank_ << " and " << header.value
           << " on rank " << peer << ". It must be equal on all ranks at the same step";
    } else {
      text << "rank " << rank_ << " and rank " << peer << " disagree on the plan of step "
           << op.step << " (exchange, round or topology). All ranks must use the same topology";
    }
  } else if (op.op == Op::kOptimizer && header.op == Op::kOptimizer) {
    text << "rank " << rank_ << " has " << mine << ", rank " << peer << " has " << theirs
         << ". Parameters, momentum and weight_decay must be equal on all ranks";
  } else if (op.op == Op::kBroadcast && header.op == op.op && header.value != op.value) {
    text << "the root is " << op.value << " on rank " << rank_ << " and " << header.value
         << " on rank " << peer << ". All ranks must name the same root";
  } else if (op.op == Op::kNeighborAllreduce && header.op == op.op &&
             header.layout_hash == op.layout_hash && header.value != op.value) {
    const auto name = [](double value) {
      return value >= 0 && value < kDTypeCount ? NameOf(static_cast<DType>(value)) : "?";
    };
    text << "messages are " << name(op.value) << " on rank " << rank_ << " and "
         << name(header.value) << " on rank " << peer
         << ". message_dtype must be equal on all ranks";
  } else if (op.op == Op::kAllreduce && header.op == op.op && header.value != op.value) {
    const auto kind = [](double value) {
      const int bits = static_cast<int>(value);
      return std::string(bits & kAverage ? "the average" : "the sum") +
             (bits & kLocal ? " over its machine" : "");
    };
    text << "rank " << rank_ << " asks for " << kind(op.value) << " and rank " << peer << " for "
         << kind(header.value) << ". All ranks must ask for the same";
  } else {
    text << "rank " << rank_ << " has " << mine << ", rank " << peer << " has " << theirs
         << ". Shape, dtype, memory order and operation must be equal on all ranks under one name";
  }
  return absl::InvalidArgumentError(text.str());
}

}  // namespace bluefog
