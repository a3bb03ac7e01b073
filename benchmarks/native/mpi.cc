// The peer MPI: what a program would write with MPI_Neighbor_allgather and a sum, and
// MPI_Allreduce.
#include <mpi.h>

#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "native/native.h"

namespace {

using bluefog::Status;
using bluefog::benchmarks::Checked;
using bluefog::benchmarks::Timed;

MPI_Comm graph = MPI_COMM_NULL;
int degree = 0;

Status Check(int code, const char* what) {
  if (code == MPI_SUCCESS) return absl::OkStatus();
  return absl::InternalError(std::string(what) + " returned " + std::to_string(code));
}

}  // namespace

extern "C" {

/// A bidirectional ring.
int64_t bench_mpi_init() {
  return Checked([]() -> Status {
    int threads = 0, rank = 0, size = 0;
    if (Status s = Check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &threads), "Init");
        !s.ok()) {
      return s;
    }
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    std::vector<int> peers = {(rank + 1) % size};
    if (size > 2) peers.push_back((rank + size - 1) % size);
    degree = static_cast<int>(peers.size());
    return Check(
        MPI_Dist_graph_create_adjacent(MPI_COMM_WORLD, degree, peers.data(), MPI_UNWEIGHTED, degree,
                                       peers.data(), MPI_UNWEIGHTED, MPI_INFO_NULL, 0, &graph),
        "MPI_Dist_graph_create_adjacent");
  });
}

/// out = mean of `in` and the neighbours' `in`, which are gathered in `gathered`.
int64_t bench_mpi_neighbor_mean(const float* in, float* gathered, float* out, int64_t count) {
  return Timed([&]() -> Status {
    const int n = static_cast<int>(count);
    if (Status s = Check(MPI_Neighbor_allgather(in, n, MPI_FLOAT, gathered, n, MPI_FLOAT, graph),
                         "MPI_Neighbor_allgather");
        !s.ok()) {
      return s;
    }
    std::vector<bluefog::kernels::Term> terms = {{in}};
    for (int i = 0; i < degree; ++i) terms.push_back({gathered + i * count});
    const bool streaming = count * 4 * (degree + 2) > int64_t{16} << 20;
    return bluefog::kernels::SumDivide(bluefog::DType::kFloat32, count, out, terms, degree + 1,
                                       streaming);
  });
}

int64_t bench_mpi_allreduce(const float* in, float* out, int64_t count) {
  return Timed([&] {
    return Check(
        MPI_Allreduce(in, out, static_cast<int>(count), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD),
        "MPI_Allreduce");
  });
}

void bench_mpi_finalize() {
  MPI_Comm_free(&graph);
  MPI_Finalize();
}

}  // extern "C"
