// `bluefog topo`: a topology in numbers.
#include "commands.h"

namespace bluefog::tools {

void AddTopo(CLI::App& app) {
  app.add_subcommand("topo", "Neighbours, weights and spectrum of a topology");
}

}  // namespace bluefog::tools
