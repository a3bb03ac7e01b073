#include "engine/match.h"

#include <sstream>

namespace bluefog {

Operation* Match::Find(const Key& key) const {
  const auto it = active_.find(key);
  return it == active_.end() ? nullptr : it->second;
}

bool Match::IsPast(const Key& key) const {
  const auto it = next_use_.find(key.name_hash);
  return it != next_use_.end() && key.use < it->second;
}

std::vector<Match::Early> Match::Add(Operation* op) {
  active_[op->key] = op;
  next_use_[op->key.name_hash] = op->key.use + 1;
  const auto it = early_.find(op->key);
  if (it == early_.end()) return {};
  std::vector<Early> early = std::move(it->second);
  early_.erase(it);
  for (const Early& e : early) {
    if (!e.copied) held_bytes_[static_cast<size_t>(e.peer)] -= e.view.size;
  }
  return early;
}

void Match::Remove(const Operation& op) {
  active_.erase(op.key);
  last_[op.key.name_hash] = {op.key.use, op.plan};
}

bool Match::FinishedWithout(const Key& key, int peer) const {
  const auto it = last_.find(key.name_hash);
  return it != last_.end() && it->second.first == key.use &&
         it->second.second->DestinationOf(peer) < 0;
}

void Match::Store(Early early) {
  if (!early.copied) held_bytes_[static_cast<size_t>(early.peer)] += early.view.size;
  early_[early.header.key].push_back(std::move(early));
}

void Match::Forget(int peer, std::vector<Early>* views) {
  for (auto it = early_.begin(); it != early_.end();) {
    std::vector<Early>& list = it->second;
    for (size_t i = 0; i < list.size();) {
      if (list[i].peer == peer && list[i].header.kind != MessageKind::kAbort) {
        views->push_back(std::move(list[i]));
        list.erase(list.begin() + static_cast<std::ptrdiff_t>(i));
      } else {
        ++i;
      }
    }
    it = list.empty() ? early_.erase(it) : std::next(it);
  }
  held_bytes_[static_cast<size_t>(peer)] = 0;
}

void Match::SetDescription(int peer, uint64_t name_hash, std::string name,
                           std::string description) {
  names_[name_hash] = std::move(name);
  descriptions_[name_hash][peer] = std::move(description);
}

std::string Match::NameOf(uint64_t name_hash) const {
  const auto it = names_.find(name_hash);
  return it == names_.end() ? "?" : it->second;
}

Status Match::Compare(const Operation& op, int peer, const WireHeader& header) const {
  if (header.op == op.op && header.dtype == op.dtype && header.count == op.input.count &&
      header.layout_hash == op.input.LayoutHash() && header.plan_hash == op.plan_hash) {
    return absl::OkStatus();
  }
  std::string theirs;
  const auto by_name = descriptions_.find(op.key.name_hash);
  if (by_name != descriptions_.end()) {
    const auto it = by_name->second.find(peer);
    if (it != by_name->second.end()) theirs = it->second;
  }
  if (theirs.empty()) {
    theirs = std::string(bluefog::NameOf(header.op)) + " " + bluefog::NameOf(header.dtype) + "[" +
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
  } else if (op.op == Op::kBroadcast && header.op == op.op && header.value != op.value) {
    text << "the root is " << op.value << " on rank " << rank_ << " and " << header.value
         << " on rank " << peer;
  } else if (op.op == Op::kAllreduce && header.op == op.op && header.value != op.value) {
    const auto kind = [](double average) { return average != 0 ? "the average" : "the sum"; };
    text << "rank " << rank_ << " asks for " << kind(op.value) << " and rank " << peer << " for "
         << kind(header.value);
  } else {
    text << "rank " << rank_ << " has " << mine << ", rank " << peer << " has " << theirs
         << ". Shape, dtype, memory order and operation must be equal on all ranks under one name";
  }
  return absl::InvalidArgumentError(text.str());
}

}  // namespace bluefog
