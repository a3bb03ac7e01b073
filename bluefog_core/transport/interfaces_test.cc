#include "transport/interfaces.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace bluefog::transport {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(InterfacesTest, ByNameAndBySubnet) {
  for (const char* wanted : {"lo", "127.0.0.0/8", "lo,127.0.0.0/8"}) {
    const auto found = FindInterfaces(wanted);
    ASSERT_TRUE(found.ok()) << wanted << ": " << found.status();
    EXPECT_THAT(*found, ElementsAre("lo")) << wanted;
  }
  EXPECT_THAT(DescribeInterfaces({"lo"}), HasSubstr("lo 127.0.0.1"));
}

// A whole byte more or less would hide a mask that is cut in the middle of one.
TEST(InterfacesTest, SubnetsEndInTheMiddleOfAByte) {
  EXPECT_TRUE(FindInterfaces("126.0.0.0/7").ok());
  EXPECT_FALSE(FindInterfaces("126.0.0.0/8").ok());
  EXPECT_FALSE(FindInterfaces("127.0.0.2/31").ok());
  EXPECT_TRUE(FindInterfaces("127.0.0.1/32").ok());
}

TEST(InterfacesTest, WhatDoesNotExistIsNamedWithWhatDoes) {
  for (const char* wanted : {"ib7", "lo,ib7", "203.0.113.0/24", "127.0.0.0/33", "127.0.0.0/",
                             "127.0.0/8", "", "lo,", "2001:db8::/129"}) {
    const auto found = FindInterfaces(wanted);
    ASSERT_FALSE(found.ok()) << wanted;
    EXPECT_THAT(std::string(found.status().message()), HasSubstr("lo 127.0.0.1")) << wanted;
  }
  EXPECT_THAT(std::string(FindInterfaces("lo,ib7").status().message()), HasSubstr("'ib7'"));
}

// Its own loopback leads to no other host; a name that cannot be resolved is the control plane's to
// report.
TEST(InterfacesTest, TowardNowhere) {
  EXPECT_EQ(InterfaceToward("127.0.0.1:4711"), "");
  EXPECT_EQ(InterfaceToward("no-such-host.invalid:4711"), "");
  EXPECT_EQ(InterfaceToward(""), "");
}

}  // namespace
}  // namespace bluefog::transport
