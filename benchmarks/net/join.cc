// join.cc RANKS PROCESSES: how long it takes until so many ranks have joined a job and hold its
// address book. Rank 0, which serves, is alone in its process; the others are threads of PROCESSES
// more. Real control plane, with a token; no engine. Prints one line of JSON.
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/port.h"
#include "base/token.h"
#include "control/membership.h"

namespace bluefog::control {
namespace {

constexpr size_t kAddressBytes = 200;  // About what a rank with shared memory and UCX gives.

struct Result {
  int64_t end_ns = 0;
  int joined = 0;
  bool serves = false;
  int threads = 0;
  int64_t cpu_us = 0, peak_kib = 0;
};

int Threads() {
  int n = 0;
  for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task"))
    ++n;
  return n;
}

// Reports to `results`, and leaves the job when all have joined: at the end of `done`.
bool JoinAs(int first, int last, const Place& job, int go, int results, int done) {
  Config config;
  config.component_dir = COMPONENT_DIR;
  config.join_timeout_ms = 120'000;
  std::vector<std::unique_ptr<Membership>> members(static_cast<size_t>(last - first));
  std::vector<std::thread> threads;
  for (int rank = first; rank < last; ++rank) {
    threads.emplace_back([&, rank] {
      Place place = job;
      place.rank = rank;
      char byte;
      if (read(go, &byte, 1) != 0) return;  // The end of the pipe is the start.
      auto joined = Membership::Join(place, config, std::string(kAddressBytes, 'x'), {});
      if (joined.ok())
        members[static_cast<size_t>(rank - first)] = *std::move(joined);
      else
        fprintf(stderr, "%s\n", std::string(joined.status().message()).c_str());
    });
  }
  for (std::thread& thread : threads) thread.join();
  Result result;
  result.end_ns = NowNs();
  for (const auto& member : members) result.joined += member != nullptr;
  result.serves = first == 0;
  result.threads = Threads();
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  result.cpu_us = (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1'000'000 +
                  usage.ru_utime.tv_usec + usage.ru_stime.tv_usec;
  result.peak_kib = usage.ru_maxrss;
  if (write(results, &result, sizeof(result)) != sizeof(result)) return false;
  char byte;
  if (read(done, &byte, 1) != 0) return false;
  for (auto& member : members) {
    threads.emplace_back();
    if (member != nullptr) threads.back() = std::thread([&member] { member->Leave(); });
  }
  for (std::thread& thread : threads) {
    if (thread.joinable()) thread.join();
  }
  return true;
}

int Main(int ranks, int processes) {
  Place job;
  job.size = ranks;
  job.job_id = "join-" + std::to_string(getpid());
  job.coordinator = "127.0.0.1:" + std::to_string(FreePort().value());
  job.token = RandomBytes(kTokenBytes).value();
  int go[2], results[2], done[2];
  if (pipe(go) != 0 || pipe(results) != 0 || pipe(done) != 0) return 1;
  const int each = (ranks - 1 + processes - 1) / processes;
  for (int p = 0; p <= processes; ++p) {
    const int first = p == 0 ? 0 : 1 + (p - 1) * each;
    const int last = p == 0 ? 1 : std::min(ranks, first + each);
    if (fork() == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      close(go[1]);
      close(done[1]);
      _exit(JoinAs(first, last, job, go[0], results[1], done[0]) ? 0 : 1);
    }
  }
  const int64_t start = NowNs();
  close(go[1]);
  Result all, server;
  for (int p = 0; p <= processes; ++p) {
    Result one;
    if (read(results[0], &one, sizeof(one)) != sizeof(one)) return 1;
    all.joined += one.joined;
    all.end_ns = std::max(all.end_ns, one.end_ns);
    if (one.serves) server = one;
  }
  close(done[1]);
  while (wait(nullptr) > 0) {
  }
  printf(
      "{\"joined\": %d, \"seconds\": %.3f, \"server_threads\": %d, \"server_cpu_s\": %.3f, "
      "\"server_peak_mib\": %.1f}\n",
      all.joined, double(all.end_ns - start) * 1e-9, server.threads, double(server.cpu_us) * 1e-6,
      double(server.peak_kib) / 1024);
  return all.joined == ranks ? 0 : 1;
}

}  // namespace
}  // namespace bluefog::control

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return bluefog::control::Main(std::atoi(argv[1]), std::atoi(argv[2]));
}
