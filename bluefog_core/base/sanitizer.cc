// Options of the sanitizers, part of every executable of a build with one
// (cmake/BluefogOptions.cmake).
#include "base/sanitizer.h"

#if defined(__SANITIZE_THREAD__)
// gRPC and abseil's debug checks in it are not instrumented and synchronise with futexes of their
// own, so what is handed through them looks racy. Our own fields are checked by clang's
// thread-safety analysis; here the core's side is.
extern "C" const char* __tsan_default_options() { return "ignore_noninstrumented_modules=1"; }
extern "C" const char* __tsan_default_suppressions() { return "race:grpc::\n"; }
#endif

#if defined(__SANITIZE_ADDRESS__)
namespace bluefog {
bool leaks_expected = false;
}
extern "C" int __lsan_is_turned_off() { return bluefog::leaks_expected; }
#endif
