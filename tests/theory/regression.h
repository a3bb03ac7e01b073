// Least squares in fp64, one problem for each rank: f_i(x) = |A_i x - b_i|^2 / 2 with A_i 50 x 30,
// standard normal, and another minimum on each rank. Gradients are exact and the same bits wherever
// they are computed.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace bluefog::theory {

using Vector = std::vector<double>;
using Vectors = std::vector<Vector>;  // By rank.

constexpr int kRanks = 8;
constexpr size_t kRows = 50, kColumns = 30;

/// The same numbers on every platform.
class Normal {
 public:
  explicit Normal(uint64_t seed) : state_(seed) {}
  double operator()() {
    const double radius = std::sqrt(-2.0 * std::log(Uniform()));
    return radius * std::cos(6.283185307179586 * Uniform());
  }

 private:
  double Uniform() {
    state_ += 0x9e3779b97f4a7c15ULL;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    z ^= z >> 31;
    return (static_cast<double>(z >> 11) + 0.5) / 9007199254740992.0;
  }
  uint64_t state_;
};

class Regression {
 public:
  Regression() {
    Normal normal(20260101);
    for (int rank = 0; rank < kRanks; ++rank) {
      Vector a(kRows * kColumns), b(kRows), start(kColumns);
      for (double& v : a) v = normal();
      for (double& v : b) v = 3.0 * normal();
      for (double& v : start) v = normal();
      a_.push_back(a);
      b_.push_back(b);
      starts_.push_back(start);
    }
    Solve();
  }
  Vector Gradient(int rank, const Vector& x) const {
    const Vector& a = a_[static_cast<size_t>(rank)];
    Vector g(kColumns, 0.0);
    for (size_t row = 0; row < kRows; ++row) {
      double residual = -b_[static_cast<size_t>(rank)][row];
      for (size_t c = 0; c < kColumns; ++c) residual += a[row * kColumns + c] * x[c];
      for (size_t c = 0; c < kColumns; ++c) g[c] += a[row * kColumns + c] * residual;
    }
    return g;
  }
  /// Of the sum over the ranks, by Gauss' elimination.
  const Vector& Minimum() const { return minimum_; }
  /// Different on every rank, or that of rank 0.
  const Vector& Start(int rank, bool common) const {
    return starts_[static_cast<size_t>(common ? 0 : rank)];
  }

 private:
  void Solve() {
    const Vector zero(kColumns, 0.0);
    Vectors rows(kColumns, Vector(kColumns + 1, 0.0));
    for (int rank = 0; rank < kRanks; ++rank) {
      const Vector g0 = Gradient(rank, zero);
      for (size_t c = 0; c < kColumns; ++c) {
        Vector unit = zero;
        unit[c] = 1.0;
        const Vector g = Gradient(rank, unit);
        for (size_t r = 0; r < kColumns; ++r) rows[r][c] += g[r] - g0[r];
        rows[c][kColumns] -= g0[c];
      }
    }
    for (size_t p = 0; p < kColumns; ++p) {  // Positive definite: no pivoting.
      for (size_t r = 0; r < kColumns; ++r) {
        if (r == p) continue;
        const double factor = rows[r][p] / rows[p][p];
        for (size_t c = p; c <= kColumns; ++c) rows[r][c] -= factor * rows[p][c];
      }
    }
    for (size_t r = 0; r < kColumns; ++r) minimum_.push_back(rows[r][kColumns] / rows[r][r]);
  }

  Vectors a_, b_, starts_;
  Vector minimum_;
};

}  // namespace bluefog::theory
