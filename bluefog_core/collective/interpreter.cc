#include "collective/interpreter.h"

#include <algorithm>
#include <queue>
#include <random>
#include <span>
#include <utility>

#include <absl/strings/str_cat.h>

#include "collective/matching.h"

namespace bluefog::collective {
namespace {

size_t Index(int64_t i) { return static_cast<size_t>(i); }

/// One buffer of a rank. In place, output and input share `values` but not the flags.
struct Buffer {
  std::vector<double>* values = nullptr;
  std::vector<bool> defined;
};

struct Rank {
  const Schedule* schedule = nullptr;
  std::vector<std::vector<double>> memory;  // Owns what buffers point at.
  std::vector<Buffer> buffers[4];           // By role, kTile apart.
  std::vector<std::vector<double>> tiles;   // Of the group that runs, by payload.
  std::vector<double> consumed;             // What the toy plugin made of each element.
  std::vector<int> consumes, measures;      // How often each element was.
  bool consuming = false;                   // Some element was consumed.
  std::vector<int32_t> outstanding;         // Publishes that not all targets have released.

  // By step.
  std::vector<int32_t> waits;                    // Dependencies not done, of the unit's first step.
  std::vector<int32_t> first;                    // First step of the unit this one belongs to.
  std::vector<std::vector<int32_t>> dependents;  // First steps of units that wait for this one.
  std::vector<int32_t> readers;                  // Receive: steps that still read the view.
  std::vector<int32_t> unreleased;               // Publish: targets that have not released.
  std::vector<bool> started, done;
};

class Run {
 public:
  Run(const std::vector<Schedule>& schedules, Matching matching, const InterpreterOptions& options)
      : schedules_(schedules),
        matching_(std::move(matching)),
        options_(options),
        random_(options.seed),
        ranks_(schedules.size()) {}

  Status Prepare(const std::vector<std::vector<double>>& inputs);
  Status Execute();
  StatusOr<std::vector<std::vector<double>>> Results() const;

 private:
  Rank& Of(StepId id) { return ranks_[Index(id.rank)]; }
  const Step& StepOf(StepId id) const { return schedules_[Index(id.rank)].steps[Index(id.step)]; }
  Status Error(StepId id, const std::string& what) const { return StepError(schedules_, id, what); }

  void Ready(StepId id) { ready_.push({random_(), {id.rank, id.step}}); }
  void PrepareOrder(int r);
  Status RunUnit(StepId first);
  Status RunStep(StepId id);
  Status Publish(StepId id);
  Status Sum(StepId id);
  Status Produce(StepId id);
  Status MeasureOrConsume(StepId id);
  /// Reads this rank's memory; an error if an element was never written.
  Status Read(StepId id, const Range& range, std::vector<double>* out);
  Status Write(StepId id, const Range& range, std::span<const double> values);
  bool SameMemory(Role a, Role b) const;
  void Done(StepId id);
  void Release(StepId receive);
  Status Deadlock() const;

  const std::vector<Schedule>& schedules_;
  const Matching matching_;
  const InterpreterOptions options_;
  std::mt19937_64 random_;
  std::vector<Rank> ranks_;
  /// First steps of units that can run, and receives that can arrive. Each draws its priority once:
  /// a step that drew a low one runs as late as dependencies allow, which finds those that are
  /// missing far more often than an even choice each time.
  std::priority_queue<std::pair<uint64_t, std::pair<int, int32_t>>> ready_;
};

Status Run::Prepare(const std::vector<std::vector<double>>& inputs) {
  if (inputs.size() != schedules_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("there are ", schedules_.size(), " schedules and ", inputs.size(), " inputs"));
  }
  for (size_t r = 0; r < ranks_.size(); ++r) {
    const Schedule& schedule = schedules_[r];
    const bool alias_fits = schedule.buffers == 1 && schedule.input_count == schedule.output_count;
    if (Index(schedule.input_count) != inputs[r].size() || (options_.in_place && !alias_fits)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "rank ", r, ": an input of ", inputs[r].size(), " elements does not fit a schedule for ",
          schedule.input_count, (options_.in_place ? " in place" : "")));
    }
    Rank& rank = ranks_[r];
    rank.schedule = &schedule;
    const bool plugin = std::any_of(schedule.steps.begin(), schedule.steps.end(),
                                    [](auto& step) { return step.kind == StepKind::kProduce; });
    const int64_t counts[] = {schedule.input_count, schedule.output_count, schedule.scratch_count,
                              schedule.coded_count};
    const size_t payloads = Index(schedule.buffers);
    rank.memory.reserve(4 * payloads);
    for (int role = 0; role < 4; ++role) {
      for (size_t p = 0; p < payloads; ++p) {
        std::vector<double>* values = nullptr;
        if (options_.in_place && role == static_cast<int>(Role::kOutput)) {
          values = &rank.memory[p];
        } else if (role == static_cast<int>(Role::kInput)) {
          values = &rank.memory.emplace_back(inputs[r]);
        } else {
          values = &rank.memory.emplace_back(Index(counts[role]));
        }
        const bool defined = role == static_cast<int>(Role::kInput) && !plugin;
        rank.buffers[role].push_back({values, std::vector<bool>(values->size(), defined)});
      }
    }
    rank.tiles.resize(payloads);
    rank.consumed.resize(Index(schedule.input_count));
    rank.consumes.resize(Index(schedule.input_count));
    rank.measures.resize(Index(schedule.input_count));
    PrepareOrder(static_cast<int>(r));
  }
  return {};
}

