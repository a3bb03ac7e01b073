// `bluefog run -np N command…`: starts a command as the N ranks of a job on this host.
#include <sys/resource.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "commands.h"
#include "launcher.h"

extern char** environ;

namespace bluefog::tools {
namespace {

constexpr int kMaxRanks = 4096;  // More is a slip of the finger, and would take the host down.

struct RunOptions {
  int ranks = 1;
  std::vector<std::string> command, env;
  std::string timeline;
  bool no_tag = false, verbose = false;
};

bool IsSet(const std::string& name) {
  for (char** e = environ; *e != nullptr; ++e) {
    if (std::string_view(*e).starts_with(name + "=")) return true;
  }
  return false;
}

void Run(const RunOptions& o) {
  if (o.ranks < 1 || o.ranks > kMaxRanks) {
    Fail(absl::InvalidArgumentError("run: -np is " + std::to_string(o.ranks) + ": 1 to " +
                                    std::to_string(kMaxRanks) + " ranks can run on one host"));
  }
  // Two pipes a rank, and what is open anyway.
  if (rlimit files; !o.no_tag && getrlimit(RLIMIT_NOFILE, &files) == 0 &&
                    static_cast<rlim_t>(2 * o.ranks + 64) > files.rlim_cur) {
    Fail(absl::InvalidArgumentError(
        "run: -np " + std::to_string(o.ranks) + " needs " + std::to_string(2 * o.ranks + 64) +
        " open files, but the limit is " + std::to_string(files.rlim_cur) +
        ": raise it (ulimit -n), or use --no-tag"));
  }
  LaunchOptions launch;
  launch.ranks = o.ranks;
  launch.command = o.command;
  launch.tag = !o.no_tag;
  launch.verbose = o.verbose;
  if (!o.timeline.empty()) launch.env.emplace_back("BLUEFOG_TIMELINE", o.timeline);
  for (const std::string& setting : o.env) {
    const size_t equals = setting.find('=');
    if (equals == std::string::npos || equals == 0) {
      Fail(absl::InvalidArgumentError("run: --env is '" + setting + "' and should be NAME=VALUE"));
    }
    launch.env.emplace_back(setting.substr(0, equals), setting.substr(equals + 1));
  }
  // Ranks share the cores. Python's output through a pipe would otherwise come in blocks.
  std::vector<std::pair<std::string, std::string>> defaults = {{"OMP_NUM_THREADS", "1"}};
  if (launch.tag) defaults.emplace_back("PYTHONUNBUFFERED", "1");
  std::erase_if(defaults, [&](const auto& wanted) {
    return IsSet(wanted.first) ||
           std::any_of(launch.env.begin(), launch.env.end(),
                       [&](const auto& given) { return given.first == wanted.first; });
  });
  launch.env.insert(launch.env.end(), defaults.begin(), defaults.end());
  StatusOr<std::string> coordinator = ChooseCoordinator();
  if (!coordinator.ok()) Fail(coordinator.status(), 1);
  launch.coordinator = *coordinator;
  launch.job_id = MakeJobId();
  if (o.verbose) {
    std::cerr << "bluefog run: " << o.ranks << " ranks on this host, job " << launch.job_id
              << ", control plane at " << launch.coordinator << "\n";
    for (const auto& [name, value] : defaults) {
      std::cerr << "bluefog run: " << name << "=" << value
                << " for every rank (set it to change this)\n";
    }
  }
  Exit(Launch(launch));
}

}  // namespace

void AddRun(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* run = app.add_subcommand("run", "Run a command as the ranks of a job on this host");
  run->add_option("-n,--np,--num-proc", options->ranks, "Number of ranks (also -np)")->required();
  run->add_option("--env", options->env, "NAME=VALUE for every rank's environment; may be repeated")
      ->allow_extra_args(false);
  run->add_option("--timeline,--timeline-filename", options->timeline,
                  "Prefix of the timeline files, one per rank (BLUEFOG_TIMELINE)");
  run->add_flag("--no-tag", options->no_tag,
                "Output as it is, without [rank] in front of the lines");
  run->add_flag("-v,--verbose", options->verbose, "Say what is set and how every rank ended");
  run->add_option("command", options->command, "The command and its arguments")->required();
  run->callback([options] { Run(*options); });
}

}  // namespace bluefog::tools
