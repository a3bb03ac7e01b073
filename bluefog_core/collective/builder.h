// What the planners share: cutting into chunks and appending steps to a schedule.
#pragma once

#include <utility>
#include <vector>

#include "collective/schedule.h"

namespace bluefog::collective {

struct Piece {
  int64_t begin = 0;
  int64_t count = 0;
};

/// Pieces of at most `chunk` elements, in order; one empty piece if count is 0, so that empty
/// tensors are exchanged like others.
std::vector<Piece> Cut(int64_t begin, int64_t count, int64_t chunk);

inline Range At(Role role, Piece piece) { return {role, 0, piece.begin, piece.count}; }
inline Source View(int32_t receive, double weight = 1.0) { return {receive, {}, weight}; }
inline Source Local(Range range, double weight = 1.0) { return {-1, range, weight}; }

/// Every method appends one step and returns its index.
class Builder {
 public:
  Builder(int64_t input_count, int64_t output_count) {
    schedule_.input_count = input_count;
    schedule_.output_count = output_count;
  }

  int32_t Publish(Range range, std::vector<Target> targets, std::vector<int32_t> after = {});
  int32_t Receive(int peer, int32_t message, int64_t count, Role role = Role::kInput);
  int32_t Copy(Range range, Source source, std::vector<int32_t> after = {});
  int32_t Combine(Range range, std::vector<Source> sources, double divisor,
                  std::vector<int32_t> after = {});
  /// Makes room in kScratch, or in kCoded.
  void ReserveScratch(int64_t count) { schedule_.scratch_count = count; }
  void ReserveCoded(int64_t count) { schedule_.coded_count = count; }
  Schedule Finish() && { return std::move(schedule_); }

 private:
  int32_t Append(Step step);
  Schedule schedule_;
};

}  // namespace bluefog::collective
