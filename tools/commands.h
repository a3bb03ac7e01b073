// The subcommands of the `bluefog` command-line tool. Each lives in its own file, adds itself to
// the application with its options and a callback, and owns its option values through that
// callback.
//
// To add a command: write tools/<name>.cc, declare Add<Name> here, name the file in
// tools/CMakeLists.txt and call Add<Name> in main.cc.
#pragma once

#include <string>

#include <CLI/CLI.hpp>

#include <bluefog/status.h>

#include "format.h"

namespace bluefog::tools {

void AddRun(CLI::App& app);
void AddPerf(CLI::App& app);
void AddTopo(CLI::App& app);
void AddInfo(CLI::App& app);

/// `bluefog info --job`: joins the job; rank 0 prints.
void DescribeJob(bool json);

/// Exit code of the tool for a wrong call (unknown name, malformed option).
inline constexpr int kUsageError = 2;

/// Ends the command from inside its callback with this exit code and no further output. (CLI11
/// carries it to main by an exception of its own; nothing of the library is on the stack's way.)
[[noreturn]] inline void Exit(int code) { throw CLI::RuntimeError(code); }
/// For an option's transform(): "64M" becomes its number of bytes.
inline CLI::Validator Size() {
  return CLI::Validator(
      [](std::string& text) {
        const int64_t bytes = ParseSize(text);
        if (bytes < 0) {
          return "'" + text +
                 "' is not a size: use a number with or without K, M, G or T, as in 64M";
        }
        text = std::to_string(bytes);
        return std::string();
      },
      "");
}
/// Prints "bluefog: <message>" on stderr and ends the command with `code`.
[[noreturn]] void Fail(const Status& status, int code = kUsageError);

}  // namespace bluefog::tools
