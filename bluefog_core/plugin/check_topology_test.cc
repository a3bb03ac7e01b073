// Graphs on which a method would silently train a wrong model are refused, with the entry that is
// at fault.
#include <bluefog/optimizer.h>
#include <bluefog/topology.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace bluefog {
namespace {

using ::testing::HasSubstr;

const Traits kAnyGraph = {.name = "dmsgd"};
const Traits kSymmetric = {.name = "decentlam",
                           .needs_symmetric = true,
                           .needs_static = true,
                           .needs_reason = "It diverges from momentum .52"};
const Traits kNoGraph = {.name = "pmsgd", .uses_topology = false};

Status Check(const Traits& traits, StatusOr<TopologySequence> topology) {
  return topology.ok() ? CheckTopology(traits, *topology) : topology.status();
}
Status Check(const Traits& traits, StatusOr<Topology> topology) {
  return topology.ok() ? CheckTopology(traits, TopologySequence(*topology)) : topology.status();
}
std::string Refusal(const Status& status) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  return std::string(status.message());
}

TEST(CheckTopologyTest, UndirectedStaticGraphsSuitAll) {
  for (const char* name : {"ring", "star", "mesh-grid-2d", "hypercube", "fully-connected"}) {
    for (const int n : {1, 2, 4, 8, 16}) {
      for (const Traits& traits : {kAnyGraph, kSymmetric, kNoGraph}) {
        const Status status = Check(traits, MakeTopology(name, n));
        EXPECT_TRUE(status.ok()) << name << " " << n << " " << status;
      }
    }
  }
}

TEST(CheckTopologyTest, DirectedGraphNamesThePair) {
  EXPECT_TRUE(Check(kAnyGraph, MakeTopology("exponential", 8)).ok());
  const std::string message = Refusal(Check(kSymmetric, MakeTopology("exponential", 8)));
  EXPECT_THAT(message, HasSubstr("'decentlam'"));
  EXPECT_THAT(message, HasSubstr("8 ranks"));
  EXPECT_THAT(message, HasSubstr("W[0][1] = 0.25 but W[1][0] = 0"));
  EXPECT_THAT(message, HasSubstr("It diverges from momentum .52"));
  EXPECT_THAT(message, HasSubstr("allow_unstable"));
}

TEST(CheckTopologyTest, AnEdgeInOneDirectionOnlyIsFoundFromEitherEnd) {
  // A directed cycle of three plus self: rank 0 has an incoming edge from 2 that has no way back.
  const auto cycle = Topology::FromMatrix(3, {.5, .5, 0, 0, .5, .5, .5, 0, .5});
  EXPECT_TRUE(Check(kAnyGraph, cycle).ok());
  EXPECT_THAT(Refusal(Check(kSymmetric, cycle)), HasSubstr("W[0][1] = 0.5 but W[1][0] = 0"));
}

TEST(CheckTopologyTest, TimeVaryingGraphNamesThePeriod) {
  EXPECT_TRUE(Check(kAnyGraph, OnePeerExponential(8)).ok());
  EXPECT_THAT(Refusal(Check(kSymmetric, OnePeerExponential(8))), HasSubstr("period 3"));
  // Every round of this one is symmetric; it is refused all the same.
  EXPECT_THAT(Refusal(Check(kSymmetric, OnePeerHypercube(8))), HasSubstr("period 3"));
}

TEST(CheckTopologyTest, EqualRoundsAreStatic) {
  const Topology ring = *Ring(4);
  EXPECT_TRUE(Check(kSymmetric, TopologySequence::Of({ring, ring}, "twice")).ok());
}

TEST(CheckTopologyTest, OneSidedStochasticIsRefusedByAll) {
  // Rows sum to 1, columns to 1.25, 1, .75: ranks would agree on a weighted mean.
  const auto rows = Topology::FromMatrix(3, {.5, .25, .25, .5, .5, 0, .25, .25, .5});
  for (const Traits& traits : {kAnyGraph, kSymmetric}) {
    const std::string message = Refusal(Check(traits, rows));
    EXPECT_THAT(message, HasSubstr("column 0"));
    EXPECT_THAT(message, HasSubstr("1.25 instead of 1"));
  }
  const auto columns = Topology::FromMatrix(3, {.5, .5, .25, .25, .5, .25, .25, 0, .5});
  EXPECT_THAT(Refusal(Check(kAnyGraph, columns)), HasSubstr("row 0"));
  EXPECT_TRUE(Check(kNoGraph, rows).ok());
}

TEST(CheckTopologyTest, UnbalancedRoundIsNamed) {
  const Topology good = *Ring(3);
  const Topology bad = *Topology::FromMatrix(3, {1, 0, 0, .5, .5, 0, 0, 0, 1});
  EXPECT_THAT(Refusal(Check(kAnyGraph, TopologySequence::Of({good, bad}, "x"))),
              HasSubstr("in round 1"));
}

TEST(CheckTopologyTest, DisconnectedIsRefusedByAll) {
  const auto pairs =
      Topology::FromMatrix(4, {.5, .5, 0, 0, .5, .5, 0, 0, 0, 0, .5, .5, 0, 0, .5, .5});
  for (const Traits& traits : {kAnyGraph, kSymmetric}) {
    EXPECT_THAT(Refusal(Check(traits, pairs)), HasSubstr("from rank 0 to rank 2"));
  }
  // The same pairs, and then other pairs: connected over the period.
  const Topology other =
      *Topology::FromMatrix(4, {.5, 0, .5, 0, 0, .5, 0, .5, .5, 0, .5, 0, 0, .5, 0, .5});
  EXPECT_TRUE(Check(kAnyGraph, TopologySequence::Of({*pairs, other}, "pairs")).ok());
  EXPECT_THAT(Refusal(Check(kAnyGraph, TopologySequence::Of({*pairs, *pairs}, "pairs"))),
              HasSubstr("over a whole period"));
}

TEST(CheckTopologyTest, RoundingOfWeightsIsForgiven) {
  const double third = 1.0 / 3.0, other = 1.0 - third - third;  // Not the same double.
  EXPECT_TRUE(Check(kSymmetric, Topology::FromMatrix(3, {third, third, other, third, third, third,
                                                         third, third, third}))
                  .ok());
}

TEST(CheckTopologyTest, ThousandsOfRanks) {
  EXPECT_TRUE(Check(kSymmetric, Ring(5000)).ok());
  EXPECT_THAT(Refusal(Check(kSymmetric, Exponential(5000))), HasSubstr("W[0][1]"));
  EXPECT_THAT(Refusal(Check(kSymmetric, Ring(5000, RingStyle::kLeft))), HasSubstr("not symmetric"));
}

}  // namespace
}  // namespace bluefog
