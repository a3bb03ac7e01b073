// `bluefog info`: version, build, components, plugins, settings.
#include "commands.h"

namespace bluefog::tools {

void AddInfo(CLI::App& app) {
  app.add_subcommand("info", "Version, build, components, plugins, settings");
}

}  // namespace bluefog::tools
