// The network interfaces of this host, and which of them leads to the other hosts of a job.
#pragma once

#include <string>
#include <vector>

#include <bluefog/status.h>

namespace bluefog::transport {

/// Names of the interfaces that `wanted` lists: names ("eth0"), or subnets ("10.1.0.0/16",
/// "fd00::/8") that an interface has an address in; separated by commas. InvalidArgument if one
/// does not exist here; it lists those that do.
StatusOr<std::vector<std::string>> FindInterfaces(const std::string& wanted);

/// The interface over which the kernel would reach `address` ("host:port", "[::1]:port"). Empty if
/// it is not known, or if `address` is this host's own loopback.
std::string InterfaceToward(const std::string& address);

/// "eth0 10.1.0.2 fd00::2" for each of `names`, separated by commas.
std::string DescribeInterfaces(const std::vector<std::string>& names);

}  // namespace bluefog::transport
