// An exchange becomes a plugin's step: what it reads is produced first, each payload has its own
// copy of the exchange, and what it writes is consumed, where possible tile by tile without ever
// being whole.
#include <algorithm>
#include <utility>

#include "collective/schedule.h"

namespace bluefog::collective {
namespace {

bool Overlap(const Range& a, const Range& b) {
  return a.role == b.role && a.buffer == b.buffer && a.begin < b.begin + b.count &&
         b.begin < a.begin + a.count;
}

/// What a step reads from this rank's own memory.
std::vector<Range> LocalReads(const Step& step) {
  std::vector<Range> reads;
  if (step.kind == StepKind::kPublish) reads.push_back(step.range);
  for (const Source& source : step.sources) {
    if (source.receive < 0) reads.push_back(source.local);
  }
  return reads;
}

class Wrapper {
 public:
  Wrapper(const Schedule& exchange, const PluginPlan& plan) : exchange_(exchange), plan_(plan) {
    result_.buffers = plan.payloads;
    result_.input_count = exchange.input_count;
    result_.scratch_count = exchange.scratch_count;
    result_.coded_count = exchange.coded_count;
    for (const Step& step : exchange.steps) {
      for (const Range& read : LocalReads(step)) {
        if (read.role == Role::kOutput) output_reads_.push_back(read);
      }
    }
    CutProduces();
  }

  Schedule Wrap() && {
    for (size_t i = 0; i < exchange_.steps.size(); ++i) {
      const Step& step = exchange_.steps[i];
      // A publish goes before the consumes that are ready with it: others wait for it.
      if (step.kind != StepKind::kPublish) FlushConsumes();
      AddStep(step);
    }
    FlushConsumes();
    for (const Range& range : measured_) AddConsume(range, {last_measure_});
    Produce(0, result_.input_count);
    return std::move(result_);
  }

 private:
  struct Interval {
    int64_t begin = 0, end = 0;
    int32_t step = -1;  // Of its kProduce, once emitted.
  };

  void CutProduces() {
    std::vector<int64_t> cuts = {0, exchange_.input_count};
    for (const Step& step : exchange_.steps) {
      for (const Range& read : LocalReads(step)) {
        if (read.role != Role::kInput) continue;
        cuts.push_back(read.begin);
        cuts.push_back(read.begin + read.count);
      }
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) intervals_.push_back({cuts[i], cuts[i + 1]});
  }

  /// The kProduce steps of [begin, end), emitted now if they were not before.
  std::vector<int32_t> Produce(int64_t begin, int64_t end) {
    std::vector<int32_t> steps;
    auto it =
        std::upper_bound(intervals_.begin(), intervals_.end(), begin,
                         [](int64_t at, const Interval& interval) { return at < interval.end; });
    for (; it != intervals_.end() && it->begin < end; ++it) {
      if (it->step < 0) {
        it->step = Append({.kind = StepKind::kProduce,
                           .range = {Role::kInput, 0, it->begin, it->end - it->begin}});
      }
      steps.push_back(it->step);
    }
    return steps;
  }

  void AddStep(const Step& step) {
    std::vector<int32_t> produced;
    for (const Range& read : LocalReads(step)) {
      if (read.role != Role::kInput) continue;
      for (int32_t index : Produce(read.begin, read.begin + read.count)) produced.push_back(index);
    }
    const bool result = (step.kind == StepKind::kCombine || step.kind == StepKind::kCopy) &&
                        step.range.role == Role::kOutput;
    const bool fused =
        result && plan_.consume && plan_.fuse && !plan_.measure && !IsRead(step.range);
    const int32_t group = fused ? groups_++ : -1;

    std::vector<int32_t> copies;  // Of this step, one for each payload.
    for (int p = 0; p < plan_.payloads; ++p) {
      Step copy = ForPayload(step, p);
      copy.after.insert(copy.after.end(), produced.begin(), produced.end());
      if (fused) copy.range.role = Role::kTile;
      copy.group = group;
      copies.push_back(Append(std::move(copy)));
    }
    index_.push_back(copies);
    if (!result) return;
    if (!fused) result_.output_count = exchange_.output_count;

    if (fused) {
      Range range = step.range;
      range.role = Role::kTile;
      AddConsume(range, std::move(copies), group);
    } else if (plan_.measure) {
      // One after the other, so that the partial sums do not depend on the order of arrival.
      if (last_measure_ >= 0) copies.push_back(last_measure_);
      last_measure_ =
          Append({.kind = StepKind::kMeasure, .range = step.range, .after = std::move(copies)});
      if (plan_.consume) measured_.push_back(step.range);
    } else if (plan_.consume) {
      waiting_.emplace_back(step.range, std::move(copies));
    }
  }

  Step ForPayload(const Step& step, int p) const {
    const auto buffer = static_cast<int16_t>(p);
    auto message = [&](int32_t m) { return m * plan_.payloads + p; };
    auto mapped = [&](int32_t old) {
      return index_[static_cast<size_t>(old)][static_cast<size_t>(p)];
    };
    Step copy = step;
    copy.range.buffer = buffer;
    copy.message = message(step.message);
    for (Target& target : copy.targets) target.message = message(target.message);
    for (Source& source : copy.sources) {
      source.local.buffer = buffer;
      if (source.receive >= 0) source.receive = mapped(source.receive);
    }
    for (int32_t& index : copy.after) index = mapped(index);
    return copy;
  }

  bool IsRead(const Range& range) const {
    return std::any_of(output_reads_.begin(), output_reads_.end(),
                       [&](const Range& read) { return Overlap(read, range); });
  }

  void FlushConsumes() {
    for (auto& [range, after] : std::exchange(waiting_, {})) AddConsume(range, std::move(after));
  }

  void AddConsume(const Range& range, std::vector<int32_t> after, int32_t group = -1) {
    Append({.kind = StepKind::kConsume, .range = range, .after = std::move(after), .group = group});
  }

  int32_t Append(Step step) {
    result_.steps.push_back(std::move(step));
    return static_cast<int32_t>(result_.steps.size()) - 1;
  }

  const Schedule& exchange_;
  const PluginPlan& plan_;
  Schedule result_;
  std::vector<Range> output_reads_;  // Output that the exchange itself reads again.
  std::vector<Interval> intervals_;  // Of the produces, ascending.
  std::vector<std::vector<int32_t>>
      index_;  // [step of the exchange][payload] -> step of the result.
  std::vector<std::pair<Range, std::vector<int32_t>>>
      waiting_;  // Consumes held back for publishes.
  std::vector<Range> measured_;
  int32_t last_measure_ = -1;
  int32_t groups_ = 0;
};

}  // namespace

Schedule WithPlugin(const Schedule& exchange, const PluginPlan& plan) {
  return Wrapper(exchange, plan).Wrap();
}

}  // namespace bluefog::collective
