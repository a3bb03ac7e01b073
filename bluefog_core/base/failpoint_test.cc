#include "base/failpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "base/clock.h"

namespace bluefog {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

class Failpoints : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_TRUE(SetFailpoints("").ok()); }
};

TEST_F(Failpoints, OffByDefault) {
  EXPECT_FALSE(failpoints_on.load());
  EXPECT_FALSE(FailpointHit("engine.submit"));
}

TEST_F(Failpoints, EachKnownNameCanFail) {
  EXPECT_THAT(FailpointNames(), Contains("engine.after_publish"));
  for (const std::string& name : FailpointNames()) {
    ASSERT_TRUE(SetFailpoints(name + "=error").ok());
    EXPECT_TRUE(FailpointHit(name.c_str())) << name;
    EXPECT_FALSE(FailpointHit(name.c_str())) << name << " fires once";
  }
}

TEST_F(Failpoints, FiresAtTheCountGivenAndOnlyThere) {
  ASSERT_TRUE(SetFailpoints(" engine.op_done = error @ 3 ;; shm.accept=error").ok());
  EXPECT_FALSE(FailpointHit("engine.op_done"));
  EXPECT_FALSE(FailpointHit("engine.submit"));
  EXPECT_TRUE(FailpointHit("shm.accept"));
  EXPECT_FALSE(FailpointHit("engine.op_done"));
  EXPECT_TRUE(FailpointHit("engine.op_done"));
  EXPECT_FALSE(FailpointHit("engine.op_done"));
  // Setting them again counts from the start.
  ASSERT_TRUE(SetFailpoints("engine.op_done=error@1;engine.op_done=error@2").ok());
  EXPECT_TRUE(FailpointHit("engine.op_done"));
  EXPECT_TRUE(FailpointHit("engine.op_done"));
  EXPECT_FALSE(FailpointHit("engine.op_done"));
}

TEST_F(Failpoints, AMalformedSpecIsAnErrorAndChangesNothing) {
  ASSERT_TRUE(SetFailpoints("engine.submit=error").ok());
  const std::pair<const char*, const char*> cases[] = {
      {"engine.sumbit=kill", "engine.submit"},  // Lists those that exist.
      {"engine.submit", "name=action"},
      {"engine.submit=", "kill, stop, error or sleep"},
      {"engine.submit=explode", "kill, stop, error or sleep"},
      {"engine.submit=error@0", "1 or more"},
      {"engine.submit=error@2x", "1 or more"},
      {"engine.submit=sleep:", "milliseconds"},
      {"engine.submit=sleep:-1", "milliseconds"},
      {"engine.op_done=error;engine.submit=sleep:1s", "engine.submit=sleep:1s"},
  };
  for (const auto& [spec, text] : cases) {
    const Status s = SetFailpoints(spec);
    EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument) << spec;
    EXPECT_THAT(std::string(s.message()), AllOf(HasSubstr("BLUEFOG_FAILPOINTS"), HasSubstr(text)));
  }
  EXPECT_FALSE(FailpointHit("engine.op_done"));
  EXPECT_TRUE(FailpointHit("engine.submit"));
}

TEST_F(Failpoints, SleepDelaysOnceAndDoesNotFail) {
  ASSERT_TRUE(SetFailpoints("shm.connect=sleep:20@2").ok());
  EXPECT_FALSE(FailpointHit("shm.connect"));
  const int64_t begin = NowNs();
  EXPECT_FALSE(FailpointHit("shm.connect"));
  EXPECT_GE(NowNs() - begin, 20'000'000);
}

TEST_F(Failpoints, ThreadsShareOneCount) {
  ASSERT_TRUE(SetFailpoints("engine.submit=error@1000").ok());
  std::atomic<int> fired{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 250; ++i) fired += FailpointHit("engine.submit");
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(fired, 1);
}

TEST_F(Failpoints, APlaceThatIsNotInTheListIsReported) {
  ASSERT_TRUE(SetFailpoints("engine.submit=error").ok());
  ::testing::internal::CaptureStderr();
  EXPECT_FALSE(FailpointHit("engine.not_in_the_list"));
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("engine.not_in_the_list"));
}

TEST_F(Failpoints, KillEndsTheProcessAtTheCount) {
  const pid_t child = fork();
  if (child == 0) {
    if (!SetFailpoints("control.join=kill@2").ok() || FailpointHit("control.join")) _exit(1);
    FailpointHit("control.join");
    _exit(2);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status)) << status;
  EXPECT_EQ(WTERMSIG(status), SIGKILL);
}

TEST_F(Failpoints, StopHaltsTheProcessUntilItIsContinued) {
  const pid_t child = fork();
  if (child == 0) {
    if (!SetFailpoints("control.heartbeat=stop").ok()) _exit(1);
    _exit(FailpointHit("control.heartbeat") ? 2 : 3);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, WUNTRACED), child);
  ASSERT_TRUE(WIFSTOPPED(status)) << status;
  kill(child, SIGCONT);
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << status;
  EXPECT_EQ(WEXITSTATUS(status), 3);
}

}  // namespace
}  // namespace bluefog
