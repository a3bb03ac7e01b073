#include "collective/matching.h"

#include <map>
#include <tuple>
#include <utility>

#include <absl/strings/str_cat.h>

#include "collective/interpreter.h"

namespace bluefog::collective {
namespace {

using MessageId = std::tuple<int, int, int32_t>;  // from, to, number

std::string Describe(const MessageId& id) {
  const auto& [from, to, number] = id;
  return absl::StrCat("message ", number, " from rank ", from, " to rank ", to);
}

struct Sent {
  StepId publish;
  size_t target = 0;
  double weight = 1.0;
  bool received = false;
};

class Structure {
 public:
  Structure(const std::vector<Schedule>& all, int rank, bool allow_unread_views)
      : all_(all),
        schedule_(all[static_cast<size_t>(rank)]),
        rank_(rank),
        allow_unread_views_(allow_unread_views),
        used_(schedule_.steps.size(), false) {}

  Status Check() {
    for (int32_t i = 0; i < Size(); ++i) {
      if (Status status = CheckStep(i); !status.ok()) return status;
    }
    for (int32_t i = 0; i < Size(); ++i) {
      const Step& step = At(i);
      if (step.kind == StepKind::kReceive && step.range.count > 0 && !allow_unread_views_ &&
          !used_[static_cast<size_t>(i)]) {
        return Error(i, "no step reads the view");
      }
    }
    return CheckGroups();
  }

 private:
  int32_t Size() const { return static_cast<int32_t>(schedule_.steps.size()); }
  const Step& At(int32_t i) const { return schedule_.steps[static_cast<size_t>(i)]; }
  Status Error(int32_t i, const std::string& what) const {
    return StepError(all_, {rank_, i}, what);
  }

  Status CheckStep(int32_t i) {
    const Step& step = At(i);
    for (int32_t before : step.after) {
      if (before < 0 || before >= i) {
        return Error(i, absl::StrCat("after names step #", before, ", which is not earlier"));
      }
    }
    if (step.range.role == Role::kTile && step.group < 0) return Error(i, "a tile outside a group");
    if (step.kind != StepKind::kReceive) {
      if (Status status = CheckRange(i, step.range); !status.ok()) return status;
    }
    for (const Source& source : step.sources) {
      if (Status status = CheckSource(i, source); !status.ok()) return status;
    }
    return CheckKind(i);
  }

  Status CheckRange(int32_t i, const Range& range) const {
    int64_t size = 0;
    switch (range.role) {
      case Role::kInput:
        size = schedule_.input_count;
        break;
      case Role::kOutput:
        size = schedule_.output_count;
        break;
      case Role::kScratch:
        size = schedule_.scratch_count;
        break;
      case Role::kCoded:
        size = schedule_.coded_count;
        break;
      case Role::kTile:
        size = schedule_.input_count;
        break;
    }
    if (range.begin < 0 || range.count < 0 || range.begin + range.count > size ||
        range.buffer < 0 || range.buffer >= schedule_.buffers) {
      return Error(i, absl::StrCat("range ", ToString(range), " is outside of ", schedule_.buffers,
                                   " buffers of ", size, " elements"));
    }
    return {};
  }

  Status CheckSource(int32_t i, const Source& source) {
    int64_t count = source.local.count;
    if (source.receive >= 0) {
      if (source.receive >= i || At(source.receive).kind != StepKind::kReceive) {
        return Error(i, absl::StrCat("source #", source.receive, " is no earlier receive"));
      }
      used_[static_cast<size_t>(source.receive)] = true;
      count = At(source.receive).range.count;
    } else {
      if (Status status = CheckRange(i, source.local); !status.ok()) return status;
      if (source.local.role == Role::kTile) return Error(i, "a tile as a source");
    }
    if (count != At(i).range.count) {
      return Error(i, absl::StrCat("a source of ", count, " elements"));
    }
    return {};
  }

