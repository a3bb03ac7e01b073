// What an optimizer may ask of the engine, one toy plugin each, on every fabric: a short training
// on a directed, time-varying graph is compared with the recursion in plain loops. The model has
// several buckets, parameters of odd sizes, one that is empty, one without gradient in some steps,
// and chunks smaller than a parameter.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <optional>
#include <thread>

#include <bluefog/distributed_optimizer.h>

#include "ranks.h"
#include "toys.h"
#include "transport/transport.h"

namespace bluefog::spine {
namespace {

constexpr int kRanks = 4;
const std::vector<int64_t> kSizes = {7, 0, 1000, 333, 1, 2049, 40};
using Vector = std::vector<double>;
using Vectors = std::vector<Vector>;  // By rank.

int GroupOf(size_t param) { return param == 3 ? 1 : 0; }

/// A parameter that this rank does not use in this step.
bool HasGradient(int rank, int64_t step, size_t param) {
  return param != 3 || (step + rank) % 3 != 0;
}

double Gradient(int rank, size_t i, double x) {
  const double curvature = 0.5 + 0.25 * static_cast<double>((i + static_cast<size_t>(rank)) % 5);
  return curvature * (x - std::sin(static_cast<double>(i) * 0.7 + rank * 1.3));
}

double Start(int rank, size_t i) { return std::cos(static_cast<double>(i) * 0.37 + rank); }

std::vector<Hyper> HypersAt(int64_t step) {
  const double lr = 0.1 * (1.0 + 0.25 * static_cast<double>(step % 3));
  return {{lr, 0.8, 0.01, {3.0}}, {lr / 2, 0.5, 0.02, {2.0}}};  // The last: of some toys.
}

// Doubly stochastic, directed, not circulant: rows and columns cannot be mixed up unseen.
Topology Directed() {
  return *Topology::FromMatrix(
      kRanks, {.4, .4, .2, 0, .1, .4, .3, .2, .3, 0, .4, .3, .2, .2, .1, .5}, "directed");
}

TopologySequence Alternating() {
  return *TopologySequence::Of({Directed(), *Ring(kRanks)}, "alternating");
}

// ---- The engine's side -------------------------------------------------------------------------

struct Training {
  std::function<std::unique_ptr<Optimizer>()> make;
  int64_t steps = 9;
  int64_t first_step = 0;
  TopologySequence topology = Alternating();
  bool overlap = true;
  bool delayed = false;
  std::optional<DType> message_dtype;
  int64_t remake_at =
      -1;  ///< The step at which it goes on with a new optimizer, as from a checkpoint.
  bool synchronize = false;  ///< At the end.
  /// Called before the gradients of a step are ready.
  std::function<Status(Communicator&, DistributedOptimizer&)> before_step;
  /// What the caller does to its model between steps.
  std::function<void(int64_t step, Vectors& x)> change;
  /// Called when all gradients are ready, before Step; with the model.
  std::function<Status(Communicator&, const Vectors& x)> before_end;
};

/// Returns the parameters, then the states, in registration order.
Status Train(Communicator& comm, const Training& run, Vector* values) {
  std::vector<ParameterInfo> params;
  const size_t states = run.make()->traits().states.size();
  std::vector<ParameterBinding> bindings(kSizes.size());
  Vectors x, g;
  std::vector<Vectors> state(states);
  size_t total = 0;
  for (size_t p = 0; p < kSizes.size(); ++p) {
    params.push_back({std::string(1, 'p') + std::to_string(p), kSizes[p], DType::kFloat64,
                      GroupOf(p), 1, "float64"});
    x.emplace_back();
    for (int64_t i = 0; i < kSizes[p]; ++i) x[p].push_back(Start(comm.rank(), total++));
    g.emplace_back(x[p].size());
    for (Vectors& s : state) s.emplace_back(x[p].size(), 0.0);
  }
  for (size_t p = 0; p < kSizes.size(); ++p) {
    bindings[p].x = x[p].data();
    for (size_t k = 0; k < states; ++k) bindings[p].state[k] = state[k][p].data();
  }
  const auto make = [&](int64_t step) {
    DistributedOptimizerOptions options;
    options.optimizer = run.make();
    options.topology = std::make_shared<TopologySequence>(run.topology);
    options.step = step;
    options.params = params;
    options.delayed = run.delayed;
    options.message_dtype = run.message_dtype;
    return DistributedOptimizer::Create(&comm, std::move(options));
  };
  auto made = make(run.first_step);
  if (!made.ok()) return made.status();
  for (int64_t step = run.first_step; step < run.first_step + run.steps; ++step) {
    if (step == run.remake_at) {
      *made = nullptr;
      if (made = make(step); !made.ok()) return made.status();
    }
    DistributedOptimizer& opt = **made;
    if (run.change) run.change(step, x);
    if (run.before_step) {
      if (Status s = run.before_step(comm, opt); !s.ok()) return s;
    }
    size_t index = 0;
    for (size_t p = 0; p < kSizes.size(); ++p) {
      for (size_t i = 0; i < x[p].size(); ++i) g[p][i] = Gradient(comm.rank(), index++, x[p][i]);
      bindings[p].g = HasGradient(comm.rank(), step, p) ? g[p].data() : nullptr;
    }
    const std::vector<Hyper> hypers = HypersAt(step);
    for (size_t p = kSizes.size(); run.overlap && p-- > 0;) {
      // Now and then a gradient that only Step knows of.
      if (!run.before_end && (p == 2 || p == 3) && step % 2 == 1) continue;
      if (Status s = opt.Ready(static_cast<int>(p), bindings[p], hypers); !s.ok()) return s;
    }
    if (run.before_end) {
      if (Status s = run.before_end(comm, x); !s.ok()) return s;
    }
    if (Status s = opt.Step(bindings, hypers); !s.ok()) return s;
  }
  if (run.synchronize) {
    Status s = absl::DeadlineExceededError("");
    while (absl::IsDeadlineExceeded(s)) {
      s = (*made)->Synchronize(bindings, std::chrono::milliseconds(20));
    }
    if (!s.ok()) return s;
  }
  for (const Vector& v : x) values->insert(values->end(), v.begin(), v.end());
  for (const Vectors& s : state) {
    for (const Vector& v : s) values->insert(values->end(), v.begin(), v.end());
  }
  return absl::OkStatus();
}

// ---- The same in plain loops -------------------------------------------------------------------

struct Model {
  int64_t step = 0;
  const Topology* w = nullptr;  // Of this step.
  Vectors x, state;             // By rank, all parameters one after the other.
  Vectors g;                    // Zero where there is no gradient.
  std::vector<int> param;       // By element.
  std::vector<std::vector<bool>> has_gradient;

