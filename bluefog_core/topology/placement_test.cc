#include <bluefog/topology.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace bluefog {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Placement, RanksOfAHostNeedNotBeConsecutive) {
  const Placement placement{{0, 1, 0, 1, 1}, {0, 0, 0, 0, 0}};
  EXPECT_EQ(placement.hosts(), 2);
  EXPECT_THAT(placement.RanksByHost(), ElementsAre(ElementsAre(0, 2), ElementsAre(1, 3, 4)));
  EXPECT_EQ(Placement::OfCounts({2, 1}).host, (std::vector<int>{0, 0, 1}));
}

TEST(OverRanks, EachRankGivesItsMachinesWeightToAllRanksOfTheOther) {
  const Topology machines = *Topology::FromMatrix(2, {0.75, 0.25, 0.5, 0.5});
  const Topology ranks = *OverRanks(machines, Placement::OfCounts({2, 1}));
  EXPECT_EQ(ranks.ToMatrix(),
            (std::vector<double>{0.375, 0.375, 0.125, 0.375, 0.375, 0.125, 0.5, 0.5, 0.5}));
}

TEST(OverRanks, EqualNumbersOfRanksKeepWhatTheGraphIs) {
  for (const char* name : {"ring", "exponential", "star", "mesh-grid-2d", "one-peer-exponential"}) {
    const TopologySequence machines = *MakeTopology(name, 4);
    const TopologyAnalysis of = Analyze(machines);
    const TopologyAnalysis over = Analyze(*OverRanks(machines, Placement::OfCounts({3, 3, 3, 3})));
    EXPECT_EQ(of.symmetric, over.symmetric) << name;
    EXPECT_EQ(of.doubly_stochastic, over.doubly_stochastic) << name;
    EXPECT_EQ(of.connected, over.connected) << name;
    EXPECT_EQ(of.exact_average, over.exact_average) << name;
    EXPECT_NEAR(of.lambda2, over.lambda2, 1e-6) << name;
  }
}

TEST(OverRanks, UnequalNumbersOfRanksDoNotKeepAverages) {
  const TopologyAnalysis a =
      Analyze(TopologySequence(*OverRanks(*Ring(3), Placement::OfCounts({2, 1, 1}))));
  EXPECT_TRUE(a.column_stochastic);  // Constants are kept,
  EXPECT_FALSE(a.row_stochastic);    // but the smaller machines' ranks count for more.
}

TEST(OverRanks, RefusesAGraphOfAnotherSize) {
  const auto refused = OverRanks(*Ring(3), Placement::OfCounts({4, 4}));
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("has 3 nodes, but there are 2"));
}

}  // namespace
}  // namespace bluefog
