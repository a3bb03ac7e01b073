// What callers of a Communicator may do, on every fabric: any order of submission, edges that only
// one end knows of, and active messages that are served while the target's own thread sleeps.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <numeric>

#include "engine/engine.h"
#include "ranks.h"

namespace bluefog::spine {
namespace {

using ::testing::HasSubstr;
using Vector = std::vector<double>;

/// Only a hang lasts so long: the time-out of operations is ten minutes.
constexpr auto kPrompt = std::chrono::seconds(10);

OpSpec Spec(Op op, const std::string& name, Vector* x) {
  OpSpec spec;
  spec.op = op;
  spec.name = name;
  spec.input = TensorView::Of(x->data(), static_cast<int64_t>(x->size()));
  spec.output = spec.input;
  return spec;
}

class CommunicatorSpine : public ::testing::TestWithParam<Fabric> {
 protected:
  std::vector<RankResult> Run(int size, const Program& program) {
    return RunRanks(GetParam(), size, Config(), program);
  }
  std::vector<Vector> RunOk(int size, const Program& program) {
    return RunRanksOk(GetParam(), size, Config(), program);
  }
};

TEST_P(CommunicatorSpine, OppositeOrderWithALargeTensorInFront) {
  const auto values = RunOk(2, [](Communicator& comm, Vector* out) -> Status {
    Vector large(size_t{8} << 20, comm.rank() + 1.0);  // 64 MiB
    Vector middle(100'000, comm.rank() + 2.0), small(3, comm.rank() + 3.0);
    std::vector<OpSpec> specs = {Spec(Op::kNeighborAllreduce, "large", &large),
                                 Spec(Op::kNeighborAllreduce, "middle", &middle),
                                 Spec(Op::kAllreduce, "small", &small)};
    if (comm.rank() == 1) std::reverse(specs.begin(), specs.end());
    std::vector<std::shared_ptr<Work>> works;
    for (OpSpec& spec : specs) {
      auto work = comm.Submit(spec);
      if (!work.ok()) return work.status();
      works.push_back(*work);
    }
    for (auto& work : works) {
      if (Status s = work->Wait(std::chrono::seconds(60)); !s.ok()) return s;
    }
    for (const Vector* v : {&large, &middle, &small}) {
      out->push_back(*std::min_element(v->begin(), v->end()));
      out->push_back(*std::max_element(v->begin(), v->end()));
    }
    return absl::OkStatus();
  });
  for (const Vector& v : values) EXPECT_EQ(v, (Vector{1.5, 1.5, 2.5, 2.5, 3.5, 3.5}));
}

// Each operation waits for several peers, so that what one of them sent early could keep out what
// another operation needs.
TEST_P(CommunicatorSpine, ManyOperationsInOppositeOrder) {
  struct Case {
    int operations;
    size_t count;
  };
  for (const Case& c : {Case{100, 1000}, Case{2000, 2}, Case{8, 40'000}}) {
    const auto values = RunOk(3, [&](Communicator& comm, Vector* out) -> Status {
      std::vector<Vector> x(static_cast<size_t>(c.operations), Vector(c.count, comm.rank() + 1.0));
      std::vector<int> order(x.size());
      std::iota(order.begin(), order.end(), 0);
      if (comm.rank() == 2) std::reverse(order.begin(), order.end());
      std::vector<std::shared_ptr<Work>> works;
      for (const int i : order) {
        auto work = comm.Submit(Spec(Op::kNeighborAllreduce, "x" + std::to_string(i), &x[i]));
        if (!work.ok()) return work.status();
        works.push_back(*work);
      }
      for (auto& work : works) {
        if (Status s = work->Wait(std::chrono::seconds(60)); !s.ok()) return s;
      }
      for (const Vector& v : x) out->push_back(v.back());
      return absl::OkStatus();
    });
    for (const Vector& v : values) {
      for (const double mean : v) EXPECT_DOUBLE_EQ(mean, 2.0) << c.operations;
    }
  }
}

// More than a link holds at a time: what rank 1 wants next is what rank 0 has submitted last.
TEST_P(CommunicatorSpine, MoreOperationsThanALinkHolds) {
  constexpr int kOperations = 2 * transport::kMaxInFlight + 500;
  const auto values = RunOk(2, [&](Communicator& comm, Vector* out) -> Status {
    std::vector<Vector> x(kOperations, Vector(2, comm.rank() + 1.0));
    std::vector<std::shared_ptr<Work>> works(kOperations);
    for (int k = 0; k < kOperations; ++k) {
      const int i = comm.rank() == 0 ? k : kOperations - 1 - k;
      auto work = comm.Submit(Spec(Op::kNeighborAllreduce, "x" + std::to_string(i), &x[i]));
      if (!work.ok()) return work.status();
      works[i] = *work;
      if (comm.rank() == 0) continue;
      if (Status s = (*work)->Wait(std::chrono::seconds(60)); !s.ok()) return s;
    }
    for (auto& work : works) {
      if (Status s = work->Wait(std::chrono::seconds(60)); !s.ok()) return s;
    }
    for (const Vector& v : x) out->push_back(v.back());
    return absl::OkStatus();
  });
  for (const Vector& v : values) {
    for (const double mean : v) ASSERT_DOUBLE_EQ(mean, 1.5);
  }
}

TEST_P(CommunicatorSpine, ASendToARankThatDoesNotListenFailsOnBoth) {
  for (const size_t count : {10u, 50'000u}) {
    const auto results = Run(3, [&](Communicator& comm, Vector*) -> Status {
      // 0 sends to 1, which waits for 2 alone; 2 has not submitted anything.
      if (Status s = Barrier(comm, "connected"); !s.ok()) return s;
      Status mine = absl::OkStatus();
      if (comm.rank() != 2) {
        Vector x(count, 1.0);
        OpSpec spec = Spec(Op::kNeighborAllreduce, "edge", &x);
        MixingWeights weights;
        weights.self_weight = 0.5;
        weights.dst = std::vector<Edge>{};
        if (comm.rank() == 0) weights.dst = std::vector<Edge>{{1, 1.0}};
        if (comm.rank() == 1) weights.src = {{2, 0.5}};
        spec.weights = weights;
        auto work = comm.Submit(spec);
        if (!work.ok()) return work.status();
        mine = (*work)->Wait(kPrompt);
        if (mine.ok()) mine = absl::InternalError("the operation ended well");
      }
      // What follows works.
      Vector y(count, comm.rank());
      if (Status s = RunOp(comm, Spec(Op::kAllreduce, "after", &y)); !s.ok()) return s;
      return y[1] == 1.0 ? mine : absl::InternalError("wrong mean");
    });
    for (const int rank : {0, 1}) {
      EXPECT_THAT(results[rank].error, HasSubstr("INVALID_ARGUMENT")) << rank;
      EXPECT_THAT(results[rank].error, HasSubstr("'edge'")) << rank;
      EXPECT_THAT(results[rank].error, HasSubstr("rank 0")) << rank;
      EXPECT_THAT(results[rank].error, HasSubstr("rank 1")) << rank;
    }
    EXPECT_EQ(results[2].error, "");
  }
}

TEST_P(CommunicatorSpine, AnActiveMessageIsServedWhileTheTargetSleeps) {
  constexpr uint8_t kAsk = 7, kAnswer = 8;
  const auto values = RunOk(2, [](Communicator& comm, Vector* out) -> Status {
    Engine* const engine = comm.engine();
    const int other = 1 - comm.rank();
    auto served = std::make_shared<std::promise<Vector>>();
    engine->SetUserHandler(
        comm.rank() == 0 ? kAnswer : kAsk,
        [=](int peer, const WireHeader& header, std::span<const std::byte> payload) {
          double value;
          std::memcpy(&value, payload.data(), sizeof value);
          served->set_value({static_cast<double>(peer), static_cast<double>(header.count), value});
          if (header.code == kAnswer) return;
          // From inside the engine: the caller of rank 1 has no part in it.
          engine->Run([=](Executor& executor) {
            const double twice = 2 * value;
            executor.SendUser(peer, kAnswer, header.count + 1, std::as_bytes(std::span(&twice, 1)));
          });
        });
    if (Status s = Barrier(comm, "handlers are set"); !s.ok()) return s;
    if (comm.rank() == 0) {
      engine->Run([other](Executor& executor) {
        const double value = 21.0;
        executor.SendUser(other, kAsk, 5, std::as_bytes(std::span(&value, 1)));
      });
    }
    // Not a wait of the engine: nobody drives progress but its own thread.
    std::future<Vector> future = served->get_future();
    if (future.wait_for(kPrompt) != std::future_status::ready) {
      return absl::InternalError("not served");
    }
    *out = future.get();
    // The engine's reference to the handler ends before what it refers to.
    engine->SetUserHandler(comm.rank() == 0 ? kAnswer : kAsk, nullptr);
    return absl::OkStatus();
  });
  EXPECT_EQ(values[1], (Vector{0, 5, 21}));
  EXPECT_EQ(values[0], (Vector{1, 6, 42}));
}

INSTANTIATE_TEST_SUITE_P(Fabrics, CommunicatorSpine, ::testing::ValuesIn(AllFabrics()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace bluefog::spine
