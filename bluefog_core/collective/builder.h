// What the planners share: cutting into chunks and appending steps to a schedule.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "collective/schedule.h"

namespace bluefog::collective {

struct Piece {
  int64_t begin = 0;
  int64_t count = 0;
  int part = 0;  ///< See CutShards.
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
  /// The same under the next message number of each edge, with the edges' weights. Both ends must
  /// append what they exchange in the same order.
  int32_t Send(Range range, const std::vector<Edge>& to, std::vector<int32_t> after = {});
  int32_t ReceiveNext(int peer, int64_t count, Role role = Role::kInput) {
    return Receive(peer, next_from_[peer]++, count, role);
  }
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
  std::map<int, int32_t> next_to_, next_from_;  ///< Message numbers, by peer.
};

/// Where a rank sends to, with the weights that go with its messages: 1 if none were given.
inline std::vector<Edge> SendEdges(const Neighborhood& neighborhood,
                                   const std::vector<double>& send_weights) {
  std::vector<Edge> edges = neighborhood.out;
  for (size_t k = 0; k < edges.size(); ++k) {
    edges[k].weight = send_weights.empty() ? 1.0 : send_weights[k];
  }
  return edges;
}

/// The addends of self*mine + sum over in-edges, self first; `view` receives what an edge brings.
/// `keep_self`: also with weight 0.
struct Mixture {
  std::vector<Source> addends;
  double divisor = 0.0;
};
template <typename ViewOf>
Mixture MixtureOf(const Neighborhood& neighborhood, Range mine, ViewOf view,
                  bool keep_self = false) {
  const bool uniform = neighborhood.uniform && !neighborhood.in.empty();
  Mixture mixture;
  if (uniform) mixture.divisor = static_cast<double>(neighborhood.in.size() + 1);
  if (neighborhood.self_weight != 0.0 || keep_self) {
    mixture.addends.push_back(Local(mine, uniform ? 1.0 : neighborhood.self_weight));
  }
  for (const Edge& edge : neighborhood.in) {
    const int32_t receive = view(edge);  // Also of an edge that is left out.
    if (edge.weight != 0.0) mixture.addends.push_back(View(receive, uniform ? 1.0 : edge.weight));
  }
  return mixture;
}

}  // namespace bluefog::collective
