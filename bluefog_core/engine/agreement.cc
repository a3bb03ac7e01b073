#include "engine/agreement.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "base/hash.h"

namespace bluefog {
namespace {

std::string OperationName(const std::string& optimizer, const char* what) {
  return optimizer + "." + what;
}

class Agreement {
 public:
  Agreement(Engine* engine, const std::string& name, const std::function<bool()>& interrupted)
      : engine_(engine), name_(name), interrupted_(interrupted) {}

  /// Everybody's numbers, as many from each, in rank order.
  StatusOr<std::vector<int64_t>> Gather(const std::vector<int64_t>& mine, const char* what) const {
    OpSpec spec;
    spec.op = Op::kAllgather;
    spec.name = OperationName(name_, what);
    // The engine's until the operation is over, which it may not be when this one gives up.
    struct Memory {
      std::vector<int64_t> mine, all;
    };
    const auto memory = std::make_shared<Memory>();
    memory->mine = mine;
    memory->all.resize(mine.size() * static_cast<size_t>(engine_->place().size));
    spec.input =
        TensorView::Of(memory->mine.data(), static_cast<int64_t>(mine.size()), DType::kInt64);
    spec.output =
        TensorView::Of(memory->all.data(), static_cast<int64_t>(memory->all.size()), DType::kInt64);
    spec.keep_alive = memory;
    StatusOr<std::shared_ptr<Work>> work = engine_->Submit(std::move(spec));
    if (!work.ok()) return work.status();
    while (!(*work)->done()) {
      (void)(*work)->Wait(std::chrono::milliseconds(100));
      if (!(*work)->done() && interrupted_ && interrupted_()) {
        return absl::CancelledError("interrupted while the ranks agree on the optimizer");
      }
    }
    if (Status s = (*work)->Wait(); !s.ok()) return s;
    return std::move(memory->all);
  }

  /// All ranks see the same difference, and tell each other what they have there.
  Status Differ(const std::string& what, std::string mine, int other,
                const std::string& cure = "") const {
    constexpr size_t kWords = 32;
    mine.resize(kWords * 8 - 1);
    std::vector<int64_t> words(kWords, 0);
    std::copy(mine.begin(), mine.end(), reinterpret_cast<char*>(words.data()));
    const auto all = Gather(words, "difference");
    if (!all.ok()) return all.status();
    const auto text_of = [&](int r) {
      return std::string(
          reinterpret_cast<const char*>(all->data() + static_cast<size_t>(r) * kWords));
    };
    return absl::InvalidArgumentError("optimizer: the ranks do not agree: " + what + text_of(0) +
                                      " on rank 0 and " + text_of(other) + " on rank " +
                                      std::to_string(other) + cure);
  }

 private:
  Engine* const engine_;
  const std::string& name_;
  const std::function<bool()>& interrupted_;
};

int64_t Bits(const StableHash& hash) { return static_cast<int64_t>(hash.value()); }

int64_t HashOf(const ParameterInfo& p) {
  return Bits(StableHash()
                  .Add(std::string_view(p.name))
                  .Add(p.count)
                  .Add(p.dtype)
                  .Add(p.group)
                  .Add(p.layout_hash));
}

// What every rank says first.
enum Head : size_t { kCount, kStep, kPlugin, kSettings, kHeadLength };
constexpr const char* kHead = "head";

}  // namespace

Status AgreeOnOptimizer(Engine* engine, const std::string& name, const std::string& plugin,
                        const std::string& settings, int64_t step,
                        std::span<const ParameterInfo> params,
                        const std::function<bool()>& interrupted) {
  const int size = engine->place().size;
  if (size == 1) return absl::OkStatus();
  const Agreement agreement(engine, name, interrupted);
  const auto count = static_cast<int64_t>(params.size());
  const auto heads =
      agreement.Gather({count, step, Bits(StableHash().Add(std::string_view(plugin))),
                        Bits(StableHash().Add(std::string_view(settings)))},
                       kHead);
  if (absl::IsDeadlineExceeded(heads.status())) {
    return absl::DeadlineExceededError(
        "optimizer '" + plugin + "' with " + std::to_string(count) +
        " parameters: not all ranks make it. Optimizers are made, and models changed, on all ranks "
        "alike and in the same order. (" +
        std::string(heads.status().message()) + ")");
  }
  if (!heads.ok()) return heads.status();
  const auto head = [&](int r, Head field) {
    return (*heads)[static_cast<size_t>(r) * kHeadLength + field];
  };
  int64_t least = count;
  std::string counts;
  for (int r = 0; r < size; ++r) {
    least = std::min(least, head(r, kCount));
    if (head(r, kCount) != head(0, kCount) && counts.empty()) {
      counts = std::to_string(head(0, kCount)) + " parameters on rank 0, " +
               std::to_string(head(r, kCount)) + " on rank " + std::to_string(r) + "; ";
    }
    if (head(r, kStep) != head(0, kStep)) {
      return agreement.Differ("step ", std::to_string(step), r,
                              " (load the same checkpoint everywhere)");
    }
    if (head(r, kPlugin) != head(0, kPlugin)) {
      return agreement.Differ("plugin ", "'" + plugin + "'", r);
    }
    if (head(r, kSettings) != head(0, kSettings)) {
      return agreement.Differ("settings ", "'" + settings + "'", r);
    }
  }
  std::vector<int64_t> hashes;
  for (int64_t i = 0; i < least; ++i) hashes.push_back(HashOf(params[static_cast<size_t>(i)]));
  const auto all = agreement.Gather(hashes, "parameters");
  if (!all.ok()) return all.status();
  // The first parameter that differs; of different numbers at the latest where one list ends.
  for (size_t i = 0; i < hashes.size() || !counts.empty(); ++i) {
    const bool ends = i == hashes.size();
    for (int r = 1; r < size; ++r) {
      const bool same = ends ? (head(r, kCount) > least) == (head(0, kCount) > least)
                             : (*all)[static_cast<size_t>(r) * hashes.size() + i] == (*all)[i];
      if (same) continue;
      std::string mine = "missing";
      if (i < params.size()) {
        const ParameterInfo& p = params[i];
        mine = "'" + p.name + "' " + p.layout + " (group " + std::to_string(p.group) + ")";
      }
      return agreement.Differ(counts + "parameter " + std::to_string(i) + " is ", mine, r);
    }
  }
  return absl::OkStatus();
}

void DeclineOptimizer(Engine* engine, const std::string& name, const Status& why) {
  OpSpec spec;
  spec.op = Op::kAllgather;
  spec.name = OperationName(name, kHead);
  const std::string where = "rank " + std::to_string(engine->place().rank) + ": ";
  const std::string text(why.message());
  engine->Decline(spec, Status(why.code(), "an optimizer cannot be made: " +
                                               (text.starts_with(where) ? "" : where) + text));
}

Status AgreeOnSuccess(Engine* engine, const std::string& name, const Status& mine,
                      const std::function<bool()>& interrupted) {
  if (engine->place().size == 1) return mine;
  const auto all = Agreement(engine, name, interrupted).Gather({mine.ok() ? 1 : 0}, "success");
  if (!mine.ok()) return mine;
  if (!all.ok()) return all.status();
  const auto failed = std::find(all->begin(), all->end(), 0);
  if (failed == all->end()) return absl::OkStatus();
  return absl::AbortedError("optimizer: it could not be made on rank " +
                            std::to_string(failed - all->begin()) + ", whose error says why");
}

}  // namespace bluefog
