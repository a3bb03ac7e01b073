#include "base/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>
#include <thread>
#include <vector>

namespace bluefog {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;

class Log : public ::testing::Test {
 protected:
  void TearDown() override {
    SetLogRank(-1);
    SetLogLevel("info", false);
  }
};

TEST_F(Log, LinesBelowTheLevelCostAndPrintNothing) {
  ASSERT_TRUE(SetLogLevel("warn", true));
  int evaluated = 0;
  ::testing::internal::CaptureStderr();
  BLUEFOG_LOG(kInfo) << "hidden " << ++evaluated;
  BLUEFOG_LOG(kWarning) << "shown " << ++evaluated;
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "bluefog warning: shown 1\n");
  ASSERT_TRUE(SetLogLevel("off", true));
  EXPECT_FALSE(LogEnabled(LogLevel::kError));
  EXPECT_FALSE(LogEnabled(LogLevel::kOff));
}

TEST_F(Log, RankAndTimeStandInFront) {
  SetLogRank(7);
  ::testing::internal::CaptureStderr();
  BLUEFOG_LOG(kError) << "with {braces} and %d";
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              MatchesRegex("[0-9-]+ [0-9:.]+ bluefog\\[7\\] error: with .braces. and %d\n"));
}

TEST_F(Log, UnknownLevelsAreRefusedAndChangeNothing) {
  ASSERT_TRUE(SetLogLevel("Error", true));
  EXPECT_FALSE(SetLogLevel("verbose", true));
  EXPECT_FALSE(SetLogLevel("", true));
  EXPECT_FALSE(LogEnabled(LogLevel::kWarning));
  EXPECT_TRUE(LogEnabled(LogLevel::kError));
  EXPECT_TRUE(SetLogLevel("WARNING", true));
  EXPECT_TRUE(LogEnabled(LogLevel::kWarning));
}

TEST_F(Log, LinesOfManyThreadsStayWhole) {
  ASSERT_TRUE(SetLogLevel("info", true));
  ::testing::internal::CaptureStderr();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 100; ++i) {
        BLUEFOG_LOG(kInfo) << "thread " << t << " line " << i << " end";
        if (i % 10 == 0) SetLogRank(t);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::istringstream lines(::testing::internal::GetCapturedStderr());
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    EXPECT_THAT(line, MatchesRegex("bluefog(\\[.\\])? info: thread . line [0-9]+ end"));
  }
  EXPECT_EQ(count, 400);
}

}  // namespace
}  // namespace bluefog
