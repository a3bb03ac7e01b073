// The units that touch memory: combine, copy, and the plugin's produce, measure and consume, by
// tile.
#include <algorithm>
#include <cstring>

#include "base/clock.h"
#include "base/failpoint.h"
#include "engine/executor.h"
#include "engine/executor_detail.h"

namespace bluefog {

using collective::Range;
using collective::Role;
using collective::Source;
using collective::Step;
using collective::StepKind;

namespace {

// Past this size inputs and outputs of what is under way do not stay in the last-level cache
// anyway.
constexpr int64_t kStreamingBytes = int64_t{16} << 20;

class TraceSpan {
 public:
  TraceSpan(Trace* trace, const char* what, const Operation& op, int64_t first_element)
      : trace_(trace->on() ? trace : nullptr),
        what_(what),
        op_(op),
        first_(first_element),
        begin_ns_(trace_ == nullptr ? 0 : NowNs()) {}
  ~TraceSpan() {
    if (trace_ == nullptr) return;
    trace_->Span(TraceTrack::kEngine, what_, op_.name->name, begin_ns_, NowNs(),
                 {"element", first_});
  }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  Trace* trace_;
  const char* what_;
  const Operation& op_;
  int64_t first_, begin_ns_;
};

}  // namespace

std::byte* Executor::At(const Operation& op, const Range& range, int64_t offset) const {
  const auto& base = range.role == Role::kInput    ? op.in
                     : range.role == Role::kOutput ? op.out
                     : range.role == Role::kCoded  ? op.coded
                                                   : op.scratch;
  const int64_t stride = range.role == Role::kCoded ? op.coded_stride : op.element_bytes;
  return base[static_cast<size_t>(range.buffer)] + (range.begin + offset) * stride;
}

const std::byte* Executor::Read(const Operation& op, const Source& source, int64_t offset) const {
  if (source.receive < 0) return At(op, source.local, offset);
  const Plan& plan = *op.plan;
  return op.receives[plan.units[plan.unit_of_step[source.receive]].ordinal].data +
         offset * op.element_bytes;
}

// What `step` publishes; of a combine of encoded messages, how its own was encoded.
std::span<const std::byte> Executor::Bytes(const Operation& op, const Step& step) const {
  const Plan& plan = *op.plan;
  const int32_t encoding = plan.EncodingOf(step);
  if (encoding < 0) {
    return {At(op, step.range), static_cast<size_t>(step.range.count * op.element_bytes)};
  }
  const Range& range = plan.schedule.steps[encoding].range;
  const int32_t ordinal = plan.units[plan.unit_of_step[encoding]].ordinal;
  return {At(op, range), static_cast<size_t>(op.encoded_bytes[ordinal])};
}

void Executor::NeedTiles(size_t buffers, int64_t bytes) {
  if (tiles_.size() < buffers) tiles_.resize(buffers);
  for (std::vector<std::byte>& tile : tiles_) {
    if (static_cast<int64_t>(tile.size()) < bytes + 64) {
      ++stats_->allocations;
      tile.resize(static_cast<size_t>(bytes) + 64);
    }
  }
}

Status Executor::CombineInto(Operation* op, const Step& step, int64_t begin, int64_t count,
                             std::byte* out, bool streaming) {
  terms_.clear();
  bool plain = step.divisor > 0;
  for (const Source& source : step.sources) {
    double weight = source.weight;
    if (source.receive >= 0) {
      weight *=
          op->receives[op->plan->units[op->plan->unit_of_step[source.receive]].ordinal].weight;
    }
    if (weight == 0.0) continue;
    plain = plain && weight == 1.0;
    terms_.push_back({Read(*op, source, begin), weight});
  }
  if (plain) {
    return kernels::SumDivide(op->dtype, count, out, terms_, step.divisor, streaming);
  }
  if (step.divisor > 0) {
    for (kernels::Term& term : terms_) term.weight /= step.divisor;
  }
  return kernels::WeightedSum(op->dtype, count, out, terms_, streaming);
}

// Once: a codec may be random, and the combine must take back exactly what was sent.
Status Executor::Encode(Operation* op, const Step& step, int32_t ordinal) {
  const int64_t count = step.range.count;
  const int64_t most = op->codec->MaxBytes(op->dtype, count);
  const int64_t bytes =
      op->codec->Encode(op->dtype, count, Read(*op, step.sources[0], 0), At(*op, step.range));
  if (bytes < 0 || bytes > most) {
    return absl::InternalError(op->ToString() + ": the codec '" + op->codec->name() + "' wrote " +
                               std::to_string(bytes) + " bytes of " + std::to_string(count) +
                               " elements, at most " + std::to_string(most) + " were announced");
  }
  op->encoded_bytes[ordinal] = bytes;
  return absl::OkStatus();
}

bool Executor::IsCoded(const Operation& op, const Step& step) const {
  return op.codec != nullptr && step.kind == StepKind::kCombine && step.sources.size() > 1 &&
         op.plan->EncodingOf(step) >= 0;
}

// t*x + sum of w_j (Q(x_j) - Q(x)): schedule.h says why.
Status Executor::CombineCoded(Operation* op, const Step& step, int64_t begin, int64_t count,
                              std::byte* out) {
  const Codec& codec = *op->codec;
  const int64_t element = codec.ElementBytes();
  const auto part = [&](std::span<const std::byte> bytes) {
    return element == 0 ? bytes
                        : bytes.subspan(static_cast<size_t>(begin * element),
                                        static_cast<size_t>(count * element));
  };
  messages_.clear();
  const std::byte* mine = nullptr;
  double total = 0.0;
  for (const Source& source : step.sources) {
    double weight = source.weight;
    if (source.receive < 0) {
      mine = Read(*op, source, begin);
    } else {
      const Operation::Receive& r =
          op->receives[op->plan->units[op->plan->unit_of_step[source.receive]].ordinal];
      weight *= r.weight;
      if (weight != 0.0) {
        messages_.push_back({r.view.peer, part({r.data, static_cast<size_t>(r.bytes)}), weight});
      }
    }
    total += weight;
  }
  if (step.divisor > 0) {
    total /= step.divisor;
    for (Codec::Message& message : messages_) message.weight /= step.divisor;
  }
  return codec.Mix(op->dtype, count, out, total, mine, part(Bytes(*op, step)), messages_);
}

Status Executor::ComputeGroup(Operation* op, const Plan::Unit& unit) {
  const auto& steps = op->plan->schedule.steps;
  const int32_t combines = unit.count - 1;
  const Range& range = steps[unit.first + combines].range;
  // What can be decoded as a whole only has the whole chunk for its tile.
  const bool whole = IsCoded(*op, steps[unit.first]) && op->codec->ElementBytes() == 0;
  const int64_t tile =
      whole ? range.count : std::max<int64_t>(64, config_.tile_bytes / op->element_bytes);
  NeedTiles(static_cast<size_t>(combines), std::min(tile, range.count) * op->element_bytes);
  mixed_.resize(static_cast<size_t>(combines));
  for (int64_t begin = 0; begin < range.count; begin += tile) {
    const int64_t count = std::min(tile, range.count - begin);
    for (int32_t i = 0; i < combines; ++i) {
      const Step& step = steps[unit.first + i];
      if (step.kind == StepKind::kCopy) {
        mixed_[i] = Read(*op, step.sources[0], begin);
        continue;
      }
      std::byte* out = tiles_[i].data();
      out += (64 - reinterpret_cast<uintptr_t>(out) % 64) % 64;
      Status status = IsCoded(*op, step) ? CombineCoded(op, step, begin, count, out)
                                         : CombineInto(op, step, begin, count, out, false);
      if (!status.ok()) return About(*op, status);
      mixed_[i] = out;
    }
    if (Status status = op->hooks->Consume(range.begin + begin, count, mixed_); !status.ok()) {
      return status;
    }
  }
  return absl::OkStatus();
}

Status Executor::Compute(Operation* op, const Plan::Unit& unit) {
  const auto& steps = op->plan->schedule.steps;
  const Step& step = steps[unit.first];
  const auto failpoint = [&](const char* name) {
    return FailpointHit(name) ? absl::InternalError(op->ToString() + ": failpoint " + name)
                              : absl::OkStatus();
  };
  // Messages whose sender gave up meanwhile must not have been used. Its reason follows.
  const auto look_again = [&] {
    for (int32_t s = unit.first; s < unit.first + unit.count; ++s) {
      for (const Source& source : steps[s].sources) {
        if (source.receive < 0) continue;
        const auto& r =
            op->receives[op->plan->units[op->plan->unit_of_step[source.receive]].ordinal];
        if (r.held && r.fetched == nullptr && r.copy.empty() &&
            !peers_[r.view.peer]->Intact(r.view)) {
          Break(op, r.view.peer);
        }
      }
    }
  };
  if (unit.count > 1) {
    if (Status s = failpoint("engine.before_consume"); !s.ok()) return s;
    const TraceSpan span(trace_, "COMBINE+CONSUME", *op, step.range.begin);
    if (Status status = ComputeGroup(op, unit); !status.ok()) return status;
    look_again();
    return absl::OkStatus();
  }
  const int64_t tile = std::max<int64_t>(64, config_.tile_bytes / op->element_bytes);
  switch (step.kind) {
    case StepKind::kProduce: {
      if (Status s = failpoint("engine.before_produce"); !s.ok()) return s;
      const TraceSpan span(trace_, "PRODUCE", *op, step.range.begin);
      for (int64_t begin = 0; begin < step.range.count; begin += tile) {
        op->hooks->Produce(step.range.begin + begin, std::min(tile, step.range.count - begin));
      }
      return absl::OkStatus();
    }
    case StepKind::kCombine: {
      if (Status s = failpoint("engine.before_combine"); !s.ok()) return s;
      const TraceSpan span(trace_, "COMBINE", *op, step.range.begin);
      std::byte* out = At(*op, step.range);
      const bool streaming =
          op->hooks == nullptr &&
          active_bytes_ * static_cast<int64_t>(step.sources.size() + 1) > kStreamingBytes;
      Status status = IsCoded(*op, step)
                          ? CombineCoded(op, step, 0, step.range.count, out)
                          : CombineInto(op, step, 0, step.range.count, out, streaming);
      if (!status.ok()) return About(*op, status);
      look_again();
      return absl::OkStatus();
    }
    case StepKind::kCopy: {
      if (step.range.role == Role::kCoded) {
        const TraceSpan span(trace_, "ENCODE", *op, step.range.begin);
        return Encode(op, step, unit.ordinal);
      }
      const TraceSpan span(trace_, "COPY", *op, step.range.begin);
      std::byte* out = At(*op, step.range);
      const std::byte* in = Read(*op, step.sources[0], 0);
      if (out != in && step.range.count > 0) {
        std::memcpy(out, in, static_cast<size_t>(step.range.count * op->element_bytes));
      }
      look_again();
      return absl::OkStatus();
    }
    case StepKind::kMeasure:
    case StepKind::kConsume: {
      const bool consume = step.kind == StepKind::kConsume;
      if (Status s = failpoint(consume ? "engine.before_consume" : "engine.before_combine");
          !s.ok()) {
        return s;
      }
      const TraceSpan span(trace_, consume ? "CONSUME" : "MEASURE", *op, step.range.begin);
      mixed_.resize(static_cast<size_t>(op->plan->schedule.buffers));
      for (int64_t begin = 0; begin < step.range.count; begin += tile) {
        const int64_t count = std::min(tile, step.range.count - begin);
        for (size_t p = 0; p < mixed_.size(); ++p) {
          Range range = step.range;
          range.buffer = static_cast<int16_t>(p);
          mixed_[p] = At(*op, range, begin);
        }
        if (!consume) {
          op->hooks->Measure(unit.ordinal, step.range.begin + begin, count, mixed_);
        } else if (Status s = op->hooks->Consume(step.range.begin + begin, count, mixed_);
                   !s.ok()) {
          return s;
        }
      }
      return absl::OkStatus();
    }
    default:
      return absl::InternalError(op->ToString() + ": step " + collective::NameOf(step.kind) +
                                 " has no executor");
  }
}

}  // namespace bluefog
