#include "engine/bucket.h"

#include <algorithm>
#include <utility>

#include <bluefog/elementwise.h>

#include "base/hash.h"
#include "engine/hyper.h"

namespace bluefog {

void OptimizerShared::Fail(const Status& status) {
  MutexLock lock(mu);
  if (failure.ok()) failure = status;
}

void BucketStep::Begin(const StepContext& ctx, std::shared_ptr<const Plan> plan, Mode mode,
                       bool consume_open, uint64_t plan_hash) {
  in_use_.store(true, std::memory_order_release);
  ctx_ = ctx;
  plan_ = std::move(plan);
  mode_ = mode;
  exchanged_before_ = std::exchange(bucket_->exchanged, ctx.exchanged);
  scratch_ = bucket_->scratch[slot()];
  consume_open_ = consume_open;
  plan_hash_ = plan_hash;
  hyper_ = shared_->hypers[static_cast<size_t>(bucket_->group)];
  op_ = nullptr;
  produced_ = consumed_ = reduced_ = false;
  const auto measures = static_cast<size_t>(shared_->plugin->traits().measures);
  if (shared_->plugin->traits().measure_scope == MeasureScope::kParameter) {
    totals_.assign(bucket_->params.size() * measures, 0.0);
    partials_.assign(static_cast<size_t>(plan_->measures) * totals_.size(), 0.0);
  }
  shared_->in_flight.fetch_add(1);
}

bool BucketStep::MayProduce() const {
  return bucket_->occupant[slot()] == nullptr &&
         (mode_ == Mode::kAtOnce || bucket_->occupant[slot_before()] == nullptr);
}

void BucketStep::Start(Executor* executor) {
  executor_ = executor;
  const bool wait = !MayProduce() || !bucket_->waiting.empty();
  Operation* op = executor->NewOperation();
  static_cast<Submission&>(*op) = Submission{};
  const int64_t es = SizeOf(bucket_->dtype);
  op->op = Op::kOptimizer;
  op->name = bucket_->name;
  op->key = {bucket_->name->hash, bucket_->uses++};
  op->plan = plan_;
  op->input = TensorView::Of(nullptr, bucket_->count, bucket_->dtype);
  op->layout_hash = op->input.LayoutHash();
  op->dtype = bucket_->dtype;
  op->element_bytes = es;
  for (int p = 0; p < shared_->plugin->traits().payloads; ++p) {
    op->in[p] = bucket_->payload[slot()].get() + p * bucket_->count * es;
    if (bucket_->mixed[slot()] != nullptr) {
      op->out[p] = bucket_->mixed[slot()].get() + p * bucket_->count * es;
    }
  }
  if (plan_->encodings > 0) {
    op->codec = bucket_->codec;
    op->coded_stride = bucket_->coded_stride;
    for (int p = 0; p < shared_->plugin->traits().payloads; ++p) {
      op->coded[p] = bucket_->coded[slot()].get() + p * bucket_->coded_bytes;
    }
  }
  for (int p = 0; scratch_ != nullptr && p < shared_->plugin->traits().payloads; ++p) {
    op->scratch[p] = scratch_.get() + p * plan_->schedule.scratch_count * es;
  }
  op->scratch_memory = std::move(scratch_);
  op->plan_hash = plan_hash_;
  op->value = hyper_.lr;
  op->step = ctx_.step;
  op->description_hash = StableHash()
                             .Add(bucket_->count)
                             .Add(bucket_->dtype)
                             .Add(HashOfRest(shared_->plugin->traits(), hyper_))
                             .value();
  op->dedicated = true;
  op->hooks = this;
  op->produce_open = !wait;
  op->consume_open = consume_open_;
  op_ = op;
  // Whoever is in the way gives it up in OnDone.
  if (wait) {
    bucket_->waiting.push_back(this);
  } else {
    bucket_->occupant[slot()] = this;
  }
  executor->Start(op);
}

void BucketStep::OpenConsume(Executor* executor) {
  consume_open_ = true;
  if (op_ != nullptr) executor->OpenGates(op_, false, true);
}

void BucketStep::Abandon(Executor* executor, const Status& status) {
  if (op_ != nullptr) executor->Abandon(op_, status);
}

std::span<const Segment> BucketStep::Segments(int64_t begin, int64_t count,
                                              std::span<const std::byte* const> mixed) {
  const Traits& traits = shared_->plugin->traits();
  const int64_t es = SizeOf(bucket_->dtype);
  const auto at = [es](auto* base, int64_t offset) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(base)>>,
                                    const std::byte, std::byte>;
    return base == nullptr ? nullptr : static_cast<Byte*>(base) + offset * es;
  };
  segments_.clear();
  const auto& offsets = bucket_->offsets;
  auto i = static_cast<size_t>(std::upper_bound(offsets.begin(), offsets.end(), begin) -
                               offsets.begin() - 1);
  const std::byte* payload = bucket_->payload[slot()].get();
  for (int64_t done = 0; done < count; ++i) {
    const int64_t position = begin + done;
    Segment s;
    s.param = bucket_->params[i];
    s.offset = position - offsets[i];
    s.n = std::min(count - done, offsets[i + 1] - position);
    if (s.n == 0) continue;  // An empty parameter.
    const ParameterBinding& binding = shared_->bindings[static_cast<size_t>(s.param)];
    s.x = at(binding.x, s.offset);
    s.g = binding.g == nullptr ? shared_->zeros.data() : at(binding.g, s.offset);
    for (size_t k = 0; k < traits.states.size(); ++k) s.state[k] = at(binding.state[k], s.offset);
    for (int p = 0; p < traits.payloads; ++p) {
      s.payload[p] = const_cast<std::byte*>(payload) + (p * bucket_->count + position) * es;
      if (!mixed.empty()) s.mixed[p] = mixed[p] + done * es;
    }
    const auto group = static_cast<size_t>(bucket_->group);
    s.hyper = binding.g == nullptr ? &shared_->hypers_no_decay[group] : &shared_->hypers[group];
    if (traits.measure_scope == MeasureScope::kModel) {
      s.measure = shared_->model_measure.data();
    } else if (traits.measure_scope == MeasureScope::kParameter) {
      s.measure = totals_.data() + i * static_cast<size_t>(traits.measures);
    }
    segments_.push_back(s);
    done += s.n;
  }
  return segments_;
}

