#include "engine/planner.h"

#include <gtest/gtest.h>

namespace bluefog {
namespace {

Planner::Request Average(int64_t count, const Neighborhood& neighborhood) {
  Planner::Request request;
  request.op = Op::kNeighborAllreduce;
  request.count = count;
  request.element_bytes = 4;
  request.neighborhood = &neighborhood;
  return request;
}

TEST(PlannerTest, PlansAreKept) {
  Planner planner(Config(), 0, 2);
  const Neighborhood pair{0.5, {{1, 0.5}}, {{1, 0.5}}};
  const auto first = planner.Get(Average(100, pair));
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(*planner.Get(Average(100, pair)), *first);
  EXPECT_NE(*planner.Get(Average(101, pair)), *first);
  EXPECT_EQ(planner.planned(), 2);
}

TEST(PlannerTest, ButNotOfManyCallsOnALargeTensorThatBringTheirOwnWeights) {
  Config config;
  config.chunk_bytes = 1 << 10;
  Planner planner(config, 0, 2);
  int64_t most = 0;
  for (int i = 0; i < 100; ++i) {
    const double w = 0.001 * (i + 1);
    const Neighborhood pair{1 - w, {{1, w}}, {{1, w}}, false};
    const auto plan = planner.Get(Average(int64_t{1} << 20, pair));
    ASSERT_TRUE(plan.ok());
    const auto steps = static_cast<int64_t>((*plan)->schedule.steps.size());
    EXPECT_GT(steps, 10'000);
    most = std::max(most, static_cast<int64_t>(planner.kept()) * steps);
  }
  EXPECT_EQ(planner.planned(), 100);
  EXPECT_LE(most, 200'000);
}

}  // namespace
}  // namespace bluefog
