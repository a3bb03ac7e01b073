// The command as a user meets it: output, errors on stderr, exit codes.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Result {
  int exit_code = -1;
  std::string out;
};

Result Shell(const std::string& command) {
  Result result;
  FILE* const pipe = popen(command.c_str(), "r");
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) result.out.append(buffer, n);
  const int status = pclose(pipe);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return result;
}

// Standard output and exit code.
Result Tool(const std::string& arguments) {
  return Shell(BLUEFOG_TOOL " " + arguments + " 2>/dev/null");
}

// Standard error only; expects the exit code of a wrong call and an empty standard output.
std::string UsageError(const std::string& arguments) {
  EXPECT_EQ(Tool(arguments).out, "") << arguments;
  const Result result = Shell(BLUEFOG_TOOL " " + arguments + " 2>&1 >/dev/null");
  EXPECT_EQ(result.exit_code, 2) << arguments;
  return result.out;
}

TEST(Topo, TableNamesNeighborsWeightsAndCosts) {
  const Result ring = Tool("topo ring -n 8 --bytes 64M");
  EXPECT_EQ(ring.exit_code, 0);
  EXPECT_THAT(ring.out,
              AllOf(HasSubstr("0   1/3   1, 7 (1/3)"), HasSubstr("λ₂                  0.804738"),
                    HasSubstr("spectral gap        0.195262"), HasSubstr("128 MiB")));
  EXPECT_EQ(Tool("topo ring -np 8 --bytes 64M").out, ring.out);
  const std::string exponential = Tool("topo exponential -n 8").out;
  EXPECT_THAT(exponential, HasSubstr("0   1/4   4, 6, 7 (1/4)            1, 2, 4 (1/4)"));
  EXPECT_THAT(exponential, HasSubstr("no: W[0][1] = 0.25 but W[1][0] = 0"));
}

TEST(Topo, SequencesShowTheirRounds) {
  const std::string all = Tool("topo one_peer_hypercube -n 8").out;
  EXPECT_THAT(all, AllOf(HasSubstr("round 2"), HasSubstr("yes, after every 3 rounds")));
  const std::string one = Tool("topo one-peer-hypercube -n 8 --round 5").out;
  EXPECT_THAT(
      one, AllOf(HasSubstr("round 5"), HasSubstr("0   1/2   4 (1/2)"), Not(HasSubstr("round 2"))));
}

TEST(Topo, LargeGraphsStayShort) {
  const auto lines = [](const std::string& text) {
    return std::count(text.begin(), text.end(), '\n');
  };
  EXPECT_LT(lines(Tool("topo torus-2d -n 1000").out), 30);
  EXPECT_GT(lines(Tool("topo torus-2d -n 1000 --all").out), 1000);
  EXPECT_THAT(Tool("topo fully-connected -n 64").out, HasSubstr("1–63 (1/64)"));
}

TEST(Topo, PlacementTellsWhatLeavesAHostAndWhichFormIsChosen) {
  const Result two = Tool("topo ring --placement 2x4 --bytes 16M");
  EXPECT_EQ(two.exit_code, 0);
  EXPECT_THAT(two.out, AllOf(HasSubstr("8 ranks on 2 hosts"), HasSubstr("4–7"),
                             HasSubstr("10000 Mbit/s and 50 us from host to host"),
                             HasSubstr("hierarchical_neighbor_allreduce is hierarchical: 3.99"),
                             HasSubstr("times faster than flat by the model")));
  EXPECT_EQ(Tool("topo ring -n 8 --placement 2x4 --bytes 16M").out, two.out);

  const auto json = nlohmann::json::parse(
      Tool("topo ring --placement big:4,small:2 --bytes 1200 --json").out)["placement"];
  EXPECT_EQ(json["hosts"][1]["name"], "small");
  EXPECT_EQ(json["hosts"][1]["ranks"], (std::vector<int>{4, 5}));
  std::vector<std::string> seen;
  for (const auto& operation : json["operations"]) {
    seen.push_back(operation["operation"]);
    if (operation["operation"] != "hierarchical_neighbor_allreduce") continue;
    // The whole from each of the larger host's ranks that has a counterpart, or once.
    const bool flat = operation["form"] == "flat";
    EXPECT_EQ(operation["nics"][0]["bytes_out"], flat ? 2400 : 1200);
    EXPECT_EQ(operation["nics"][1]["bytes_out"], flat ? 4800 : 1200);
  }
  EXPECT_EQ(seen.size(), 5u);

  const std::string slow =
      Shell("BLUEFOG_NIC_MBPS=1000 " BLUEFOG_TOOL " topo ring --placement 2x4 --json").out;
  EXPECT_EQ(nlohmann::json::parse(slow)["placement"]["links"]["nic_bytes_per_s"], 125e6);
  const std::string forced =
      Shell("BLUEFOG_HIERARCHY=flat " BLUEFOG_TOOL " topo ring --placement 2x4").out;
  EXPECT_THAT(forced, HasSubstr("allreduce is flat: BLUEFOG_HIERARCHY says so"));
}

