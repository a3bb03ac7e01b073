// For tests: the schedules of all ranks, inputs, and what should come out.
#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "collective/interpreter.h"
#include "collective/schedule.h"

namespace bluefog::collective {

using Values = std::vector<std::vector<double>>;  // [rank][element]

template <typename Plan>
std::vector<Schedule> PlanAll(PlanInput in, Plan plan) {
  std::vector<Schedule> schedules;
  for (in.rank = 0; in.rank < in.size; ++in.rank) schedules.push_back(plan(in));
  return schedules;
}

inline std::vector<Schedule> PlanAll(PlanInput in, const Topology& topology) {
  return PlanAll(in, [&](const PlanInput& rank) {
    return PlanNeighborAllreduce(rank, topology.neighborhood(rank.rank));
  });
}

inline Values RandomInputs(int size, int64_t count) {
  std::mt19937_64 random(static_cast<uint64_t>(size * 1000 + count));
  std::uniform_real_distribution<double> uniform(-1.0, 1.0);
  Values inputs(static_cast<size_t>(size), std::vector<double>(static_cast<size_t>(count)));
  for (auto& input : inputs) {
    for (double& x : input) x = uniform(random);
  }
  return inputs;
}

/// [rank] = sum over j of W[j][rank] * inputs[j].
inline Values Mixed(const Topology& topology, const Values& inputs) {
  Values mixed(inputs.size(), std::vector<double>(inputs[0].size(), 0.0));
  for (size_t to = 0; to < inputs.size(); ++to) {
    for (size_t from = 0; from < inputs.size(); ++from) {
      const double w = topology.weight(static_cast<int>(from), static_cast<int>(to));
      for (size_t k = 0; k < inputs[to].size(); ++k) mixed[to][k] += w * inputs[from][k];
    }
  }
  return mixed;
}

/// The sum of all inputs in rank order.
inline std::vector<double> Sum(const Values& inputs) {
  std::vector<double> sum = inputs[0];
  for (size_t rank = 1; rank < inputs.size(); ++rank) {
    for (size_t k = 0; k < sum.size(); ++k) sum[k] += inputs[rank][k];
  }
  return sum;
}

/// A directed graph that no rotation of ranks maps onto itself, so that rows and columns of W
/// differ. Degrees from 0, weights of any sum.
inline Topology RandomDigraph(int size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  std::vector<double> w(static_cast<size_t>(size * size), 0.0);
  for (double& entry : w) {
    if (uniform(random) < 0.4) entry = uniform(random);
  }
  return *Topology::FromMatrix(size, w);
}

inline void ExpectNear(const Values& actual, const Values& expected, const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (size_t rank = 0; rank < expected.size(); ++rank) {
    ASSERT_EQ(actual[rank].size(), expected[rank].size()) << what << ", rank " << rank;
    for (size_t k = 0; k < expected[rank].size(); ++k) {
      ASSERT_NEAR(actual[rank][k], expected[rank][k], 1e-12)
          << what << ", rank " << rank << ", element " << k;
    }
  }
}

/// Runs in `seeds` orders; each must succeed with this result.
inline void ExpectResult(const std::vector<Schedule>& schedules, const Values& inputs,
                         const Values& expected, const std::string& what,
                         InterpreterOptions options = {}, int seeds = 2) {
  for (int seed = 0; seed < seeds; ++seed) {
    options.seed = static_cast<uint64_t>(seed);
    const StatusOr<Values> outputs = Interpret(schedules, inputs, options);
    ASSERT_TRUE(outputs.ok()) << what << ", seed " << seed << ": " << outputs.status();
    ExpectNear(*outputs, expected, what);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace bluefog::collective
