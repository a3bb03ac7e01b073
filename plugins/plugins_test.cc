// Each optimizer against its recursion written as plain loops, on a few ranks whose averages are
// formed by hand; and on one rank, bit for bit, against what torch.optim.SGD computes.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include <bluefog/optimizer.h>
#include <bluefog/topology.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace bluefog {
namespace {

using ::testing::HasSubstr;

constexpr size_t kCount = 1037;

// The gradient of a quadratic whose curvature and minimum differ from rank to rank.
double Gradient(int rank, size_t i, double x) {
  const double curvature = 0.5 + 0.25 * static_cast<double>((i + static_cast<size_t>(rank)) % 5);
  const double minimum = std::sin(static_cast<double>(i) * 0.7 + rank * 1.3);
  return curvature * (x - minimum);
}
double Start(size_t i) { return std::cos(static_cast<double>(i) * 0.37); }

// W[i][j]: what rank j gives to rank i; symmetric here.
using Matrix = std::vector<std::vector<double>>;
const Matrix kAlone = {{1.0}};
const Matrix kPair = {{0.75, 0.25}, {0.25, 0.75}};
const Matrix kLine = {{2. / 3, 1. / 3, 0}, {1. / 3, 1. / 3, 1. / 3}, {0, 1. / 3, 2. / 3}};

// One rank's vectors.
template <class T>
struct Model {
  std::vector<T> x = std::vector<T>(kCount), g = x, state = x, payload = x, mixed = x;
};

// Ranks that step together; the test plays the engine.
template <class T>
class Cluster {
 public:
  Cluster(const std::string& plugin, const Matrix& w) : w_(w), models_(w.size()) {
    auto optimizer = MakeOptimizer(plugin);
    EXPECT_TRUE(optimizer.ok()) << optimizer.status();
    optimizer_ = std::move(*optimizer);
    for (auto& model : models_) {
      for (size_t i = 0; i < kCount; ++i) model.x[i] = static_cast<T>(Start(i));
    }
  }

  void Step(const Hyper& hyper) {
    const auto plan = optimizer_->Plan(step_, Hyper{});
    ASSERT_EQ(plan.size(), 1u);
    EXPECT_EQ(plan[0].round, step_);
    const bool all = plan[0].collective == Collective::kAllreduce;
    for (size_t r = 0; r < models_.size(); ++r) {
      auto& model = models_[r];
      for (size_t i = 0; i < kCount; ++i) {
        model.g[i] = static_cast<T>(Gradient(static_cast<int>(r), i, model.x[i]));
      }
      const auto x = model.x, g = model.g;
      optimizer_->Produce(Context(r), Segments(model, hyper));
      EXPECT_EQ(model.x, x) << "Produce may not touch the model";
      EXPECT_EQ(model.g, g) << "Produce may not touch the gradient";
    }
    for (size_t r = 0; r < models_.size(); ++r) {
      for (size_t i = 0; i < kCount; ++i) {
        double sum = 0.0;
        for (size_t j = 0; j < models_.size(); ++j) {
          const double weight = all ? 1.0 / static_cast<double>(models_.size()) : w_[r][j];
          sum += weight * static_cast<double>(models_[j].payload[i]);
        }
        models_[r].mixed[i] = static_cast<T>(sum);
      }
    }
    for (size_t r = 0; r < models_.size(); ++r) {
      auto& model = models_[r];
      const auto payload = model.payload, g = model.g, mixed = model.mixed;
      const Status status = optimizer_->Consume(Context(r), Segments(model, hyper));
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(model.payload, payload) << "neighbours may still read it";
      EXPECT_EQ(model.g, g);
      EXPECT_EQ(model.mixed, mixed);
    }
    ++step_;
  }

  const Model<T>& operator[](size_t rank) const { return models_[rank]; }
  size_t size() const { return models_.size(); }

 private:
  StepContext Context(size_t rank) const {
    StepContext context;
    context.step = step_;
    context.dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    context.rank = static_cast<int>(rank);
    context.size = static_cast<int>(models_.size());
    return context;
  }
  // The parameter in pieces of odd lengths, as a bucket may cut it.
  std::vector<Segment> Segments(Model<T>& model, const Hyper& hyper) const {
    std::vector<Segment> segments;
    size_t offset = 0;
    for (const size_t n : {size_t{1}, size_t{0}, size_t{510}, size_t{26}, size_t{500}}) {
      Segment s;
      s.offset = static_cast<int64_t>(offset);
      s.n = static_cast<int64_t>(n);
      s.x = model.x.data() + offset;
      s.g = model.g.data() + offset;
      if (!optimizer_->traits().states.empty()) s.state[0] = model.state.data() + offset;
      s.payload[0] = model.payload.data() + offset;
      s.mixed[0] = model.mixed.data() + offset;
      s.hyper = &hyper;
      segments.push_back(s);
      offset += n;
    }
    EXPECT_EQ(offset, kCount);
    return segments;
  }

