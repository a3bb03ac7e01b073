// Operations and optimizers over machines, on every fabric: one host looks like several. Both forms
// of each, equal and unequal numbers of ranks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include <bluefog/distributed_optimizer.h>

#include "ranks.h"

namespace bluefog::spine {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;
using Vector = std::vector<double>;

class HierarchySpine : public ::testing::TestWithParam<Fabric> {
 protected:
  static Config ConfigOf(int ranks_per_machine, const std::string& form = "auto") {
    Config config;
    config.nodes_per_machine = ranks_per_machine;
    config.hierarchy = form;
    config.chunk_bytes = 64 << 10;
    config.bucket_bytes = 16 << 10;
    return config;
  }
};

double Input(int rank, size_t i) { return std::sin(static_cast<double>(i) + 10.0 * rank); }

Vector InputOf(int rank, size_t count) {
  Vector x(count);
  for (size_t i = 0; i < count; ++i) x[i] = Input(rank, i);
  return x;
}

OpSpec Spec(Op op, const std::string& name, Vector* x, Vector* y) {
  OpSpec spec;
  spec.op = op;
  spec.name = name;
  spec.input = TensorView::Of(x->data(), static_cast<int64_t>(x->size()));
  spec.output = TensorView::Of(y->data(), static_cast<int64_t>(y->size()));
  return spec;
}

/// Column `rank` of the graph between ranks times the inputs.
Vector Expected(const Topology& ranks, int rank, size_t count) {
  Vector y(count, 0.0);
  for (int from = 0; from < ranks.size(); ++from) {
    const double w = ranks.weight(from, rank);
    for (size_t i = 0; i < count; ++i) y[i] += w * Input(from, i);
  }
  return y;
}

double Difference(const Vector& a, const Vector& b) {
  double most = a.size() == b.size() ? 0.0 : 1e300;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    most = std::max(most, std::fabs(a[i] - b[i]));
  }
  return most;
}