void Run::PrepareOrder(int r) {
  Rank& rank = ranks_[Index(r)];
  const std::vector<Step>& steps = rank.schedule->steps;
  rank.waits.resize(steps.size());
  rank.first.resize(steps.size());
  rank.dependents.resize(steps.size());
  rank.readers.resize(steps.size());
  rank.unreleased.resize(steps.size());
  rank.started.resize(steps.size());
  rank.done.resize(steps.size());
  for (int32_t i = 0; i < static_cast<int32_t>(steps.size()); ++i) {
    const Step& step = steps[Index(i)];
    const bool grouped = step.group >= 0 && i > 0 && steps[Index(i - 1)].group == step.group;
    const int32_t first = grouped ? rank.first[Index(i - 1)] : i;
    rank.first[Index(i)] = first;
    auto wait_for = [&](int32_t before) {
      if (rank.first[Index(before)] == first) return;
      rank.dependents[Index(before)].push_back(first);
      ++rank.waits[Index(first)];
    };
    for (int32_t before : step.after) wait_for(before);
    for (const Source& source : step.sources) {
      if (source.receive < 0) continue;
      wait_for(source.receive);
      ++rank.readers[Index(source.receive)];
    }
    rank.unreleased[Index(i)] = static_cast<int32_t>(step.targets.size());
    if (step.kind == StepKind::kReceive) rank.waits[Index(i)] = 1;
  }
  for (int32_t i = 0; i < static_cast<int32_t>(steps.size()); ++i) {
    if (rank.first[Index(i)] == i && rank.waits[Index(i)] == 0) Ready({r, i});
  }
}

Status Run::Execute() {
  while (!ready_.empty()) {
    const auto [rank, step] = ready_.top().second;
    ready_.pop();
    if (Status status = RunUnit({rank, step}); !status.ok()) return status;
  }
  for (const Rank& rank : ranks_) {
    if (std::find(rank.done.begin(), rank.done.end(), false) != rank.done.end()) return Deadlock();
  }
  return {};
}

Status Run::RunUnit(StepId first) {
  Rank& rank = Of(first);
  int32_t end = first.step;
  while (Index(end) < rank.first.size() && rank.first[Index(end)] == first.step) ++end;
  for (int32_t i = first.step; i < end; ++i) {
    rank.started[Index(i)] = true;
    if (Status status = RunStep({first.rank, i}); !status.ok()) return status;
  }
  for (int32_t i = first.step; i < end; ++i) {
    const StepId id{first.rank, i};
    if (StepOf(id).kind != StepKind::kPublish) Done(id);
  }
  return {};
}

Status Run::RunStep(StepId id) {
  switch (StepOf(id).kind) {
    case StepKind::kProduce:
      return Produce(id);
    case StepKind::kPublish:
      return Publish(id);
    case StepKind::kCombine:
    case StepKind::kCopy:
      return Sum(id);
    case StepKind::kMeasure:
    case StepKind::kConsume:
      return MeasureOrConsume(id);
    case StepKind::kReceive:
    case StepKind::kNative:
      break;
  }
  return {};
}

Status Run::Publish(StepId id) {
  std::vector<double> values;
  if (Status status = Read(id, StepOf(id).range, &values); !status.ok()) return status;
  Of(id).outstanding.push_back(id.step);
  for (const StepId receive : matching_.receives[Index(id.rank)][Index(id.step)]) {
    Ready(receive);
  }
  return {};
}

