// Every collective on every kind of graph, size and order of steps: right values, no deadlock,
// nothing read too early or overwritten too soon (the interpreter's checks).
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "collective/test_plans.h"

namespace bluefog::collective {
namespace {

constexpr int64_t kChunk = 16;
// Empty, one element, a single odd chunk, several chunks of which the last is short, whole chunks.
const std::vector<int64_t> kCounts = {0, 1, 7, 101, 64};
const std::vector<int> kSizes = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 31, 32, 48, 64};

std::string Label(const std::string& name, const PlanInput& in) {
  return name + ", n = " + std::to_string(in.size) + ", " + std::to_string(in.count) + " elements" +
         (in.in_place ? ", in place" : "") + (in.coded ? ", coded" : "");
}

/// All counts, in place and not; fewer counts for many ranks, to save time.
template <typename Body>
void ForEachInput(int size, Body body) {
  for (int64_t count : kCounts) {
    if (size > 16 && (count == 1 || count == 64)) continue;
    for (bool in_place : {false, true}) {
      body(PlanInput{.size = size, .count = count, .chunk = kChunk, .in_place = in_place});
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(NeighborAllreduce, AveragesOnEveryGeneratedGraph) {
  for (const TopologyGenerator& generator : TopologyGenerators()) {
    int graphs = 0;
    for (int size : kSizes) {
      const StatusOr<TopologySequence> sequence = generator.make(size);
      if (!sequence.ok()) continue;  // A hypercube of 3 ranks, say.
      for (int64_t round = 0; round < sequence->period(); ++round) {
        const Topology& topology = sequence->at(round);
        ++graphs;
        ForEachInput(size, [&](PlanInput in) {
          const Values inputs = RandomInputs(size, in.count);
          for (in.coded = false;; in.coded = true) {
            ExpectResult(PlanAll(in, topology), inputs, Mixed(topology, inputs),
                         Label(generator.name, in), {.in_place = in.in_place});
            if (in.coded) break;
          }
        });
        if (HasFatalFailure()) return;
      }
    }
    EXPECT_GE(graphs, 6) << generator.name;
  }
}

TEST(NeighborAllreduce, UsesTheColumnOfDirectedWeights) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const int size = 2 + static_cast<int>(seed % 9);
    const Topology topology = RandomDigraph(size, seed);
    ForEachInput(size, [&](PlanInput in) {
      in.coded = seed % 2 == 1;
      const Values inputs = RandomInputs(size, in.count);
      ExpectResult(PlanAll(in, topology), inputs, Mixed(topology, inputs),
                   Label("random digraph", in), {.in_place = in.in_place}, 4);
    });
    if (HasFatalFailure()) return;
  }
}

TEST(NeighborAllreduce, UniformWeightsAreASumAndOneDivision) {
  const Topology ring = *Ring(8);
  ASSERT_TRUE(ring.neighborhood(3).uniform);
  const PlanInput in{.size = 8, .count = 5, .chunk = kChunk};
  const Values inputs = RandomInputs(8, 5);
  const StatusOr<Values> outputs = Interpret(PlanAll(in, ring), inputs);
  ASSERT_TRUE(outputs.ok()) << outputs.status();
  for (size_t rank = 1; rank < 7; ++rank) {
    for (size_t k = 0; k < 5; ++k) {
      const double sum = inputs[rank][k] + inputs[rank - 1][k] + inputs[rank + 1][k];
      EXPECT_EQ((*outputs)[rank][k], sum / 3.0);
    }
  }
}

TEST(NeighborAllreduce, AnInEdgeOfWeightZeroIsReceivedAndDoesNotPoison) {
  // 0 -> 1 with weight 0; 1 takes only its own.
  const Neighborhood sender{.self_weight = 1.0, .in = {}, .out = {{1, 0.0}}, .uniform = true};
  const Neighborhood receiver{.self_weight = 0.5, .in = {{0, 0.0}}, .out = {}, .uniform = false};
  const PlanInput in{.size = 2, .count = 20, .chunk = kChunk};
  const std::vector<Schedule> schedules = PlanAll(in, [&](const PlanInput& rank) {
    return PlanNeighborAllreduce(rank, rank.rank == 0 ? sender : receiver);
  });
  EXPECT_EQ(schedules[1].sources(), std::vector<int>{0});
  for (const Step& step : schedules[1].steps) {
    if (step.kind == StepKind::kCombine) {
      EXPECT_EQ(step.sources.size(), 1u);
    }
  }
  const std::vector<double> nan(20, std::numeric_limits<double>::quiet_NaN());
  const StatusOr<Values> outputs =
      Interpret(schedules, {nan, std::vector<double>(20, 3.0)}, {.allow_unread_views = true});
  ASSERT_TRUE(outputs.ok()) << outputs.status();
  EXPECT_EQ((*outputs)[1], std::vector<double>(20, 1.5));
}

TEST(NeighborAllreduce, SelfWeightZeroLeavesTheOwnTensorOut) {
  const Neighborhood swap0{
      .self_weight = 0.0, .in = {{1, 1.0}}, .out = {{1, 1.0}}, .uniform = false};
  const Neighborhood swap1{
      .self_weight = 0.0, .in = {{0, 1.0}}, .out = {{0, 1.0}}, .uniform = false};
  ForEachInput(2, [&](const PlanInput& in) {
    const std::vector<Schedule> schedules = PlanAll(in, [&](const PlanInput& rank) {
      return PlanNeighborAllreduce(rank, rank.rank == 0 ? swap0 : swap1);
    });
    const Values inputs = RandomInputs(2, in.count);
    ExpectResult(schedules, inputs, {inputs[1], inputs[0]}, Label("swap", in),
                 {.in_place = in.in_place});
  });
}

TEST(NeighborAllreduce, SendersWeightsMultiplyReceivers) {
  const Topology topology = RandomDigraph(7, 3);
  const PlanInput in{.size = 7, .count = 40, .chunk = kChunk};
  auto given = [](int from, int to) { return 0.25 * from + 0.5 * to; };  // 0 on 0 -> 0 only.
  const std::vector<Schedule> schedules = PlanAll(in, [&](const PlanInput& rank) {
    std::vector<double> weights;
    for (const Edge& edge : topology.neighborhood(rank.rank).out) {
      weights.push_back(given(rank.rank, edge.rank));
    }
    return PlanNeighborAllreduce(rank, topology.neighborhood(rank.rank), weights);
  });
  const Values inputs = RandomInputs(7, 40);
  std::vector<double> product = topology.ToMatrix();
  for (int from = 0; from < 7; ++from) {
    for (int to = 0; to < 7; ++to) {
      if (from != to) product[static_cast<size_t>(from * 7 + to)] *= given(from, to);
    }
  }
  ExpectResult(schedules, inputs, Mixed(*Topology::FromMatrix(7, product), inputs), "weights");
}

TEST(NeighborAllreduce, WithoutNeighboursTheResultIsTheWeightedInput) {
  for (double weight : {1.0, 0.25, 0.0}) {
    const Neighborhood alone{.self_weight = weight, .in = {}, .out = {}, .uniform = false};
    ForEachInput(1, [&](const PlanInput& in) {
      const Values inputs = RandomInputs(1, in.count);
      Values expected = inputs;
      for (double& x : expected[0]) x *= weight;
      ExpectResult({PlanNeighborAllreduce(in, alone)}, inputs, expected, Label("alone", in),
                   {.in_place = in.in_place});
    });
  }
}

TEST(NeighborAllreduce, CodedMessagesLeaveAndArriveEncoded) {
  const Topology topology = RandomDigraph(6, 5);
  const PlanInput in{.size = 6, .count = 101, .chunk = kChunk, .coded = true};
  int messages = 0;
  for (const Schedule& schedule : PlanAll(in, topology)) {
    for (const Step& step : schedule.steps) {
      if (step.kind != StepKind::kPublish && step.kind != StepKind::kReceive) continue;
      EXPECT_EQ(step.range.role, Role::kCoded);
      ++messages;
    }
  }
  EXPECT_GT(messages, 0);
}

// One end of an edge cannot read what the other does not encode.
TEST(NeighborAllreduce, BothEndsOfAnEdgeCode) {
  const Topology ring = *Ring(3);
  const Values inputs = RandomInputs(3, 20);
  std::vector<Schedule> schedules = PlanAll({.size = 3, .count = 20, .chunk = kChunk}, ring);
  schedules[1] = PlanNeighborAllreduce(
      {.rank = 1, .size = 3, .count = 20, .chunk = kChunk, .coded = true}, ring.neighborhood(1));
  const StatusOr<Values> outputs = Interpret(schedules, inputs);
  ASSERT_FALSE(outputs.ok());
  EXPECT_NE(outputs.status().message().find("encoded for one of both ends"), std::string::npos);
}

TEST(NeighborAllreduce, SendsOneMessagePerChunkAndEdgeAlsoWhenEmpty) {
  const Topology topology = *Exponential(8);
  const std::vector<std::pair<int64_t, int>> cases = {{0, 1}, {16, 1}, {17, 2}, {101, 7}};
  for (const auto& [count, chunks] : cases) {
    const PlanInput in{.size = 8, .count = count, .chunk = kChunk};
    for (const Schedule& schedule : PlanAll(in, topology)) {
      int publishes = 0;
      for (const Step& step : schedule.steps) {
        if (step.kind != StepKind::kPublish) continue;
        ++publishes;
        EXPECT_EQ(step.targets.size(), 3u);  // One publish serves all out-neighbours.
      }
      EXPECT_EQ(publishes, chunks);
    }
  }
}

TEST(Allreduce, SumsWithTheSameBitsEverywhere) {
  for (int size : kSizes) {
    for (bool one_shot : {true, false}) {
      for (bool average : {true, false}) {
        ForEachInput(size, [&](const PlanInput& in) {
          const std::vector<Schedule> schedules = PlanAll(
              in, [&](const PlanInput& rank) { return PlanAllreduce(rank, average, one_shot); });
          const Values inputs = RandomInputs(size, in.count);
          std::vector<double> expected = Sum(inputs);
          for (double& x : expected) x /= average ? size : 1;
          const StatusOr<Values> outputs = Interpret(schedules, inputs, {.in_place = in.in_place});
          const std::string label = Label(one_shot ? "one shot" : "sharded", in);
          ASSERT_TRUE(outputs.ok()) << label << ": " << outputs.status();
          for (const std::vector<double>& output : *outputs) ASSERT_EQ(output, expected) << label;
        });
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Allreduce, ShardsSpreadTheBytesEvenly) {
  const PlanInput in{.size = 8, .count = 8000, .chunk = 512};
  for (const Schedule& schedule : PlanAll(in, [](const PlanInput& rank) {
         return PlanAllreduce(rank, true, /*one_shot=*/false);
       })) {
    int64_t sent = 0, largest = 0;
    for (const Step& step : schedule.steps) {
      sent += step.range.count * static_cast<int64_t>(step.targets.size());
      if (!step.targets.empty()) largest = std::max(largest, step.range.count);
    }
    EXPECT_NEAR(static_cast<double>(sent), 2.0 * 7 / 8 * 8000, 8 * 16);
    EXPECT_LE(largest, 512);
  }
}

TEST(Allreduce, RanksDoNotAllSendToTheSameRankFirst) {
  for (bool one_shot : {true, false}) {
    std::set<int> first;
    const PlanInput in{.size = 8, .count = 800, .chunk = kChunk};
    for (const Schedule& schedule :
         PlanAll(in, [&](const PlanInput& rank) { return PlanAllreduce(rank, true, one_shot); })) {
      for (const Step& step : schedule.steps) {
        if (step.kind != StepKind::kPublish) continue;
        first.insert(step.targets[0].peer);
        break;
      }
    }
    EXPECT_EQ(first.size(), 8u);
  }
}

TEST(Broadcast, GivesAllRanksTheRootsInput) {
  for (int size : kSizes) {
    for (int root : std::set<int>{0, 1 % size, size / 2, size - 1}) {
      ForEachInput(size, [&](const PlanInput& in) {
        const std::vector<Schedule> schedules =
            PlanAll(in, [&](const PlanInput& rank) { return PlanBroadcast(rank, root); });
        const Values inputs = RandomInputs(size, in.count);
        ExpectResult(schedules, inputs,
                     Values(static_cast<size_t>(size), inputs[static_cast<size_t>(root)]),
                     Label("root " + std::to_string(root), in), {.in_place = in.in_place});
      });
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Broadcast, IsALogarithmicTree) {
  const PlanInput in{.size = 64, .count = 1, .chunk = kChunk};
  for (const Schedule& schedule :
       PlanAll(in, [](const PlanInput& rank) { return PlanBroadcast(rank, 5); })) {
    EXPECT_LE(schedule.sources().size(), 1u);
    EXPECT_LE(schedule.destinations().size(), 6u);
  }
}

TEST(Allgather, PutsInputsInRankOrder) {
  for (int size : kSizes) {
    for (int64_t count : kCounts) {
      if (size > 16 && count == 101) continue;
      const PlanInput in{.size = size, .count = count, .chunk = kChunk};
      const Values inputs = RandomInputs(size, count);
      std::vector<double> all;
      for (const std::vector<double>& input : inputs) {
        all.insert(all.end(), input.begin(), input.end());
      }
      ExpectResult(PlanAll(in, PlanAllgather), inputs, Values(static_cast<size_t>(size), all),
                   Label("allgather", in));
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Barrier, NoRankLeavesBeforeAllHaveCome) {
  for (int size : kSizes) {
    const std::vector<Schedule> schedules = PlanAll({.size = size}, PlanBarrier);
    ExpectResult(schedules, Values(static_cast<size_t>(size)), Values(static_cast<size_t>(size)),
                 Label("barrier", {.size = size}));
    // knows[rank][step]: the ranks that must have come for this step to be done. A message brings
    // what its sender had to wait for.
    using Ranks = std::set<int>;
    std::vector<std::vector<Ranks>> knows;
    for (const Schedule& schedule : schedules) knows.emplace_back(schedule.steps.size());
    auto learn = [&](int rank, size_t i) {
      const Schedule& schedule = schedules[static_cast<size_t>(rank)];
      Ranks& known = knows[static_cast<size_t>(rank)][i];
      const size_t before = known.size();
      known.insert(rank);
      for (int32_t after : schedule.steps[i].after) {
        const Ranks& more = knows[static_cast<size_t>(rank)][static_cast<size_t>(after)];
        known.insert(more.begin(), more.end());
      }
      for (const Target& target : schedule.steps[i].targets) {
        const auto peer = static_cast<size_t>(target.peer);
        for (size_t k = 0; k < schedules[peer].steps.size(); ++k) {
          const Step& step = schedules[peer].steps[k];
          if (step.kind == StepKind::kReceive && step.peer == rank) {
            knows[peer][k].insert(known.begin(), known.end());
          }
        }
      }
      return known.size() > before;
    };
    for (bool more = true; more;) {
      more = false;
      for (int rank = 0; rank < size; ++rank) {
        for (size_t i = 0; i < knows[static_cast<size_t>(rank)].size(); ++i) {
          if (schedules[static_cast<size_t>(rank)].steps[i].kind == StepKind::kPublish) {
            more = learn(rank, i) || more;
          }
        }
      }
    }
    for (int rank = 0; rank < size; ++rank) {
      Ranks all = {rank};
      for (const Ranks& known : knows[static_cast<size_t>(rank)]) {
        all.insert(known.begin(), known.end());
      }
      ASSERT_EQ(all.size(), static_cast<size_t>(size)) << "rank " << rank << " of " << size;
    }
  }
}

TEST(Schedule, PrintsOneLinePerStep) {
  const PlanInput in{.rank = 1, .size = 2, .count = 20, .chunk = kChunk};
  EXPECT_EQ(PlanBroadcast(in, 0).ToString(),
            "#0 receive message 0 of rank 0, 16\n"
            "#1 copy output[0] 0+16 = #0\n"
            "#2 receive message 1 of rank 0, 4\n"
            "#3 copy output[0] 16+4 = #2\n");
}

}  // namespace
}  // namespace bluefog::collective
