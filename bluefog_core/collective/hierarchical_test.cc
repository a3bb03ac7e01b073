// Operations over several hosts: right values on every graph and placement, the same bits where
// they must be, and no byte between hosts that need not be.
#include <map>
#include <set>

#include "collective/cost.h"
#include "collective/test_plans.h"

namespace bluefog::collective {
namespace {

constexpr int64_t kChunk = 16;
const std::vector<int64_t> kCounts = {0, 1, 7, 101, 64, 1000};

/// Equal and unequal, one rank each, one host, hosts whose ranks are not consecutive.
std::vector<Placement> Placements() {
  std::vector<Placement> all;
  for (const std::vector<int>& counts : std::vector<std::vector<int>>{{1},
                                                                      {4},
                                                                      {1, 1},
                                                                      {2, 2},
                                                                      {4, 4},
                                                                      {1, 3},
                                                                      {3, 2},
                                                                      {1, 1, 1},
                                                                      {3, 3, 3},
                                                                      {2, 5, 3},
                                                                      {2, 2, 2, 2},
                                                                      {1, 2, 3, 4, 5},
                                                                      {4, 4, 4, 4, 4, 4, 4, 4}}) {
    all.push_back(Placement::OfCounts(counts));
  }
  all.push_back({{0, 1, 0, 1}, {0, 0, 0, 0}});
  all.push_back({{0, 1, 2, 2, 1, 0, 1}, {0, 0, 0, 1, 1, 1, 2}});
  return all;
}

std::string Label(const Placement& placement, const PlanInput& in, const std::string& what) {
  std::string text = what + ", hosts";
  for (const int host : placement.host) text += " " + std::to_string(host);
  return text + ", " + std::to_string(in.count) + " elements" + (in.in_place ? ", in place" : "");
}

std::vector<Topology> GraphsOf(int machines) {
  std::vector<Topology> graphs = {RandomDigraph(machines, 5), RandomDigraph(machines, 6),
                                  *FullyConnected(machines), *Exponential(machines)};
  for (const char* name : {"ring", "star", "one-peer-exponential"}) {
    const StatusOr<TopologySequence> sequence = MakeTopology(name, machines);
    if (!sequence.ok()) continue;
    for (int round = 0; round < sequence->period(); ++round) graphs.push_back(sequence->at(round));
  }
  return graphs;
}

struct Case {
  Form form = Form::kHierarchical;
  bool one_shot = false;
};
constexpr Case kCases[] = {{Form::kHierarchical}, {Form::kFlat}, {Form::kFlat, true}};
std::string NameOf(const Case& c) {
  return std::string(NameOf(c.form)) + (c.one_shot ? ", one shot" : "");
}

Schedule PlanOne(const Case& c, const PlanInput& in, const Placement& placement,
                 const Topology& machines) {
  const int host = placement.host[static_cast<size_t>(in.rank)];
  return PlanHierarchicalNeighborAllreduce(in, placement, machines.neighborhood(host), {}, c.form,
                                           c.one_shot);
}

template <typename Body>
void ForEachInput(Body body) {
  for (const Placement& placement : Placements()) {
    for (int64_t count : kCounts) {
      if (placement.size() > 16 && (count == 1 || count == 64)) continue;
      for (bool in_place : {false, true}) {
        body(placement,
             PlanInput{
                 .size = placement.size(), .count = count, .chunk = kChunk, .in_place = in_place});
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

void ExpectSameBitsOnEachHost(const Placement& placement, const Values& outputs,
                              const std::string& label) {
  for (const std::vector<int>& ranks : placement.RanksByHost()) {
    for (const int rank : ranks) {
      ASSERT_EQ(outputs[static_cast<size_t>(rank)], outputs[static_cast<size_t>(ranks[0])])
          << label << ", rank " << rank;
    }
  }
}

TEST(HierarchicalNeighborAllreduce, MixesMeansOfMachines) {
  for (const Case& c : kCases) {
    ForEachInput([&](const Placement& placement, const PlanInput& in) {
      for (const Topology& machines : GraphsOf(placement.hosts())) {
        const std::string label = Label(placement, in, NameOf(c) + ", " + machines.name());
        const auto schedules = PlanAll(
            in, [&](const PlanInput& rank) { return PlanOne(c, rank, placement, machines); });
        const Values inputs = RandomInputs(in.size, in.count);
        const StatusOr<Values> outputs = Interpret(schedules, inputs, {.in_place = in.in_place});
        ASSERT_TRUE(outputs.ok()) << label << ": " << outputs.status();
        ExpectNear(*outputs, Mixed(*OverRanks(machines, placement), inputs), label);
        ExpectSameBitsOnEachHost(placement, *outputs, label);
      }
    });
  }
}

TEST(HierarchicalNeighborAllreduce, MultipliesWithTheSendersWeight) {
  const Placement placement = Placement::OfCounts({2, 3, 2});
  const Topology machines = RandomDigraph(3, 8);
  const PlanInput in{.size = 7, .count = 200, .chunk = kChunk};
  auto given = [](int from, int to) { return 0.25 * from + 0.5 * to; };
  std::vector<double> product = machines.ToMatrix();
  for (int from = 0; from < 3; ++from) {
    for (int to = 0; to < 3; ++to) {
      if (from != to) product[static_cast<size_t>(from * 3 + to)] *= given(from, to);
    }
  }
  for (const Case& c : kCases) {
    const auto schedules = PlanAll(in, [&](const PlanInput& rank) {
      const int host = placement.host[static_cast<size_t>(rank.rank)];
      std::vector<double> weights;
      for (const Edge& edge : machines.neighborhood(host).out) {
        weights.push_back(given(host, edge.rank));
      }
      return PlanHierarchicalNeighborAllreduce(rank, placement, machines.neighborhood(host),
                                               weights, c.form, c.one_shot);
    });
    const Values inputs = RandomInputs(7, 200);
    const Topology weighted = *Topology::FromMatrix(3, product);
    ExpectResult(schedules, inputs, Mixed(*OverRanks(weighted, placement), inputs), NameOf(c));
  }
}

TEST(HierarchicalNeighborAllreduce, ARankMeetsItsMachineAndItsCounterpartsOnly) {
  const Placement placement = Placement::OfCounts({4, 4, 4, 4});
  const Topology machines = *Exponential(4);
  const PlanInput in{.size = 16, .count = 1000, .chunk = kChunk};
  for (const Case& c : kCases) {
    for (int rank = 0; rank < 16; ++rank) {
      PlanInput mine = in;
      mine.rank = rank;
      std::set<int> expected;
      for (int other = rank / 4 * 4; other < rank / 4 * 4 + 4; ++other) expected.insert(other);
      for (const Edge& edge : machines.neighborhood(rank / 4).out) {
        expected.insert(edge.rank * 4 + rank % 4);
      }
      expected.erase(rank);
      const std::vector<int> to = PlanOne(c, mine, placement, machines).destinations();
      EXPECT_EQ(std::set<int>(to.begin(), to.end()), expected) << NameOf(c) << ", rank " << rank;
    }
  }
}

TEST(HierarchicalAllreduce, SumsWithTheSameBitsEverywhere) {
  for (bool average : {true, false}) {
    ForEachInput([&](const Placement& placement, const PlanInput& in) {
      if (in.count == 0) return;
      const auto schedules = PlanAll(in, [&](const PlanInput& rank) {
        return PlanHierarchicalAllreduce(rank, placement, average);
      });
      const Values inputs = RandomInputs(in.size, in.count);
      std::vector<double> expected = Sum(inputs);
      for (double& x : expected) x /= average ? in.size : 1;
      const StatusOr<Values> outputs = Interpret(schedules, inputs, {.in_place = in.in_place});
      const std::string label = Label(placement, in, "allreduce");
      ASSERT_TRUE(outputs.ok()) << label << ": " << outputs.status();
      ExpectNear(*outputs, Values(inputs.size(), expected), label);
      for (const std::vector<double>& output : *outputs) ASSERT_EQ(output, (*outputs)[0]) << label;
    });
  }
}

TEST(Allreduce, OfSomeRanksOnly) {
  const std::vector<int> members = {1, 2, 5};
  for (bool one_shot : {true, false}) {
    for (int64_t count : kCounts) {
      for (bool in_place : {true, false}) {
        const PlanInput in{.size = 6, .count = count, .chunk = kChunk, .in_place = in_place};
        const Values inputs = RandomInputs(6, count);
        const auto schedules = PlanAll(in, [&](const PlanInput& rank) {
          const bool member = rank.rank == 1 || rank.rank == 2 || rank.rank == 5;
          return PlanAllreduce(rank, true, one_shot, member ? members : std::vector{rank.rank});
        });
        Values expected = inputs;
        std::vector<double> mean = Sum({inputs[1], inputs[2], inputs[5]});
        for (double& x : mean) x /= 3;
        for (const int r : members) expected[static_cast<size_t>(r)] = mean;
        ExpectResult(schedules, inputs, expected, "some ranks", {.in_place = in_place});
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Hierarchical, OptimizersConsumeTheMixOfEveryPayloadOnce) {
  for (const Placement& placement : Placements()) {
    for (int64_t count : {1, 101, 400}) {
      const PlanInput in{.size = placement.size(), .count = count, .chunk = kChunk};
      const Values inputs = RandomInputs(in.size, in.count);
      const Topology machines = RandomDigraph(placement.hosts(), 9);
      for (int payloads : {1, 2}) {
        for (bool measure : {false, true}) {
          const PluginPlan plugin{.payloads = payloads, .fuse = !measure, .measure = measure};
          const auto check = [&](const std::string& what, Values expected, auto exchange) {
            for (std::vector<double>& values : expected) {
              for (double& x : values) x *= payloads == 1 ? 1 : 5;  // See the interpreter's toy.
            }
            ExpectResult(
                PlanAll(in,
                        [&](const PlanInput& rank) { return WithPlugin(exchange(rank), plugin); }),
                inputs, expected, Label(placement, in, what));
          };
          for (const Case& c : kCases) {
            check(NameOf(c), Mixed(*OverRanks(machines, placement), inputs),
                  [&](const PlanInput& rank) { return PlanOne(c, rank, placement, machines); });
          }
          std::vector<double> mean = Sum(inputs);
          for (double& x : mean) x /= in.size;
          check("allreduce", Values(inputs.size(), mean), [&](const PlanInput& rank) {
            return PlanHierarchicalAllreduce(rank, placement, true);
          });
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(Hierarchical, AChunkLeavesTheHostBeforeTheLastIsReduced) {
  const Placement placement = Placement::OfCounts({2, 2});
  const PlanInput in{.size = 4, .count = 1024, .chunk = kChunk};
  const Schedule schedule = PlanOne(kCases[0], in, placement, *Ring(2));
  int leave = 0;
  for (const Step& step : schedule.steps) {
    if (step.kind != StepKind::kPublish || step.targets[0].peer != 2) continue;
    ++leave;
    EXPECT_LE(step.range.count, kChunk);
    ASSERT_EQ(step.after.size(), 1u);
    // Only on the reduction of this very chunk.
    EXPECT_EQ(schedule.steps[static_cast<size_t>(step.after[0])].range, step.range);
  }
  EXPECT_EQ(leave, 1024 / 2 / kChunk);
}

// ---- The cost model against what the schedules do.

struct Moved {
  std::map<std::pair<int, int>, std::pair<double, double>> nics;  // Out, in.
  std::vector<double> inside;
};

Moved Count(const std::vector<Schedule>& schedules, const Placement& placement) {
  Moved moved;
  moved.inside.resize(static_cast<size_t>(placement.hosts()));
  const auto nic = [&](int rank) -> auto& {
    const auto r = static_cast<size_t>(rank);
    return moved.nics[{placement.host[r], placement.nic[r]}];
  };
  for (int rank = 0; rank < placement.size(); ++rank) {
    const int host = placement.host[static_cast<size_t>(rank)];
    for (const Step& step : schedules[static_cast<size_t>(rank)].steps) {
      for (const Target& target : step.targets) {
        const auto count = static_cast<double>(step.range.count);
        if (placement.host[static_cast<size_t>(target.peer)] == host) {
          moved.inside[static_cast<size_t>(host)] += count;
        } else {
          nic(rank).first += count;
          nic(target.peer).second += count;
        }
      }
    }
  }
  return moved;
}

void ExpectCost(const Cost& cost, const std::vector<Schedule>& schedules,
                const Placement& placement, const std::string& label) {
  const Moved moved = Count(schedules, placement);
  const double rounding = 16.0 * placement.size() * placement.size();  // Of shards to units.
  ASSERT_EQ(cost.host_bytes.size(), moved.inside.size()) << label;
  for (size_t h = 0; h < moved.inside.size(); ++h) {
    EXPECT_NEAR(cost.host_bytes[h], moved.inside[h], rounding) << label << ", host " << h;
  }
  for (const NicBytes& nic : cost.nics) {
    const auto it = moved.nics.find({nic.host, nic.nic});
    const auto [out, in] = it == moved.nics.end() ? std::pair(0.0, 0.0) : it->second;
    EXPECT_NEAR(nic.out, out, rounding) << label << ", host " << nic.host << " nic " << nic.nic;
    EXPECT_NEAR(nic.in, in, rounding) << label << ", host " << nic.host << " nic " << nic.nic;
  }
}

TEST(Cost, CountsTheBytesThatSchedulesMove) {
  for (const Placement& placement : Placements()) {
    const PlanInput in{.size = placement.size(), .count = 100'000, .chunk = 50'000};
    for (const Case& c : kCases) {
      for (const Topology& machines : GraphsOf(placement.hosts())) {
        const auto schedules = PlanAll(
            in, [&](const PlanInput& rank) { return PlanOne(c, rank, placement, machines); });
        ExpectCost(
            CostOfHierarchicalNeighborAllreduce(c.form, placement, machines, 100'000, c.one_shot),
            schedules, placement, Label(placement, in, NameOf(c) + machines.name()));
      }
    }
    const Topology ranks = RandomDigraph(placement.size(), 4);
    ExpectCost(CostOfNeighborAllreduce(placement, ranks, 100'000), PlanAll(in, ranks), placement,
               Label(placement, in, "between ranks"));
    const auto hierarchical = PlanAll(in, [&](const PlanInput& rank) {
      return PlanHierarchicalAllreduce(rank, placement, true);
    });
    ExpectCost(CostOfAllreduce(Form::kHierarchical, placement, 100'000, false), hierarchical,
               placement, Label(placement, in, "hierarchical allreduce"));
    for (bool one_shot : {true, false}) {
      const auto flat =
          PlanAll(in, [&](const PlanInput& rank) { return PlanAllreduce(rank, true, one_shot); });
      ExpectCost(CostOfAllreduce(Form::kFlat, placement, 100'000, one_shot), flat, placement,
                 Label(placement, in, "flat allreduce"));
    }
  }
}

TEST(Cost, OfTwoHostsWithFourRanksAQuarterLeavesEach) {
  const Placement placement = Placement::OfCounts({4, 4});
  const Links links{5e-6, 1e10, 50e-6, 125e6};
  const double bytes = 16 << 20;
  const Cost flat =
      CostOfHierarchicalNeighborAllreduce(Form::kFlat, placement, *Ring(2), bytes, false);
  const Cost less =
      CostOfHierarchicalNeighborAllreduce(Form::kHierarchical, placement, *Ring(2), bytes, false);
  EXPECT_EQ(less.BusiestNic(), bytes);
  EXPECT_EQ(flat.BusiestNic(), 4 * bytes);
  EXPECT_NEAR(less.Seconds(links), bytes / 125e6 + 60e-6, 1e-9);
  // An interface for each rank, and the flat form is no slower on the wire.
  Placement own = placement;
  own.nic = {0, 1, 2, 3, 0, 1, 2, 3};
  EXPECT_EQ(
      CostOfHierarchicalNeighborAllreduce(Form::kFlat, own, *Ring(2), bytes, false).BusiestNic(),
      bytes);
  EXPECT_EQ(CostOfHierarchicalNeighborAllreduce(Form::kHierarchical, own, *Ring(2), bytes, false)
                .BusiestNic(),
            bytes / 4);
}

TEST(Cost, ChoosesByWhatTakesLessTime) {
  const Links links{5e-6, 1e10, 50e-6, 125e6};
  const Placement placement = Placement::OfCounts({4, 4});
  // A hop less matters for 100 bytes, the wire for more.
  EXPECT_EQ(ChooseHierarchicalNeighborAllreduce(placement, 100, true, links), Form::kFlat);
  EXPECT_EQ(ChooseHierarchicalNeighborAllreduce(placement, 1 << 20, false, links),
            Form::kHierarchical);
  EXPECT_EQ(ChooseAllreduce(placement, 16, true, links), Form::kFlat);
  EXPECT_EQ(ChooseAllreduce(placement, 1 << 20, false, links), Form::kHierarchical);
  // Slow memory and a fast network, with an interface for each rank.
  Placement own = placement;
  own.nic = {0, 1, 2, 3, 0, 1, 2, 3};
  EXPECT_EQ(ChooseAllreduce(own, 1 << 20, false, {5e-6, 1e8, 5e-6, 1e10}), Form::kFlat);
  // Nothing to gain.
  EXPECT_EQ(ChooseAllreduce(Placement::OneHost(8), 1 << 20, false, links), Form::kFlat);
  EXPECT_EQ(ChooseAllreduce(Placement::OfCounts({1, 1, 1}), 1 << 20, false, links), Form::kFlat);
}

}  // namespace
}  // namespace bluefog::collective
