// `bluefog run -np N command…`: starts a command as the N ranks of a job, on this host or on those
// of -H and --hostfile.
#include <limits.h>
#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
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
constexpr int kNotGiven = INT_MIN;

struct RunOptions {
  LaunchOptions launch;
  std::vector<std::string> env, forward;
  std::string hosts, hostfile, timeline, network_interface;
  bool no_tag = false, ssh_always = false, dry_run = false;
};

using Environment = std::vector<std::pair<std::string, std::string>>;

[[noreturn]] void Wrong(const std::string& text) {
  Fail(absl::InvalidArgumentError("run: " + text));
}

const char* FindVariable(const std::string& name) {
  for (char** e = environ; *e != nullptr; ++e) {
    if (std::string_view(*e).starts_with(name + "=")) return *e + name.size() + 1;
  }
  return nullptr;
}

std::vector<HostRanks> Hosts(const RunOptions& o) {
  if (!o.hosts.empty() && !o.hostfile.empty()) Wrong("give -H or --hostfile, not both");
  const StatusOr<std::vector<HostSlots>> hosts =
      o.hosts.empty() ? ReadHostfile(o.hostfile) : ParseHosts(o.hosts);
  if (!hosts.ok()) {
    Wrong((o.hosts.empty() ? "--hostfile: " : "-H: ") + std::string(hosts.status().message()));
  }
  StatusOr<std::vector<HostRanks>> placed = PlaceRanks(*hosts, o.launch.ranks, o.ssh_always);
  if (!placed.ok()) Wrong(std::string(placed.status().message()));
  return *std::move(placed);
}

void CheckRanksHere(const LaunchOptions& launch) {
  int here = launch.hosts.empty() ? launch.ranks : 0;
  for (const HostRanks& host : launch.hosts) {
    if (host.local) here += host.count;
  }
  if (here > kMaxRanks) {
    Wrong("-np is " + std::to_string(here) + ": 1 to " + std::to_string(kMaxRanks) +
          " ranks can run on one host");
  }
  // Two pipes a rank, and what is open anyway.
  if (rlimit files; launch.tag && getrlimit(RLIMIT_NOFILE, &files) == 0 &&
                    rlim_t{2} * static_cast<rlim_t>(here) + 64 > files.rlim_cur) {
    Wrong("-np " + std::to_string(here) + " needs " + std::to_string(2 * here + 64) +
          " open files, but the limit is " + std::to_string(files.rlim_cur) +
          ": raise it (ulimit -n), or use --no-tag");
  }
}

Environment MakeEnvironment(const RunOptions& o) {
  Environment env;
  if (!o.timeline.empty()) env.emplace_back("BLUEFOG_TIMELINE", o.timeline);
  if (!o.network_interface.empty()) {
    env.emplace_back("BLUEFOG_NETWORK_INTERFACE", o.network_interface);
  }
  for (const std::string& name : o.forward) {
    const char* value = FindVariable(name);
    if (value == nullptr) Wrong("--forward-env names " + name + ", which is not set here");
    env.emplace_back(name, value);
  }
  for (const std::string& setting : o.env) {
    const size_t equals = setting.find('=');
    if (equals == std::string::npos || equals == 0) {
      Wrong("--env is '" + setting + "' and should be NAME=VALUE");
    }
    env.emplace_back(setting.substr(0, equals), setting.substr(equals + 1));
  }
  // Ranks share the cores. Python's output through a pipe would otherwise come in blocks.
  Environment defaults = {{"OMP_NUM_THREADS", "1"}};
  if (o.launch.tag) defaults.emplace_back("PYTHONUNBUFFERED", "1");
  for (const auto& setting : defaults) {
    const bool given = std::any_of(env.begin(), env.end(),
                                   [&](const auto& other) { return other.first == setting.first; });
    if (given) continue;
    if (const char* own = FindVariable(setting.first)) {
      env.emplace_back(setting.first, own);  // The same on other hosts.
      continue;
    }
    env.push_back(setting);
    if (!o.launch.verbose) continue;
    std::cerr << "bluefog run: " << setting.first << "=" << setting.second
              << " for every rank (set it to change this)\n";
  }
  return env;
}

std::string Words(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + ShellWord(word);
  return text;
}

void DryRun(const LaunchOptions& launch) {
  const StatusOr<std::string> coordinator = CoordinatorHost(launch);
  if (!coordinator.ok()) Fail(coordinator.status(), 1);
  std::cout << launch.ranks << (launch.ranks == 1 ? " rank: " : " ranks: ") << Words(launch.command)
            << "\n";
  std::cout << "in " << (launch.cwd.empty() ? std::filesystem::current_path().string() : launch.cwd)
            << "\n";
  std::vector<HostRanks> hosts = launch.hosts;
  if (hosts.empty()) hosts.push_back({"this host", true, launch.ranks, 0, launch.ranks});
  for (const HostRanks& host : hosts) {
    std::cout << host.name << ": ";
    if (host.count == 1) {
      std::cout << "rank " << host.first;
    } else {
      std::cout << "ranks " << host.first << "-" << host.first + host.count - 1;
    }
    std::cout << (host.local ? ", started from here\n"
                             : ", started by: " + Words(SshCommand(launch.ssh, host.name)) + "\n");
  }
  std::cout << "control plane: rank 0 at " << *coordinator
            << (HasCoordinator(launch) ? "" : ", a free port") << "\n";
  std::cout << "environment for every rank:";
  for (const auto& [name, value] : launch.env) std::cout << " " << name;
  std::cout << "\n";
}

