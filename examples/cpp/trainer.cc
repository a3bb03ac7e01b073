// Linear regression with DecentLaM in C++: every rank has rows of its own, nobody sees all of them,
// and yet all ranks find the one solution. Run it with
//   bluefog run -np 4 ./trainer
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include <bluefog/communicator.h>
#include <bluefog/distributed_optimizer.h>

namespace {

constexpr int kRows = 64, kColumns = 10, kSteps = 400;

bluefog::Status Train() {
  auto comm = bluefog::Communicator::Create();
  if (!comm.ok()) return comm.status();
  const int rank = (*comm)->rank();

  // b = A x_true: the same x_true everywhere, rows that differ in size and direction from rank to
  // rank.
  std::mt19937 shared(1), mine(100u + static_cast<unsigned>(rank));
  std::normal_distribution<double> normal;
  std::vector<double> x_true(kColumns), a(kRows * kColumns), b(kRows);
  for (double& v : x_true) v = normal(shared);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      a[i * kColumns + j] = normal(mine) * (j % 4 == rank % 4 ? 1.0 : 0.3);
      b[i] += a[i * kColumns + j] * x_true[j];
    }
  }

  auto ring = bluefog::MakeTopology("ring", (*comm)->size());
  if (!ring.ok()) return ring.status();
  if (auto status = (*comm)->SetTopology(*std::move(ring)); !status.ok()) return status;
  bluefog::DistributedOptimizerOptions options;
  options.plugin = "decentlam";
  options.params = {
      {.name = "x", .count = kColumns, .dtype = bluefog::DType::kFloat64, .layout = "float64[10]"}};
  auto optimizer = bluefog::DistributedOptimizer::Create(comm->get(), std::move(options));
  if (!optimizer.ok()) return optimizer.status();

  std::vector<double> x(kColumns), gradient(kColumns);
  std::vector<std::vector<double>> states((*optimizer)->traits().states.size(), x);
  bluefog::ParameterBinding binding{.x = x.data(), .g = gradient.data()};
  for (size_t s = 0; s < states.size(); ++s) binding.state[s] = states[s].data();
  const bluefog::Hyper hyper{.lr = 0.2, .momentum = 0.8};

  for (int step = 0; step < kSteps; ++step) {
    std::fill(gradient.begin(), gradient.end(), 0.0);
    for (int i = 0; i < kRows; ++i) {
      const double* row = &a[i * kColumns];
      double residual = -b[i];
      for (int j = 0; j < kColumns; ++j) residual += row[j] * x[j];
      for (int j = 0; j < kColumns; ++j) gradient[j] += residual * row[j] / kRows;
    }
    // With several parameters, Ready(i, …) during back-propagation lets each leave at once.
    if (auto status = (*optimizer)->Step({&binding, 1}, {&hyper, 1}); !status.ok()) return status;
  }

  double error = 0.0;
  for (int j = 0; j < kColumns; ++j) error = std::max(error, std::abs(x[j] - x_true[j]));
  std::printf("rank %d of %d: largest error %.1e\n", rank, (*comm)->size(), error);
  return error < 1e-6 ? bluefog::Status() : absl::InternalError("did not converge");
}

}  // namespace

int main() {
  const bluefog::Status status = Train();
  if (!status.ok()) std::fprintf(stderr, "trainer: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
