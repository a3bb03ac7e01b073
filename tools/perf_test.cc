// `bluefog perf` with real ranks: the rows a script reads, and what a wrong call says.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

namespace {

using ::testing::HasSubstr;

int Perf(const std::string& arguments, std::string* out) {
  FILE* const pipe = popen((BLUEFOG_TOOL " perf " + arguments + " 2>&1").c_str(), "r");
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) out->append(buffer, n);
  const int status = pclose(pipe);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(Perf, JsonHasARowForEachSizeAndPlace) {
  const std::string file = ::testing::TempDir() + "perf.json";
  std::string out;
  ASSERT_EQ(Perf("neighbor_allreduce -np 3 --bytes 4K,1M --rounds 2 --iterations 2 --dtype float64 "
                 "--json " +
                     file,
                 &out),
            0)
      << out;
  std::ifstream stream(file);
  const auto rows = nlohmann::json::parse(stream);
  ASSERT_EQ(rows.size(), 4);
  EXPECT_EQ(rows[3]["op"], "neighbor_allreduce");
  EXPECT_EQ(rows[3]["ranks"], 3);
  EXPECT_EQ(rows[3]["bytes"], 1 << 20);
  EXPECT_EQ(rows[3]["buffers"], "private");
  EXPECT_EQ(rows[3]["dtype"], "float64");
  const double p50 = rows[3]["time_us"]["p50"];
  EXPECT_GT(p50, 0);
  EXPECT_LE(p50, rows[3]["time_us"]["p90"]);
  EXPECT_NEAR(rows[3]["algbw_GBps"], (1 << 20) / p50 / 1e3, 1e-9);
  EXPECT_NEAR(rows[3]["busbw_GBps"], 2 * (1 << 20) / p50 / 1e3, 1e-9);
  EXPECT_GT(rows[3]["limit_us"], 0);
  EXPECT_GT(rows[3]["ratio_to_limit"], 0);
}

TEST(Perf, DistributionCountsEveryIteration) {
  const std::string file = ::testing::TempDir() + "perf_distribution.json";
  std::string out;
  ASSERT_EQ(Perf("allreduce -np 2 --bytes 4K --buffers arena --rounds 3 --iterations 50 "
                 "--latency-distribution --json " +
                     file,
                 &out),
            0)
      << out;
  std::ifstream stream(file);
  const auto d = nlohmann::json::parse(stream)[0]["latency_distribution"];
  EXPECT_LE(d["p50"], d["p90"]);
  EXPECT_LE(d["p90"], d["p99"]);
  EXPECT_LE(d["p99"], d["p99.9"]);
  EXPECT_LE(d["p99.9"], d["max"]);
  int64_t count = 0;
  for (const auto& c : d["histogram"]) count += c["count"].get<int64_t>();
  EXPECT_EQ(count, 150);
  EXPECT_LE(d["histogram"].back()["from_us"], d["max"]);
  EXPECT_GE(d["histogram"].back()["to_us"], d["max"]);
  EXPECT_THAT(out, HasSubstr("p99.9"));
  EXPECT_THAT(out, HasSubstr("###"));
}

TEST(Perf, SlowRankSlowsTheOthers) {
  const std::string file = ::testing::TempDir() + "perf_slow_rank.json";
  std::string out;
  ASSERT_EQ(Perf("neighbor_allreduce -np 4 --topology one_peer_exponential --bytes 4K --buffers "
                 "arena --rounds 2 --iterations 5 --slow-rank 1 --factor 3 --compute-us 5000 "
                 "--json " +
                     file,
                 &out),
            0)
      << out;
  std::ifstream stream(file);
  const auto rows = nlohmann::json::parse(stream)[0]["slow_rank"];
  ASSERT_EQ(rows.size(), 2);  // The average with neighbours, and the all-reduce.
  EXPECT_EQ(rows[1]["operation"], "allreduce");
  for (const auto& row : rows) {
    EXPECT_GT(row["step_ms"], 4.9);
    EXPECT_GT(row["slowed_step_ms"], 9);
    EXPECT_GT(row["slowdown"], 1.2);
  }
}

TEST(Perf, MeasuresRoundedMessagesBesideABareExchangeThatRoundsToo) {
  for (const std::string name : {"bfloat16", "float16"}) {
    const std::string file = ::testing::TempDir() + "perf_narrow.json";
    std::string out;
    ASSERT_EQ(Perf("neighbor_allreduce -np 2 --bytes 4K,1M --rounds 2 --iterations 2 "
                   "--message-dtype " +
                       name + " --json " + file,
                   &out),
              0)
        << out;
    EXPECT_THAT(out, HasSubstr("float32 as " + name));
    std::ifstream stream(file);
    const auto rows = nlohmann::json::parse(stream);
    ASSERT_EQ(rows.size(), 4);
    EXPECT_EQ(rows[0]["message_dtype"], name);
  }
}

TEST(Perf, BothFormsOverMachinesAreMeasuredAndChecked) {
  for (const char* form : {"flat", "hierarchical"}) {
    for (const char* operation : {"hierarchical_neighbor_allreduce", "allreduce"}) {
      const std::string file = ::testing::TempDir() + "perf.json";
      std::string out;
      ASSERT_EQ(Perf(std::string(operation) + " -np 4 --nodes-per-machine 2 --bytes 4K,300K " +
                         "--rounds 1 --iterations 2 --hierarchy " + form + " --json " + file,
                     &out),
                0)
          << out;
      std::ifstream stream(file);
      const auto rows = nlohmann::json::parse(stream);
      ASSERT_EQ(rows.size(), 4);
      EXPECT_EQ(rows[0]["op"], operation);
      EXPECT_EQ(rows[0]["machines"], 2);
      EXPECT_EQ(rows[0]["hierarchy"], form);
    }
  }
}

TEST(Perf, WrongCallsNameTheCure) {
  const std::pair<const char*, const char*> kCalls[] = {
      {"gossip",
       "neighbor_allreduce, hierarchical_neighbor_allreduce, allreduce, broadcast, allgather, "
       "barrier"},
      {"allreduce --hierarchy deep", "auto, flat or hierarchical"},
      {"allreduce --bytes 4Q", "4K,1M,64M"},
      {"allreduce --bytes 6", "multiple of 4"},
      {"allreduce --dtype int8", "float32 or float64"},
      {"allreduce --buffers gpu", "arena,private"},
      {"neighbor_allreduce --message-dtype int8", "float16 or bfloat16 for float32"},
      {"allreduce --message-dtype bfloat16", "of neighbor_allreduce"},
      {"allreduce -np 0", "1 to 128"},
      {"allreduce --topology rung", "ring"},
      {"allreduce --slow-rank 2", "0 to 1"},
      {"allreduce --slow-rank 1 --factor 0", "--factor must be 1 to 1000"},
  };
  for (const auto& [arguments, cure] : kCalls) {
    std::string out;
    EXPECT_EQ(Perf(arguments, &out), 2) << arguments;
    EXPECT_THAT(out, HasSubstr(cure));
  }
}

}  // namespace
