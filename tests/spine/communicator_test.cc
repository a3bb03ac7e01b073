// What callers of a Communicator may do, on every fabric: any order of submission, edges that only
// one end knows of, and active messages that are served while the target's own thread sleeps.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <future>
#include <numeric>
#include <tuple>

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

/// x, a normal number, as it travels: rounded to nearest even.
float Rounded(DType message, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int cut = message == DType::kBFloat16 ? 16 : 13;
  bits += (1u << (cut - 1)) - 1 + ((bits >> cut) & 1);
  bits = bits >> cut << cut;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Doubly stochastic, directed and not circulant.
Topology Directed() {
  return *Topology::FromMatrix(4, {.4, .4, .2, 0, .1, .4, .3, .2, .3, 0, .4, .3, .2, .2, .1, .5},
                               "directed");
}

float Element(int rank, size_t i) {
  return std::sin(static_cast<float>(i) * 0.37f + static_cast<float>(rank)) + 1.5f;
}

// Half the bytes, the mean as it was, and the same bits each time, in place and not.
TEST_P(CommunicatorSpine, RoundedMessagesKeepTheMean) {
  const Topology w = Directed();
  for (const DType message : {DType::kBFloat16, DType::kFloat16}) {
    for (const size_t count : {0u, 5u, 300'000u}) {
      const auto values = RunOk(4, [&](Communicator& comm, Vector* out) -> Status {
        if (Status s = comm.SetTopology(TopologySequence(w)); !s.ok()) return s;
        std::vector<std::vector<float>> results;
        int64_t sent = 0;
        for (int round = 0; round < 3; ++round) {
          std::vector<float> x(count), y(count);
          for (size_t i = 0; i < count; ++i) x[i] = Element(comm.rank(), i);
          OpSpec spec;
          spec.name = "x";
          spec.input = TensorView::Of(x.data(), static_cast<int64_t>(count));
          spec.output = spec.input;
          if (round < 2) spec.output.data = y.data();
          spec.message_dtype = message;
          const int64_t before = comm.stats().bytes_sent;
          if (Status s = RunOp(comm, spec); !s.ok()) return s;
          sent = comm.stats().bytes_sent - before;
          results.push_back(round == 2 ? x : y);
        }
        const auto edges = static_cast<int64_t>(w.neighborhood(comm.rank()).out.size());
        if (sent != 2 * edges * static_cast<int64_t>(count)) {
          return absl::InternalError(std::to_string(sent) + " bytes sent");
        }
        if (results[0] != results[1] || results[0] != results[2]) {
          return absl::InternalError("other bits");
        }
        out->assign(results[0].begin(), results[0].end());
        return absl::OkStatus();
      });
      for (size_t i = 0; i < count; ++i) {
        double before = 0.0, after = 0.0;
        for (int r = 0; r < 4; ++r) {
          double expected = Element(r, i);
          for (int j = 0; j < 4; ++j) {
            expected += w.weight(j, r) * (static_cast<double>(Rounded(message, Element(j, i))) -
                                          static_cast<double>(Rounded(message, Element(r, i))));
          }
          ASSERT_NEAR(values[r].at(i), expected, 1e-6) << "rank " << r << ", element " << i;
          before += Element(r, i);
          after += values[r][i];
        }
        ASSERT_NEAR(before, after, 1e-6);
      }
    }
  }
}

// Weights of the call, of any sum; a rank that only sends, and one that only receives.
TEST_P(CommunicatorSpine, RoundedMessagesWithWeightsOfTheCall) {
  const auto values = RunOk(3, [](Communicator& comm, Vector* out) -> Status {
    std::vector<float> x(1000);
    for (size_t i = 0; i < x.size(); ++i) x[i] = Element(comm.rank(), i);
    OpSpec spec;
    spec.name = "x";
    spec.input = spec.output = TensorView::Of(x.data(), 1000);
    spec.message_dtype = DType::kBFloat16;
    MixingWeights weights;  // 0 -> 1 -> 2
    weights.self_weight = comm.rank() == 2 ? 0.0 : 0.25;
    if (comm.rank() > 0) weights.src = {{comm.rank() - 1, 0.5}};
    weights.dst = std::vector<Edge>{};
    if (comm.rank() < 2) weights.dst = std::vector<Edge>{{comm.rank() + 1, 2.0}};
    spec.weights = weights;
    if (Status s = RunOp(comm, spec); !s.ok()) return s;
    out->assign(x.begin(), x.end());
    return absl::OkStatus();
  });
  const auto rounded = [](int r, size_t i) {
    return static_cast<double>(Rounded(DType::kBFloat16, Element(r, i)));
  };
  for (size_t i = 0; i < 1000; ++i) {
    ASSERT_NEAR(values[0].at(i), 0.25 * Element(0, i), 1e-6);
    // What was rounded away of the own part stays, as far as others' parts come in.
    ASSERT_NEAR(values[1].at(i), 1.25 * Element(1, i) + rounded(0, i) - rounded(1, i), 1e-6);
    ASSERT_NEAR(values[2].at(i), Element(2, i) + rounded(1, i) - rounded(2, i), 1e-6);
  }
}

TEST_P(CommunicatorSpine, OtherMessageDtypesAreAnErrorOnBothRanks) {
  for (const size_t count : {10u, 50'000u}) {
    const auto results = Run(2, [&](Communicator& comm, Vector*) -> Status {
      std::vector<float> x(count, 1.0f);
      OpSpec spec;
      spec.name = "edge";
      spec.input = spec.output = TensorView::Of(x.data(), static_cast<int64_t>(count));
      if (comm.rank() == 0) spec.message_dtype = DType::kBFloat16;
      auto work = comm.Submit(spec);
      if (!work.ok()) return work.status();
      const Status s = (*work)->Wait(kPrompt);
      return s.ok() ? absl::InternalError("the operation ended well") : s;
    });
    for (const RankResult& r : results) {
      EXPECT_THAT(r.error, HasSubstr("'edge'"));
      EXPECT_THAT(r.error, HasSubstr("bfloat16 on rank 0"));
      EXPECT_THAT(r.error, HasSubstr("float32 on rank 1"));
    }
  }
}

TEST_P(CommunicatorSpine, MessageDtypesThatCannotBeAreRefused) {
  RunOk(2, [](Communicator& comm, Vector*) -> Status {
    std::vector<float> x(10, 1.0f);
    std::vector<uint16_t> half(10, 0);
    const auto told = [&](Op op, const TensorView& tensor, DType message,
                          const std::string& why) -> Status {
      OpSpec spec;
      spec.op = op;
      spec.input = spec.output = tensor;
      spec.message_dtype = message;
      const Status s = comm.Submit(spec).status();
      return absl::IsInvalidArgument(s) && s.message().find(why) != std::string::npos
                 ? absl::OkStatus()
                 : absl::InternalError("not " + why + ": " + s.ToString());
    };
    const TensorView floats = TensorView::Of(x.data(), 10);
    for (const auto& [op, tensor, message, why] :
         {std::tuple{Op::kAllreduce, floats, DType::kBFloat16, "is for neighbor_allreduce"},
          std::tuple{Op::kNeighborAllreduce, floats, DType::kFloat64, "cannot travel as float64"},
          std::tuple{Op::kNeighborAllreduce, floats, DType::kInt16, "cannot travel as int16"},
          std::tuple{Op::kNeighborAllreduce, TensorView::Of(half.data(), 10, DType::kBFloat16),
                     DType::kFloat16, "bfloat16 cannot travel as float16"}}) {
      if (Status s = told(op, tensor, message, why); !s.ok()) return s;
    }
    OpSpec own;  // Its own type is what it travels as anyway.
    own.input = own.output = floats;
    own.message_dtype = DType::kFloat32;
    return RunOp(comm, own);
  });
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
