// Each generator against numbers worked out by hand, and what holds for every size.
#include <bluefog/topology.h>

#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "topology/integer.h"

namespace bluefog {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// To whom rank 0 sends, and W[0][0] among them.
std::vector<int> Row0(const Topology& topology) {
  std::vector<int> ranks{0};
  for (const Edge& edge : topology.neighborhood(0).out) ranks.push_back(edge.rank);
  return ranks;
}

TEST(Integer, PowersThatFloatingLogarithmsMiss) {
  EXPECT_TRUE(topology::IsPowerOf(243, 3));
  EXPECT_TRUE(topology::IsPowerOf(1000, 10));
  EXPECT_TRUE(topology::IsPowerOf(1, 7));
  EXPECT_FALSE(topology::IsPowerOf(0, 3));
  EXPECT_FALSE(topology::IsPowerOf(242, 3));
  EXPECT_FALSE(topology::IsPowerOf(6, 2));
  EXPECT_EQ(topology::CeilLog2(1), 0);
  EXPECT_EQ(topology::CeilLog2(8), 3);
  EXPECT_EQ(topology::CeilLog2(9), 4);
}

TEST(Exponential, OffsetsArePowers) {
  const Topology ten = *Exponential(10, 3);
  EXPECT_THAT(Row0(ten), ElementsAre(0, 1, 3, 9));
  for (const Edge& edge : ten.neighborhood(7).out) EXPECT_EQ(edge.weight, 1.0 / 4);
  EXPECT_EQ(ten.weight(7, 0), 1.0 / 4);  // 7 + 3 wraps around.
  EXPECT_EQ(ten.weight(0, 7), 0.0);      // Directed.
  EXPECT_THAT(Row0(*Exponential(8)), ElementsAre(0, 1, 2, 4));
  EXPECT_THAT(Row0(*Exponential(244, 3)), ElementsAre(0, 1, 3, 9, 27, 81, 243));
  EXPECT_THAT(Row0(*Exponential(1001, 10)), ElementsAre(0, 1, 10, 100, 1000));
  EXPECT_THAT(Row0(*Exponential(243, 3)), ElementsAre(0, 1, 3, 9, 27, 81));
  EXPECT_THAT(Row0(*Exponential(1)), ElementsAre(0));
  EXPECT_EQ(Exponential(1)->weight(0, 0), 1.0);
}

TEST(SymmetricExponential, DistancesArePowers) {
  const Topology twelve = *SymmetricExponential(12);
  EXPECT_THAT(Row0(twelve), ElementsAre(0, 1, 4, 8, 11));
  EXPECT_EQ(twelve.weight(3, 11), 1.0 / 5);
  EXPECT_THAT(Row0(*SymmetricExponential(8)), ElementsAre(0, 1, 4, 7));
  EXPECT_THAT(Row0(*SymmetricExponential(486, 3)),
              ElementsAre(0, 1, 3, 9, 27, 81, 243, 405, 459, 477, 483, 485));
}

TEST(Ring, StylesAndSmallSizes) {
  const Topology both = *Ring(5);
  EXPECT_THAT(both.neighborhood(0).out, ElementsAre(Edge{1, 1.0 / 3}, Edge{4, 1.0 / 3}));
  const Topology left = *Ring(5, RingStyle::kLeft);
  EXPECT_THAT(left.neighborhood(0).out, ElementsAre(Edge{4, 0.5}));
  EXPECT_THAT(left.neighborhood(0).in, ElementsAre(Edge{1, 0.5}));
  EXPECT_EQ(left.name(), "ring-left");
  const Topology right = *Ring(5, RingStyle::kRight);
  EXPECT_THAT(right.neighborhood(0).out, ElementsAre(Edge{1, 0.5}));
  EXPECT_THAT(right.neighborhood(0).in, ElementsAre(Edge{4, 0.5}));
  for (const RingStyle style : {RingStyle::kBidirectional, RingStyle::kLeft, RingStyle::kRight}) {
    EXPECT_THAT(Ring(1, style)->ToMatrix(), ElementsAre(1.0));
    EXPECT_THAT(Ring(2, style)->ToMatrix(), ElementsAre(0.5, 0.5, 0.5, 0.5));
  }
}

TEST(Star, CenterTakesTheMean) {
  const Topology star = *Star(4, 1);
  EXPECT_EQ(star.weight(1, 1), 0.25);
  EXPECT_EQ(star.weight(2, 2), 0.75);
  EXPECT_EQ(star.weight(2, 1), 0.25);
  EXPECT_EQ(star.weight(1, 2), 0.25);
  EXPECT_EQ(star.weight(2, 3), 0.0);
  EXPECT_TRUE(star.neighborhood(1).uniform);
  EXPECT_FALSE(star.neighborhood(2).uniform);
  EXPECT_THAT(Star(1)->ToMatrix(), ElementsAre(1.0));
  EXPECT_THAT(std::string(Star(4, 4).status().message()), HasSubstr("center 4 is outside 0 … 3"));
}

TEST(MeshGrid2D, MetropolisHastingsWeights) {
  const Topology mesh = *MeshGrid2D(6);  // 0 1 2 / 3 4 5
  EXPECT_DOUBLE_EQ(mesh.weight(0, 0), 5.0 / 12);
  EXPECT_DOUBLE_EQ(mesh.weight(0, 1), 1.0 / 4);
  EXPECT_DOUBLE_EQ(mesh.weight(0, 3), 1.0 / 3);
  EXPECT_DOUBLE_EQ(mesh.weight(1, 1), 1.0 / 4);
  EXPECT_EQ(mesh.weight(2, 3), 0.0);  // The end of a row is not beside the next row's start.
  const Topology line = *MeshGrid2D(5);
  EXPECT_DOUBLE_EQ(line.weight(0, 0), 2.0 / 3);
  EXPECT_DOUBLE_EQ(line.weight(0, 1), 1.0 / 3);
  EXPECT_EQ(line.weight(0, 4), 0.0);
  EXPECT_EQ(MeshGrid2D(6, 3)->weight(0, 2), mesh.weight(0, 1));
  EXPECT_THAT(std::string(MeshGrid2D(6, 4).status().message()), HasSubstr("6 ranks"));
  EXPECT_FALSE(MeshGrid2D(6, -2).ok());
}

TEST(Torus2D, WrapsAroundAndMergesDoubleEdges) {
  const Topology torus = *Torus2D(12);  // 3 x 4
  EXPECT_THAT(Row0(torus), ElementsAre(0, 1, 3, 4, 8));
  EXPECT_DOUBLE_EQ(torus.weight(0, 8), 1.0 / 5);
  EXPECT_TRUE(torus.neighborhood(5).uniform);
  EXPECT_THAT(Row0(*Torus2D(6)), ElementsAre(0, 1, 2, 3));  // 2 x 3: up and down are one rank.
  EXPECT_THAT(Torus2D(7)->neighborhood(0).in, ElementsAre(Edge{1, 1.0 / 3}, Edge{6, 1.0 / 3}));
}

TEST(Hypercube, NeighborsDifferInOneBit) {
  const Topology cube = *Hypercube(8);
  EXPECT_THAT(cube.neighborhood(5).out, ElementsAre(Edge{1, 0.25}, Edge{4, 0.25}, Edge{7, 0.25}));
  EXPECT_THAT(Hypercube(1)->ToMatrix(), ElementsAre(1.0));
  const Status status = Hypercube(6).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("use 4 or 8 ranks"));
}

