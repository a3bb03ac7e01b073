// Optional parts (control plane, UCX, CUDA, NCCL) are shared objects behind one extern "C" factory,
// loaded at run time with RTLD_LOCAL | RTLD_DEEPBIND so that their libraries never meet another
// copy in the process (TensorFlow exports its own gRPC and protobuf). DEEPBIND is left out under
// sanitizers. Nothing is allocated on one side and freed on the other.
#pragma once

#include <string>
#include <vector>

#include <bluefog/status.h>

namespace bluefog {

struct ComponentInfo {
  std::string name, path;
  bool found = false;
  std::string problem;  ///< Why it cannot be loaded, and what to install.
};

/// Loads `libbluefog_<name>.so` from `directory` (empty: where libbluefog.so itself lies, then the
/// loader's path) and returns the address of `factory`. Never unloaded. NotFound says what to
/// install.
StatusOr<void*> LoadComponentSymbol(const std::string& name, const std::string& factory,
                                    const std::string& directory);
/// One entry for every component this version knows, found or not.
std::vector<ComponentInfo> DescribeComponents(const std::string& directory);

}  // namespace bluefog
