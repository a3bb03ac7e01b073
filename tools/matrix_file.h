// Reads a weight matrix from a text file, for `bluefog topo --matrix`.
#pragma once

#include <string>

#include <bluefog/topology.h>

namespace bluefog::tools {

/// Row i holds W[i][0] … W[i][n-1], separated by commas or blanks; numbers or fractions ("1/3").
/// Blank lines and what follows '#' are skipped; "-" reads standard input. Errors name file, line
/// and entry.
StatusOr<Topology> ReadMatrix(const std::string& path);

}  // namespace bluefog::tools