Status Run::Sum(StepId id) {
  const Step& step = StepOf(id);
  std::vector<double> sum(Index(step.range.count), 0.0);
  std::vector<double> values;
  bool first = true;
  for (const Source& source : step.sources) {
    double weight = source.weight;
    if (source.receive >= 0) {
      const auto& sender = matching_.senders[Index(id.rank)][Index(source.receive)];
      weight *= sender.weight;
      if (Status s = Read(sender.publish, StepOf(sender.publish).range, &values); !s.ok()) return s;
    } else {
      const Range& from = source.local;
      if (SameMemory(from.role, step.range.role) && from.buffer == step.range.buffer &&
          from.begin != step.range.begin && from.begin < step.range.begin + step.range.count &&
          step.range.begin < from.begin + from.count) {
        return Error(id, "reads and writes shifted parts of one range");
      }
      if (Status status = Read(id, from, &values); !status.ok()) return status;
    }
    if (step.kind == StepKind::kCopy) {
      sum = values;
      continue;
    }
    if (weight == 0.0) continue;
    for (size_t k = 0; k < sum.size(); ++k) {
      sum[k] = first ? weight * values[k] : sum[k] + weight * values[k];
    }
    first = false;
  }
  if (step.divisor > 0.0) {
    for (double& value : sum) value /= step.divisor;
  }
  return Write(id, step.range, sum);
}

Status Run::Produce(StepId id) {
  const Range& range = StepOf(id).range;
  for (int p = 0; p < Of(id).schedule->buffers; ++p) {
    Range payload = range;
    payload.buffer = static_cast<int16_t>(p);
    Buffer& buffer = Of(id).buffers[static_cast<int>(Role::kInput)][Index(p)];
    std::vector<double> values(buffer.values->begin() + range.begin,
                               buffer.values->begin() + range.begin + range.count);
    for (double& value : values) value *= p + 1;
    for (int64_t i = range.begin; i < range.begin + range.count; ++i) {
      if (buffer.defined[Index(i)]) return Error(id, "produced a second time");
    }
    if (Status status = Write(id, payload, values); !status.ok()) return status;
  }
  return {};
}

Status Run::MeasureOrConsume(StepId id) {
  const Step& step = StepOf(id);
  Rank& rank = Of(id);
  const bool consume = step.kind == StepKind::kConsume;
  std::vector<double> mixed;
  for (int p = 0; p < rank.schedule->buffers; ++p) {
    Range range = step.range;
    range.buffer = static_cast<int16_t>(p);
    if (Status status = Read(id, range, &mixed); !status.ok()) return status;
    for (int64_t k = 0; consume && k < range.count; ++k) {
      rank.consumed[Index(range.begin + k)] += (p + 1) * mixed[Index(k)];
    }
  }
  std::vector<int>& times = consume ? rank.consumes : rank.measures;
  for (int64_t i = step.range.begin; i < step.range.begin + step.range.count; ++i) {
    if (++times[Index(i)] > 1) return Error(id, "the plugin sees it a second time");
    rank.consuming = rank.consuming || consume;
    if (!consume && rank.consuming) {
      return Error(id, "measured after a consume");
    }
  }
  return {};
}

bool Run::SameMemory(Role a, Role b) const {
  auto memory = [&](Role role) {
    return options_.in_place && role == Role::kOutput ? Role::kInput : role;
  };
  return memory(a) == memory(b);
}

Status Run::Read(StepId id, const Range& range, std::vector<double>* out) {
  Rank& rank = Of(id);
  if (range.role == Role::kTile) {
    *out = rank.tiles[Index(range.buffer)];
    return {};
  }
  const Buffer& buffer = rank.buffers[static_cast<int>(range.role)][Index(range.buffer)];
  for (int64_t i = range.begin; i < range.begin + range.count; ++i) {
    if (!buffer.defined[Index(i)]) {
      return Error(id, absl::StrCat("reads element ", i, " of ", ToString(range),
                                    " before it is written, or after it was overwritten in place"));
    }
  }
  out->assign(buffer.values->begin() + range.begin,
              buffer.values->begin() + range.begin + range.count);
  return {};
}

Status Run::Write(StepId id, const Range& range, std::span<const double> values) {
  Rank& rank = Of(id);
  if (range.role == Role::kTile) {
    rank.tiles[Index(range.buffer)].assign(values.begin(), values.end());
    return {};
  }
  const int64_t end = range.begin + range.count;
  for (int32_t index : rank.outstanding) {
    const Range& read = rank.schedule->steps[Index(index)].range;
    if (SameMemory(read.role, range.role) && read.buffer == range.buffer && read.begin < end &&
        range.begin < read.begin + read.count) {
      return Error(id, absl::StrCat("overwrites what publish #", index, " still shows"));
    }
  }
  Buffer& buffer = rank.buffers[static_cast<int>(range.role)][Index(range.buffer)];
  for (int64_t i = range.begin; i < end; ++i) {
    if (buffer.defined[Index(i)]) return Error(id, absl::StrCat("writes element ", i, " twice"));
    buffer.defined[Index(i)] = true;
    if (options_.in_place && range.role == Role::kOutput) {
      rank.buffers[static_cast<int>(Role::kInput)][Index(range.buffer)].defined[Index(i)] = false;
    }
  }
  std::copy(values.begin(), values.end(), buffer.values->begin() + range.begin);
  return {};
}

