// Optimizers by name: what a user sees who asks for one that is not there, or registers a name
// twice.
#include <bluefog/optimizer.h>

#include <algorithm>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace bluefog {
namespace {

class Toy final : public Optimizer {
 public:
  const Traits& traits() const override { return traits_; }
  void Produce(const StepContext&, std::span<const Segment>) override {}
  Status Consume(const StepContext&, std::span<const Segment>) override { return absl::OkStatus(); }

 private:
  const Traits traits_ = {.name = "toy"};
};
class OtherToy final : public Optimizer {
 public:
  const Traits& traits() const override { return traits_; }
  void Produce(const StepContext&, std::span<const Segment>) override {}
  Status Consume(const StepContext&, std::span<const Segment>) override { return absl::OkStatus(); }

 private:
  const Traits traits_ = {.name = "other-toy"};
};

BLUEFOG_REGISTER_OPTIMIZER("toy", Toy);
BLUEFOG_REGISTER_OPTIMIZER("a-toy", OtherToy);

TEST(RegistryTest, MakesANewObjectEachTime) {
  const auto first = MakeOptimizer("toy"), second = MakeOptimizer("toy");
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok());
  EXPECT_EQ((*first)->traits().name, "toy");
  EXPECT_NE(first->get(), second->get());
}

TEST(RegistryTest, UnknownNameListsTheKnownOnes) {
  const Status status = MakeOptimizer("toyy").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_NE(status.message().find("'toyy'"), std::string::npos) << status;
  EXPECT_NE(status.message().find("a-toy, toy"), std::string::npos) << status;
}

TEST(RegistryTest, FirstOfTwoEqualNamesStays) {
  EXPECT_FALSE(RegisterOptimizer("toy", [] { return std::make_unique<OtherToy>(); }));
  EXPECT_EQ((*MakeOptimizer("toy"))->traits().name, "toy");
  EXPECT_FALSE(RegisterOptimizer("", [] { return std::make_unique<Toy>(); }));
  EXPECT_FALSE(RegisterOptimizer("empty", nullptr));
  const std::vector<std::string> names = OptimizerNames();
  EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
  EXPECT_THAT(names, ::testing::IsSupersetOf({"a-toy", "toy"}));
  EXPECT_THAT(names, ::testing::Not(::testing::Contains("empty")));
}

TEST(RegistryTest, FactoryWithoutResultIsAnError) {
  EXPECT_TRUE(RegisterOptimizer("z-nothing", [] { return std::unique_ptr<Optimizer>(); }));
  const Status status = MakeOptimizer("z-nothing").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(status.message().find("z-nothing"), std::string::npos) << status;
}

}  // namespace
}  // namespace bluefog
