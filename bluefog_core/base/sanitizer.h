// What tests tell a sanitizer. Without one nothing happens.
#pragma once

namespace bluefog {

#if defined(__SANITIZE_ADDRESS__)
extern bool leaks_expected;  ///< In sanitizer.cc.
/// This process ends without giving back what it has: a program that just exits, or a forked child,
/// in which what the parent's threads held is lost.
inline void ExpectLeaks() { leaks_expected = true; }
#else
inline void ExpectLeaks() {}
#endif

}  // namespace bluefog