void Run::Done(StepId id) {
  Rank& rank = Of(id);
  rank.done[Index(id.step)] = true;
  for (int32_t unit : rank.dependents[Index(id.step)]) {
    if (--rank.waits[Index(unit)] == 0) Ready({id.rank, unit});
  }
  const Step& step = StepOf(id);
  if (step.kind == StepKind::kReceive && rank.readers[Index(id.step)] == 0) Release(id);
  for (const Source& source : step.sources) {
    if (source.receive >= 0 && --rank.readers[Index(source.receive)] == 0) {
      Release({id.rank, source.receive});
    }
  }
}

void Run::Release(StepId receive) {
  const StepId publish = matching_.senders[Index(receive.rank)][Index(receive.step)].publish;
  Rank& sender = Of(publish);
  if (--sender.unreleased[Index(publish.step)] > 0) return;
  std::erase(sender.outstanding, publish.step);
  Done(publish);
}

Status Run::Deadlock() const {
  constexpr int kMost = 12;
  std::string text = "deadlock; blocked are";
  int listed = 0;
  for (size_t r = 0; r < ranks_.size(); ++r) {
    const Rank& rank = ranks_[r];
    for (size_t i = 0; i < rank.done.size(); ++i) {
      if (rank.done[i]) continue;
      if (++listed > kMost) continue;
      const Step& step = rank.schedule->steps[i];
      absl::StrAppend(&text, "\n  rank ", r, ", step #", i, " (", ToString(step), ")");
      if (step.kind == StepKind::kPublish && rank.started[i]) {
        text += " is not released by rank";
        for (const StepId receive : matching_.receives[r][i]) {
          if (ranks_[Index(receive.rank)].readers[Index(receive.step)] > 0) {
            absl::StrAppend(&text, " ", receive.rank);
          }
        }
        continue;
      }
      if (step.kind == StepKind::kReceive) text += " has not arrived";
      for (int32_t before : step.after) {
        if (!rank.done[Index(before)]) absl::StrAppend(&text, " waits for #", before);
      }
      for (const Source& source : step.sources) {
        if (source.receive >= 0 && !rank.done[Index(source.receive)]) {
          absl::StrAppend(&text, " waits for #", source.receive);
        }
      }
    }
  }
  if (listed > kMost) absl::StrAppend(&text, "\n  and ", listed - kMost, " more");
  return absl::InvalidArgumentError(text);
}

StatusOr<std::vector<std::vector<double>>> Run::Results() const {
  std::vector<std::vector<double>> results;
  for (size_t r = 0; r < ranks_.size(); ++r) {
    const Rank& rank = ranks_[r];
    auto missing = [&](const char* what, size_t element) {
      return absl::InvalidArgumentError(
          absl::StrCat("rank ", r, ": element ", element, " is never ", what));
    };
    auto has = [&](StepKind kind) {
      return std::any_of(rank.schedule->steps.begin(), rank.schedule->steps.end(),
                         [&](const Step& step) { return step.kind == kind; });
    };
    for (size_t i = 0; i < rank.measures.size() && has(StepKind::kMeasure); ++i) {
      if (rank.measures[i] == 0) return missing("measured", i);
    }
    if (has(StepKind::kConsume)) {
      for (size_t i = 0; i < rank.consumes.size(); ++i) {
        if (rank.consumes[i] == 0) return missing("consumed", i);
      }
      results.push_back(rank.consumed);
      continue;
    }
    std::vector<double>& result = results.emplace_back();
    for (const Buffer& buffer : rank.buffers[static_cast<int>(Role::kOutput)]) {
      for (size_t i = 0; i < buffer.defined.size() && !options_.in_place; ++i) {
        if (!buffer.defined[i]) return missing("written", i);
      }
      result.insert(result.end(), buffer.values->begin(), buffer.values->end());
    }
  }
  return results;
}

}  // namespace

StatusOr<std::vector<std::vector<double>>> Interpret(const std::vector<Schedule>& schedules,
                                                     const std::vector<std::vector<double>>& inputs,
                                                     const InterpreterOptions& options) {
  StatusOr<Matching> matching = Match(schedules, options.allow_unread_views);
  if (!matching.ok()) return matching.status();
  Run run(schedules, *std::move(matching), options);
  if (Status status = run.Prepare(inputs); !status.ok()) return status;
  if (Status status = run.Execute(); !status.ok()) return status;
  return run.Results();
}

}  // namespace bluefog::collective
