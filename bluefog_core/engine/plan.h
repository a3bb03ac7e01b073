// A Schedule made ready for replay: its steps grouped into units (what the executor runs at once),
// with their dependencies counted. Immutable and shared by all operations of the same kind and
// shape.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "collective/schedule.h"

namespace bluefog {

struct Plan {
  /// One step, or the steps of one group.
  struct Unit {
    int32_t first = 0, count = 1;  ///< Steps.
    int32_t pending = 0;           ///< Units that must be done before.
    int32_t dependents_begin = 0, dependents_end = 0;
    int32_t ordinal = -1;  ///< Among the receives, publishes, measures or encodings.
    int32_t users = 0;     ///< Receives: units that read the view.
    bool consume = false;  ///< Contains a consume.
    bool answers = false;  ///< Makes a part of the result: consumes; or writes, if none does.
  };
  /// Messages from one peer: unit of the receive, by message number.
  struct Inbound {
    int peer = -1;
    std::vector<int32_t> receives;
    float weight = 0.0f;  ///< Of the topology for this edge; 0: of the call, nobody compares it.
  };

  collective::Schedule schedule;
  std::vector<Unit> units;
  std::vector<int32_t> dependents;
  std::vector<int32_t> unit_of_step;
  std::vector<int32_t> publish_units;  ///< By ordinal.
  std::vector<Inbound> inbound;        ///< Ascending by peer.
  std::vector<int> destinations;       ///< Ascending.
  std::vector<float> edge_weights;     ///< By destination, like Inbound::weight; or empty.
  std::vector<int> peers;              ///< Union of both, ascending.
  int receives = 0, publishes = 0, produces = 0, consumes = 0, answers = 0, measures = 0,
      encodings = 0;
  int64_t largest_message = 0, largest_coded = 0;  ///< Elements.

  /// The first unit that reads what this receive brings; -1 if none does.
  int32_t FirstUser(int32_t unit) const {
    const Unit& u = units[unit];
    return u.dependents_begin == u.dependents_end ? -1 : dependents[u.dependents_begin];
  }
  /// Of the step that encodes what `step` publishes, or what it mixes with others' messages; -1 if
  /// it is not coded.
  int32_t EncodingOf(const collective::Step& step) const;
  /// Index into inbound, or -1.
  int InboundOf(int peer) const;
  /// Index into destinations, or -1.
  int DestinationOf(int peer) const;
};

/// `edges`: of the topology, if both ends of an edge must have the same weight; or null. Internal
/// error if the schedule is not sorted.
StatusOr<std::shared_ptr<const Plan>> MakePlan(collective::Schedule schedule,
                                               const Neighborhood* edges = nullptr);

/// Whom a rank sends to or receives from, ascending, each once.
std::vector<int> PeersOf(const Neighborhood& neighborhood);

}  // namespace bluefog
