// DecentLaM: momentum on what the exchange did to the model instead of on the gradient, which
// removes the bias that momentum adds to decentralized SGD with large batches.
//   y = x - lr (g + wd x);   v+ = beta v + (x - W y);   x+ = x - v+
// Yuan et al. 2021, Algorithm 2 and equations 8 and 10, in velocity form (v = lr times the paper's
// momentum): Algorithm 2 as printed divides by lr, which fails at lr = 0 and rescales the momentum
// when lr changes.
#include <bluefog/elementwise.h>
#include <bluefog/optimizer.h>

namespace bluefog {
namespace {

class DecentLaM final : public Optimizer {
 public:
  const Traits& traits() const override { return traits_; }

  void Produce(const StepContext& ctx, std::span<const Segment> segments) override {
    for (const Segment& s : segments) {
      void* y = s.payload[0];
      const void* g = s.g;
      if (s.hyper->weight_decay != 0.0) {
        elementwise::MulAdd(ctx.dtype, s.n, y, s.hyper->weight_decay, s.x, g);
        g = y;
      }
      elementwise::MulAdd(ctx.dtype, s.n, y, -s.hyper->lr, g, s.x);
    }
  }

  Status Consume(const StepContext& ctx, std::span<const Segment> segments) override {
    if (Status status = elementwise::CheckDType(ctx.dtype); !status.ok()) return status;
    for (const Segment& s : segments) {
      elementwise::HeavyBall(ctx.dtype, s.n, s.x, s.state[0], s.hyper->momentum, s.mixed[0]);
    }
    return absl::OkStatus();
  }

 private:
  const Traits traits_ = {
      .name = "decentlam",
      .summary = "v+ = beta v + (x - W(x - lr g)); x+ = x - v+",
      .source = "Yuan et al. 2021, arXiv:2104.11981, Algorithm 2, equations 8 and 10",
      .states = {"velocity"},
      .delayed = "v+ = beta v + (x - (W x - lr g)); x+ = x - v+",
      .needs_symmetric = true,
      .needs_static = true,
      .needs_reason =
          "DecentLaM diverges on the static exponential graph for momentum >= .52; on time-varying "
          "graphs "
          "it diverges even if every round is symmetric: one-peer exponential is unstable from "
          "momentum "
          ".77/.71/.56/.52 at n = 4/8/16/32 (measured on heterogeneous linear regression)",
  };
};

BLUEFOG_REGISTER_OPTIMIZER("decentlam", DecentLaM);

}  // namespace
}  // namespace bluefog