  Hyper HyperOf(size_t rank, size_t i) const {
    Hyper h = HypersAt(step)[static_cast<size_t>(GroupOf(static_cast<size_t>(param[i])))];
    if (!has_gradient[rank][i]) h.weight_decay = 0.0;
    return h;
  }
};

Vectors Average(const Topology& w, const Vectors& y) {
  Vectors out = y;
  for (int r = 0; r < kRanks; ++r) {
    for (size_t i = 0; i < y[0].size(); ++i) {
      double sum = 0.0;
      for (int j = 0; j < kRanks; ++j) sum += w.weight(j, r) * y[j][i];
      out[r][i] = sum;
    }
  }
  return out;
}

/// y[rank][i] = f(rank, i)
template <typename F>
Vectors ForAll(const Model& m, F f) {
  Vectors y = m.x;
  for (size_t r = 0; r < y.size(); ++r) {
    for (size_t i = 0; i < y[r].size(); ++i) y[r][i] = f(r, i);
  }
  return y;
}

Vectors GradientStep(const Model& m) {
  return ForAll(m, [&](size_t r, size_t i) { return m.x[r][i] - m.HyperOf(r, i).lr * m.g[r][i]; });
}

using Recursion = std::function<void(Model&)>;

Vectors Simulate(const Training& run, const Recursion& recursion,
                 const std::function<Topology(int64_t)>& topology_at) {
  Model m;
  for (size_t p = 0; p < kSizes.size(); ++p) m.param.insert(m.param.end(), kSizes[p], (int)p);
  const size_t n = m.param.size();
  m.x.resize(kRanks);
  for (int r = 0; r < kRanks; ++r) {
    for (size_t i = 0; i < n; ++i) m.x[r].push_back(Start(r, i));
  }
  m.state.assign(kRanks, Vector(n, 0.0));
  for (m.step = run.first_step; m.step < run.first_step + run.steps; ++m.step) {
    const Topology graph = topology_at(m.step);
    m.w = &graph;
    m.has_gradient.assign(kRanks, std::vector<bool>(n));
    for (int r = 0; r < kRanks; ++r) {
      for (size_t i = 0; i < n; ++i) {
        m.has_gradient[r][i] = HasGradient(r, m.step, static_cast<size_t>(m.param[i]));
      }
    }
    m.g = ForAll(m, [&](size_t r, size_t i) {
      return m.has_gradient[r][i] ? Gradient(static_cast<int>(r), i, m.x[r][i]) : 0.0;
    });
    recursion(m);
  }
  for (int r = 0; r < kRanks; ++r) {
    if (!run.make()->traits().states.empty()) {
      m.x[r].insert(m.x[r].end(), m.state[r].begin(), m.state[r].end());
    }
  }
  return m.x;
}

Vectors Simulate(const Training& run, const Recursion& recursion) {
  return Simulate(run, recursion, [&](int64_t step) -> Topology { return run.topology.at(step); });
}

void ExpectNear(const Vectors& got, const Vectors& expected, double tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t r = 0; r < got.size(); ++r) {
    ASSERT_EQ(got[r].size(), expected[r].size()) << "rank " << r;
    double worst = 0.0;
    size_t at = 0;
    for (size_t i = 0; i < got[r].size(); ++i) {
      const double d = std::fabs(got[r][i] - expected[r][i]);
      if (!(d <= worst)) worst = d, at = i;
    }
    EXPECT_LE(worst, tolerance) << "rank " << r << ", element " << at << ": " << got[r][at]
                                << " instead of " << expected[r][at];
  }
}

// Several buckets, of several chunks, of several tiles; some messages beyond the eager limit.
Config SmallPieces() {
  Config config;
  config.eager_bytes = 512;
  config.chunk_bytes = 1024;
  config.tile_bytes = 512;
  config.bucket_bytes = 8 * 1500;
  config.slot_bytes = 8 * 1024;
  return config;
}

template <typename Plugin>
Training RunOf() {
  Training run;
  run.make = [] { return std::make_unique<Plugin>(); };
  return run;
}

class OptimizerSpine : public ::testing::TestWithParam<Fabric> {
 protected:
  Vectors TrainAll(const Training& run, const Config& config = SmallPieces()) {
    return RunRanksOk(GetParam(), kRanks, config,
                      [&](Communicator& c, Vector* v) { return Train(c, run, v); });
  }
  void Check(const Training& run, const Recursion& recursion) {
    ExpectNear(TrainAll(run), Simulate(run, recursion), 1e-13);
  }
};

/// The recursion of TwoPayloads; `average` mixes both.
template <typename Mix>
void StepTwoPayloads(Model& m, const Mix& average) {
  const Vectors momentum = ForAll(m, [&](size_t r, size_t i) {
    const Hyper h = m.HyperOf(r, i);
    return h.momentum * m.state[r][i] + m.g[r][i] + h.weight_decay * m.x[r][i];
  });
  m.x = average(*m.w, ForAll(m, [&](size_t r, size_t i) {
    return m.x[r][i] - m.HyperOf(r, i).lr * momentum[r][i];
  }));
  m.state = average(*m.w, momentum);
}

TEST_P(OptimizerSpine, TwoPayloads) {
  Check(RunOf<TwoPayloads>(), [](Model& m) { StepTwoPayloads(m, Average); });
}

// Rank 0 has more under way than a link takes unasked, and rank 1 wants the step first. It releases
// no payload of a chunk before it has both.
TEST_P(OptimizerSpine, TwoPayloadsBehindManyOperations) {
  constexpr int kOperations = transport::kMaxInFlight / 2 + 100;
  Config config = SmallPieces();
  config.chunk_bytes = 8192;  // Not released by copying it.
  config.op_timeout_ms = 10'000;
  RunRanksOk(GetParam(), 2, config, [&](Communicator& comm, Vector*) -> Status {
    std::vector<Vector> values(kOperations, Vector(1, comm.rank()));
    std::vector<std::shared_ptr<Work>> works;
    const auto submit = [&]() -> Status {
      for (int k = 0; k < kOperations; ++k) {
        OpSpec spec;
        spec.op = Op::kNeighborAllreduce;
        spec.name = "x" + std::to_string(k);
        spec.input = spec.output = TensorView::Of(values[static_cast<size_t>(k)].data(), 1);
        auto work = comm.Submit(spec);
        if (!work.ok()) return work.status();
        works.push_back(*std::move(work));
      }
      return absl::OkStatus();
    };
    if (comm.rank() == 0) {
      if (Status s = submit(); !s.ok()) return s;
    }
    DistributedOptimizerOptions options;
    options.optimizer = std::make_unique<TwoPayloads>();
    Vector x(5000, comm.rank()), g(x.size(), 0.0), state(x.size(), 0.0);
    options.params.push_back({"x", 5000, DType::kFloat64, 0, 1, "float64"});
    auto made = DistributedOptimizer::Create(&comm, std::move(options));
    if (!made.ok()) return made.status();
    const ParameterBinding binding{.x = x.data(), .g = g.data(), .state = {state.data()}};
    const Hyper hyper{.lr = 0.1};
    for (int step = 0; step < 3; ++step) {
      if (Status s = (*made)->Step({&binding, 1}, {&hyper, 1}); !s.ok()) return s;
    }
    if (comm.rank() == 1) {
      if (Status s = submit(); !s.ok()) return s;
    }
    for (const auto& work : works) {
      if (Status s = work->Wait(); !s.ok()) return s;
    }
    return x[0] == 0.5 ? absl::OkStatus() : absl::InternalError("wrong average");
  });
}

TEST_P(OptimizerSpine, SilentSteps) {
  // A hyper-parameter of the plugin's own, another one in each group, says when.
  Check(RunOf<Periodic>(), [](Model& m) {
    m.x = GradientStep(m);
    const Vectors mixed = Average(*m.w, m.x);
    for (size_t r = 0; r < m.x.size(); ++r) {
      for (size_t i = 0; i < m.x[r].size(); ++i) {
        const auto period = static_cast<int64_t>(m.HyperOf(r, i).own[0]);
        if (m.step % period != period - 1) continue;
        m.x[r][i] = mixed[r][i];
        m.state[r][i] += 1.0;
      }
    }
  });
}

TEST_P(OptimizerSpine, AllreduceInEveryFourthStep) {
  const Topology all = *FullyConnected(kRanks);
  Check(RunOf<GlobalEveryFourth>(),
        [&](Model& m) { m.x = Average(m.step % 4 == 3 ? all : *m.w, GradientStep(m)); });
}

TEST_P(OptimizerSpine, EarlyPayload) {
  Check(RunOf<Early>(), [](Model& m) {
    m.state = ForAll(m, [&](size_t r, size_t i) {
      const Hyper h = m.HyperOf(r, i);
      return h.momentum * m.state[r][i] - h.lr * m.g[r][i];
    });
    const Vectors mixed = Average(*m.w, m.x);
    m.x = ForAll(m, [&](size_t r, size_t i) { return mixed[r][i] + m.state[r][i]; });
  });
}

TEST_P(OptimizerSpine, NormsOfParametersBeforeConsume) {
  Check(RunOf<LayerWise>(), [](Model& m) {
    const Vectors mixed = Average(*m.w, m.g);
    for (size_t r = 0; r < m.x.size(); ++r) {
      Vector norm_g(kSizes.size()), norm_x(kSizes.size());
      for (size_t i = 0; i < m.param.size(); ++i) {
        norm_g[m.param[i]] += mixed[r][i] * mixed[r][i];
        norm_x[m.param[i]] += m.x[r][i] * m.x[r][i];
      }
      for (size_t i = 0; i < m.param.size(); ++i) {
        const double scale = std::sqrt(norm_x[m.param[i]]) / (std::sqrt(norm_g[m.param[i]]) + 1e-9);
        m.x[r][i] -= m.HyperOf(r, i).lr * scale * mixed[r][i];
      }
    }
  });
}

TEST_P(OptimizerSpine, NormOfTheModelBeforeProduce) {
  int clipped = 0;
  Check(RunOf<Clipping>(), [&](Model& m) {
    for (size_t r = 0; r < m.g.size(); ++r) {
      double sum = 0.0;
      for (const double g : m.g[r]) sum += g * g;
      for (size_t i = 0; i < m.g[r].size(); ++i) {
        const double scale = std::min(1.0, m.HyperOf(r, i).own[0] / std::sqrt(sum));
        clipped += scale < 1.0;
        m.g[r][i] *= scale;
      }
    }
    m.x = Average(*m.w, GradientStep(m));
  });
  EXPECT_GT(clipped, 0);
}

// x+ = W x - lr (g + wd W x), with the graph of the same step.
void DelayedStep(Model& m) {
  const bool silent = m.step % 4 == 2;
  const Vectors mixed = silent ? m.x : Average(*m.w, m.x);
  m.x = ForAll(m, [&](size_t r, size_t i) {
    const Hyper h = m.HyperOf(r, i);
    m.state[r][i] += silent ? 1.0 : 0.0;
    return mixed[r][i] - h.lr * (m.g[r][i] + h.weight_decay * mixed[r][i]);
  });
}

TEST_P(OptimizerSpine, DelayedAveragesWhatTheStepBeforeLeft) {
  Training run = RunOf<Plain>();
  run.delayed = true;
  Check(run, DelayedStep);
}

// What is under way when a checkpoint is taken is the model itself.
TEST_P(OptimizerSpine, DelayedGoesOnFromACheckpointBitForBit) {
  Training run = RunOf<Plain>();
  run.delayed = true;
  const Vectors whole = TrainAll(run);
  run.remake_at = 5;
  EXPECT_EQ(TrainAll(run), whole);
  run.remake_at = -1;
  run.before_step = [](Communicator&, DistributedOptimizer& opt) {
    // As load_state_dict does on an optimizer that has averages under way, of this very model.
    return opt.step() % 3 == 1 ? opt.SetStep(opt.step()) : absl::OkStatus();
  };
  EXPECT_EQ(TrainAll(run), whole);
}

TEST_P(OptimizerSpine, DelayedKeepsWhatTheCallerDoesToTheModel) {
  Training run = RunOf<Plain>();
  run.delayed = true;
  const auto change = [](int64_t step) { return step == 4 ? 0.125 : 0.0; };
  run.change = [&](int64_t step, Vectors& x) {
    for (Vector& v : x) {
      for (double& value : v) value += change(step);
    }
  };
  // The gradient is taken at the changed model; averaged is what was sent before the change.
  const auto shift = [&](Model& m, double by) {
    m.x = ForAll(m, [&](size_t r, size_t i) { return m.x[r][i] + by; });
  };
  Check(run, [&](Model& m) {
    shift(m, change(m.step));  // Doubly stochastic: averaging a constant leaves it.
    m.g = ForAll(m, [&](size_t r, size_t i) {
      return m.has_gradient[r][i] ? Gradient(static_cast<int>(r), i, m.x[r][i]) : 0.0;
    });
    DelayedStep(m);
  });
}

TEST_P(OptimizerSpine, SynchronizeTakesWhatIsUnderWay) {
  Training run = RunOf<Plain>();
  run.delayed = true;
  run.synchronize = true;
  run.steps = 8;
  Check(run, [&](Model& m) {
    DelayedStep(m);
    if (m.step == 7) m.x = Average(run.topology.at(8), m.x);
  });
  run.delayed = false;  // There is nothing under way.
  TrainAll(run);
}

TEST_P(OptimizerSpine, DelayedTakesATopologyForTheNextStepButOne) {
  Training run = RunOf<Plain>();
  run.delayed = true;
  run.topology = TopologySequence(Directed());
  const TopologySequence later(*Ring(kRanks, RingStyle::kLeft));
  run.before_step = [&](Communicator&, DistributedOptimizer& opt) -> Status {
    if (opt.step() != 3) return absl::OkStatus();
    // What is averaged in step 3 has left.
    const Status late = opt.SetTopology(std::make_shared<TopologySequence>(later), 3);
    if (!absl::IsInvalidArgument(late)) return absl::InternalError("accepted");
    return opt.SetTopology(std::make_shared<TopologySequence>(later), 4);
  };
  const Vectors expected = Simulate(run, DelayedStep, [&](int64_t step) -> Topology {
    return (step < 4 ? run.topology : later).at(0);
  });
  ExpectNear(TrainAll(run), expected, 1e-13);
}

TEST_P(OptimizerSpine, DelayedIsRefusedWhereTheMethodDoesNotStandIt) {
  RunRanksOk(GetParam(), 2, SmallPieces(), [&](Communicator& comm, Vector*) -> Status {
    DistributedOptimizerOptions options;
    options.plugin = "pmsgd";
    options.delayed = true;
    options.params.push_back({"x", 5, DType::kFloat64, 0, 1, "float64"});
    const Status s = DistributedOptimizer::Create(&comm, std::move(options)).status();
    const bool told = absl::IsInvalidArgument(s) &&
                      s.message().find("no delayed mode") != std::string::npos &&
                      s.message().find("1/38") != std::string::npos;
    return told ? absl::OkStatus() : absl::InternalError(s.ToString());
  });
}

TEST_P(OptimizerSpine, NothingChangesBeforeTheStepIsCalled) {
  Training run = RunOf<AtStep>();
  run.before_end = [](Communicator& comm, const Vectors& x) -> Status {
    const Vectors before = x;
    // By then everything that was ready has been exchanged.
    for (int i = 0; i < 3; ++i) {
      if (Status s = Barrier(comm, "ready"); !s.ok()) return s;
    }
    return x == before ? absl::OkStatus() : absl::InternalError("consumed before Step");
  };
  Check(run, [](Model& m) { m.x = Average(*m.w, GradientStep(m)); });
}

TEST_P(OptimizerSpine, CompressedPayloadsKeepTheMean) {
  const Training run = RunOf<Compressed>();
  const Config config = SmallPieces();
  // The engine's buckets, in reverse order of registration, and what one message covers.
  std::vector<std::vector<size_t>> messages;
  {
    std::vector<size_t> offsets = {0};
    for (const int64_t size : kSizes) offsets.push_back(offsets.back() + (size_t)size);
    std::vector<std::vector<size_t>> buckets;
    int group = -1;
    for (size_t p = kSizes.size(); p-- > 0;) {
      if (kSizes[p] == 0) continue;
      if (GroupOf(p) != group || static_cast<int64_t>((buckets.back().size() + (size_t)kSizes[p]) *
                                                      8) > config.bucket_bytes) {
        buckets.emplace_back();
      }
      group = GroupOf(p);
      for (size_t i = offsets[p]; i < offsets[p + 1]; ++i) buckets.back().push_back(i);
    }
    const size_t chunk = static_cast<size_t>(config.chunk_bytes) / 8;
    for (const auto& bucket : buckets) {
      for (size_t b = 0; b < bucket.size(); b += chunk) {
        messages.emplace_back(bucket.begin() + (std::ptrdiff_t)b,
                              bucket.begin() + (std::ptrdiff_t)std::min(b + chunk, bucket.size()));
      }
    }
  }
  const auto recursion = [&](Model& m) {
    const Vectors y = GradientStep(m);
    Vectors q(kRanks, Vector(m.param.size(), 0.0));
    for (int r = 0; r < kRanks; ++r) {
      for (const auto& message : messages) {
        Vector part;
        for (const size_t i : message) part.push_back(y[r][i]);
        for (const auto& e : LargestEntries::Pick((int64_t)part.size(), part.data())) {
          q[r][message[e.index]] = e.value;
        }
      }
    }
    m.x = y;
    for (int r = 0; r < kRanks; ++r) {
      for (int j = 0; j < kRanks; ++j) {
        if (j == r) continue;
        for (size_t i = 0; i < m.param.size(); ++i) {
          m.x[r][i] += m.w->weight(j, r) * (q[j][i] - q[r][i]);
        }
      }
    }
    // The mean is that of y.
    for (size_t i = 0; i < m.param.size(); i += 17) {
      double sum = 0.0;
      for (int r = 0; r < kRanks; ++r) sum += m.x[r][i] - y[r][i];
      ASSERT_NEAR(sum, 0.0, 1e-12);
    }
  };
  ExpectNear(TrainAll(run, config), Simulate(run, recursion), 1e-12);
}

// Two payloads, rounded each; the ranks' mean is that without rounding.
TEST_P(OptimizerSpine, RoundedPayloadsKeepTheMean) {
  Training run = RunOf<TwoPayloads>();
  run.message_dtype = DType::kFloat32;
  const auto rounded_average = [](const Topology& w, const Vectors& y) {
    Vectors out = y;
    for (int r = 0; r < kRanks; ++r) {
      for (int j = 0; j < kRanks; ++j) {
        for (size_t i = 0; i < y[0].size(); ++i) {
          out[r][i] += w.weight(j, r) * (static_cast<double>(static_cast<float>(y[j][i])) -
                                         static_cast<double>(static_cast<float>(y[r][i])));
        }
      }
    }
    for (size_t i = 0; i < y[0].size(); i += 17) {
      double sum = 0.0;
      for (int r = 0; r < kRanks; ++r) sum += out[r][i] - y[r][i];
      EXPECT_NEAR(sum, 0.0, 1e-12);
    }
    return out;
  };
  Check(run, [&](Model& m) { StepTwoPayloads(m, rounded_average); });
}

TEST_P(OptimizerSpine, MessageDtypesThatCannotBeAreRefused) {
  const auto refused = [](Communicator& comm, DistributedOptimizerOptions options,
                          const std::string& why) -> Status {
    options.params.push_back({"w", 5, DType::kFloat32, 0, 1, "float32"});
    const Status s = DistributedOptimizer::Create(&comm, std::move(options)).status();
    const bool told = absl::IsInvalidArgument(s) && s.message().find(why) != std::string::npos;
    return told ? absl::OkStatus() : absl::InternalError("not " + why + ": " + s.ToString());
  };
  RunRanksOk(GetParam(), 2, SmallPieces(), [&](Communicator& comm, Vector*) -> Status {
    DistributedOptimizerOptions all, wide, coded, differ;
    all.plugin = "pmsgd";
    all.message_dtype = DType::kBFloat16;
    if (Status s = refused(comm, std::move(all), "averages over all ranks"); !s.ok()) return s;
    wide.plugin = "dsgd";
    wide.message_dtype = DType::kFloat64;
    if (Status s = refused(comm, std::move(wide), "parameter 'w': float32 cannot travel as");
        !s.ok()) {
      return s;
    }
    coded.optimizer = std::make_unique<Compressed>();
    coded.message_dtype = DType::kBFloat16;
    if (Status s = refused(comm, std::move(coded), "'largest entries' already"); !s.ok()) return s;
    differ.plugin = "dsgd";
    differ.message_dtype = comm.rank() == 0 ? DType::kBFloat16 : DType::kFloat16;
    return refused(comm, std::move(differ),
                   "'message_dtype=bfloat16' on rank 0 and 'message_dtype=float16' on rank 1");
  });
}

TEST_P(OptimizerSpine, TopologyChangesAtAnAgreedStep) {
  Training run = RunOf<Periodic>();
  run.make = [] { return std::make_unique<GlobalEveryFourth>(); };
  const TopologySequence later(*Ring(kRanks, RingStyle::kLeft));
  run.topology = TopologySequence(Directed());
  // Each rank learns of it at another point of its program.
  run.before_step = [&](Communicator& comm, DistributedOptimizer& opt) {
    return opt.step() == comm.rank() ? opt.SetTopology(std::make_shared<TopologySequence>(later), 5)
                                     : absl::OkStatus();
  };
  const Topology all = *FullyConnected(kRanks);
  const Vectors expected = Simulate(
      run, [&](Model& m) { m.x = Average(m.step % 4 == 3 ? all : *m.w, GradientStep(m)); },
      [&](int64_t step) -> Topology { return (step < 5 ? run.topology : later).at(0); });
  ExpectNear(TrainAll(run), expected, 1e-13);
}

TEST_P(OptimizerSpine, ATopologyForThePastIsRefused) {
  Training run = RunOf<GlobalEveryFourth>();
  run.steps = 3;
  run.before_step = [&](Communicator&, DistributedOptimizer& opt) -> Status {
    if (opt.step() != 2) return absl::OkStatus();
    const Status s = opt.SetTopology(std::make_shared<TopologySequence>(*Ring(kRanks)), 1);
    return s.code() == absl::StatusCode::kInvalidArgument
               ? absl::OkStatus()
               : absl::InternalError("accepted: " + s.ToString());
  };
  TrainAll(run);
}

TEST_P(OptimizerSpine, OverlapAndNoOverlapAgreeBitForBit) {
  Training delayed = RunOf<Plain>(), narrow = RunOf<TwoPayloads>();
  delayed.delayed = true;
  delayed.message_dtype = DType::kFloat16;
  narrow.message_dtype = DType::kBFloat16;
  for (Training run : {RunOf<TwoPayloads>(), RunOf<Early>(), RunOf<LayerWise>(),
                       RunOf<Compressed>(), delayed, narrow}) {
    run.steps = 5;
    const Vectors with = TrainAll(run);
    run.overlap = false;
    EXPECT_EQ(TrainAll(run), with) << run.make()->traits().name;
  }
}

INSTANTIATE_TEST_SUITE_P(Fabrics, OptimizerSpine, ::testing::ValuesIn(AllFabrics()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace bluefog::spine
