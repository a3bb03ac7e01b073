// Failure is a value: every call that can fail returns absl::Status or absl::StatusOr. Nothing in
// the library throws, exits or aborts. The codes used, and what they mean here:
//   InvalidArgument     the call itself is wrong (shape, dtype, weights, name in flight)
//   FailedPrecondition  use before init, after shutdown, or in a forked child; a gradient changed
//   Unavailable         a peer died or left; the communicator is unusable from then on
//   DeadlineExceeded    a partner never submitted its side
//   Aborted             another rank failed the same operation; the message carries its reason
//   ResourceExhausted   memory or descriptors
#pragma once

#include <absl/status/status.h>
#include <absl/status/statusor.h>

namespace bluefog {

using absl::Status;
template <typename T>
using StatusOr = absl::StatusOr<T>;

}  // namespace bluefog