  Matrix w_;
  std::vector<Model<T>> models_;
  std::unique_ptr<Optimizer> optimizer_;
  int64_t step_ = 0;
};

// The recursions of the papers, element by element: x and state of all ranks, gradients given.
using Vector = std::vector<double>;
using Recursion =
    std::function<void(const Matrix&, const Hyper&, const Vector& g, Vector& x, Vector& m)>;

Vector Times(const Matrix& w, const Vector& v) {
  Vector product(v.size(), 0.0);
  for (size_t i = 0; i < v.size(); ++i) {
    for (size_t j = 0; j < v.size(); ++j) product[i] += w[i][j] * v[j];
  }
  return product;
}
double Mean(const Vector& v) {
  return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
}

void DsgdRecursion(const Matrix& w, const Hyper& h, const Vector& g, Vector& x, Vector&) {
  Vector y = x;
  for (size_t r = 0; r < x.size(); ++r) y[r] -= h.lr * g[r];
  x = Times(w, y);
}
void DmsgdRecursion(const Matrix& w, const Hyper& h, const Vector& g, Vector& x, Vector& m) {
  Vector y = x;
  for (size_t r = 0; r < x.size(); ++r) {
    m[r] = h.momentum * m[r] + g[r];
    y[r] -= h.lr * m[r];
  }
  x = Times(w, y);
}
void PmsgdRecursion(const Matrix&, const Hyper& h, const Vector& g, Vector& x, Vector& m) {
  const double mean = Mean(g);
  for (size_t r = 0; r < x.size(); ++r) {
    m[r] = h.momentum * m[r] + mean;
    x[r] -= h.lr * m[r];
  }
}
// Algorithm 2 as printed, with its division by lr: the state is the paper's momentum.
void DecentlamRecursion(const Matrix& w, const Hyper& h, const Vector& g, Vector& x, Vector& m) {
  Vector y = x;
  for (size_t r = 0; r < x.size(); ++r) y[r] -= h.lr * g[r];
  const Vector mixed = Times(w, y);
  for (size_t r = 0; r < x.size(); ++r) {
    m[r] = h.momentum * m[r] + (x[r] - mixed[r]) / h.lr;
    x[r] -= h.lr * m[r];
  }
}

struct Case {
  const char* plugin;
  Recursion recursion;
};
const Case kCases[] = {{"dsgd", DsgdRecursion},
                       {"dmsgd", DmsgdRecursion},
                       {"pmsgd", PmsgdRecursion},
                       {"decentlam", DecentlamRecursion}};

template <class T>
void CheckAgainstRecursion(const Case& c, const Matrix& w, const Hyper& hyper, double tolerance) {
  constexpr int kSteps = 20;
  Cluster<T> cluster(c.plugin, w);
  for (int step = 0; step < kSteps; ++step) cluster.Step(hyper);
  for (size_t i = 0; i < kCount; ++i) {
    Vector x(w.size(), static_cast<double>(static_cast<T>(Start(i)))), m(w.size(), 0.0);
    for (int step = 0; step < kSteps; ++step) {
      Vector g(w.size());
      for (size_t r = 0; r < w.size(); ++r) {
        g[r] = Gradient(static_cast<int>(r), i, x[r]) + hyper.weight_decay * x[r];
      }
      c.recursion(w, hyper, g, x, m);
    }
    for (size_t r = 0; r < w.size(); ++r) {
      ASSERT_NEAR(static_cast<double>(cluster[r].x[i]), x[r], tolerance)
          << c.plugin << " on " << w.size() << " ranks, rank " << r << ", element " << i;
    }
  }
}

TEST(PluginsTest, FollowTheirRecursions) {
  for (const Case& c : kCases) {
    for (const Matrix& w : {kAlone, kPair, kLine}) {
      for (const double weight_decay : {0.0, 0.01}) {
        const Hyper hyper{.lr = 0.1, .momentum = 0.8, .weight_decay = weight_decay};
        CheckAgainstRecursion<double>(c, w, hyper, 5e-14);
        CheckAgainstRecursion<float>(c, w, hyper, 2e-5);
      }
    }
  }
}

TEST(PluginsTest, WithoutMomentumAllButPmsgdAreDsgd) {
  const Hyper hyper{.lr = 0.1, .momentum = 0.0, .weight_decay = 0.01};
  for (const char* plugin : {"dmsgd", "decentlam"}) {
    CheckAgainstRecursion<double>({plugin, DsgdRecursion}, kLine, hyper, 1e-14);
  }
}

// torch.optim.SGD: grad.add(param, alpha=wd); buf.mul_(momentum).add_(grad); param.add_(buf,
// alpha=-lr), where add with alpha is one fused multiply-add and mul_ rounds.
TEST(PluginsTest, OnOneRankTheBitsAreThoseOfTorch) {
  for (const char* plugin : {"dsgd", "dmsgd", "pmsgd"}) {
    for (const float weight_decay : {0.0f, 1e-4f}) {
      const float momentum = std::string(plugin) == "dsgd" ? 0.0f : 0.9f;
      Cluster<float> cluster(plugin, kAlone);
      std::vector<float> x(kCount), buffer(kCount);
      for (size_t i = 0; i < kCount; ++i) x[i] = static_cast<float>(Start(i));
      for (int step = 0; step < 10; ++step) {
        const float lr = 0.1f / static_cast<float>(1 + step);
        cluster.Step({.lr = lr, .momentum = momentum, .weight_decay = weight_decay});
        for (size_t i = 0; i < kCount; ++i) {
          auto g = static_cast<float>(Gradient(0, i, x[i]));
          if (weight_decay != 0.0f) g = std::fma(x[i], weight_decay, g);
          const float decayed = momentum * buffer[i];  // Contraction is off.
          buffer[i] = step == 0 || momentum == 0.0f ? g : decayed + g;
          x[i] = std::fma(buffer[i], -lr, x[i]);
          ASSERT_EQ(std::bit_cast<uint32_t>(cluster[0].x[i]), std::bit_cast<uint32_t>(x[i]))
              << plugin << " step " << step << " element " << i;
          if (momentum != 0.0f) {
            ASSERT_EQ(cluster[0].state[i], buffer[i]);
          }
        }
      }
    }
  }
}

// Warm-up begins at lr = 0: the models mix, nothing else happens, and momentum starts without NaN.
TEST(PluginsTest, LearningRateZeroIsSafe) {
  for (const char* plugin : {"dsgd", "dmsgd", "pmsgd", "decentlam"}) {
    Cluster<double> cluster(plugin, kPair);
    const auto start = cluster[0].x;
    cluster.Step({.lr = 0.0, .momentum = 0.9, .weight_decay = 1e-4});
    for (size_t r = 0; r < 2; ++r) EXPECT_EQ(cluster[r].x, start) << plugin;
    for (const double lr : {0.1, 0.0, 0.05}) {
      cluster.Step({.lr = lr, .momentum = 0.9, .weight_decay = 1e-4});
    }
    for (const double x : cluster[0].x) ASSERT_TRUE(std::isfinite(x)) << plugin;
    EXPECT_NE(cluster[0].x, start) << plugin;
  }
}

// A schedule that cuts lr must not blow up DecentLaM's momentum: the velocity is a displacement.
TEST(PluginsTest, DecentlamVelocityIsTheLastDisplacement) {
  Cluster<double> cluster("decentlam", kPair);
  for (const double lr : {0.1, 0.1, 0.001}) {
    const auto before = cluster[1].x;
    cluster.Step({.lr = lr, .momentum = 0.9});
    for (size_t i = 0; i < kCount; ++i) {
      ASSERT_NEAR(before[i] - cluster[1].x[i], cluster[1].state[i], 1e-15);
    }
  }
}

TEST(PluginsTest, HalfPrecisionIsRefusedByName) {
  const Hyper hyper;
  uint16_t vector[4] = {};
  Segment s;
  s.n = 4;
  s.x = s.state[0] = s.payload[0] = vector;
  s.g = s.mixed[0] = vector;
  s.hyper = &hyper;
  StepContext context;
  context.dtype = DType::kFloat16;
  for (const std::string& name : OptimizerNames()) {
    const auto optimizer = MakeOptimizer(name);
    (*optimizer)->Produce(context, {&s, 1});
    const Status status = (*optimizer)->Consume(context, {&s, 1});
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("float16"));
  }
}