  Status CheckKind(int32_t i) const {
    const Step& step = At(i);
    const Role role = step.range.role;
    if (!step.targets.empty() && step.kind != StepKind::kPublish) return Error(i, "has targets");
    switch (step.kind) {
      case StepKind::kProduce:
        if (role != Role::kInput) return Error(i, "produces what is no input");
        break;
      case StepKind::kPublish:
        if (step.targets.empty()) return Error(i, "has no targets");
        for (const Target& target : step.targets) {
          if (!IsPeer(target.peer)) return Error(i, absl::StrCat("rank ", target.peer, "?"));
        }
        break;
      case StepKind::kReceive:
        if (!step.after.empty() || step.group >= 0) return Error(i, "receives are always open");
        if (!IsPeer(step.peer) || step.range.count < 0) return Error(i, "no such message");
        break;
      case StepKind::kCopy:
        if (step.sources.size() != 1) return Error(i, "a copy has one source");
        [[fallthrough]];
      case StepKind::kCombine:
        if (role == Role::kInput) return Error(i, "writes the input");
        return CheckCoded(i);
      case StepKind::kMeasure:
      case StepKind::kConsume:
        if (role == Role::kInput) return Error(i, "reads the input");
        break;
      case StepKind::kNative:
        return Error(i, "native steps cannot be interpreted");
    }
    return {};
  }

  /// What reads encoded messages knows how its own was encoded.
  Status CheckCoded(int32_t i) const {
    const Step& step = At(i);
    int views = 0, coded = 0;
    Range mine;
    for (const Source& source : step.sources) {
      if (source.receive < 0) {
        mine = source.local;
      } else {
        ++views;
        coded += At(source.receive).range.role == Role::kCoded ? 1 : 0;
      }
    }
    if (coded == 0) return {};
    if (coded != views || step.sources.size() != static_cast<size_t>(views) + 1 ||
        step.kind == StepKind::kCopy) {
      return Error(i, "encoded messages are combined with one local source, and with each other");
    }
    for (const int32_t before : step.after) {
      const Step& encode = At(before);
      if (encode.kind == StepKind::kCopy && encode.range.role == Role::kCoded &&
          encode.sources[0].local == mine) {
        return {};
      }
    }
    return Error(i, "combines encoded messages before its own is encoded");
  }

  bool IsPeer(int rank) const {
    return rank >= 0 && rank < static_cast<int>(all_.size()) && rank != rank_;
  }

  /// Each group: one combine or copy to kTile for each buffer, then their consume.
  Status CheckGroups() const {
    std::map<int32_t, int32_t> ends;  // group -> index of its last step
    for (int32_t i = 0; i < Size(); ++i) {
      const int32_t group = At(i).group;
      if (group < 0) continue;
      if (ends.count(group) > 0) return Error(i, "its group ended before");
      const int32_t last = i + schedule_.buffers;
      if (last >= Size()) return Error(i, "its group has no end");
      const Step& consume = At(last);
      for (int32_t k = i; k <= last; ++k) {
        const Step& step = At(k);
        const StepKind kind = step.kind;
        const Range expected{Role::kTile, static_cast<int16_t>(k == last ? 0 : k - i),
                             consume.range.begin, consume.range.count};
        const bool kind_fits = k == last ? kind == StepKind::kConsume
                                         : kind == StepKind::kCombine || kind == StepKind::kCopy;
        if (step.group != group || !kind_fits || step.range != expected) {
          return Error(k, absl::StrCat("does not fit into group ", group));
        }
      }
      ends[group] = last;
      i = last;
    }
    return {};
  }

