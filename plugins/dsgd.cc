// Decentralized SGD, adapt then combine: each rank takes a gradient step, then averages the result
// with its neighbours.
//   y = x - lr (g + wd x);   x+ = W y
// Chen and Sayed 2012 (diffusion, adapt then combine); Lian et al. 2017 for deep learning.
#include <bluefog/elementwise.h>
#include <bluefog/optimizer.h>

namespace bluefog {
namespace {

class Dsgd final : public Optimizer {
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
    for (const Segment& s : segments) elementwise::Copy(ctx.dtype, s.n, s.x, s.mixed[0]);
    return absl::OkStatus();
  }

 private:
  const Traits traits_ = {
      .name = "dsgd",
      .summary = "x+ = W(x - lr g)",
      .source = "Lian et al. 2017, arXiv:1705.09056 (adapt then combine: Chen and Sayed 2012)",
      .delayed = "x+ = W x - lr g",
  };
};

BLUEFOG_REGISTER_OPTIMIZER("dsgd", Dsgd);

}  // namespace
}  // namespace bluefog
