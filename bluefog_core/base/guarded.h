// Plugins, codecs, handlers and the heap may throw: no exception crosses the engine.
#pragma once

#include <exception>
#include <string>

#include <bluefog/status.h>

namespace bluefog {

/// What `fn` returns, a Status or StatusOr; Internal if it throws. `where()` names the culprit.
template <typename Where, typename Fn>
auto Guarded(Where where, Fn fn) -> decltype(fn()) {
  try {
    return fn();
  } catch (const std::exception& e) {
    return absl::InternalError(where() + ": exception: " + e.what());
  } catch (...) {
    return absl::InternalError(where() + ": exception of unknown type");
  }
}

}  // namespace bluefog
