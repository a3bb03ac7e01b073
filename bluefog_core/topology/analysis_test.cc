// Analysis against spectra known in closed form, and the facts it names when a graph is at fault.
#include <bluefog/topology.h>

#include <cmath>
#include <complex>
#include <numbers>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace bluefog {
namespace {

using ::testing::HasSubstr;

TopologyAnalysis AnalyzeNamed(const std::string& name, int n) {
  return Analyze(*MakeTopology(name, n));
}

TEST(Analyze, RingIsTheCosine) {
  for (const int n : {3, 8, 9, 33}) {
    const TopologyAnalysis analysis = AnalyzeNamed("ring", n);
    const double step = 2 * std::numbers::pi / n;
    const double smallest = 1.0 / 3 + 2.0 / 3 * std::cos(step * (n / 2));
    EXPECT_TRUE(analysis.symmetric);
    EXPECT_TRUE(analysis.spectrum_known);
    EXPECT_NEAR(analysis.lambda2, 1.0 / 3 + 2.0 / 3 * std::cos(step), 1e-12) << n;
    EXPECT_NEAR(analysis.lambda_min, smallest, 1e-12) << n;
    EXPECT_NEAR(analysis.spectral_gap, 1 - std::max(std::abs(analysis.lambda2), std::abs(smallest)),
                1e-12);
    EXPECT_EQ(analysis.exact_average, n == 3);
    EXPECT_EQ(analysis.messages_per_step, 2);
  }
}

TEST(Analyze, Hypercube) {
  // Eigenvalues (1 + t - 2k)/(t + 1), k = 0 … t.
  const TopologyAnalysis analysis = AnalyzeNamed("hypercube", 16);
  EXPECT_NEAR(analysis.lambda2, 3.0 / 5, 1e-12);
  EXPECT_NEAR(analysis.lambda_min, -3.0 / 5, 1e-12);
  EXPECT_NEAR(analysis.spectral_gap, 2.0 / 5, 1e-12);
  EXPECT_NEAR(AnalyzeNamed("hypercube", 8).lambda_min, -0.5, 1e-12);
  EXPECT_NEAR(AnalyzeNamed("mesh-grid-2d", 8).lambda_min, -0.384, 1e-3);
}

// The negative end of the spectrum can be the slow one.
TEST(Analyze, GapSeesBothEnds) {
  const TopologyAnalysis analysis =
      Analyze(TopologySequence(*Topology::FromMatrix(2, {0.1, 0.9, 0.9, 0.1})));
  EXPECT_NEAR(analysis.lambda2, -0.8, 1e-12);
  EXPECT_NEAR(analysis.lambda_min, -0.8, 1e-12);
  EXPECT_NEAR(analysis.spectral_gap, 0.2, 1e-12);
}

TEST(Analyze, FullyConnectedAveragesAtOnce) {
  for (const int n : {1, 2, 7, 64}) {
    const TopologyAnalysis analysis = AnalyzeNamed("fully-connected", n);
    EXPECT_TRUE(analysis.exact_average) << n;
    EXPECT_EQ(analysis.lambda2, 0.0) << n;
    EXPECT_EQ(analysis.lambda_min, n == 1 ? 1.0 : 0.0) << n;
    EXPECT_EQ(analysis.spectral_gap, 1.0) << n;
    EXPECT_EQ(analysis.messages_per_step, n - 1);
  }
}

TEST(Analyze, DirectedExponentialHasComplexEigenvalues) {
  for (const int n : {6, 8, 12}) {
    std::vector<int> offsets{0};
    for (int d = 1; d < n; d *= 2) offsets.push_back(d);
    double second = 0.0, smallest = 1.0;
    for (int k = 1; k < n; ++k) {
      std::complex<double> lambda = 0.0;
      for (const int d : offsets) {
        lambda +=
            std::polar(1.0 / static_cast<double>(offsets.size()), 2 * std::numbers::pi * k * d / n);
      }
      second = std::max(second, std::abs(lambda));
      smallest = std::min(smallest, lambda.real());
    }
    const TopologyAnalysis analysis = AnalyzeNamed("exponential", n);
    EXPECT_FALSE(analysis.symmetric);
    EXPECT_THAT(analysis.asymmetry, HasSubstr("W[0][1]"));
    EXPECT_TRUE(analysis.doubly_stochastic);
    EXPECT_NEAR(analysis.lambda2, second, 1e-9) << n;
    EXPECT_NEAR(analysis.lambda_min, smallest, 1e-9) << n;
    EXPECT_NEAR(analysis.spectral_gap, 1 - second, 1e-9) << n;
  }
}

TEST(Analyze, OnePeerExponentialIsExactForPowersOfTwoOnly) {
  for (const int n : {2, 4, 8, 16, 32, 64}) {
    const TopologyAnalysis analysis = AnalyzeNamed("one-peer-exponential", n);
    EXPECT_TRUE(analysis.exact_average) << n;
    EXPECT_EQ(analysis.spectral_gap, 1.0) << n;
    EXPECT_EQ(analysis.messages_per_step, 1.0);
    EXPECT_EQ(analysis.max_out_degree, 1);
    EXPECT_EQ(analysis.lambda_min, 0.0);  // (1 + exp(i pi))/2.
    EXPECT_TRUE(AnalyzeNamed("one-peer-hypercube", n).exact_average) << n;
  }
  // n = 3: rounds (I+P)/2 and (I+P²)/2, whose product has the double eigenvalue 1/4.
  const TopologyAnalysis three = AnalyzeNamed("one-peer-exponential", 3);
  EXPECT_FALSE(three.exact_average);
  EXPECT_NEAR(three.lambda2, std::sqrt(0.25), 1e-9);
  EXPECT_NEAR(three.spectral_gap, 0.5, 1e-9);
}

TEST(Analyze, RoundsApplyInTheirOrder) {
  // Rank 0 takes the mean, then everybody takes rank 0's: exact. The other way round it is not.
  const Topology gather = *Topology::FromMatrix(2, {0.5, 0.0, 0.5, 1.0});
  const Topology spread = *Topology::FromMatrix(2, {1.0, 1.0, 0.0, 0.0});
  EXPECT_TRUE(Analyze(*TopologySequence::Of({gather, spread}, "mean first")).exact_average);
  EXPECT_FALSE(Analyze(*TopologySequence::Of({spread, gather}, "mean last")).exact_average);
}

TEST(Analyze, ConnectivityIsThatOfTheUnion) {
  // Neither round alone connects four ranks; together they do.
  const TopologySequence cube = *OnePeerHypercube(4);
  EXPECT_TRUE(Analyze(cube).connected);
  const TopologyAnalysis half = Analyze(TopologySequence(cube.at(0)));
  EXPECT_FALSE(half.connected);
  EXPECT_THAT(half.problem, HasSubstr("rank 0 to rank 2"));
  EXPECT_EQ(half.lambda2, 1.0);
  EXPECT_EQ(half.spectral_gap, 0.0);
}

TEST(Analyze, OneWayStreetIsNotStronglyConnected) {
  const TopologyAnalysis analysis =
      Analyze(TopologySequence(*Topology::FromEdges(3, {{0, 0, 1.0},
                                                        {2, 0, 0.0},  // Carries nothing.
                                                        {0, 1, 0.5},
                                                        {1, 1, 0.5},
                                                        {1, 2, 0.5},
                                                        {2, 2, 0.5}})));
  EXPECT_FALSE(analysis.connected);
  EXPECT_TRUE(analysis.column_stochastic);
  EXPECT_FALSE(analysis.row_stochastic);
  EXPECT_FALSE(analysis.doubly_stochastic);
  EXPECT_THAT(analysis.problem, HasSubstr("row 0 sums to 1.5"));
}

TEST(Analyze, NoPathBackIsNamed) {
  // A doubly stochastic graph cannot be connected one way only; a substochastic one can, and says
  // so after its sums. Reverse the edge to see the other message.
  const auto problem = [](int from, int to) {
    return Analyze(TopologySequence(
                       *Topology::FromEdges(2, {{0, 0, 1.0}, {1, 1, 1.0}, {from, to, 1e-12}})))
        .problem;
  };
  EXPECT_THAT(problem(0, 1), HasSubstr("no path leads from rank 1 to rank 0"));
  EXPECT_THAT(problem(1, 0), HasSubstr("no path leads from rank 0 to rank 1"));
}

TEST(Analyze, SumsNameRowColumnAndRound) {
  const Topology good = *Topology::FromMatrix(2, {0.5, 0.5, 0.5, 0.5});
  const TopologyAnalysis columns =
      Analyze(*TopologySequence::Of({good, *Topology::FromMatrix(2, {0.5, 0.5, 0.5, 0.4})}, "x"));
  EXPECT_FALSE(columns.column_stochastic);
  EXPECT_THAT(columns.problem, HasSubstr("column 1 sums to 0.9 instead of 1 in round 1"));
  const TopologyAnalysis rows =
      Analyze(TopologySequence(*Topology::FromMatrix(2, {0.25, 0.5, 0.75, 0.5})));
  EXPECT_TRUE(rows.column_stochastic);
  EXPECT_FALSE(rows.row_stochastic);
  EXPECT_THAT(rows.problem, HasSubstr("row 0 sums to 0.75 instead of 1"));
  EXPECT_THAT(rows.problem, ::testing::Not(HasSubstr("round")));
}

TEST(Analyze, AsymmetryNamesPairAndRound) {
  const TopologyAnalysis analysis = AnalyzeNamed("one-peer-exponential", 8);
  EXPECT_THAT(analysis.asymmetry, HasSubstr("W[0][1] = 0.5 but W[1][0] = 0 in round 0"));
  const auto with = [](double weight) {
    return Analyze(TopologySequence(*Topology::FromMatrix(2, {0.5, 0.5, weight, 0.5})));
  };
  EXPECT_TRUE(with(std::nextafter(0.5, 1.0)).symmetric) << "rounding";
  EXPECT_FALSE(with(0.5 + 1e-8).symmetric);
}

TEST(Analyze, BeyondTheSpectrumTheRestIsKnown) {
  EXPECT_TRUE(AnalyzeNamed("ring", kMaxSpectrumSize).spectrum_known);
  EXPECT_FALSE(Analyze(*MakeTopology("ring", 8), /*spectrum=*/false).spectrum_known);
  const TopologyAnalysis analysis = AnalyzeNamed("ring", kMaxSpectrumSize + 1);
  EXPECT_FALSE(analysis.spectrum_known);
  EXPECT_TRUE(analysis.symmetric);
  EXPECT_TRUE(analysis.doubly_stochastic);
  EXPECT_TRUE(analysis.connected);
  EXPECT_EQ(analysis.max_in_degree, 2);
}

}  // namespace
}  // namespace bluefog
