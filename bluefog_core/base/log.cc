// The process's one logger. It is never destroyed, so that threads may log while the process exits.
#include "base/log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <array>
#include <memory>

#include "base/mutex.h"

namespace bluefog {
namespace {

constexpr std::array kLevels = {spdlog::level::trace, spdlog::level::debug, spdlog::level::info,
                                spdlog::level::warn,  spdlog::level::err,   spdlog::level::off};

spdlog::level::level_enum Translate(LogLevel level) { return kLevels[static_cast<size_t>(level)]; }

class Log {
 public:
  Log() : logger_("bluefog", std::make_shared<spdlog::sinks::stderr_sink_mt>()) {
    MutexLock lock(mu_);
    logger_.set_level(spdlog::level::info);
    SetPattern();
  }
  void SetLevel(LogLevel level, bool hide_time) {
    MutexLock lock(mu_);
    logger_.set_level(Translate(level));
    hide_time_ = hide_time;
    SetPattern();
  }
  void SetRank(int rank) {
    MutexLock lock(mu_);
    rank_ = rank;
    SetPattern();
  }
  spdlog::logger& logger() { return logger_; }

 private:
  void SetPattern() REQUIRES(mu_) {
    std::string pattern = hide_time_ ? "" : "%Y-%m-%d %H:%M:%S.%e ";
    pattern += rank_ < 0 ? "bluefog" : "bluefog[" + std::to_string(rank_) + "]";
    logger_.set_pattern(pattern + " %l: %v");
  }

  Mutex mu_;
  bool hide_time_ GUARDED_BY(mu_) = false;
  int rank_ GUARDED_BY(mu_) = -1;
  spdlog::logger logger_;  // Synchronises itself; mu_ orders pattern changes.
};

Log& TheLog() {
  static Log& log = *new Log;
  return log;
}

}  // namespace

const char* NameOf(LogLevel level) {
  constexpr std::array kNames = {"trace", "debug", "info", "warn", "error", "off"};
  return kNames[static_cast<size_t>(level)];
}

std::optional<LogLevel> ParseLogLevel(const std::string& text) {
  std::string lower = text;
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  if (lower == "warning") return LogLevel::kWarning;
  if (lower == "fatal") return LogLevel::kError;
  for (size_t i = 0; i < kLevels.size(); ++i) {
    if (lower == NameOf(static_cast<LogLevel>(i))) return static_cast<LogLevel>(i);
  }
  return std::nullopt;
}

bool SetLogLevel(const std::string& level, bool hide_time) {
  const auto parsed = ParseLogLevel(level);
  if (parsed) TheLog().SetLevel(*parsed, hide_time);
  return parsed.has_value();
}

void SetLogRank(int rank) { TheLog().SetRank(rank); }

bool LogEnabled(LogLevel level) {
  return level != LogLevel::kOff && TheLog().logger().should_log(Translate(level));
}

void LogMessage(LogLevel level, const std::string& message) {
  if (!LogEnabled(level)) return;
  // As an argument, not as the format: a message may contain braces.
  TheLog().logger().log(Translate(level), spdlog::string_view_t(message));
}

}  // namespace bluefog
