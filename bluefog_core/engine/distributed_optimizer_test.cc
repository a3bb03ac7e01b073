// The life of a distributed optimizer on the caller's side: what it must leave behind in order when
// it is not made, fails, or goes. What it computes is tests/spine's.
#include <bluefog/distributed_optimizer.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <thread>

#include "engine/engine.h"

namespace bluefog {
namespace {

using ::testing::HasSubstr;

std::vector<std::unique_ptr<Communicator>> Make(int size) {
  CommunicatorOptions options;
  options.config.log_level = "error";
  auto made = Communicator::CreateInProcess(size, options);
  EXPECT_TRUE(made.ok()) << made.status();
  return *std::move(made);
}

DistributedOptimizerOptions Options(std::vector<int64_t> counts) {
  DistributedOptimizerOptions options;
  options.plugin = "dsgd";
  for (size_t i = 0; i < counts.size(); ++i) {
    options.params.push_back(
        {.name = "p" + std::to_string(i), .count = counts[i], .layout = "float32"});
  }
  return options;
}

TEST(DistributedOptimizerTest, GivenUpWhileTheRanksAgreeItsMemoryIsNotWrittenAnyMore) {
  auto comms = Make(2);
  DistributedOptimizerOptions options = Options({4});
  options.interrupted = [] { return true; };
  const auto given_up = DistributedOptimizer::Create(comms[0].get(), std::move(options));
  ASSERT_EQ(given_up.status().code(), absl::StatusCode::kCancelled) << given_up.status();
  // Of the sizes of what was gathered: this is where it would have been.
  constexpr int64_t kUntouched = 0x5a5a5a5a;
  std::vector<std::vector<int64_t>> memory;
  for (int i = 0; i < 1000; ++i) memory.emplace_back(i % 2 == 0 ? 8 : 4, kUntouched);
  options = Options({4});
  options.interrupted = [waits = 0]() mutable { return ++waits > 5; };
  EXPECT_FALSE(DistributedOptimizer::Create(comms[1].get(), std::move(options)).ok());
  for (const auto& block : memory) {
    EXPECT_EQ(std::count(block.begin(), block.end(), kUntouched),
              static_cast<int64_t>(block.size()));
  }
}

// On one rank only; the others are told, and the next optimizers meet.
TEST(DistributedOptimizerTest, WhatCannotBeMadeOnOneRankFailsOnAll) {
  auto comms = Make(3);
  const auto ring = [](int n) {
    return std::make_shared<const TopologySequence>(*MakeTopology("ring", n));
  };
  std::vector<std::function<void(DistributedOptimizerOptions*)>> mistakes = {
      [](auto* o) { o->plugin = "nosuch"; },
      [](auto* o) { o->params[0].dtype = DType::kInt32; },
      [&](auto* o) { o->topology = ring(5); },
  };
  std::vector<std::thread> threads;
  for (int r = 0; r < 3; ++r) {
    threads.emplace_back([&, r] {
      for (const auto& mistake : mistakes) {
        DistributedOptimizerOptions options = Options({4});
        options.topology = ring(3);
        if (r == 1) mistake(&options);
        const auto made = DistributedOptimizer::Create(comms[r].get(), std::move(options));
        ASSERT_FALSE(made.ok());
        EXPECT_THAT(std::string(made.status().message()), HasSubstr(r == 1 ? "" : "rank 1"));
        const auto next = DistributedOptimizer::Create(comms[r].get(), Options({4}));
        EXPECT_TRUE(next.ok()) << next.status();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Which buckets are complete before step() differs from rank to rank: a graph that is set after the
// first gradient is the next step's, everywhere.
TEST(DistributedOptimizerTest, AStepUsesOneGraph) {
  auto comms = Make(2);
  const auto graph = [](double w) {
    return TopologySequence(*Topology::FromMatrix(2, {1 - w, w, w, 1 - w}));
  };
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      ASSERT_TRUE(comms[r]->SetTopology(graph(0.5)).ok());
      constexpr int64_t kCount = 3'000'000;  // Two buckets.
      auto made = DistributedOptimizer::Create(comms[r].get(), Options({kCount, kCount}));
      ASSERT_TRUE(made.ok()) << made.status();
      std::vector<float> x(2 * kCount, static_cast<float>(r)), g(2 * kCount, 0.0f);
      const ParameterBinding bindings[] = {{.x = x.data(), .g = g.data()},
                                           {.x = x.data() + kCount, .g = g.data() + kCount}};
      const Hyper hyper{.lr = 0.1};
      // Rank 0 is through with the second parameter's gradient, rank 1 with the first's.
      ASSERT_TRUE((*made)->Ready(1 - r, bindings[1 - r], {&hyper, 1}).ok());
      ASSERT_TRUE(comms[r]->SetTopology(graph(0.25)).ok());
      const Status status = (*made)->Step(bindings, {&hyper, 1});
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(x[0], 0.5f);
      EXPECT_EQ(x[kCount], 0.5f);
      x.assign(x.size(), static_cast<float>(r));
      ASSERT_TRUE((*made)->Step(bindings, {&hyper, 1}).ok());
      EXPECT_EQ(x[0], r == 0 ? 0.25f : 0.75f);
    });
  }
  for (std::thread& t : threads) t.join();
}

class Throwing final : public Optimizer {
 public:
  const Traits& traits() const override { return traits_; }
  void Produce(const StepContext& ctx, std::span<const Segment>) override {
    if (ctx.rank == 1) throw std::runtime_error("out of luck");
  }
  Status Consume(const StepContext&, std::span<const Segment>) override { return absl::OkStatus(); }

 private:
  const Traits traits_{.name = "throwing"};
};

TEST(DistributedOptimizerTest, AnExceptionOfAPluginIsAnErrorOfTheStep) {
  auto comms = Make(2);
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      DistributedOptimizerOptions options = Options({100});
      options.optimizer = std::make_unique<Throwing>();
      auto made = DistributedOptimizer::Create(comms[r].get(), std::move(options));
      ASSERT_TRUE(made.ok()) << made.status();
      std::vector<float> x(100), g(100);
      const ParameterBinding binding{.x = x.data(), .g = g.data()};
      const Hyper hyper{.lr = 0.1};
      const Status status = (*made)->Step({&binding, 1}, {&hyper, 1});
      EXPECT_THAT(std::string(status.message()), HasSubstr("exception: out of luck"));
    });
  }
  for (std::thread& t : threads) t.join();
}

/// Rank 1 plans what cannot be done in step 1.
class Wrong final : public Optimizer {
 public:
  explicit Wrong(int rank) : rank_(rank) {}
  const Traits& traits() const override { return traits_; }
  StepPlan Plan(int64_t step, const Hyper&) const override {
    return {Exchange{Collective::kNeighborAllreduce, step, rank_ == 1 && step == 1 ? 0u : 1u}};
  }
  void Produce(const StepContext&, std::span<const Segment> segments) override {
    for (const Segment& s : segments) {
      std::fill_n(static_cast<float*>(s.payload[0]), s.n, 1.0f);
    }
  }
  Status Consume(const StepContext&, std::span<const Segment>) override { return absl::OkStatus(); }

