// The engine over the in-process transport, with views read in place and with views that must be
// fetched: what a user of Communicator relies on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>

#include <bluefog/communicator.h>

#include "engine/engine.h"

namespace bluefog {
namespace {

using ::testing::HasSubstr;

class EngineTest : public ::testing::TestWithParam<bool> {
 protected:
  void Make(int size, Config config = {}) {
    CommunicatorOptions options;
    options.config = config;
    options.config.log_level = "error";
    options.fetch_views = GetParam();
    auto made = Communicator::CreateInProcess(size, options);
    ASSERT_TRUE(made.ok()) << made.status();
    comms_ = *std::move(made);
  }
  void SetTopology(const TopologySequence& topology) {
    for (auto& c : comms_) ASSERT_TRUE(c->SetTopology(topology).ok());
  }
  /// Runs `fn(rank)` on a thread for each rank.
  template <typename Fn>
  void OnRanks(Fn fn) {
    std::vector<std::thread> threads;
    for (int r = 0; r < static_cast<int>(comms_.size()); ++r) threads.emplace_back([=] { fn(r); });
    for (std::thread& t : threads) t.join();
  }
  StatusOr<std::vector<double>> Run(int rank, OpSpec spec) {
    auto work = comms_[rank]->Submit(std::move(spec));
    if (!work.ok()) return work.status();
    if (Status s = (*work)->Wait(std::chrono::seconds(20)); !s.ok()) return s;
    const TensorView out = (*work)->output();
    const auto* p = static_cast<const double*>(out.data);
    return std::vector<double>(p, p + out.count);
  }
  std::vector<std::unique_ptr<Communicator>> comms_;
};

OpSpec Spec(Op op, std::vector<double>& x, std::string name = "") {
  OpSpec spec;
  spec.op = op;
  spec.name = std::move(name);
  spec.input = TensorView::Of(x.data(), static_cast<int64_t>(x.size()));
  return spec;
}

std::vector<double> Input(int rank, int64_t n) {
  std::vector<double> x(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) x[i] = std::sin(static_cast<double>(rank * 1000003 + i));
  return x;
}

TEST_P(EngineTest, NeighborAllreduceMatchesTheMatrix) {
  // Directed and not circulant, so that rows and columns cannot be mixed up unseen.
  const int n = 4;
  const std::vector<double> w = {.5, .2, .3, 0, 0, .7, 0, .3, .1, 0, .6, .3, .4, .1, .1, .4};
  Make(n);
  SetTopology(TopologySequence(*Topology::FromMatrix(n, w)));
  for (const int64_t count : {0, 1, 1023, 1024, 1025, 200'001}) {
    OnRanks([&](int r) {
      std::vector<double> x = Input(r, count);
      auto y = Run(r, Spec(Op::kNeighborAllreduce, x));
      ASSERT_TRUE(y.ok()) << y.status();
      ASSERT_EQ(y->size(), x.size());
      for (int64_t i = 0; i < count; i += 97) {
        double expected = 0;
        for (int j = 0; j < n; ++j) expected += w[j * n + r] * Input(j, i + 1)[i];
        if (i > 2000) break;
        EXPECT_NEAR((*y)[i], expected, 1e-15) << count << " " << i;
      }
      for (int64_t i = std::max<int64_t>(0, count - 3); i < count; ++i) {
        double expected = 0;
        for (int j = 0; j < n; ++j) {
          expected += w[j * n + r] * std::sin(static_cast<double>(j * 1000003 + i));
        }
        EXPECT_NEAR((*y)[i], expected, 1e-15) << count << " " << i;
      }
    });
  }
}

TEST_P(EngineTest, AllreduceIsIdenticalOnAllRanks) {
  const int n = 5;
  Make(n);
  for (const int64_t count : {1, 777, 100'003}) {
    std::vector<std::vector<double>> results(n);
    OnRanks([&](int r) {
      std::vector<double> x = Input(r, count);
      auto y = Run(r, Spec(Op::kAllreduce, x));
      ASSERT_TRUE(y.ok()) << y.status();
      results[r] = *y;
    });
    for (int r = 1; r < n; ++r) EXPECT_EQ(results[r], results[0]);
    double mean = 0;
    for (int r = 0; r < n; ++r) mean += std::sin(static_cast<double>(r * 1000003)) / n;
    EXPECT_NEAR(results[0][0], mean, 1e-14);
  }
}

TEST_P(EngineTest, BroadcastAllgatherBarrier) {
  const int n = 6;
  Make(n);
  OnRanks([&](int r) {
    std::vector<double> x = Input(r, 90'001);
    OpSpec spec = Spec(Op::kBroadcast, x);
    spec.root = 3;
    auto y = Run(r, spec);
    ASSERT_TRUE(y.ok()) << y.status();
    EXPECT_EQ(*y, Input(3, 90'001));
    std::vector<double> small = {static_cast<double>(r), -1.0};
    auto all = Run(r, Spec(Op::kAllgather, small));
    ASSERT_TRUE(all.ok()) << all.status();
    for (int j = 0; j < n; ++j) EXPECT_EQ((*all)[2 * j], j);
    std::vector<double> none;
    auto barrier = Run(r, Spec(Op::kBarrier, none));
    EXPECT_TRUE(barrier.ok()) << barrier.status();
  });
}

TEST_P(EngineTest, InPlaceAndRepeated) {
  Make(4);
  SetTopology(TopologySequence(*Ring(4)));
  OnRanks([&](int r) {
    for (int k = 0; k < 50; ++k) {
      std::vector<double> x(5000, r);
      OpSpec spec = Spec(Op::kNeighborAllreduce, x);
      spec.output = spec.input;
      auto y = Run(r, spec);
      ASSERT_TRUE(y.ok()) << y.status();
      const double expected = (r + (r + 1) % 4 + (r + 3) % 4) / 3.0;
      EXPECT_EQ(x[17], expected);
    }
  });
}

TEST_P(EngineTest, OppositeOrderWithALargeTensorInFront) {
  Make(2);
  SetTopology(TopologySequence(*Ring(2)));
  OnRanks([&](int r) {
    std::vector<double> big(int64_t{4} << 20, r), small(3, r), mid(9000, r);
    std::vector<std::shared_ptr<Work>> works;
    std::vector<OpSpec> specs = {Spec(Op::kNeighborAllreduce, big, "big"),
                                 Spec(Op::kNeighborAllreduce, mid, "mid"),
                                 Spec(Op::kAllreduce, small, "small")};
    if (r == 1) std::reverse(specs.begin(), specs.end());
    for (OpSpec& s : specs) {
      auto work = comms_[r]->Submit(s);
      ASSERT_TRUE(work.ok()) << work.status();
      works.push_back(*work);
    }
    for (auto& w : works) {
      ASSERT_TRUE(w->Wait(std::chrono::seconds(30)).ok());
      EXPECT_EQ(static_cast<double*>(w->output().data)[2], 0.5);
    }
  });
}

TEST_P(EngineTest, AMismatchNamesBothValuesOnBothRanksAndLeavesNothingBehind) {
  Make(3);
  SetTopology(TopologySequence(*Ring(3)));
  for (const int64_t count : {10, 50'000}) {
    const std::string name = "t" + std::to_string(count);
    OnRanks([&](int r) {
      std::vector<double> x(count + (r == 1 ? 5 : 0), 1.0);
      auto y = Run(r, Spec(Op::kNeighborAllreduce, x, name));
      ASSERT_FALSE(y.ok());
      EXPECT_EQ(y.status().code(), absl::StatusCode::kInvalidArgument) << y.status();
      const std::string text(y.status().message());
      EXPECT_THAT(text, HasSubstr("float64[" + std::to_string(count) + "]"));
      EXPECT_THAT(text, HasSubstr("float64[" + std::to_string(count + 5) + "]"));
      EXPECT_THAT(text, HasSubstr("rank 1"));
      EXPECT_THAT(text, HasSubstr(name));
      // What follows works at once.
      std::vector<double> z(count, r);
      auto again = Run(r, Spec(Op::kNeighborAllreduce, z));
      ASSERT_TRUE(again.ok()) << again.status();
      EXPECT_EQ((*again)[1], 1.0);
    });
  }
}

TEST_P(EngineTest, DynamicCallsWithWeightsOfBothEnds) {
  Make(4);
  OnRanks([&](int r) {
    for (int round = 0; round < 6; ++round) {
      const int shift = 1 + round % 3;
      std::vector<double> x(700, r + 1);
      OpSpec spec = Spec(Op::kNeighborAllreduce, x);
      MixingWeights w;
      w.self_weight = 0.25;
      w.src = {{(r + 4 - shift) % 4, 2.0}};
      w.dst = std::vector<Edge>{{(r + shift) % 4, 0.5 * (r + 1)}};
      spec.weights = w;
      auto y = Run(r, spec);
      ASSERT_TRUE(y.ok()) << y.status();
      const double j = (r + 4 - shift) % 4 + 1;
      EXPECT_DOUBLE_EQ((*y)[5], 0.25 * (r + 1) + 2.0 * 0.5 * j * j);
    }
  });
}

TEST_P(EngineTest, AnOutputWithAnotherMemoryOrderIsRefused) {
  Make(1);
  std::vector<double> x(6, 1.0), y(6, 0.0);
  OpSpec spec = Spec(Op::kAllreduce, x);
  spec.output = TensorView::Of(y.data(), 6);
  spec.input.ndim = spec.output.ndim = 2;
  spec.input.shape = spec.output.shape = {2, 3};
  spec.input.strides = {1, 2};
  spec.output.strides = {3, 1};
  for (const Op op : {Op::kAllreduce, Op::kNeighborAllreduce, Op::kBroadcast}) {
    spec.op = op;
    const auto work = comms_[0]->Submit(spec);
    ASSERT_FALSE(work.ok()) << NameOf(op);
    EXPECT_THAT(std::string(work.status().message()),
                ::testing::AllOf(HasSubstr("output is float64[2, 3], input is"),
                                 HasSubstr("strides (1, 2)")));
  }
  spec.op = Op::kAllgather;
  EXPECT_THAT(std::string(comms_[0]->Submit(spec).status().message()),
              HasSubstr("input float64[2, 3] strides (1, 2) is not contiguous"));
  std::swap(spec.input.strides, spec.output.strides);
  EXPECT_THAT(std::string(comms_[0]->Submit(spec).status().message()),
              HasSubstr("output float64[2, 3] strides (1, 2) is not contiguous"));
  spec.output.strides = spec.input.strides;
  EXPECT_TRUE(Run(0, spec).ok());
}

TEST_P(EngineTest, ADuplicateNameInFlightIsRefused) {
  Make(2);
  SetTopology(TopologySequence(*Ring(2)));
  std::vector<double> x(4, 1.0), y(4, 2.0);
  auto first = comms_[0]->Submit(Spec(Op::kNeighborAllreduce, x, "w"));
  ASSERT_TRUE(first.ok());
  auto second = comms_[0]->Submit(Spec(Op::kNeighborAllreduce, x, "w"));
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("'w'"));
  auto partner = comms_[1]->Submit(Spec(Op::kNeighborAllreduce, y, "w"));
  ASSERT_TRUE((*partner)->Wait().ok());
  ASSERT_TRUE((*first)->Wait().ok());
  EXPECT_TRUE(comms_[0]->Submit(Spec(Op::kNeighborAllreduce, x, "w")).ok());
}

TEST_P(EngineTest, AMissingPartnerIsNamedWhenTimeIsUp) {
  Config config;
  config.stall_report_ms = 20;
  config.op_timeout_ms = 200;
  Make(3, config);
  SetTopology(TopologySequence(*Ring(3)));
  std::vector<double> x(4, 1.0), z(4, 1.0);
  auto a = comms_[0]->Submit(Spec(Op::kNeighborAllreduce, x, "late"));
  auto b = comms_[2]->Submit(Spec(Op::kNeighborAllreduce, z, "late"));
  const Status status = (*a)->Wait();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("'late'"));
  EXPECT_FALSE((*b)->Wait().ok());
}

TEST_P(EngineTest, ShutdownCompletesWhatIsOutstanding) {
  Make(2);
  SetTopology(TopologySequence(*Ring(2)));
  std::vector<double> x(4, 1.0);
  auto work = comms_[0]->Submit(Spec(Op::kNeighborAllreduce, x));
  comms_[0]->Shutdown();
  EXPECT_FALSE((*work)->Wait().ok());
  EXPECT_FALSE(comms_[0]->Submit(Spec(Op::kNeighborAllreduce, x)).ok());
  // The other hears that rank 0 has left.
  auto other = comms_[1]->Submit(Spec(Op::kNeighborAllreduce, x));
  const Status status = other.ok() ? (*other)->Wait() : other.status();
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0"));
}

// The notice that a rank has left may overtake the use of what it sent.
TEST_P(EngineTest, WhatARankSentBeforeItLeftCountsAndOfADeadOneNothing) {
  for (const bool died : {false, true}) {
    Make(2);
    std::vector<double> x(100, 7.0), y(100, 0.0), none;
    OpSpec spec = Spec(Op::kBroadcast, x, "early");
    auto sent = comms_[0]->Submit(spec);
    ASSERT_TRUE(sent.ok());
    // Behind it, from the same rank: then it has arrived.
    OnRanks([&](int r) { ASSERT_TRUE(Run(r, Spec(Op::kBarrier, none)).ok()); });
    comms_[1]->engine()->Run([died](Executor& executor) {
      executor.FailPeer(0, absl::UnavailableError("rank 0 has left the job"), died);
    });
    auto early = Run(1, Spec(Op::kBroadcast, y, "early"));
    if (died) {
      EXPECT_THAT(std::string(early.status().message()),
                  ::testing::AllOf(HasSubstr("broadcast 'early'"), HasSubstr("rank 0 has left")));
    } else {
      EXPECT_TRUE(early.ok() && *early == x) << early.status();
      EXPECT_TRUE((*sent)->Wait().ok());
    }
    // What would have to come yet does not.
    auto late = Run(1, Spec(Op::kBroadcast, y, "late"));
    EXPECT_THAT(std::string(late.status().message()),
                ::testing::AllOf(HasSubstr("broadcast 'late'"), HasSubstr("rank 0 has left")));
    comms_.clear();
  }
}

// A caller that was past all checks when another thread shut the communicator down.
TEST_P(EngineTest, WhatIsSubmittedWhileTheCommunicatorShutsDownFails) {
  Make(2);
  std::vector<double> x(4, 1.0);
  Engine* const engine = comms_[0]->engine();
  Planner::Request request;
  request.op = Op::kAllreduce;
  request.count = 4;
  request.element_bytes = 8;
  Submission late;
  late.op = request.op;
  late.name = engine->Name("late", false);
  late.key.name_hash = late.name->hash;
  late.plan = *engine->planner().Get(request);
  late.input = TensorView::Of(x.data(), 4);
  late.in[0] = late.out[0] = reinterpret_cast<std::byte*>(x.data());
  late.work = std::make_shared<WorkImpl>(engine, late.name);
  comms_[0]->Shutdown();
  engine->Run([&](Executor& executor) {
    Operation* op = executor.NewOperation();
    static_cast<Submission&>(*op) = late;
    executor.Start(op);
  });
  Completion never;
  engine->Wait(never, std::chrono::milliseconds(1), "the inbox");
  ASSERT_TRUE(late.work->done());
  EXPECT_THAT(std::string(late.work->Wait(std::chrono::seconds(1)).message()),
              HasSubstr("shut down"));
}

TEST(WorkTest, ManyThreadsThatWaitReleaseTheTensorOnce) {
  NameEntry name;
  for (int i = 0; i < 2000; ++i) {
    std::atomic<int> released{0}, ready{0};
    WorkImpl work(nullptr, &name);
    work.BindKeepAlive(std::shared_ptr<void>(&released, [&](void*) { ++released; }));
    work.Complete(absl::OkStatus());
    std::vector<std::thread> threads;
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&] {
        for (++ready; ready.load() < 2;) {
        }
        EXPECT_TRUE(work.Wait(std::chrono::seconds(1)).ok());
      });
    }
    for (std::thread& t : threads) t.join();
    ASSERT_EQ(released.load(), 1);
  }
}

TEST_P(EngineTest, FiftyOutstandingInAnyOrder) {
  Make(4);
  SetTopology(TopologySequence(*Exponential(4)));
  OnRanks([&](int r) {
    std::vector<std::vector<double>> xs;
    for (int k = 0; k < 50; ++k) xs.emplace_back(k % 5 == 0 ? 3000 : 7, r + k);
    std::vector<std::shared_ptr<Work>> works(50);
    for (int i = 0; i < 50; ++i) {
      const int k = (i * (2 * r + 1) * 7 + r) % 50;
      auto w = comms_[r]->Submit(Spec(Op::kNeighborAllreduce, xs[k], "op" + std::to_string(k)));
      if (works[k] == nullptr) {
        ASSERT_TRUE(w.ok()) << w.status();
        works[k] = *w;
      }
    }
    for (int k = 0; k < 50; ++k) {
      if (works[k] == nullptr) {
        auto w = comms_[r]->Submit(Spec(Op::kNeighborAllreduce, xs[k], "op" + std::to_string(k)));
        ASSERT_TRUE(w.ok()) << w.status();
        works[k] = *w;
      }
    }
    for (int k = 0; k < 50; ++k) {
      ASSERT_TRUE(works[k]->Wait().ok());
      const double mean = (r + (r + 3) % 4 + (r + 2) % 4) / 3.0 + k;
      EXPECT_NEAR(static_cast<double*>(works[k]->output().data)[2], mean, 1e-12);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Views, EngineTest, ::testing::Values(false, true),
                         [](const auto& info) { return info.param ? "fetched" : "in_place"; });

}  // namespace
}  // namespace bluefog
