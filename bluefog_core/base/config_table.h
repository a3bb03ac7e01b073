// The settings table with its source of values left open, so that tests need not change the
// environment of a process.
#pragma once

#include <functional>

#include <bluefog/config.h>

namespace bluefog {

/// Value of a variable, or null where it is not set.
using VariableLookup = std::function<const char*(const char* variable)>;

/// Config::FromEnvironment with `lookup` in place of the environment.
StatusOr<Config> ReadConfig(const VariableLookup& lookup);

}  // namespace bluefog