constexpr size_t kCounts[] = {0, 1, 777, 100'003};

TEST_P(HierarchySpine, MixesTheMeansOfMachines) {
  for (const int per_machine : {2, 3}) {  // Of 5 ranks: 2, 2, 1 and 3, 2.
    for (const char* form : {"flat", "hierarchical"}) {
      const Placement placement = Placement::Evenly(5, per_machine);
      const TopologySequence machines = *MakeTopology("one-peer-exponential", placement.hosts());
      const auto program = [&](Communicator& comm, Vector* out) -> Status {
        if (comm.placement() != placement) return absl::InternalError("another placement");
        if (Status s = comm.SetMachineTopology(machines); !s.ok()) return s;
        for (const size_t count : kCounts) {
          for (int round = 0; round < 3; ++round) {
            Vector x = InputOf(comm.rank(), count), y(count, NAN);
            const bool in_place = round == 2;
            const Status s = RunOp(comm, Spec(Op::kHierarchicalNeighborAllreduce,
                                              "x" + std::to_string(count), &x, in_place ? &x : &y));
            if (!s.ok()) return s;
            const Topology ranks = *OverRanks(machines.at(round), placement);
            out->push_back(Difference(in_place ? x : y, Expected(ranks, comm.rank(), count)));
          }
        }
        return absl::OkStatus();
      };
      for (const Vector& v : RunRanksOk(GetParam(), 5, ConfigOf(per_machine, form), program)) {
        EXPECT_THAT(v, Each(::testing::Le(1e-12))) << form << ", " << per_machine << " a machine";
        EXPECT_EQ(v.size(), 12u);
      }
    }
  }
}

TEST_P(HierarchySpine, TheRanksOfAMachineGetTheSameBits) {
  for (const char* form : {"flat", "hierarchical"}) {
    const auto values =
        RunRanksOk(GetParam(), 4, ConfigOf(2, form), [](Communicator& comm, Vector* out) -> Status {
          if (Status s = comm.SetMachineTopology(TopologySequence(*Ring(2))); !s.ok()) return s;
          Vector x = InputOf(comm.rank(), 30'011);
          out->resize(x.size());
          return RunOp(comm, Spec(Op::kHierarchicalNeighborAllreduce, "x", &x, out));
        });
    EXPECT_EQ(values[0], values[1]) << form;
    EXPECT_EQ(values[2], values[3]) << form;
  }
}

TEST_P(HierarchySpine, AllreduceIsTheSameOnAllRanksAndInBothForms) {
  for (const int per_machine : {2, 3}) {
    Vector flat;
    for (const char* form : {"flat", "hierarchical", "auto"}) {
      const auto values = RunRanksOk(
          GetParam(), 5, ConfigOf(per_machine, form), [](Communicator& comm, Vector* out) {
            for (const size_t count : kCounts) {
              Vector x = InputOf(comm.rank(), count);
              const Status s = RunOp(comm, Spec(Op::kAllreduce, "", &x, &x));
              if (!s.ok()) return s;
              out->insert(out->end(), x.begin(), x.end());
            }
            return absl::OkStatus();
          });
      for (const Vector& v : values) EXPECT_EQ(v, values[0]) << form;
      if (flat.empty()) flat = values[0];
      EXPECT_LE(Difference(flat, values[0]), 1e-12) << form;
    }
  }
}

TEST_P(HierarchySpine, LocalAllreduceStaysOnTheMachineAndNeedNotBeCalledEquallyOften) {
  const auto values =
      RunRanksOk(GetParam(), 4, ConfigOf(2), [](Communicator& comm, Vector* out) -> Status {
        for (int call = 0; call <= 2 * comm.machine_rank(); ++call) {
          for (const size_t count : {size_t{3}, size_t{40'000}}) {
            Vector x(count, comm.rank() + 1.0);
            OpSpec spec = Spec(Op::kAllreduce, "", &x, &x);
            spec.local = true;
            if (Status s = RunOp(comm, spec); !s.ok()) return s;
            if (call == 0) out->push_back(x.back());
          }
        }
        Vector x(3, comm.rank());
        if (Status s = RunOp(comm, Spec(Op::kAllreduce, "", &x, &x)); !s.ok()) return s;
        out->push_back(x.back());
        return absl::OkStatus();
      });
  EXPECT_EQ(values[0], (Vector{1.5, 1.5, 1.5}));
  EXPECT_EQ(values[1], values[0]);
  EXPECT_EQ(values[2], (Vector{3.5, 3.5, 1.5}));
  EXPECT_EQ(values[3], values[2]);
}

TEST_P(HierarchySpine, WeightsOfACallReachAnyMachine) {
  // No topology of machines is needed. 0 -> 1 -> 2 -> 0, and only machine 2 scales what it sends.
  for (const char* form : {"flat", "hierarchical"}) {
    const auto values =
        RunRanksOk(GetParam(), 6, ConfigOf(2, form), [](Communicator& comm, Vector* out) -> Status {
          const int machine = comm.machine_rank();
          Vector x(20'000, comm.rank());
          OpSpec spec = Spec(Op::kHierarchicalNeighborAllreduce, "x", &x, &x);
          spec.weights = MixingWeights{0.5, {{(machine + 2) % 3, 0.25}}, {}};
          spec.weights->dst = {{(machine + 1) % 3, machine == 2 ? 4.0 : 1.0}};
          if (Status s = RunOp(comm, spec); !s.ok()) return s;
          *out = {x.front(), x.back()};
          return absl::OkStatus();
        });
    const Vector means = {0.5, 2.5, 4.5};
    for (size_t rank = 0; rank < 6; ++rank) {
      const size_t k = rank / 2, from = (k + 2) % 3;
      const double y = 0.5 * means[k] + 0.25 * means[from] * (from == 2 ? 4.0 : 1.0);
      EXPECT_EQ(values[rank], (Vector{y, y})) << form << ", rank " << rank;
    }
  }
}

TEST_P(HierarchySpine, WrongCallsSayWhatIsWrong) {
  const auto results = RunRanks(GetParam(), 4, ConfigOf(2), [](Communicator& comm, Vector*) {
    Vector x(3);
    std::string all;
    const auto refused = [&](std::optional<MixingWeights> weights) {
      OpSpec spec = Spec(Op::kHierarchicalNeighborAllreduce, "", &x, &x);
      spec.weights = std::move(weights);
      all += std::string(RunOp(comm, spec).message()) + "\n";
    };
    const int other = 1 - comm.machine_rank();
    refused(std::nullopt);
    refused(MixingWeights{0.5, {{other, 0.5}}, std::nullopt});
    refused(MixingWeights{0.5, {{2, 0.5}}, std::vector<Edge>{}});
    refused(MixingWeights{0.5, {}, std::vector<Edge>{{comm.machine_rank(), 1.0}}});
    all += std::string(comm.SetMachineTopology(TopologySequence(*Ring(4))).message());
    return absl::InternalError(all);
  });
  for (const RankResult& r : results) {
    EXPECT_THAT(r.error,
                AllOf(HasSubstr("no topology of machines was set; use set_machine_topology first"),
                      HasSubstr("src_machine_weights is given without dst_machine_weights"),
                      HasSubstr("src_machine_weights names machine 2, outside 0..1"),
                      HasSubstr("dst_machine_weights names this machine itself"),
                      HasSubstr("'ring' has 4 machines, the job has 2")));
  }
}

TEST_P(HierarchySpine, DifferentGraphsAreAnErrorOnBothMachines) {
  const auto results = RunRanks(GetParam(), 4, ConfigOf(2), [](Communicator& comm, Vector*) {
    const double w = comm.machine_rank() == 0 ? 0.5 : 0.25;
    const TopologySequence machines(*Topology::FromMatrix(2, {1 - w, w, w, 1 - w}));
    if (Status s = comm.SetMachineTopology(machines); !s.ok()) return s;
    Vector x(50'000);
    return RunOp(comm, Spec(Op::kHierarchicalNeighborAllreduce, "x", &x, &x));
  });
  for (const RankResult& r : results) {
    EXPECT_THAT(r.error, HasSubstr("All ranks must use the same topology, weights included"));
  }
}

// x+ = W (x - lr g) with W of ranks, against the engine with the graph between machines.
Status TrainDsgd(Communicator& comm, const TopologySequence& machines, Vector* out) {
  DistributedOptimizerOptions options;
  options.plugin = "dsgd";
  options.communication = Collective::kHierarchicalNeighborAllreduce;
  options.topology = std::make_shared<TopologySequence>(machines);
  const std::vector<size_t> sizes = {1000, 3, 5000};
  std::vector<Vector> x, g;
  std::vector<ParameterBinding> bindings;
  size_t total = 0;
  for (const size_t size : sizes) {
    options.params.push_back(
        {"p" + std::to_string(size), static_cast<int64_t>(size), DType::kFloat64, 0, 1, "float64"});
    x.emplace_back();
    for (size_t i = 0; i < size; ++i) x.back().push_back(Input(comm.rank(), total++));
    g.emplace_back(size, 0.1 * comm.rank());
  }
  for (size_t p = 0; p < sizes.size(); ++p) bindings.push_back({x[p].data(), g[p].data(), {}});
  auto optimizer = DistributedOptimizer::Create(&comm, std::move(options));
  if (!optimizer.ok()) return optimizer.status();
  const std::vector<Hyper> hypers = {{0.5, 0.0, 0.0, {}}};
  for (int step = 0; step < 6; ++step) {
    for (int p = 2; p >= 0; --p) {
      const Status s = (*optimizer)->Ready(p, bindings[static_cast<size_t>(p)], hypers);
      if (!s.ok()) return s;
    }
    if (Status s = (*optimizer)->Step(bindings, hypers); !s.ok()) return s;
  }
  for (const Vector& v : x) out->insert(out->end(), v.begin(), v.end());
  return absl::OkStatus();
}

TEST_P(HierarchySpine, AnOptimizerMixesOverMachines) {
  const Placement placement = Placement::Evenly(4, 2);
  const TopologySequence machines =
      *TopologySequence::Of({*Ring(2), *Topology::FromMatrix(2, {0.75, 0.25, 0.25, 0.75})}, "two");
  std::vector<Vector> x(4);
  for (int r = 0; r < 4; ++r) x[static_cast<size_t>(r)] = InputOf(r, 6003);
  for (int step = 0; step < 6; ++step) {
    const Topology w = *OverRanks(machines.at(step), placement);
    std::vector<Vector> mixed(4, Vector(6003, 0.0));
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        for (size_t k = 0; k < 6003; ++k) {
          mixed[static_cast<size_t>(j)][k] +=
              w.weight(i, j) * (x[static_cast<size_t>(i)][k] - 0.5 * 0.1 * i);
        }
      }
    }
    x = mixed;
  }
  for (const char* form : {"flat", "hierarchical", "auto"}) {
    const auto values =
        RunRanksOk(GetParam(), 4, ConfigOf(2, form),
                   [&](Communicator& comm, Vector* out) { return TrainDsgd(comm, machines, out); });
    for (size_t r = 0; r < 4; ++r) EXPECT_LE(Difference(values[r], x[r]), 1e-12) << form;
    EXPECT_EQ(values[0], values[1]);
    EXPECT_EQ(values[2], values[3]);
  }
}

TEST_P(HierarchySpine, AnOptimizerIsJudgedByWhatRanksDoToEachOther) {
  const auto program = [](const TopologySequence& machines) {
    return [machines](Communicator& comm, Vector* out) { return TrainDsgd(comm, machines, out); };
  };
  // Doubly stochastic between machines, not between ranks: those of the small one count for more.
  for (const RankResult& r :
       RunRanks(GetParam(), 3, ConfigOf(2), program(TopologySequence(*Ring(2))))) {
    EXPECT_THAT(r.error, AllOf(HasSubstr("'ring between machines' of 3 ranks"),
                               HasSubstr("It needs a doubly stochastic matrix")));
  }
  for (const RankResult& r :
       RunRanks(GetParam(), 4, ConfigOf(2), program(TopologySequence(*Ring(4))))) {
    EXPECT_THAT(r.error, HasSubstr("'ring' has 4 machines, the job has 2"));
  }
}

INSTANTIATE_TEST_SUITE_P(Fabrics, HierarchySpine, ::testing::ValuesIn(AllFabrics()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace bluefog::spine
