// A forked child must never touch an engine: its threads do not exist there. Engines remember the
// generation they were made in; a fork raises it in the child.
#pragma once

#include <cstdint>

namespace bluefog {

/// How many forks lie between this process and the one that loaded the library.
uint32_t ForkGeneration();

}  // namespace bluefog
