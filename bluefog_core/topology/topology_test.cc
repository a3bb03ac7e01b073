// The graph: rows and columns, errors that name what is wrong, and the mixing weights.
#include <bluefog/topology.h>

#include <cmath>
#include <limits>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace bluefog {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Directed and not circulant, so that no mix-up of rows and columns goes unseen:
// 0 -> 1 (.5), 0 -> 2 (.25), 1 -> 2 (.75), 2 -> 0 (.125).
Topology Directed() {
  return *Topology::FromMatrix(3, {0.25, 0.5, 0.25,  //
                                   0.0, 0.25, 0.75,  //
                                   0.125, 0.0, 0.875});
}

TEST(Topology, ReceivesByColumnsAndSendsByRows) {
  const Topology topology = Directed();
  EXPECT_THAT(topology.neighborhood(0).out, ElementsAre(Edge{1, 0.5}, Edge{2, 0.25}));
  EXPECT_THAT(topology.neighborhood(0).in, ElementsAre(Edge{2, 0.125}));
  EXPECT_THAT(topology.neighborhood(1).out, ElementsAre(Edge{2, 0.75}));
  EXPECT_THAT(topology.neighborhood(1).in, ElementsAre(Edge{0, 0.5}));
  EXPECT_THAT(topology.neighborhood(2).out, ElementsAre(Edge{0, 0.125}));
  EXPECT_THAT(topology.neighborhood(2).in, ElementsAre(Edge{0, 0.25}, Edge{1, 0.75}));
  EXPECT_EQ(topology.neighborhood(2).self_weight, 0.875);
  EXPECT_EQ(topology.weight(0, 2), 0.25);
  EXPECT_EQ(topology.weight(2, 0), 0.125);
  EXPECT_EQ(topology.weight(1, 0), 0.0);
  EXPECT_EQ(topology.weight(1, 1), 0.25);
}

TEST(Topology, MatrixAndEdgesAgree) {
  const Topology topology = Directed();
  EXPECT_EQ(*Topology::FromMatrix(3, topology.ToMatrix()), topology);
  EXPECT_EQ(*Topology::FromEdges(3, {{2, 2, 0.875},
                                     {2, 0, 0.125},
                                     {0, 2, 0.25},
                                     {0, 0, 0.25},
                                     {1, 2, 0.75},
                                     {0, 1, 0.5},
                                     {1, 1, 0.25}}),
            topology);
  EXPECT_EQ(Topology::FromMatrix(1, {1.0})->name(), "custom");
}

TEST(Topology, RankWithoutSelfLoopGivesItselfNoWeight) {
  const Topology topology = *Topology::FromEdges(2, {{0, 1, 1.0}, {1, 0, 1.0}});
  EXPECT_EQ(topology.neighborhood(0).self_weight, 0.0);
  EXPECT_FALSE(topology.neighborhood(0).uniform);
}

TEST(Topology, ExplicitEdgeOfWeightZeroStaysAnEdge) {
  const Topology topology = *Topology::FromEdges(2, {{0, 0, 1.0}, {0, 1, 0.0}, {1, 1, 1.0}});
  EXPECT_THAT(topology.neighborhood(1).in, ElementsAre(Edge{0, 0.0}));
}

TEST(Topology, UniformToTheLastBitHoweverRounded) {
  const double third = 1.0 / 3.0;
  const double rest = 1.0 - third - third;
  ASSERT_NE(third, rest);
  EXPECT_TRUE(Topology::FromEdges(3, {{0, 0, rest}, {1, 0, third}, {2, 0, third}})
                  ->neighborhood(0)
                  .uniform);
  EXPECT_FALSE(Topology::FromEdges(3, {{0, 0, third}, {1, 0, third}, {2, 0, third * (1 + 1e-14)}})
                   ->neighborhood(0)
                   .uniform);
  // Equal weights that are not 1/(k+1) are no mean.
  EXPECT_FALSE(Topology::FromEdges(2, {{0, 0, 0.25}, {1, 0, 0.25}})->neighborhood(0).uniform);
  EXPECT_TRUE(Topology::FromMatrix(1, {1.0})->neighborhood(0).uniform);
  EXPECT_FALSE(Topology::FromMatrix(1, {0.5})->neighborhood(0).uniform);
}

void ExpectInvalid(const Status& status, const std::vector<std::string>& facts) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  for (const std::string& fact : facts) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(fact));
  }
}

TEST(Topology, ErrorsNameTheEntry) {
  ExpectInvalid(Topology::FromMatrix(2, {0.5, 0.5, -0.25, 1.25}).status(),
                {"row 1", "column 0", "-0.25"});
  ExpectInvalid(
      Topology::FromMatrix(2, {0.5, std::numeric_limits<double>::quiet_NaN(), 0.5, 0.5}).status(),
      {"row 0", "column 1", "nan"});
  ExpectInvalid(
      Topology::FromMatrix(2, {0.5, 0.5, 0.5, std::numeric_limits<double>::infinity()}).status(),
      {"row 1", "column 1", "inf"});
  ExpectInvalid(Topology::FromMatrix(3, std::vector<double>(8)).status(), {"3 ranks", "8", "9"});
  ExpectInvalid(Topology::FromMatrix(0, {}, "mine").status(), {"mine", "n = 0"});
  ExpectInvalid(Topology::FromEdges(-1, {}).status(), {"n = -1"});
  ExpectInvalid(Topology::FromEdges(4, {{0, 1, 1.0}, {3, 4, 1.0}}).status(),
                {"edge 3 -> 4", "rank 4", "0 … 3"});
  ExpectInvalid(Topology::FromEdges(4, {{-2, 1, 1.0}}).status(), {"edge -2 -> 1", "rank -2"});
  ExpectInvalid(Topology::FromEdges(4, {{1, 2, 0.5}, {0, 0, 1.0}, {1, 2, 0.25}}).status(),
                {"edge 1 -> 2", "twice"});
  ExpectInvalid(Topology::FromEdges(2, {{1, 1, 0.5}, {1, 1, 0.5}}).status(), {"edge 1 -> 1"});
}