TEST(PluginsTest, AreRegisteredAndDescribeThemselves) {
  EXPECT_EQ(OptimizerNames(), (std::vector<std::string>{"decentlam", "dmsgd", "dsgd", "pmsgd"}));
  for (const std::string& name : OptimizerNames()) {
    const auto optimizer = MakeOptimizer(name);
    EXPECT_EQ((*optimizer)->traits().name, name);
    EXPECT_FALSE((*optimizer)->traits().summary.empty());
    EXPECT_FALSE((*optimizer)->traits().source.empty());
  }
}

Status CheckOn(const std::string& plugin, const std::string& topology) {
  const auto sequence = MakeTopology(topology, 8);
  return sequence.ok() ? CheckTopology((*MakeOptimizer(plugin))->traits(), *sequence)
                       : sequence.status();
}

TEST(PluginsTest, DecentlamIsRefusedWhereItDiverges) {
  for (const char* topology : {"ring", "star", "mesh-grid-2d", "symmetric-exponential"}) {
    EXPECT_TRUE(CheckOn("decentlam", topology).ok()) << CheckOn("decentlam", topology);
  }
  const Status directed = CheckOn("decentlam", "exponential");
  EXPECT_EQ(directed.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(directed.message()), HasSubstr("momentum >= .52"));
  const Status varying = CheckOn("decentlam", "one-peer-exponential");
  EXPECT_EQ(varying.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(varying.message()), HasSubstr(".77/.71/.56/.52 at n = 4/8/16/32"));
  for (const char* plugin : {"dsgd", "dmsgd", "pmsgd"}) {
    EXPECT_TRUE(CheckOn(plugin, "exponential").ok());
    EXPECT_TRUE(CheckOn(plugin, "one-peer-exponential").ok());
  }
}

}  // namespace
}  // namespace bluefog
