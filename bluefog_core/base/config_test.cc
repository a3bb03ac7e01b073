#include <bluefog/config.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "base/config_table.h"

namespace bluefog {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

using Variables = std::map<std::string, std::string>;

StatusOr<Config> Read(const Variables& variables) {
  return ReadConfig([&](const char* variable) {
    const auto it = variables.find(variable);
    return it == variables.end() ? nullptr : it->second.c_str();
  });
}

std::string ErrorOf(const Variables& variables) {
  const auto config = Read(variables);
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(config.status().message());
}

TEST(Config, NothingSetGivesTheDefaultsOfTheStruct) {
  const auto config = Read({});
  ASSERT_TRUE(config.ok()) << config.status();
  const Config defaults;
  EXPECT_EQ(config->FingerprintText(), defaults.FingerprintText());
  EXPECT_EQ(config->rank, -1);
  EXPECT_EQ(config->log_level, "info");
  EXPECT_TRUE(Read({{"BLUEFOG_CHUNK_BYTES", ""}, {"RANK", ""}}).ok());  // Emptied is not set.
}

TEST(Config, SizesTakeSuffixes) {
  const auto config = Read({{"BLUEFOG_EAGER_BYTES", "4096"},
                            {"BLUEFOG_CHUNK_BYTES", "1M"},
                            {"BLUEFOG_TILE_BYTES", "32k"},
                            {"BLUEFOG_BUCKET_BYTES", "2G"}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->eager_bytes, 4096);
  EXPECT_EQ(config->chunk_bytes, 1 << 20);
  EXPECT_EQ(config->tile_bytes, 32 << 10);
  EXPECT_EQ(config->bucket_bytes, int64_t{2} << 30);
}

TEST(Config, AMalformedValueIsAnErrorThatNamesVariableValueAndForm) {
  EXPECT_THAT(ErrorOf({{"BLUEFOG_CHUNK_BYTES", "12Q"}}),
              AllOf(HasSubstr("BLUEFOG_CHUNK_BYTES=12Q"), HasSubstr("suffixes K, M, G"),
                    HasSubstr("from 1K to 1G")));
  for (const char* bad : {"-1", "+1", " 8", "8 ", "1.5M", "0x10", "K", "1KB", "one",
                          "99999999999999999999", "9999999999999999G", "2G", "1"}) {
    EXPECT_THAT(ErrorOf({{"BLUEFOG_CHUNK_BYTES", bad}}), HasSubstr(bad));
  }
  EXPECT_THAT(ErrorOf({{"BLUEFOG_DEAD_MS", "2K"}}), HasSubstr("milliseconds"));
  EXPECT_THAT(ErrorOf({{"BLUEFOG_LOG_HIDE_TIME", "maybe"}}), HasSubstr("1, true"));
  EXPECT_THAT(ErrorOf({{"BLUEFOG_LOG_LEVEL", "loud"}}), HasSubstr("trace, debug, info"));
  EXPECT_THAT(ErrorOf({{"BLUEFOG_SIZE", "0"}}), HasSubstr("from 1 to"));
  EXPECT_THAT(ErrorOf({{"BLUEFOG_RANK", "-1"}}), HasSubstr("BLUEFOG_RANK=-1"));
  EXPECT_THAT(ErrorOf({{"WORLD_SIZE", "two"}}), HasSubstr("WORLD_SIZE=two"));
  EXPECT_THAT(ErrorOf({{"MASTER_PORT", "65536"}}), HasSubstr("from 1 to 65535"));
  for (const char* bad : {"localhost", ":80", "host:", "host:0", "host:port", "host:70000"}) {
    EXPECT_THAT(ErrorOf({{"BLUEFOG_COORDINATOR", bad}}), HasSubstr("host:port"));
  }
}

TEST(Config, LauncherVariablesArrive) {
  const auto config = Read({{"BLUEFOG_JOB_ID", "j1"},
                            {"BLUEFOG_COORDINATOR", "[::1]:4711"},
                            {"BLUEFOG_RANK", "3"},
                            {"BLUEFOG_SIZE", "8"},
                            {"BLUEFOG_LOCAL_RANK", "1"},
                            {"BLUEFOG_LOCAL_SIZE", "2"},
                            {"BLUEFOG_NODES_PER_MACHINE", "4"},
                            {"RANK", "5"},
                            {"WORLD_SIZE", "6"},
                            {"LOCAL_RANK", "7"},
                            {"LOCAL_WORLD_SIZE", "9"},
                            {"MASTER_ADDR", "node0"},
                            {"MASTER_PORT", "29500"}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->job_id, "j1");
  EXPECT_EQ(config->coordinator, "[::1]:4711");
  EXPECT_EQ(config->rank, 3);
  EXPECT_EQ(config->size, 8);
  EXPECT_EQ(config->local_rank, 1);
  EXPECT_EQ(config->local_size, 2);
  EXPECT_EQ(config->nodes_per_machine, 4);
  EXPECT_EQ(config->torch_rank, 5);
  EXPECT_EQ(config->torch_world_size, 6);
  EXPECT_EQ(config->torch_local_rank, 7);
  EXPECT_EQ(config->torch_local_world_size, 9);
  EXPECT_EQ(config->torch_master_addr, "node0");
  EXPECT_EQ(config->torch_master_port, 29500);
}

TEST(Config, BlueFogsVariablesWork) {
  auto config = Read({{"BLUEFOG_FUSION_THRESHOLD", "1048576"},
                      {"BLUEFOG_CYCLE_TIME", "0.5"},
                      {"BLUEFOG_LOG_LEVEL", "warning"},
                      {"BLUEFOG_LOG_HIDE_TIME", "1"},
                      {"BLUEFOG_TIMELINE", "/tmp/t_"}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->bucket_bytes, 1 << 20);
  EXPECT_EQ(config->log_level, "warn");
  EXPECT_TRUE(config->log_hide_time);
  EXPECT_EQ(config->timeline, "/tmp/t_");
  EXPECT_EQ(Read({{"BLUEFOG_LOG_LEVEL", "FATAL"}})->log_level, "error");
  EXPECT_EQ(Read({{"BLUEFOG_LOG_LEVEL", "Debug"}})->log_level, "debug");
  EXPECT_FALSE(Read({{"BLUEFOG_LOG_HIDE_TIME", "0"}})->log_hide_time);
  // Our own name wins.
  EXPECT_EQ(
      Read({{"BLUEFOG_FUSION_THRESHOLD", "1K"}, {"BLUEFOG_BUCKET_BYTES", "2K"}})->bucket_bytes,
      2048);
}

TEST(Config, LivenessTimesThatWouldKillTheLivingAreRefused) {
  EXPECT_THAT(ErrorOf({{"BLUEFOG_HEARTBEAT_MS", "5000"}}),
              AllOf(HasSubstr("BLUEFOG_HEARTBEAT_MS=5000"), HasSubstr("BLUEFOG_SUSPECT_MS=1000")));
  EXPECT_THAT(ErrorOf({{"BLUEFOG_DEAD_MS", "999"}}), HasSubstr("BLUEFOG_DEAD_MS=999"));
}

TEST(Config, FingerprintCoversWhatMustBeEqualOnAllRanksAndNothingElse) {
  const Config base;
  Config other = base;
  other.rank = 3;
  other.log_level = "off";
  other.drive_us = 0;
  EXPECT_EQ(other.FingerprintText(), base.FingerprintText());
  for (int64_t Config::*field :
       {&Config::eager_bytes, &Config::chunk_bytes, &Config::bucket_bytes, &Config::nic_mbps,
        &Config::nic_latency_us, &Config::host_mbps, &Config::host_latency_us}) {
    Config changed = base;
    changed.*field *= 2;
    EXPECT_NE(changed.FingerprintText(), base.FingerprintText());
  }
}

TEST(Config, DescribeShowsEveryVariableWithDefaultAndValue) {
  Config config;
  config.chunk_bytes = 1 << 20;
  config.rank = 2;
  const auto rows = DescribeConfig(config);
  ASSERT_TRUE(rows.ok());
  std::map<std::string, SettingInfo> by_name;
  for (const SettingInfo& row : *rows) {
    EXPECT_TRUE(by_name.emplace(row.variable, row).second) << row.variable << " twice";
    EXPECT_FALSE(row.help.empty());
    EXPECT_FALSE(row.type.empty());
  }
  EXPECT_EQ(by_name["BLUEFOG_CHUNK_BYTES"].default_value, "256K");
  EXPECT_EQ(by_name["BLUEFOG_CHUNK_BYTES"].value, "1M");
  EXPECT_EQ(by_name["BLUEFOG_RANK"].default_value, "");
  EXPECT_EQ(by_name["BLUEFOG_RANK"].value, "2");
  EXPECT_THAT(by_name["BLUEFOG_CYCLE_TIME"].help, HasSubstr("no effect"));
}

TEST(Config, TheTablesOwnValuesAreAccepted) {
  // What `bluefog info --config` prints can be given back, so no default lies outside its range.
  const auto rows = DescribeConfig(Config());
  ASSERT_TRUE(rows.ok());
  Variables variables;
  for (const SettingInfo& row : *rows) variables[row.variable] = row.default_value;
  const auto config = Read(variables);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->FingerprintText(), Config().FingerprintText());
}

TEST(Config, FromEnvironmentReadsTheEnvironment) {
  ASSERT_EQ(setenv("BLUEFOG_DRIVE_US", "4321", 1), 0);
  const auto config = Config::FromEnvironment();
  unsetenv("BLUEFOG_DRIVE_US");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->drive_us, 4321);
}

}  // namespace
}  // namespace bluefog
