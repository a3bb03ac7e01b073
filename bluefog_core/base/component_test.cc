#include "base/component.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

// Exported by this program, as TensorFlow exports its gRPC: a component must not be bound to it.
extern "C" int BluefogTestWhoAmI() { return 1; }

namespace bluefog {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string ErrorOf(const StatusOr<void*>& result) {
  EXPECT_EQ(result.status().code(), absl::StatusCode::kNotFound);
  return std::string(result.status().message());
}

int Call(void* factory) { return reinterpret_cast<int (*)()>(factory)(); }

TEST(Component, LoadsFromADirectoryOrFromBesideThisProgram) {
  const auto given = LoadComponentSymbol("testpart", "BluefogTestFactory", BLUEFOG_TEST_DIR);
  ASSERT_TRUE(given.ok()) << given.status();
  const auto beside = LoadComponentSymbol("testpart", "BluefogTestFactory", "");
  ASSERT_TRUE(beside.ok()) << beside.status();
  EXPECT_EQ(*given, *beside);
  EXPECT_GT(Call(*given), 0);
}

#if !defined(BLUEFOG_SANITIZED)
TEST(Component, UsesItsOwnSymbolsAndNotThoseOfTheProcess) {
  const auto factory = LoadComponentSymbol("testpart", "BluefogTestFactory", BLUEFOG_TEST_DIR);
  ASSERT_TRUE(factory.ok()) << factory.status();
  EXPECT_EQ(Call(*factory), 2);
}
#endif

TEST(Component, AnAbsentFileIsNamedWithTheDirectoryTried) {
  EXPECT_THAT(ErrorOf(LoadComponentSymbol("nonsense", "f", "/does/not/exist")),
              AllOf(HasSubstr("'nonsense'"), HasSubstr("/does/not/exist/libbluefog_nonsense.so")));
  EXPECT_THAT(ErrorOf(LoadComponentSymbol("control", "bluefog_control_factory", "/does/not/exist")),
              AllOf(HasSubstr("/does/not/exist/libbluefog_control.so"),
                    HasSubstr("apt-get install libgrpc++1.51")));
}

TEST(Component, AFileThatCannotBeLoadedSaysWhy) {
  EXPECT_THAT(ErrorOf(LoadComponentSymbol("brokenpart", "BluefogTestFactory", "")),
              HasSubstr("BluefogTestNobodyHasThis"));
}

TEST(Component, AMissingFactoryPointsToAnotherVersion) {
  EXPECT_THAT(ErrorOf(LoadComponentSymbol("testpart", "bluefog_other_factory", "")),
              AllOf(HasSubstr("bluefog_other_factory"), HasSubstr("libbluefog_testpart.so"),
                    HasSubstr("another version")));
}

TEST(Component, DescribeNamesEveryComponentFoundOrNot) {
  std::map<std::string, ComponentInfo> by_name;
  for (const ComponentInfo& info : DescribeComponents("/does/not/exist")) by_name[info.name] = info;
  ASSERT_EQ(by_name.size(), 4u);
  for (const char* name : {"ucx", "cuda", "nccl"}) {
    EXPECT_FALSE(by_name[name].found);
    EXPECT_THAT(by_name[name].problem, HasSubstr("not part of this build"));
  }
  EXPECT_THAT(by_name["ucx"].problem, HasSubstr("apt-get install libucx-dev"));
  EXPECT_FALSE(by_name["control"].found);
  EXPECT_THAT(by_name["control"].problem, HasSubstr("libgrpc++1.51"));
}

}  // namespace
}  // namespace bluefog
