// The optimizers as the papers say: eight processes over shared memory, heterogeneous least squares
// in fp64, compared with recursions in plain loops and with what theory says of their limits.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <optional>

#include <bluefog/distributed_optimizer.h>

#include "ranks.h"
#include "regression.h"

namespace bluefog::theory {
namespace {

const Regression& Problem() {
  static const Regression problem;
  return problem;
}

struct Settings {
  std::string plugin;
  std::string topology = "ring";
  int64_t steps = 40;
  std::function<double(int64_t)> lr = [](int64_t) { return 1e-3; };
  double momentum = 0.0;
  bool common_start = false;
  bool overlap = true;
  bool whole_path = true;  ///< Or the last step only.
  bool delayed = false;
  std::optional<DType> message_dtype;
};

/// What the engine made of it: [step][rank], x after the step and the state (zeros without).
struct Path {
  std::vector<Vectors> x, state;
};

// Three parameters, so that buckets, order and offsets matter.
constexpr size_t kCuts[] = {0, 7, 18, kColumns};

Status Train(Communicator& comm, const Settings& settings, Vector* values) {
  auto topology = MakeTopology(settings.topology, comm.size());
  if (!topology.ok()) return topology.status();
  DistributedOptimizerOptions options;
  options.plugin = settings.plugin;
  options.delayed = settings.delayed;
  options.message_dtype = settings.message_dtype;
  options.topology = std::make_shared<TopologySequence>(*topology);
  for (size_t p = 0; p < 3; ++p) {
    options.params.push_back({std::string(1, 'p') + std::to_string(p),
                              static_cast<int64_t>(kCuts[p + 1] - kCuts[p]), DType::kFloat64, 0, 1,
                              "float64"});
  }
  auto opt = DistributedOptimizer::Create(&comm, std::move(options));
  if (!opt.ok()) return opt.status();
  Vector x = Problem().Start(comm.rank(), settings.common_start), state(kColumns, 0.0);
  for (int64_t step = 0; step < settings.steps; ++step) {
    const Vector g = Problem().Gradient(comm.rank(), x);
    std::vector<ParameterBinding> bindings(3);
    for (size_t p = 0; p < 3; ++p) {
      bindings[p].x = x.data() + kCuts[p];
      bindings[p].g = g.data() + kCuts[p];
      bindings[p].state[0] = state.data() + kCuts[p];
    }
    const std::vector<Hyper> hypers = {{settings.lr(step), settings.momentum, 0.0}};
    for (int p = 2; settings.overlap && p >= 0; --p) {
      if (Status s = (*opt)->Ready(p, bindings[static_cast<size_t>(p)], hypers); !s.ok()) return s;
    }
    if (Status s = (*opt)->Step(bindings, hypers); !s.ok()) return s;
    if (settings.whole_path || step + 1 == settings.steps) {
      values->insert(values->end(), x.begin(), x.end());
      values->insert(values->end(), state.begin(), state.end());
    }
  }
  return absl::OkStatus();
}

Path RunEngine(const Settings& settings, int ranks = kRanks) {
  Config config;
  config.bucket_bytes = 20 * 8;
  const auto values = spine::RunRanksOk(
      spine::Fabric::kShm, ranks, config,
      [&](Communicator& comm, Vector* out) { return Train(comm, settings, out); });
  Path path;
  const size_t steps = values[0].size() / (2 * kColumns);
  for (size_t k = 0; k < steps; ++k) {
    path.x.emplace_back();
    path.state.emplace_back();
    for (const Vector& v : values) {
      if (v.size() != values[0].size()) return {};  // Reported as a failure of that rank.
      const auto at = v.begin() + static_cast<std::ptrdiff_t>(2 * kColumns * k);
      path.x.back().emplace_back(at, at + kColumns);
      path.state.back().emplace_back(at + kColumns, at + 2 * kColumns);
    }
  }
  return path;
}

// ---- The papers' recursions
// ----------------------------------------------------------------------

Vectors Starts(const Settings& s, int ranks = kRanks) {
  Vectors x;
  for (int r = 0; r < ranks; ++r) x.push_back(Problem().Start(r, s.common_start));
  return x;
}

Vectors Gradients(const Vectors& x) {
  Vectors g;
  for (size_t r = 0; r < x.size(); ++r) g.push_back(Problem().Gradient(static_cast<int>(r), x[r]));
  return g;
}

Vectors Average(const std::string& topology, const Vectors& y) {
  const int n = static_cast<int>(y.size());
  const TopologySequence w = *MakeTopology(topology, n);
  Vectors out(y.size(), Vector(kColumns, 0.0));
  for (int r = 0; r < n; ++r) {
    for (int j = 0; j < n; ++j) {
      const double weight = w.at(0).weight(j, r);
      for (size_t i = 0; i < kColumns; ++i) out[r][i] += weight * y[j][i];
    }
  }
  return out;
}

/// a x + b y
Vectors Linear(double a, const Vectors& x, double b, const Vectors& y) {
  Vectors z = x;
  for (size_t r = 0; r < z.size(); ++r) {
    for (size_t i = 0; i < kColumns; ++i) z[r][i] = a * x[r][i] + b * y[r][i];
  }
  return z;
}

double Distance(const Vectors& a, const Vectors& b) {
  if (a.size() != b.size()) return INFINITY;
  double worst = 0.0;
  for (size_t r = 0; r < a.size(); ++r) {
    for (size_t i = 0; i < kColumns; ++i) {
      const double d = std::fabs(a[r][i] - b[r][i]);
      if (!(d <= worst)) worst = d;
    }
  }
  return worst;
}

double PathDistance(const Path& got, const std::vector<Vectors>& expected) {
  if (got.x.size() != expected.size()) return INFINITY;
  double worst = 0.0;
  for (size_t k = 0; k < expected.size(); ++k) {
    worst = std::max(worst, Distance(got.x[k], expected[k]));
  }
  return worst;
}

/// Where DSGD with this step size goes, or its delayed form: iterated until it stands still.
Vectors DsgdLimit(const std::string& topology, double lr, bool delayed = false) {
  Settings settings;
  Vectors x = Starts(settings);
  for (int k = 0; k < 100'000; ++k) {
    const Vectors next = delayed ? Linear(1.0, Average(topology, x), -lr, Gradients(x))
                                 : Average(topology, Linear(1.0, x, -lr, Gradients(x)));
    const double moved = Distance(next, x);
    x = next;
    if (moved < 1e-16) break;
  }
  return x;
}

class Fidelity : public ::testing::TestWithParam<std::string> {
 protected:
  Settings Make(const std::string& plugin, double lr, double momentum, int64_t steps) {
    Settings s;
    s.plugin = plugin;
    s.topology = GetParam();
    s.lr = [lr](int64_t) { return lr; };
    s.momentum = momentum;
    s.steps = steps;
    return s;
  }
};

// Check 1: the momentum of DecentLaM adds no bias to that of DSGD.
TEST_P(Fidelity, TheLimitOfDecentLamIsThatOfDsgd) {
  Settings s = Make("decentlam", 1e-3, 0.8, 1500);
  s.whole_path = false;
  const Vectors limit = DsgdLimit(GetParam(), 1e-3);
  EXPECT_LE(Distance(RunEngine(s).x.back(), limit), 1e-12);
  Settings dsgd = Make("dsgd", 1e-3, 0.0, 1500);
  dsgd.whole_path = false;
  EXPECT_LE(Distance(RunEngine(dsgd).x.back(), limit), 1e-12);
  // It is a bias: the ranks do not agree.
  EXPECT_GT(Distance({limit[0]}, {limit[4]}), 1e-3);
}

// Check 2: that of DmSGD does.
TEST_P(Fidelity, TheLimitOfDmsgdIsThatOfDsgdWithALargerStep) {
  Settings s = Make("dmsgd", 1e-3, 0.8, 1500);
  s.whole_path = false;
  const Vectors x = RunEngine(s).x.back();
  EXPECT_LE(Distance(x, DsgdLimit(GetParam(), 1e-3 / (1.0 - 0.8))), 1e-12);
  EXPECT_GT(Distance(x, DsgdLimit(GetParam(), 1e-3)), 1e-2);
}

// Check 5: Algorithm 2 as printed, equation 8, and the engine's velocity form, step by step.
TEST_P(Fidelity, DecentLamIsAlgorithm2) {
  const double lr = 1e-3, beta = 0.8;
  const Settings s = Make("decentlam", lr, beta, 40);
  std::vector<Vectors> algorithm2, equation8;
  Vectors x = Starts(s), m(kRanks, Vector(kColumns, 0.0));
  Vectors z = x, before = x;
  for (int64_t k = 0; k < s.steps; ++k) {
    const Vectors mixed = Average(GetParam(), Linear(1.0, x, -lr, Gradients(x)));
    const Vectors g = Linear(1.0 / lr, x, -1.0 / lr, mixed);
    m = Linear(beta, m, 1.0, g);
    x = Linear(1.0, x, -lr, m);
    algorithm2.push_back(x);
    const Vectors next = Linear(1.0, Average(GetParam(), Linear(1.0, z, -lr, Gradients(z))), beta,
                                Linear(1.0, z, -1.0, before));
    before = z;
    z = next;
    equation8.push_back(z);
  }
  const Path path = RunEngine(s);
  EXPECT_LE(PathDistance(path, algorithm2), 1e-14);
  EXPECT_LE(PathDistance(path, equation8), 1e-14);
}

// Check 5: Algorithm 1 and equation 6.
TEST_P(Fidelity, DmsgdIsAlgorithm1) {
  const double lr = 1e-3, beta = 0.8;
  const Settings s = Make("dmsgd", lr, beta, 40);
  std::vector<Vectors> algorithm1, equation6;
  Vectors x = Starts(s), m(kRanks, Vector(kColumns, 0.0));
  Vectors z = x, before;
  for (int64_t k = 0; k < s.steps; ++k) {
    m = Linear(beta, m, 1.0, Gradients(x));
    x = Average(GetParam(), Linear(1.0, x, -lr, m));
    algorithm1.push_back(x);
    Vectors next = Average(GetParam(), Linear(1.0, z, -lr, Gradients(z)));
    if (k > 0) {
      next = Linear(1.0, next, beta, Linear(1.0, z, -1.0, Average(GetParam(), before)));
    }
    before = z;
    z = next;
    equation6.push_back(z);
  }
  const Path path = RunEngine(s);
  EXPECT_LE(PathDistance(path, algorithm1), 1e-14);
  EXPECT_LE(PathDistance(path, equation6), 1e-14);
}

// Check 6, without momentum.
TEST_P(Fidelity, WithoutMomentumAllAreDsgd) {
  const Settings s = Make("dsgd", 1e-3, 0.0, 40);
  std::vector<Vectors> expected;
  Vectors x = Starts(s);
  for (int64_t k = 0; k < s.steps; ++k) {
    x = Average(GetParam(), Linear(1.0, x, -1e-3, Gradients(x)));
    expected.push_back(x);
  }
  for (const char* plugin : {"dsgd", "dmsgd", "decentlam"}) {
    EXPECT_LE(PathDistance(RunEngine(Make(plugin, 1e-3, 0.0, 40)), expected), 1e-14) << plugin;
  }
}

// Check 7: the mean over the ranks moves as with one worker.
TEST_P(Fidelity, TheMeanFollowsTheMeanMomentum) {
  const double lr = 1e-3;
  // The state of decentlam is lr times the paper's momentum.
  for (const auto& [plugin, scale] :
       std::map<std::string, double>{{"dmsgd", lr}, {"decentlam", 1.0}, {"pmsgd", lr}}) {
    const Settings s = Make(plugin, lr, 0.8, 40);
    const Path path = RunEngine(s);
    ASSERT_EQ(path.x.size(), 40u);
    double worst = 0.0;
    for (size_t k = 0; k < path.x.size(); ++k) {
      const Vectors& before = k == 0 ? Starts(s) : path.x[k - 1];
      for (size_t i = 0; i < kColumns; ++i) {
        double sum = 0.0;
        for (int r = 0; r < kRanks; ++r) {
          sum += path.x[k][r][i] - before[r][i] + scale * path.state[k][r][i];
        }
        worst = std::max(worst, std::fabs(sum / kRanks));
      }
    }
    EXPECT_LE(worst, 1e-14) << plugin;
  }
}

// Check 11: a step size that falls, and one that starts at zero.
TEST_P(Fidelity, DecentLamFollowsAScheduleOfStepSizes) {
  Settings s = Make("decentlam", 0.0, 0.8, 3500);
  s.whole_path = false;
  s.lr = [](int64_t k) { return k < 20 ? 5e-5 * static_cast<double>(k) : k < 500 ? 1e-3 : 1e-4; };
  EXPECT_LE(Distance(RunEngine(s).x.back(), DsgdLimit(GetParam(), 1e-4)), 1e-12);
}

TEST_P(Fidelity, TwoRunsAndOverlapAgreeBitForBit) {
  for (const char* plugin : {"dsgd", "pmsgd", "dmsgd", "decentlam"}) {
    Settings s = Make(plugin, 1e-3, 0.8, 25);
    const Path first = RunEngine(s), second = RunEngine(s);
    ASSERT_EQ(first.x.size(), 25u);
    EXPECT_EQ(first.x, second.x) << plugin;
    EXPECT_EQ(first.state, second.state) << plugin;
    s.overlap = false;
    EXPECT_EQ(RunEngine(s).x, first.x) << plugin;
    if (s.plugin == "pmsgd") continue;
    s.delayed = s.overlap = true;
    s.message_dtype = DType::kBFloat16;
    EXPECT_EQ(RunEngine(s).x, RunEngine(s).x) << plugin;
  }
}

/// Mean squared distance of the ranks' models to the minimum of the sum of all problems.
double Bias(const Vectors& x) {
  double sum = 0.0;
  for (const Vector& v : x) {
    for (size_t i = 0; i < kColumns; ++i) {
      const double d = v[i] - Problem().Minimum()[i];
      sum += d * d;
    }
  }
  return sum / static_cast<double>(x.size());
}

// Check 12: rounding the messages adds no bias to speak of, as the mean is kept.
TEST_P(Fidelity, RoundedMessagesLeaveTheBiasOfDecentLam) {
  Settings s = Make("decentlam", 1e-3, 0.9, 2500);
  s.whole_path = false;
  const double bias = Bias(RunEngine(s).x.back());
  ASSERT_NEAR(bias, Bias(DsgdLimit(GetParam(), 1e-3)), 1e-9);
  s.message_dtype = DType::kBFloat16;
  EXPECT_NEAR(Bias(RunEngine(s).x.back()), bias, 0.15 * bias);
  s.message_dtype = DType::kFloat16;
  s.delayed = true;
  const double delayed = Bias(DsgdLimit(GetParam(), 1e-3, true));
  EXPECT_NEAR(Bias(RunEngine(s).x.back()), delayed, 0.15 * delayed);
}

// The recursions of the delayed mode, step by step: the model is averaged while the gradient is
// computed.
TEST_P(Fidelity, DelayedIsTheRecursionThatIsDocumented) {
  const double lr = 1e-3, beta = 0.8;
  for (const char* plugin : {"dsgd", "dmsgd", "decentlam"}) {
    Settings s = Make(plugin, lr, beta, 40);
    s.delayed = true;
    std::vector<Vectors> expected;
    Vectors x = Starts(s), m(kRanks, Vector(kColumns, 0.0));
    for (int64_t k = 0; k < s.steps; ++k) {
      const Vectors g = Gradients(x), mixed = Average(GetParam(), x);
      if (s.plugin == "dsgd") {
        x = Linear(1.0, mixed, -lr, g);
      } else if (s.plugin == "dmsgd") {
        m = Linear(beta, m, 1.0, g);
        x = Linear(1.0, mixed, -lr, m);
      } else {
        m = Linear(beta, m, 1.0, Linear(1.0, x, -1.0, Linear(1.0, mixed, -lr, g)));
        x = Linear(1.0, x, -1.0, m);
      }
      expected.push_back(x);
    }
    EXPECT_LE(PathDistance(RunEngine(s), expected), 1e-13) << plugin;
  }
}

// Its limits: of DSGD's, DmSGD's and DecentLaM's delayed forms, the first with the first's and
// second's step sizes. DecentLaM's does not depend on beta here either.
TEST_P(Fidelity, TheLimitsOfTheDelayedForms) {
  Settings s = Make("decentlam", 1e-3, 0.9, 2500);
  s.delayed = true;
  s.whole_path = false;
  EXPECT_LE(Distance(RunEngine(s).x.back(), DsgdLimit(GetParam(), 1e-3, true)), 1e-12);
  s = Make("dmsgd", 5e-4, 0.8, 2500);
  s.delayed = true;
  s.whole_path = false;
  EXPECT_LE(Distance(RunEngine(s).x.back(), DsgdLimit(GetParam(), 5e-4 / (1.0 - 0.8), true)),
            1e-12);
}

INSTANTIATE_TEST_SUITE_P(Topologies, Fidelity, ::testing::Values("ring", "mesh-grid-2d"),
                         [](const auto& info) {
                           return info.param == "ring" ? std::string("ring") : std::string("mesh");
                         });

// Check 6, W = J: all methods with momentum are parallel momentum SGD.
TEST(FidelityOfOthers, OnTheFullGraphAllArePmsgd) {
  Settings s;
  s.topology = "fully-connected";
  s.momentum = 0.8;
  s.common_start = true;
  std::vector<Vectors> expected;
  Vectors x = Starts(s), m(kRanks, Vector(kColumns, 0.0));
  for (int64_t k = 0; k < s.steps; ++k) {
    m = Linear(0.8, m, 1.0, Average(s.topology, Gradients(x)));
    x = Linear(1.0, x, -1e-3, m);
    expected.push_back(x);
  }
  for (const char* plugin : {"pmsgd", "dmsgd", "decentlam"}) {
    s.plugin = plugin;
    EXPECT_LE(PathDistance(RunEngine(s), expected), 1e-13) << plugin;
  }
}

// Check 6, n = 1: all are momentum SGD.
TEST(FidelityOfOthers, OneRankIsMomentumSgd) {
  Settings s;
  s.momentum = 0.8;
  std::vector<Vectors> expected, plain;
  Vectors x = Starts(s, 1), m(1, Vector(kColumns, 0.0)), z = x;
  for (int64_t k = 0; k < s.steps; ++k) {
    m = Linear(0.8, m, 1.0, Gradients(x));
    x = Linear(1.0, x, -1e-3, m);
    expected.push_back(x);
    z = Linear(1.0, z, -1e-3, Gradients(z));
    plain.push_back(z);
  }
  for (const char* plugin : {"pmsgd", "dmsgd", "decentlam", "dsgd"}) {
    s.plugin = plugin;
    const bool momentum = s.plugin != "dsgd";
    EXPECT_LE(PathDistance(RunEngine(s, 1), momentum ? expected : plain), 1e-14) << plugin;
  }
}

}  // namespace
}  // namespace bluefog::theory
