// Decentralized momentum SGD: local heavy-ball momentum, then an average of the models.
//   m+ = beta m + g + wd x;   x+ = W(x - lr m+)
// Algorithm 1 of Yuan et al. 2021 (the DecentLaM paper), which also shows its bias: the limit is
// that of dsgd with lr/(1 - beta). The momentum is rounded as torch.optim.SGD rounds it.
#include <bluefog/elementwise.h>
#include <bluefog/optimizer.h>

namespace bluefog {
namespace {

class Dmsgd final : public Optimizer {
 public:
  const Traits& traits() const override { return traits_; }

  void Produce(const StepContext& ctx, std::span<const Segment> segments) override {
    for (const Segment& s : segments) {
      void* y = s.payload[0];
      void* m = s.state[0];
      const void* g = s.g;
      if (s.hyper->weight_decay != 0.0) {
        elementwise::MulAdd(ctx.dtype, s.n, y, s.hyper->weight_decay, s.x, g);
        g = y;
      }
      elementwise::ScaleAdd(ctx.dtype, s.n, m, s.hyper->momentum, m, g);
      elementwise::MulAdd(ctx.dtype, s.n, y, -s.hyper->lr, m, s.x);
    }
  }

  Status Consume(const StepContext& ctx, std::span<const Segment> segments) override {
    if (Status status = elementwise::CheckDType(ctx.dtype); !status.ok()) return status;
    for (const Segment& s : segments) elementwise::Copy(ctx.dtype, s.n, s.x, s.mixed[0]);
    return absl::OkStatus();
  }

 private:
  const Traits traits_ = {
      .name = "dmsgd",
      .summary = "m+ = beta m + g; x+ = W(x - lr m+)",
      .source = "Yuan et al. 2021, arXiv:2104.11981, Algorithm 1",
      .states = {"momentum_buffer"},
      .delayed = "m+ = beta m + g; x+ = W x - lr m+",
  };
};

BLUEFOG_REGISTER_OPTIMIZER("dmsgd", Dmsgd);

}  // namespace
}  // namespace bluefog
