// Parallel momentum SGD, the baseline that averages with everybody: gradients are averaged over all
// ranks, momentum and step are local and the same everywhere.
//   m+ = beta m + mean(g + wd x);   x+ = x - lr m+
// Yuan et al. 2021 (PmSGD); with equal models it is torch.optim.SGD on the joint batch, and rounds
// as that.
#include <bluefog/elementwise.h>
#include <bluefog/optimizer.h>

namespace bluefog {
namespace {

class Pmsgd final : public Optimizer {
 public:
  const Traits& traits() const override { return traits_; }

  StepPlan Plan(int64_t step, const Hyper&) const override {
    return {Exchange{Collective::kAllreduce, step}};
  }

  void Produce(const StepContext& ctx, std::span<const Segment> segments) override {
    for (const Segment& s : segments) {
      if (s.hyper->weight_decay != 0.0) {
        elementwise::MulAdd(ctx.dtype, s.n, s.payload[0], s.hyper->weight_decay, s.x, s.g);
      } else {
        elementwise::Copy(ctx.dtype, s.n, s.payload[0], s.g);
      }
    }
  }

  Status Consume(const StepContext& ctx, std::span<const Segment> segments) override {
    if (Status status = elementwise::CheckDType(ctx.dtype); !status.ok()) return status;
    for (const Segment& s : segments) {
      void* m = s.state[0];
      elementwise::ScaleAdd(ctx.dtype, s.n, m, s.hyper->momentum, m, s.mixed[0]);
      elementwise::MulAdd(ctx.dtype, s.n, s.x, -s.hyper->lr, m, s.x);
    }
    return absl::OkStatus();
  }

 private:
  const Traits traits_ = {
      .name = "pmsgd",
      .summary = "m+ = beta m + mean(g); x+ = x - lr m+",
      .source = "Yuan et al. 2021, arXiv:2104.11981 (parallel momentum SGD)",
      .states = {"momentum_buffer"},
      .delayed_reason =
          "its averages are gradients, which would be one step old: with curvature h momentum SGD "
          "is "
          "stable for lr h < 2(1 + beta), with gradients that are one step old only for lr h < 1 - "
          "beta, 1/38 of it at beta = .9",
      .uses_topology = false,
  };
};

BLUEFOG_REGISTER_OPTIMIZER("pmsgd", Pmsgd);

}  // namespace
}  // namespace bluefog