TEST(FullyConnected, EverybodyEqually) {
  const Topology topology = *FullyConnected(7);
  EXPECT_THAT(topology.ToMatrix(), ::testing::Each(1.0 / 7));
  EXPECT_TRUE(topology.neighborhood(3).uniform);
}

TEST(ErdosRenyi, SeedDecides) {
  EXPECT_EQ(*ErdosRenyi(20, 0.4, 1), *ErdosRenyi(20, 0.4, 1));
  EXPECT_FALSE(*ErdosRenyi(20, 0.4, 1) == *ErdosRenyi(20, 0.4, 2));
  EXPECT_EQ(Row0(*ErdosRenyi(6, 1.0, 3)).size(), 6u);
  EXPECT_THAT(ErdosRenyi(1, 0.0, 0)->ToMatrix(), ElementsAre(1.0));
  // One graph written down: no platform and no later version may draw another for this seed.
  EXPECT_THAT(Row0(*ErdosRenyi(12, 0.3, 42)), ElementsAre(0, 2, 3, 5, 7, 11));
  EXPECT_THAT(std::string(ErdosRenyi(9, 0.0, 0).status().message()), HasSubstr("connected"));
  EXPECT_FALSE(ErdosRenyi(9, 1.5, 0).ok());
}

TEST(OnePeerExponential, EachRoundOnePeer) {
  const TopologySequence sequence = *OnePeerExponential(6);
  ASSERT_EQ(sequence.period(), 3);
  EXPECT_THAT(sequence.at(0).neighborhood(5).out, ElementsAre(Edge{0, 0.5}));
  EXPECT_THAT(sequence.at(1).neighborhood(5).out, ElementsAre(Edge{1, 0.5}));
  EXPECT_THAT(sequence.at(2).neighborhood(5).out, ElementsAre(Edge{3, 0.5}));
  EXPECT_THAT(sequence.at(5).neighborhood(5).in, ElementsAre(Edge{1, 0.5}));
  EXPECT_EQ(OnePeerExponential(8)->period(), 3);
  EXPECT_EQ(OnePeerExponential(9)->period(), 4);
  EXPECT_EQ(OnePeerExponential(2)->period(), 1);
  EXPECT_EQ(OnePeerExponential(1)->period(), 1);
  EXPECT_THAT(OnePeerExponential(1)->at(0).ToMatrix(), ElementsAre(1.0));
}