  const std::vector<Schedule>& all_;
  const Schedule& schedule_;
  const int rank_;
  const bool allow_unread_views_;
  std::vector<bool> used_;  // Receives that a step reads.
};

}  // namespace

Status StepError(const std::vector<Schedule>& schedules, StepId id, const std::string& what) {
  const Step& step = schedules[static_cast<size_t>(id.rank)].steps[static_cast<size_t>(id.step)];
  return absl::InvalidArgumentError(
      absl::StrCat("rank ", id.rank, ", step #", id.step, " (", ToString(step), "): ", what));
}

StatusOr<Matching> Match(const std::vector<Schedule>& schedules, bool allow_unread_views) {
  for (int rank = 0; rank < static_cast<int>(schedules.size()); ++rank) {
    Status status = Structure(schedules, rank, allow_unread_views).Check();
    if (!status.ok()) return status;
  }
  Matching matching;
  std::map<MessageId, Sent> sent;
  std::map<std::pair<int, int>, int32_t> next;  // Number of the next message on an edge.
  Status misnumbered;                           // Told only if nothing worse is found.
  for (int rank = 0; rank < static_cast<int>(schedules.size()); ++rank) {
    const std::vector<Step>& steps = schedules[static_cast<size_t>(rank)].steps;
    matching.receives.emplace_back(steps.size());
    matching.senders.emplace_back(steps.size());
    for (int32_t i = 0; i < static_cast<int32_t>(steps.size()); ++i) {
      const Step& step = steps[static_cast<size_t>(i)];
      matching.receives.back()[static_cast<size_t>(i)].resize(step.targets.size());
      for (size_t t = 0; t < step.targets.size(); ++t) {
        const Target& target = step.targets[t];
        const MessageId id{rank, target.peer, target.message};
        if (!sent.try_emplace(id, Sent{{rank, i}, t, target.weight}).second) {
          return StepError(schedules, {rank, i}, "publishes " + Describe(id) + " a second time");
        }
        const int32_t expected = next[{rank, target.peer}]++;
        if (target.message != expected && misnumbered.ok()) {
          misnumbered =
              StepError(schedules, {rank, i},
                        absl::StrCat(Describe(id), " where number ", expected, " is next"));
        }
      }
    }
  }
  for (int rank = 0; rank < static_cast<int>(schedules.size()); ++rank) {
    const std::vector<Step>& steps = schedules[static_cast<size_t>(rank)].steps;
    for (int32_t i = 0; i < static_cast<int32_t>(steps.size()); ++i) {
      const Step& step = steps[static_cast<size_t>(i)];
      if (step.kind != StepKind::kReceive) continue;
      const MessageId id{step.peer, rank, step.message};
      const auto it = sent.find(id);
      if (it == sent.end()) {
        return StepError(schedules, {rank, i}, "nobody publishes " + Describe(id));
      }
      Sent& message = it->second;
      if (std::exchange(message.received, true)) {
        return StepError(schedules, {rank, i}, "receives " + Describe(id) + " a second time");
      }
      const auto [from, publish] = message.publish;
      const auto from_index = static_cast<size_t>(from);
      const auto publish_index = static_cast<size_t>(publish);
      const Range& range = schedules[from_index].steps[publish_index].range;
      if ((range.role == Role::kCoded) != (step.range.role == Role::kCoded)) {
        return StepError(schedules, {rank, i}, Describe(id) + " is encoded for one of both ends");
      }
      const int64_t published = range.count;
      if (published != step.range.count) {
        return StepError(
            schedules, {rank, i},
            absl::StrCat(Describe(id), " has ", published, " elements, not ", step.range.count));
      }
      matching.receives[from_index][publish_index][message.target] = {rank, i};
      matching.senders[static_cast<size_t>(rank)][static_cast<size_t>(i)] = {message.publish,
                                                                             message.weight};
    }
  }
  for (const auto& [id, message] : sent) {
    if (!message.received) {
      return StepError(schedules, message.publish, "nobody receives " + Describe(id));
    }
  }
  if (!misnumbered.ok()) return misnumbered;
  return matching;
}

Status CheckSchedules(const std::vector<Schedule>& schedules, bool allow_unread_views) {
  return Match(schedules, allow_unread_views).status();
}

}  // namespace bluefog::collective
