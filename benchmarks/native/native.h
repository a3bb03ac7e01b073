// What the parts of the benchmarks' native library share.
#pragma once

#include <cstdint>

#include <absl/functional/function_ref.h>
#include <bluefog/status.h>

namespace bluefog::benchmarks {

/// Meets the other ranks at the barrier, runs `body` and returns its time in ns, or -1;
/// bench_error() then says what failed.
int64_t Timed(absl::FunctionRef<Status()> body);
/// The same for what is not timed: 0 or -1.
int64_t Checked(absl::FunctionRef<Status()> body);

}  // namespace bluefog::benchmarks