TEST(OnePeerHypercube, PairsExchange) {
  const TopologySequence sequence = *OnePeerHypercube(8);
  ASSERT_EQ(sequence.period(), 3);
  for (int k = 0; k < 3; ++k) {
    EXPECT_THAT(sequence.at(k).neighborhood(6).out, ElementsAre(Edge{6 ^ (1 << k), 0.5}));
    EXPECT_EQ(sequence.at(k).neighborhood(6).in, sequence.at(k).neighborhood(6).out);
  }
  EXPECT_EQ(OnePeerHypercube(1)->period(), 1);
  EXPECT_THAT(std::string(OnePeerHypercube(12).status().message()),
              HasSubstr("use 8 or 16 ranks, or \"one-peer-exponential\""));
}

TEST(Generators, AllAreDoublyStochasticAndConnectedAtEverySize) {
  for (const TopologyGenerator& generator : TopologyGenerators()) {
    const bool powers_only = generator.name.find("hypercube") != std::string::npos;
    int made = 0;
    for (int n = 1; n <= 64; ++n) {
      const StatusOr<TopologySequence> sequence = generator.make(n);
      if (powers_only && !topology::IsPowerOf(n, 2)) {
        EXPECT_EQ(sequence.status().code(), absl::StatusCode::kInvalidArgument);
        continue;
      }
      ASSERT_TRUE(sequence.ok()) << generator.name << " " << n << ": " << sequence.status();
      ++made;
      EXPECT_EQ(sequence->size(), n);
      EXPECT_EQ(sequence->name(), generator.name);
      EXPECT_EQ(generator.dynamic || sequence->is_static(), true) << generator.name;
      const TopologyAnalysis analysis = Analyze(*sequence);
      EXPECT_TRUE(analysis.doubly_stochastic) << generator.name << " " << n << analysis.problem;
      EXPECT_TRUE(analysis.connected) << generator.name << " " << n << analysis.problem;
      EXPECT_EQ(analysis.problem, "");
      const std::set<std::string> directed{"ring-left", "ring-right", "exponential",
                                           "one-peer-exponential"};
      if (directed.count(generator.name) == 0) {
        EXPECT_TRUE(analysis.symmetric) << generator.name << " " << n << analysis.asymmetry;
      } else if (n > 3) {
        EXPECT_FALSE(analysis.symmetric) << generator.name << " " << n;
      }
      for (int rank = 0; rank < n; ++rank) {
        for (const Edge& edge : sequence->at(0).neighborhood(rank).out) EXPECT_NE(edge.rank, rank);
      }
    }
    EXPECT_EQ(made, powers_only ? 7 : 64);
    for (const int n : {0, -3}) {
      const Status status = generator.make(n).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()), HasSubstr(generator.name));
      EXPECT_THAT(std::string(status.message()), HasSubstr("n = " + std::to_string(n)));
    }
  }
}

TEST(Generators, OddBigSizes) {
  for (const int n : {243, 1000}) {
    for (const TopologyGenerator& generator : TopologyGenerators()) {
      if (generator.name.find("hypercube") != std::string::npos) continue;
      EXPECT_TRUE(generator.make(n).ok()) << generator.name << " " << n;
    }
  }
}

TEST(MakeTopology, NamesAndErrors) {
  EXPECT_EQ(MakeTopology("mesh_grid_2d", 6)->at(0), *MeshGrid2D(6));
  EXPECT_EQ(MakeTopology("one-peer_exponential", 6)->period(), 3);
  const Status status = MakeTopology("rnig", 4).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"rnig\""));
  for (const TopologyGenerator& generator : TopologyGenerators()) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(generator.name));
  }
  EXPECT_EQ(MakeTopology("ring", 0).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace bluefog