TEST(Topo, WrongPlacementsNameTheCure) {
  for (const char* wrong : {"2x", "0x4", "a", "a:b", "a:1,a:2", ":4", "a:1,", "2000x2000"}) {
    EXPECT_THAT(UsageError(std::string("topo ring --placement ") + wrong),
                HasSubstr("give HOSTSxRANKS, as in 2x4, or host1:4,host2:4"))
        << wrong;
  }
  EXPECT_THAT(UsageError("topo ring -n 7 --placement 2x4"), HasSubstr("8 ranks on 2 hosts"));
}

TEST(Topo, JsonHasFullPrecision) {
  const auto json = nlohmann::json::parse(Tool("topo star -n 3 --json --bytes 10").out);
  EXPECT_EQ(json["ranks"], 3);
  EXPECT_EQ(json["rounds"][0]["neighborhoods"][1]["self_weight"], 1.0 - 1.0 / 3);
  EXPECT_EQ(json["rounds"][0]["neighborhoods"][1]["in"][0]["rank"], 0);
  EXPECT_EQ(json["bytes_per_step"], 20.0);
  EXPECT_EQ(json["doubly_stochastic"], true);
  EXPECT_TRUE(nlohmann::json::parse(Tool("topo ring -n 300 --json").out)["lambda2"].is_null());
  EXPECT_EQ(nlohmann::json::parse(Tool("topo --list --json").out)[0]["name"], "ring");
}

TEST(Topo, MatrixFile) {
  const auto from = [](const std::string& text) {
    return "--matrix - <<'EOF'\n" + text + "\nEOF\n";
  };
  const auto run = [&](const std::string& text) {
    return Shell("{ " BLUEFOG_TOOL " topo " + from(text) + "} 2>&1");
  };
  const Result good = run("1/2, 1/2 # a comment\n\n0.5\t.5");
  EXPECT_EQ(good.exit_code, 0);
  EXPECT_THAT(good.out, HasSubstr("yes, in every step"));
  EXPECT_THAT(run(".5,.5\n.5,.4").out, HasSubstr("no: column 1 sums to 0.9"));
  const Result word = run(".5,.5\n.5,x");
  EXPECT_EQ(word.exit_code, 2);
  EXPECT_THAT(word.out, AllOf(HasSubstr("input:2"), HasSubstr("entry 2"), HasSubstr("\"x\"")));
  EXPECT_THAT(run(".5,.5\n1").out, HasSubstr("input:2: 1 entries where the first row has 2"));
  EXPECT_THAT(run(".5,.5").out, HasSubstr("1 rows of 2 entries"));
  EXPECT_THAT(run("1,0\n0,-1").out, HasSubstr("row 1, column 1"));
  EXPECT_THAT(run("1/0").out, HasSubstr("neither a number"));
  EXPECT_THAT(run("").out, HasSubstr("no weights in it"));
  EXPECT_THAT(UsageError("topo --matrix /"), HasSubstr("cannot read /: Is a directory"));
  EXPECT_THAT(UsageError("topo --matrix /nowhere/w.csv"),
              HasSubstr("/nowhere/w.csv: No such file"));
}