void Run(RunOptions& o) {
  LaunchOptions& launch = o.launch;
  launch.tag = !o.no_tag;
  const bool hosts = !o.hosts.empty() || !o.hostfile.empty();
  if (launch.ranks == kNotGiven && !hosts) Wrong("how many ranks? Give -np, or hosts with -H");
  if (launch.ranks == kNotGiven) {
    launch.ranks = 0;
  } else if (launch.ranks < 1) {
    Wrong("-np is " + std::to_string(launch.ranks) + ": 1 to " + std::to_string(kMaxRanks) +
          " ranks can run on one host");
  }
  if (hosts) {
    launch.hosts = Hosts(o);
    launch.ranks = launch.hosts.back().first + launch.hosts.back().count;
  }
  CheckRanksHere(launch);
  launch.ssh.connect_timeout_s = launch.start_timeout_s;
  launch.env = MakeEnvironment(o);
  if (o.dry_run) return DryRun(launch);
  Exit(Launch(launch));
}

void AddHostOptions(CLI::App* run, RunOptions& o) {
  SshOptions& ssh = o.launch.ssh;
  run->add_option("-H,--hosts,--host", o.hosts,
                  "Hosts with their slots, as in host1:4,host2:4; ranks are numbered in this order")
      ->type_name("HOST[:SLOTS],…");
  run->add_option("--hostfile", o.hostfile, "The same from a file, a host a line: 'host slots=4'")
      ->type_name("FILE");
  run->add_option("-p,--ssh-port", ssh.port, "Where sshd listens on the other hosts")
      ->check(CLI::Range(1, 65535))
      ->type_name("PORT");
  run->add_option("--ssh-option", ssh.options, "For ssh -o, as in User=me; may be repeated")
      ->allow_extra_args(false)
      ->type_name("NAME=VALUE");
  run->add_flag("--ssh-always", o.ssh_always, "Go over ssh to this host, too");
  run->add_option("--remote-bluefog", ssh.remote_bluefog,
                  "Where the bluefog command lies on other hosts; where it does here, by default")
      ->type_name("PATH");
  run->add_option("--coordinator", o.launch.coordinator,
                  "Where all hosts reach rank 0, if its host's name will not do")
      ->type_name("HOST[:PORT]");
  run->add_option("--network-interface", o.network_interface,
                  "Network for the ranks' data (BLUEFOG_NETWORK_INTERFACE)")
      ->type_name("NAME");
  run->add_option("--start-timeout", o.launch.start_timeout_s,
                  "Until all hosts must be ready to start ranks")
      ->check(CLI::Range(1, 86'400))
      ->type_name("SECONDS")
      ->capture_default_str();
  run->add_option("--lost-after", ssh.lost_after_s,
                  "Ranks on a host that the launcher cannot reach for so long are ended")
      ->check(CLI::Range(5, 86'400))
      ->type_name("SECONDS")
      ->capture_default_str();
  run->add_flag("--dry-run", o.dry_run, "Say what would be run where, and end");
}

}  // namespace

void AddRun(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  LaunchOptions& launch = options->launch;
  launch.ranks = kNotGiven;
  CLI::App* run = app.add_subcommand("run", "Run a command as the ranks of a job");
  run->add_option("-n,--np,--num-proc", launch.ranks,
                  "Number of ranks (also -np); with -H as many as there are slots, by default");
  run->add_option("--env", options->env, "NAME=VALUE for every rank's environment; may be repeated")
      ->allow_extra_args(false);
  run->add_option("--forward-env", options->forward,
                  "Variables of this environment for the ranks on other hosts, too; those named "
                  "BLUEFOG_… go by themselves")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("NAME,…");
  run->add_option("--cwd", launch.cwd, "Folder to run in, on every host; this one, by default")
      ->type_name("FOLDER");
  run->add_option("--timeline,--timeline-filename", options->timeline,
                  "Prefix of the timeline files, one per rank (BLUEFOG_TIMELINE)");
  run->add_flag("--no-tag", options->no_tag,
                "Output as it is, without [rank] in front of the lines");
  run->add_flag("-v,--verbose", launch.verbose,
                "Say what is set and how every rank ended; lines begin with [rank@host]");
  AddHostOptions(run, *options);
  run->add_option("command", launch.command, "The command and its arguments")->required();
  run->callback([options] { Run(*options); });
}

}  // namespace bluefog::tools