TEST(TopologySequence, RepeatsAndRefusesMixedSizes) {
  const Topology two = *Topology::FromMatrix(2, {1, 0, 0, 1});
  const Topology swap = *Topology::FromMatrix(2, {0, 1, 1, 0});
  const TopologySequence sequence = *TopologySequence::Of({two, swap}, "flip");
  EXPECT_EQ(sequence.period(), 2);
  EXPECT_EQ(sequence.at(0), two);
  EXPECT_EQ(sequence.at(1), swap);
  EXPECT_EQ(sequence.at(int64_t{1} << 40), two);
  EXPECT_EQ(sequence.at((int64_t{1} << 40) + 1), swap);
  EXPECT_TRUE(TopologySequence(two).is_static());
  ExpectInvalid(TopologySequence::Of({two, Directed()}, "mixed").status(),
                {"mixed", "round 1 has 3", "round 0 has 2"});
  ExpectInvalid(TopologySequence::Of({}, "none").status(), {"none", "no round"});
}

TEST(MetropolisHastings, SymmetricAndDoublyStochasticOnRandomGraphs) {
  std::minstd_rand random(7);
  for (int n = 1; n <= 40; n += 3) {
    Adjacency neighbors(n);
    for (int i = 0; i < n; ++i) {
      for (int j = i + 1; j < n; ++j) {
        if (random() % 3 != 0) continue;
        neighbors[i].push_back(j);
        neighbors[j].insert(neighbors[j].begin(), i);  // Lists need no order.
      }
    }
    const Topology topology = *MetropolisHastings(neighbors);
    for (int i = 0; i < n; ++i) {
      double row = 0;
      for (int j = 0; j < n; ++j) {
        EXPECT_EQ(topology.weight(i, j), topology.weight(j, i));
        row += topology.weight(i, j);
      }
      EXPECT_NEAR(row, 1.0, 1e-14);
      EXPECT_EQ(topology.neighborhood(i).out.size(), neighbors[i].size());
      EXPECT_GT(topology.neighborhood(i).self_weight, 0.0);
    }
  }
}

TEST(MetropolisHastings, HeavierEndDecides) {
  // A path 0 - 1 - 2 with degrees 2, 3, 2.
  const Topology path = *MetropolisHastings({{1}, {0, 2}, {1}}, "path");
  EXPECT_EQ(path.name(), "path");
  EXPECT_DOUBLE_EQ(path.weight(0, 1), 1.0 / 3);
  EXPECT_DOUBLE_EQ(path.weight(0, 0), 2.0 / 3);
  EXPECT_DOUBLE_EQ(path.weight(1, 1), 1.0 / 3);
}

TEST(MetropolisHastings, RegularGraphsAreUniform) {
  for (int n = 1; n <= 64; ++n) {
    Adjacency complete(n);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        if (j != i) complete[i].push_back(j);
      }
    }
    EXPECT_TRUE(MetropolisHastings(complete)->neighborhood(n / 2).uniform) << n;
  }
}

TEST(MetropolisHastings, ErrorsNameTheRanks) {
  ExpectInvalid(MetropolisHastings({{1}, {}}).status(), {"rank 0 lists rank 1"});
  ExpectInvalid(MetropolisHastings({{2}, {}}).status(), {"neighbours of rank 0", "rank 2"});
  ExpectInvalid(MetropolisHastings({{}, {1}}).status(), {"rank 1", "itself"});
  ExpectInvalid(MetropolisHastings({{1, 1}, {0, 0}}).status(), {"rank 0", "rank 1", "twice"});
  ExpectInvalid(MetropolisHastings({}).status(), {"n = 0"});
}

TEST(UniformWeights, EachReceiverTakesTheMean) {
  // 0 -> 1, 0 -> 2, 1 -> 2: in-degrees 0, 1, 2.
  const Topology topology = *UniformWeights({{2, 1}, {2}, {}});
  EXPECT_THAT(topology.neighborhood(0).in, IsEmpty());
  EXPECT_EQ(topology.weight(0, 0), 1.0);
  EXPECT_EQ(topology.weight(0, 1), 1.0 / 2);
  EXPECT_EQ(topology.weight(1, 1), 1.0 / 2);
  EXPECT_THAT(topology.neighborhood(2).in, ElementsAre(Edge{0, 1.0 / 3}, Edge{1, 1.0 / 3}));
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(topology.neighborhood(i).uniform);
  ExpectInvalid(UniformWeights({{1}, {5}}).status(), {"neighbours of rank 1", "rank 5"});
}

}  // namespace
}  // namespace bluefog
