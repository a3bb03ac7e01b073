// Logging through spdlog to stderr, with the rank in front. Kept behind a few functions so that
// spdlog's headers stay in log.cc. Everything here is thread-safe and never throws.
#pragma once

#include <optional>
#include <sstream>
#include <string>

namespace bluefog {

enum class LogLevel { kTrace, kDebug, kInfo, kWarning, kError, kOff };

/// "trace", "debug", "info", "warn", "error", "off".
const char* NameOf(LogLevel level);
/// Those names in any case, and BlueFog's "warning" and "fatal" (taken as error).
std::optional<LogLevel> ParseLogLevel(const std::string& text);

/// False, and nothing changes, if ParseLogLevel does not know `level`.
bool SetLogLevel(const std::string& level, bool hide_time);
/// Prefix of every line of this process from now on; -1: none.
void SetLogRank(int rank);
bool LogEnabled(LogLevel level);
void LogMessage(LogLevel level, const std::string& message);

}  // namespace bluefog

/// BLUEFOG_LOG(kInfo) << "…";
#define BLUEFOG_LOG(level)                                                        \
  for (bool bluefog_log_once = ::bluefog::LogEnabled(::bluefog::LogLevel::level); \
       bluefog_log_once; bluefog_log_once = false)                                \
  ::bluefog::LogLine(::bluefog::LogLevel::level).stream()

namespace bluefog {
class LogLine {
 public:
  explicit LogLine(LogLevel level) : level_(level) {}
  ~LogLine() { LogMessage(level_, stream_.str()); }
  std::ostream& stream() { return stream_; }

 private:
  LogLevel level_;
  std::ostringstream stream_;
};
}  // namespace bluefog
