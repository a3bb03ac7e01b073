// Schedules of optimizers: every payload is mixed, every element produced and consumed once,
// through tiles where that is possible.
#include <algorithm>

#include "collective/test_plans.h"

namespace bluefog::collective {
namespace {

constexpr int64_t kChunk = 16;
const std::vector<int> kSizes = {1, 2, 3, 5, 8, 16};
const std::vector<int64_t> kCounts = {1, 7, 101, 160};

enum class Kind { kNeighbors, kDirected, kCoded, kOneShot, kSharded, kLocal };

Topology TopologyOf(Kind kind, int size) {
  return kind == Kind::kNeighbors ? *Exponential(size) : RandomDigraph(size, 11);
}

Schedule PlanExchange(Kind kind, PlanInput in) {
  in.coded = kind == Kind::kCoded;
  switch (kind) {
    case Kind::kNeighbors:
    case Kind::kDirected:
    case Kind::kCoded:
      return PlanNeighborAllreduce(in, TopologyOf(kind, in.size).neighborhood(in.rank));
    case Kind::kOneShot:
      return PlanAllreduce(in, true, true);
    case Kind::kSharded:
      return PlanAllreduce(in, true, false);
    case Kind::kLocal:
      return PlanLocal(in);
  }
  return {};
}

Values ExpectedMix(Kind kind, const Values& inputs) {
  switch (kind) {
    case Kind::kNeighbors:
    case Kind::kDirected:
    case Kind::kCoded:
      return Mixed(TopologyOf(kind, static_cast<int>(inputs.size())), inputs);
    case Kind::kOneShot:
    case Kind::kSharded: {
      std::vector<double> mean = Sum(inputs);
      for (double& x : mean) x /= static_cast<double>(inputs.size());
      return Values(inputs.size(), mean);
    }
    case Kind::kLocal:
      return inputs;
  }
  return {};
}

template <typename Body>
void ForEachExchange(Body body) {
  for (Kind kind : {Kind::kNeighbors, Kind::kDirected, Kind::kCoded, Kind::kOneShot, Kind::kSharded,
                    Kind::kLocal}) {
    for (int size : kSizes) {
      for (int64_t count : kCounts) {
        body(kind, PlanInput{.size = size, .count = count, .chunk = kChunk});
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

std::vector<Schedule> PlanAll(Kind kind, const PlanInput& in, const PluginPlan& plan) {
  return PlanAll(in,
                 [&](const PlanInput& rank) { return WithPlugin(PlanExchange(kind, rank), plan); });
}

int64_t CountElements(const Schedule& schedule, StepKind kind, Role role) {
  int64_t count = 0;
  for (const Step& step : schedule.steps) {
    if (step.kind == kind && step.range.role == role) count += step.range.count;
  }
  return count;
}

TEST(WithPlugin, ConsumesTheMixOfEveryPayloadOnce) {
  ForEachExchange([](Kind kind, const PlanInput& in) {
    for (int payloads : {1, 2, 3}) {
      for (bool fuse : {true, false}) {
        for (bool measure : {false, true}) {
          const PluginPlan plan{.payloads = payloads, .fuse = fuse, .measure = measure};
          const Values inputs = RandomInputs(in.size, in.count);
          Values expected = ExpectedMix(kind, inputs);
          // The interpreter's toy: sum over p of (p + 1) * (p + 1) * mix.
          const int factor = payloads * (payloads + 1) * (2 * payloads + 1) / 6;
          for (std::vector<double>& values : expected) {
            for (double& x : values) x *= factor;
          }
          ExpectResult(PlanAll(kind, in, plan), inputs, expected,
                       "kind " + std::to_string(static_cast<int>(kind)) + ", n = " +
                           std::to_string(in.size) + ", payloads " + std::to_string(payloads));
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  });
}

TEST(WithPlugin, KeepsTheOutputWhereItIsConsumedInALaterStep) {
  ForEachExchange([](Kind kind, const PlanInput& in) {
    for (bool measure : {false, true}) {
      const Values inputs = RandomInputs(in.size, in.count);
      Values expected = ExpectedMix(kind, inputs);
      for (std::vector<double>& values : expected) {  // Payload 1 is twice payload 0.
        const size_t count = values.size();
        for (size_t k = 0; k < count; ++k) values.push_back(2 * values[k]);
      }
      const PluginPlan plan{.payloads = 2, .measure = measure, .consume = false};
      ExpectResult(PlanAll(kind, in, plan), inputs, expected, "kept");
    }
  });
}

TEST(WithPlugin, NeighborAllreduceNeedsNoOutputMemory) {
  const PlanInput in{.size = 8, .count = 101, .chunk = kChunk};
  for (Kind kind : {Kind::kNeighbors, Kind::kDirected, Kind::kOneShot, Kind::kLocal}) {
    for (const Schedule& schedule : PlanAll(kind, in, {.payloads = 2})) {
      EXPECT_EQ(schedule.output_count, 0);
      EXPECT_EQ(schedule.scratch_count, 0);
      EXPECT_EQ(CountElements(schedule, StepKind::kConsume, Role::kTile), 101);
    }
  }
}

TEST(WithPlugin, AllreduceKeepsItsOwnShardAndReadsTheOthersInPlace) {
  const PlanInput in{.size = 4, .count = 256, .chunk = kChunk};
  for (const Schedule& schedule : PlanAll(Kind::kSharded, in, {})) {
    EXPECT_EQ(CountElements(schedule, StepKind::kConsume, Role::kOutput), 64);
    EXPECT_EQ(CountElements(schedule, StepKind::kConsume, Role::kTile), 192);
    EXPECT_EQ(CountElements(schedule, StepKind::kCopy, Role::kOutput), 0);
  }
}

TEST(WithPlugin, ASilentStepConsumesItsOwnPayloadWithoutAMessage) {
  const PlanInput in{.size = 3, .count = 20, .chunk = kChunk};
  for (const Schedule& schedule : PlanAll(Kind::kLocal, in, {})) {
    EXPECT_TRUE(schedule.sources().empty());
    EXPECT_TRUE(schedule.destinations().empty());
    for (const Step& step : schedule.steps) {
      if (step.kind != StepKind::kCopy) continue;
      EXPECT_EQ(step.range.role, Role::kTile);  // Nothing moves.
      EXPECT_EQ(step.sources[0].local.role, Role::kInput);
    }
  }
}

TEST(WithPlugin, AChunkLeavesAsSoonAsItIsProduced) {
  const PlanInput in{.size = 2, .count = 160, .chunk = kChunk};
  for (const Schedule& schedule : PlanAll(Kind::kNeighbors, in, {})) {
    for (const Step& step : schedule.steps) {
      if (step.kind != StepKind::kPublish) continue;
      ASSERT_EQ(step.after.size(), 1u);
      EXPECT_EQ(schedule.steps[static_cast<size_t>(step.after[0])].range, step.range);
    }
  }
}

TEST(WithPlugin, MeasuresRunInOneOrder) {
  const PlanInput in{.size = 4, .count = 160, .chunk = kChunk};
  for (const Schedule& schedule : PlanAll(Kind::kNeighbors, in, {.measure = true})) {
    int32_t last = -1;
    for (int32_t i = 0; i < static_cast<int32_t>(schedule.steps.size()); ++i) {
      const Step& step = schedule.steps[static_cast<size_t>(i)];
      if (step.kind != StepKind::kMeasure) continue;
      if (last >= 0) {
        EXPECT_EQ(std::count(step.after.begin(), step.after.end(), last), 1);
      }
      last = i;
    }
    EXPECT_GE(last, 0);
  }
}

}  // namespace
}  // namespace bluefog::collective