 private:
  const int rank_;
  const Traits traits_{.name = "wrong"};
};

TEST(DistributedOptimizerTest, AStepThatCannotBePlannedIsToldToTheNeighbours) {
  auto comms = Make(2);
  std::vector<std::thread> threads;
  for (int r = 0; r < 2; ++r) {
    threads.emplace_back([&, r] {
      DistributedOptimizerOptions options = Options({100});
      options.optimizer = std::make_unique<Wrong>(r);
      auto made = DistributedOptimizer::Create(comms[r].get(), std::move(options));
      ASSERT_TRUE(made.ok()) << made.status();
      std::vector<float> x(100), g(100);
      const ParameterBinding binding{.x = x.data(), .g = g.data()};
      const Hyper hyper{.lr = 0.1};
      ASSERT_TRUE((*made)->Step({&binding, 1}, {&hyper, 1}).ok());
      ASSERT_TRUE((*made)->BeginStep({&binding, 1}, {&hyper, 1}).ok() || r == 1);
      const Status status = (*made)->WaitStep(std::chrono::seconds(10));
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr(r == 0 ? "must name each of them once" : "no step was begun"));
    });
  }
  for (std::thread& t : threads) t.join();
}

TEST(DistributedOptimizerTest, NullIsNoMemory) {
  auto comm = std::move(Make(1).front());
  DistributedOptimizerOptions options = Options({4});
  options.plugin = "dmsgd";
  auto made = DistributedOptimizer::Create(comm.get(), std::move(options));
  ASSERT_TRUE(made.ok()) << made.status();
  std::vector<float> x(4), g(4);
  const Hyper hyper{.lr = 0.1, .momentum = 0.9};
  const ParameterBinding no_x{.g = g.data()}, no_state{.x = x.data(), .g = g.data()};
  for (const auto& [binding, text] :
       {std::pair{no_x, "parameter 'p0': x is null"}, std::pair{no_state, "' is null"}}) {
    for (const Status& status :
         {(*made)->Ready(0, binding, {&hyper, 1}), (*made)->Step({&binding, 1}, {&hyper, 1})}) {
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
      EXPECT_THAT(std::string(status.message()), HasSubstr(text));
    }
  }
}

TEST(DistributedOptimizerTest, AnUnknownPluginIsAnError) {
  auto comms = Make(1);
  DistributedOptimizerOptions options = Options({4});
  options.plugin = "no such plugin";
  const auto made = DistributedOptimizer::Create(comms[0].get(), std::move(options));
  EXPECT_THAT(std::string(made.status().message()), HasSubstr("no such plugin"));
}

}  // namespace
}  // namespace bluefog
