// The `bluefog` command: parses the command line and hands over to one subcommand. Called as
// `bfrun` it is `bluefog run`.
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include "agent.h"
#include "commands.h"

namespace bluefog::tools {

void Fail(const Status& status, int code) {
  std::cerr << "bluefog: " << status.message() << std::endl;
  Exit(code);
}

namespace {

// CLI11 takes "-np" for "-n p". Options of the subcommand with one dash and several letters get
// their second dash; the user's own command behind `run` is left alone.
void RepairLongOptions(const CLI::App& app, std::vector<std::string>& args) {
  if (args.empty()) return;
  const auto commands =
      app.get_subcommands([&](const CLI::App* c) { return c->check_name(args[0]); });
  if (commands.empty()) return;
  const CLI::App* command = commands.front();
  for (size_t i = 1; i < args.size() && args[i] != "--"; ++i) {
    if (!args[i].starts_with('-') && args[0] == "run") {
      args.insert(args.begin() + static_cast<int64_t>(i),
                  "--");  // All that follows is the command.
      return;
    }
    if (args[i].starts_with('-') && !args[i].starts_with("--") && args[i].size() > 2 &&
        command->get_option_no_throw("-" + args[i].substr(0, args[i].find('='))) != nullptr) {
      args[i].insert(0, "-");
    }
    const CLI::Option* option = command->get_option_no_throw(args[i]);
    if (option != nullptr && option->get_items_expected_max() > 0) ++i;
  }
}

// What is wrong with the first word; empty if nothing is.
std::string WrongCommand(const CLI::App& app, const std::vector<std::string>& args) {
  std::string names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (!args.empty() && command->check_name(args[0])) return "";
    names += (names.empty() ? "" : ", ") + command->get_name();
  }
  if (args.empty()) return "which command? There are: " + names + "; --help explains them";
  if (args[0].starts_with('-')) return "";
  return "there is no command '" + args[0] + "'; there are: " + names;
}

int Main(int argc, char** argv) {
  // What a launcher on another host starts here.
  if (argc == 2 && std::string_view(argv[1]) == "run-agent") return RunRemoteAgent();
  CLI::App app(
      "Decentralized deep learning: neighbour averaging that overlaps with back-propagation");
  app.name("bluefog");
  app.set_version_flag("-v,--version", "bluefog " BLUEFOG_VERSION);
  app.require_subcommand(1);
  app.failure_message([](const CLI::App* at, const CLI::Error& error) {
    std::string command = "bluefog";
    for (const CLI::App* sub : at->get_subcommands()) command += " " + sub->get_name();
    return command + ": " + error.what() + "\n" + command + " --help explains the options\n";
  });
  AddRun(app);
  AddPerf(app);
  AddTopo(app);
  AddInfo(app);

  std::vector<std::string> args(argv + 1, argv + argc);
  const std::string_view self = argv[0];
  if (self.substr(self.rfind('/') + 1) == "bfrun") args.insert(args.begin(), "run");
  if (const std::string error = WrongCommand(app, args); !error.empty()) {
    std::cerr << "bluefog: " << error << std::endl;
    return kUsageError;
  }
  RepairLongOptions(app, args);
  try {
    app.parse(std::vector<std::string>(args.rbegin(), args.rend()));
  } catch (const CLI::RuntimeError& e) {
    return e.get_exit_code();
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kUsageError;
  }
  return 0;
}

}  // namespace
}  // namespace bluefog::tools

int main(int argc, char** argv) { return bluefog::tools::Main(argc, argv); }
