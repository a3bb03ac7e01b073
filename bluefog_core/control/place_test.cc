#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "base/token.h"
#include "control/membership.h"

namespace bluefog::control {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

Config BluefogRun(int rank, int size) {
  Config c;
  c.job_id = "job";
  c.coordinator = "127.0.0.1:20000";
  c.rank = c.local_rank = rank;
  c.size = c.local_size = size;
  return c;
}

Config Torchrun(int rank, int size) {
  Config c;
  c.torch_rank = rank;
  c.torch_world_size = size;
  c.torch_local_rank = rank % 4;
  c.torch_local_world_size = 4;
  c.torch_master_addr = "10.0.0.7";
  c.torch_master_port = 29500;
  return c;
}

std::string Error(const Config& config) {
  StatusOr<Place> place = FindPlace(config);
  EXPECT_EQ(place.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(place.status().message());
}

TEST(FindPlace, AloneWithoutVariables) {
  Place place = FindPlace(Config()).value();
  EXPECT_EQ(place.rank, 0);
  EXPECT_EQ(place.size, 1);
  EXPECT_EQ(place.local_size, 1);
  EXPECT_EQ(place.coordinator, "");
  EXPECT_EQ(place.launched_by, "alone");
}

TEST(FindPlace, BluefogRun) {
  Place place = FindPlace(BluefogRun(3, 8)).value();
  EXPECT_EQ(place.rank, 3);
  EXPECT_EQ(place.size, 8);
  EXPECT_EQ(place.local_rank, 3);
  EXPECT_EQ(place.local_size, 8);
  EXPECT_EQ(place.job_id, "job");
  EXPECT_EQ(place.coordinator, "127.0.0.1:20000");
  EXPECT_EQ(place.launched_by, "bluefog run");
}

TEST(FindPlace, BluefogRunIsPreferredToTorchrun) {
  Config c = BluefogRun(1, 2);
  c.torch_rank = 5;
  c.torch_world_size = 6;
  EXPECT_EQ(FindPlace(c).value().launched_by, "bluefog run");
}

TEST(FindPlace, TorchrunTakesThePortBesideTheStore) {
  Place place = FindPlace(Torchrun(5, 8)).value();
  EXPECT_EQ(place.rank, 5);
  EXPECT_EQ(place.size, 8);
  EXPECT_EQ(place.local_rank, 1);
  EXPECT_EQ(place.local_size, 4);
  EXPECT_EQ(place.coordinator, "10.0.0.7:29501");
  EXPECT_EQ(place.launched_by, "torchrun");
  EXPECT_EQ(place.job_id, FindPlace(Torchrun(0, 8)).value().job_id);
  Config other = Torchrun(5, 8);
  other.torch_master_port = 29600;
  EXPECT_NE(place.job_id, FindPlace(other).value().job_id);
}

TEST(FindPlace, TorchrunCoordinatorCanBeChosen) {
  Config c = Torchrun(0, 2);
  c.coordinator = "127.0.0.1:4444";
  EXPECT_EQ(FindPlace(c).value().coordinator, "127.0.0.1:4444");
  EXPECT_EQ(FindPlace(c).value().launched_by, "torchrun");
}

TEST(FindPlace, LastPortAndIpv6) {
  Config c = Torchrun(0, 2);
  c.torch_master_port = 65535;
  c.torch_master_addr = "::1";
  EXPECT_EQ(FindPlace(c).value().coordinator, "[::1]:65534");
}

TEST(FindPlace, HalfASetNamesWhatIsMissing) {
  Config c = BluefogRun(0, 2);
  c.local_size = -1;
  c.job_id.clear();
  EXPECT_THAT(Error(c), AllOf(HasSubstr("BLUEFOG_LOCAL_SIZE, BLUEFOG_JOB_ID are not"),
                              HasSubstr("BLUEFOG_RANK")));
  c = Config();
  c.coordinator = "127.0.0.1:1";
  EXPECT_THAT(Error(c), AllOf(HasSubstr("BLUEFOG_COORDINATOR is set"), HasSubstr("BLUEFOG_RANK")));
  c = Torchrun(0, 2);
  c.torch_world_size = -1;
  EXPECT_THAT(Error(c), AllOf(HasSubstr("WORLD_SIZE is not"), HasSubstr("MASTER_PORT")));
}

TEST(FindPlace, AStrayMasterAddressIsNoJob) {
  Config c;
  c.torch_master_addr = "127.0.0.1";
  c.torch_master_port = 29500;
  EXPECT_EQ(FindPlace(c).value().launched_by, "alone");
}

TEST(FindPlace, RanksOutsideTheJob) {
  EXPECT_THAT(Error(BluefogRun(8, 8)), AllOf(HasSubstr("BLUEFOG_RANK is 8"), HasSubstr("0 to 7")));
  EXPECT_THAT(Error(BluefogRun(-2, 8)), HasSubstr("BLUEFOG_RANK is -2"));
  EXPECT_THAT(Error(BluefogRun(0, 0)), HasSubstr("BLUEFOG_SIZE is 0"));
  Config c = BluefogRun(1, 8);
  c.local_rank = 4;
  c.local_size = 4;
  EXPECT_THAT(Error(c), HasSubstr("BLUEFOG_LOCAL_RANK is 4"));
  EXPECT_THAT(Error(Torchrun(9, 8)), HasSubstr("RANK is 9"));
  c = Torchrun(1, 8);
  c.torch_master_port = 70000;
  EXPECT_THAT(Error(c), HasSubstr("MASTER_PORT is 70000"));
}

TEST(FindPlace, NodesPerMachineSplitsAHost) {
  Config c = BluefogRun(6, 7);
  c.nodes_per_machine = 4;
  Place place = FindPlace(c).value();
  EXPECT_EQ(place.local_rank, 2);
  EXPECT_EQ(place.local_size, 3);  // The last machine of 7 = 4 + 3.
  c.rank = c.local_rank = 1;
  EXPECT_EQ(FindPlace(c).value().local_rank, 1);
  EXPECT_EQ(FindPlace(c).value().local_size, 4);
  Config alone;
  alone.nodes_per_machine = 4;
  EXPECT_EQ(FindPlace(alone).value().local_size, 1);
}

TEST(FindPlace, TheTokenIsReadAndNotShown) {
  Config c = BluefogRun(0, 2);
  const std::string token(kTokenBytes, 't');
  c.token_fd = MakeTokenDescriptor(token).value();
  c.token_file = "/nonexistent";  // The launcher's word counts.
  EXPECT_EQ(FindPlace(c).value().token, token);
  EXPECT_EQ(FindPlace(c).value().token, token);
  const auto rows = DescribeConfig(c).value();
  for (const SettingInfo& row : rows) EXPECT_THAT(row.value, Not(HasSubstr("tttt")));
  close(c.token_fd);
  EXPECT_THAT(Error(c), HasSubstr("BLUEFOG_TOKEN_FD"));
  c.token_fd = -1;
  EXPECT_THAT(Error(c), HasSubstr("BLUEFOG_TOKEN_FILE=/nonexistent"));
}

TEST(Membership, AloneNeedsNoComponent) {
  Config c;
  c.component_dir = "/nonexistent";
  auto membership = Membership::Join(Place(), c, "here", {});
  ASSERT_TRUE(membership.ok()) << membership.status();
  EXPECT_THAT((*membership)->addresses(), ::testing::ElementsAre("here"));
  EXPECT_EQ((*membership)->messages(), 0);
  (*membership)->ReportFailure(0, "x");
  (*membership)->Leave();
}

}  // namespace
}  // namespace bluefog::control