void BucketStep::Produce(int64_t begin, int64_t count) {
  if (mode_ == Mode::kAtOnce || mode_ == Mode::kEarly) {
    const std::span<const Segment> segments = Segments(begin, count, {});
    shared_->plugin->Produce(ctx_, segments);
    CountNonFinite(segments);
    return;
  }
  if (mode_ == Mode::kUpdated) Update(begin, count);
  for (const Segment& s : Segments(begin, count, {})) {
    elementwise::Copy(ctx_.dtype, s.n, s.payload[0], s.x);
  }
}

void BucketStep::Update(int64_t begin, int64_t count) {
  const int64_t es = SizeOf(bucket_->dtype);
  std::byte* average = bucket_->mixed[slot_before()].get() + begin * es;
  const std::byte* sent = bucket_->payload[slot_before()].get() + begin * es;
  StepContext ctx = ctx_;
  --ctx.step;
  ctx.exchanged = exchanged_before_;
  // What the caller did to x since it was sent stays: x + (W sent - sent).
  elementwise::Sub(ctx.dtype, count, average, average, sent);
  Segments(begin, count, {});
  for (Segment& s : segments_) {
    elementwise::Add(ctx.dtype, s.n, average, average, s.x);
    s.x = std::exchange(average, average + s.n * es);
  }
  shared_->plugin->Produce(ctx, segments_);
  CountNonFinite(segments_);
  const std::byte* made = bucket_->payload[slot()].get() + begin * es;
  const Status status = shared_->plugin->Consume(ctx, Segments(begin, count, {&made, 1}));
  if (!status.ok()) shared_->Fail(status);
}

void BucketStep::CountNonFinite(std::span<const Segment> segments) {
  int64_t bad = 0;
  for (const Segment& s : segments) {
    if (s.g != shared_->zeros.data() && s.g != nullptr) {
      bad += elementwise::CountNonFinite(ctx_.dtype, s.n, s.g);
    }
  }
  if (bad > 0) shared_->engine->CountNonFinite(bad);
}

void BucketStep::Measure(int ordinal, int64_t begin, int64_t count,
                         std::span<const std::byte* const> mixed) {
  Segments(begin, count, mixed);
  // Partials of their own for each measure step, so that the order of arrival does not matter.
  const auto shift = static_cast<std::ptrdiff_t>(static_cast<size_t>(ordinal) * totals_.size());
  for (Segment& s : segments_) s.measure = partials_.data() + shift + (s.measure - totals_.data());
  shared_->plugin->Measure(ctx_, segments_);
}

Status BucketStep::Consume(int64_t begin, int64_t count, std::span<const std::byte* const> mixed) {
  if (!partials_.empty() && !reduced_) {
    reduced_ = true;
    for (size_t i = 0; i < partials_.size(); ++i) totals_[i % totals_.size()] += partials_[i];
  }
  return shared_->plugin->Consume(ctx_, Segments(begin, count, mixed));
}

void BucketStep::OnProduced() {
  produced_ = true;
  shared_->CountProduced();
}

void BucketStep::OnConsumed() {
  consumed_ = true;
  shared_->CountConsumed();
}

void BucketStep::OnDone(const Status& status) {
  if (!status.ok()) shared_->Fail(status);
  if (!produced_) shared_->CountProduced();
  if (!consumed_ && plan_->consumes > 0) shared_->CountConsumed();
  op_ = nullptr;
  if (bucket_->occupant[slot()] == this) bucket_->occupant[slot()] = nullptr;
  std::vector<BucketStep*>& waiting = bucket_->waiting;
  std::erase(waiting, this);
  if (BucketStep* next = waiting.empty() ? nullptr : waiting.front();
      next != nullptr && next->MayProduce()) {
    bucket_->occupant[next->slot()] = next;
    waiting.erase(waiting.begin());
    executor_->OpenGates(next->op_, true, false);
  }
  std::vector<int> peers;
  if (!status.ok()) peers = plan_->peers;
  plan_ = nullptr;
  in_use_.store(false, std::memory_order_release);
  if (!status.ok()) {
    // The optimizer has failed. Nobody is to wait for a later step of it.
    for (NameEntry* const name : shared_->bucket_names) {
      executor_->Condemn(
          name, status,
          name == bucket_->name ? std::span<const int>(peers) : std::span<const int>());
    }
  }
  if (shared_->in_flight.fetch_sub(1) == 1) shared_->quiet.Set();
}

std::string BucketStep::Label() const {
  const auto name = [&](int param) {
    return "'" + shared_->params[static_cast<size_t>(param)].name + "'";
  };
  std::string text = shared_->plugin->traits().name + ", parameter" +
                     (bucket_->params.size() > 1 ? "s " : " ") + name(bucket_->params.back());
  if (bucket_->params.size() > 1) text += " … " + name(bucket_->params.front());
  return text;
}

std::string BucketStep::Describe() const {
  const Traits& traits = shared_->plugin->traits();
  return traits.name + " " + bluefog::NameOf(bucket_->dtype) + "[" +
         std::to_string(bucket_->count) + "], " +
         bluefog::ToString(traits, hyper_, /*learning_rate=*/false);
}

}  // namespace bluefog