TEST(Topo, ErrorsSayWhatToDo) {
  EXPECT_THAT(UsageError("topo rign -n 8"), AllOf(HasSubstr("\"rign\""), HasSubstr("ring-left")));
  EXPECT_THAT(UsageError("topo ring"), HasSubstr("-n RANKS"));
  EXPECT_THAT(UsageError("topo"), HasSubstr("--list"));
  EXPECT_THAT(UsageError("topo ring -n 0"), HasSubstr("n = 0"));
  EXPECT_THAT(UsageError("topo ring -n eight"), HasSubstr("eight"));
  EXPECT_THAT(UsageError("topo ring -n 8 --round -1"), HasSubstr("--round"));
  EXPECT_THAT(UsageError("topo hypercube -n 12"), HasSubstr("use 8 or 16 ranks"));
  EXPECT_THAT(UsageError("topo ring -n 8 --matrix w.csv"), HasSubstr("not both"));
  EXPECT_THAT(UsageError("topo ring -n 8 --byte 3"), HasSubstr("--byte"));
  EXPECT_THAT(UsageError("topo ring -n 8 --byte 3"), HasSubstr("bluefog topo --help"));
  for (const char* size : {"-1", "1X", "9999999999G"}) {
    EXPECT_THAT(UsageError("topo ring -n 8 --bytes=" + std::string(size)),
                HasSubstr("'" + std::string(size) + "' is not a size"));
  }
}

TEST(Tool, NamesItsCommands) {
  EXPECT_THAT(UsageError(""), HasSubstr("which command? There are: run, perf, topo, info"));
  EXPECT_THAT(UsageError("rnu -np 2 true"),
              HasSubstr("no command 'rnu'; there are: run, perf, topo, info"));
  EXPECT_THAT(UsageError("--versoin"), HasSubstr("bluefog --help"));
  EXPECT_EQ(Tool("--help").exit_code, 0);
  EXPECT_THAT(Tool("--version").out, HasSubstr(BLUEFOG_VERSION));
}

TEST(Info, ShowsBuildPluginsAndMemory) {
  const Result info = Tool("info");
  EXPECT_EQ(info.exit_code, 0);
  EXPECT_THAT(info.out,
              AllOf(HasSubstr("bluefog " BLUEFOG_VERSION), HasSubstr("SIMD"), HasSubstr("control"),
                    HasSubstr("decentlam"), HasSubstr("D·P·S + slots")));
  const auto json = nlohmann::json::parse(Tool("info --json --model-bytes 1M").out);
  EXPECT_EQ(json["version"], BLUEFOG_VERSION);
  const double slots = json["memory"]["slot_bytes"];
  EXPECT_EQ(json["optimizers"][0]["pinned_bytes"], 2.0 * (1 << 20) + slots);
  EXPECT_FALSE(json["config"].empty());
}

TEST(Info, ConfigShowsWhatTheEnvironmentChanged) {
  const std::string as_is = Tool("info --config").out;
  EXPECT_THAT(as_is, AllOf(HasSubstr("BLUEFOG_EAGER_BYTES = 8K   (default)\n"),
                           HasSubstr("BLUEFOG_TIMELINE = (not set)")));
  EXPECT_THAT(Shell("BLUEFOG_EAGER_BYTES=16K " BLUEFOG_TOOL " info --config").out,
              HasSubstr("BLUEFOG_EAGER_BYTES = 16K   (default: 8K)"));
  const Result bad = Shell("BLUEFOG_EAGER_BYTES=lots " BLUEFOG_TOOL " info 2>&1");
  EXPECT_EQ(bad.exit_code, 2);
  EXPECT_THAT(bad.out, AllOf(HasSubstr("BLUEFOG_EAGER_BYTES"), HasSubstr("lots")));
  EXPECT_THAT(UsageError("info --model-bytes=-5"), HasSubstr("'-5' is not a size"));
}

}  // namespace
