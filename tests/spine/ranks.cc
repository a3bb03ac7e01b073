#include "ranks.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "base/port.h"

namespace bluefog::spine {
namespace {

Status RunProgram(Communicator& comm, const Program& program, std::vector<double>* values) {
  const Status status = program(comm, values);
  // A rank that leaves ends what others still have under way with it.
  const Status end = Barrier(comm, "end of the program");
  return status.ok() ? end : status;
}

bool WriteAll(int fd, const void* data, size_t bytes) {
  const auto* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = write(fd, p, bytes);
    if (n <= 0) return false;
    p += n;
    bytes -= static_cast<size_t>(n);
  }
  return true;
}

bool ReadAll(int fd, void* data, size_t bytes) {
  auto* p = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = read(fd, p, bytes);
    if (n <= 0) return false;
    p += n;
    bytes -= static_cast<size_t>(n);
  }
  return true;
}

void WriteResult(int fd, const RankResult& result) {
  const size_t sizes[2] = {result.error.size(), result.values.size()};
  WriteAll(fd, sizes, sizeof sizes);
  WriteAll(fd, result.error.data(), sizes[0]);
  WriteAll(fd, result.values.data(), sizes[1] * sizeof(double));
}

RankResult ReadResult(int fd) {
  RankResult result;
  size_t sizes[2];
  if (!ReadAll(fd, sizes, sizeof sizes)) return {"the process died", {}};
  result.error.resize(sizes[0]);
  result.values.resize(sizes[1]);
  if (!ReadAll(fd, result.error.data(), sizes[0]) ||
      !ReadAll(fd, result.values.data(), sizes[1] * sizeof(double))) {
    return {"the process died", {}};
  }
  return result;
}

RankResult RunChild(const Config& config, const Program& program) {
  CommunicatorOptions options;
  options.config = config;
  auto comm = Communicator::Create(options);
  if (!comm.ok()) return {comm.status().ToString(), {}};
  RankResult result;
  const Status status = RunProgram(**comm, program, &result.values);
  if (!status.ok()) result.error = status.ToString();
  (*comm)->Shutdown();
  return result;
}

std::vector<RankResult> RunProcesses(int size, Config config, const Program& program) {
  const int port = *FreePort();
  config.size = config.local_size = size;
  config.job_id = "spine-" + std::to_string(getpid()) + "-" + std::to_string(port);
  config.coordinator = "127.0.0.1:" + std::to_string(port);
  std::vector<int> pipes;
  std::vector<pid_t> pids;
  for (int rank = 0; rank < size; ++rank) {
    int ends[2];
    if (pipe(ends) != 0) {
      ADD_FAILURE() << "no pipe";
      return std::vector<RankResult>(static_cast<size_t>(size), {"no pipe", {}});
    }
    const pid_t pid = fork();
    if (pid == 0) {
      close(ends[0]);
      config.rank = config.local_rank = rank;
      WriteResult(ends[1], RunChild(config, program));
      _exit(0);
    }
    close(ends[1]);
    pipes.push_back(ends[0]);
    pids.push_back(pid);
  }
  std::vector<RankResult> results;
  for (const int fd : pipes) {
    results.push_back(ReadResult(fd));
    close(fd);
  }
  for (const pid_t pid : pids) waitpid(pid, nullptr, 0);
  return results;
}

std::vector<RankResult> RunThreads(int size, const CommunicatorOptions& options,
                                   const Program& program) {
  std::vector<RankResult> results(static_cast<size_t>(size));
  auto comms = Communicator::CreateInProcess(size, options);
  if (!comms.ok()) {
    for (RankResult& r : results) r.error = comms.status().ToString();
    return results;
  }
  std::vector<std::thread> threads;
  for (size_t r = 0; r < results.size(); ++r) {
    threads.emplace_back([&, r] {
      const Status status = RunProgram(*(*comms)[r], program, &results[r].values);
      if (!status.ok()) results[r].error = status.ToString();
    });
  }
  for (std::thread& t : threads) t.join();
  return results;
}

}  // namespace

std::string NameOf(Fabric fabric) {
  switch (fabric) {
    case Fabric::kInPlace:
      return "in_place";
    case Fabric::kFetched:
      return "fetched";
    case Fabric::kShm:
      return "shm";
    case Fabric::kUcx:
      return "ucx";
  }
  return "";
}

std::vector<Fabric> AllFabrics() {
  std::vector<Fabric> fabrics = {Fabric::kInPlace, Fabric::kFetched, Fabric::kShm};
#ifdef BLUEFOG_TEST_UCX
  fabrics.push_back(Fabric::kUcx);
#endif
  return fabrics;
}

std::vector<RankResult> RunRanks(Fabric fabric, int size, const Config& config,
                                 const Program& program) {
  CommunicatorOptions options;
  options.config = config;
  options.config.log_level = "error";
  options.fetch_views = fabric == Fabric::kFetched;
  if (fabric == Fabric::kInPlace || fabric == Fabric::kFetched) {
    return RunThreads(size, options, program);
  }
  options.config.transport = NameOf(fabric);
  return RunProcesses(size, options.config, program);
}

std::vector<std::vector<double>> RunRanksOk(Fabric fabric, int size, const Config& config,
                                            const Program& program) {
  std::vector<std::vector<double>> values;
  const auto results = RunRanks(fabric, size, config, program);
  for (size_t r = 0; r < results.size(); ++r) {
    EXPECT_EQ(results[r].error, "") << "rank " << r;
    values.push_back(results[r].values);
  }
  return values;
}

Status RunOp(Communicator& comm, OpSpec spec) {
  auto work = comm.Submit(std::move(spec));
  if (!work.ok()) return work.status();
  return (*work)->Wait(std::chrono::seconds(60));
}

Status Barrier(Communicator& comm, const std::string& name) {
  OpSpec spec;
  spec.op = Op::kBarrier;
  spec.name = name;
  return RunOp(comm, std::move(spec));
}

}  // namespace bluefog::spine
