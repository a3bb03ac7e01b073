// Finds and opens the optional parts, and says what to install where one does not open.
#include "base/component.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <string_view>

namespace bluefog {
namespace {

struct KnownComponent {
  const char* name;
  const char* install;  // What makes an existing file load.
  const char* build;    // What brings it into a build; null: it is in every one.
};
constexpr KnownComponent kKnown[] = {
    {"control", "apt-get install libgrpc++1.51", nullptr},
    {"ucx", "apt-get install libucx0", "apt-get install libucx-dev"},
    {"cuda", "an NVIDIA driver (libcuda.so.1) and the CUDA 13 runtime", ""},
    {"nccl", "pip install nvidia-nccl-cu13", ""},
};

const KnownComponent* FindKnown(const std::string& name) {
  for (const KnownComponent& known : kKnown) {
    if (name == known.name) return &known;
  }
  return nullptr;
}

/// Directory of the file that holds this code (libbluefog.so, or a program that contains it); empty
/// where the loader does not tell.
std::string OwnDirectory() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&OwnDirectory), &info) == 0 ||
      info.dli_fname == nullptr) {
    return "";
  }
  const std::string_view file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string_view::npos ? "" : std::string(file.substr(0, slash));
}

int OpenFlags() {
#if defined(BLUEFOG_SANITIZED)
  return RTLD_NOW | RTLD_LOCAL;  // The sanitizers' allocator must be the one of every object.
#else
  return RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND;
#endif
}

struct Opened {
  void* handle = nullptr;
  std::string path;     // Of the opened file.
  std::string problem;  // Each path tried and why it failed.
  bool file_exists = false;
};

Opened Open(const std::string& name, const std::string& directory) {
  const std::string file = "libbluefog_" + name + ".so";
  std::vector<std::string> candidates;
  if (!directory.empty()) {
    candidates = {directory + "/" + file};
  } else {
    if (const std::string own = OwnDirectory(); !own.empty())
      candidates.push_back(own + "/" + file);
    candidates.push_back(file);
  }
  Opened result;
  for (const std::string& path : candidates) {
    result.handle = dlopen(path.c_str(), OpenFlags());
    if (result.handle != nullptr) {
      const link_map* map = nullptr;
      result.path = dlinfo(result.handle, RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : path;
      return result;
    }
    const char* error = dlerror();
    const std::string why = error == nullptr ? "unknown error" : error;
    if (!result.problem.empty()) result.problem += "; ";
    result.problem += "tried ";
    if (why.rfind(path, 0) != 0) result.problem += path + ": ";  // Most messages begin with it.
    result.problem += why;
    if (access(path.c_str(), F_OK) == 0) {
      result.file_exists = true;
      break;  // A broken file here must not be hidden by another one elsewhere.
    }
  }
  return result;
}

std::string NotBuilt(const KnownComponent& known) {
  std::string text = "not part of this build";
  if (*known.build != '\0') text += std::string("; ") + known.build + ", and build bluefog again";
  return text;
}

/// What the user reads for a component that did not open.
std::string Explain(const std::string& name, const Opened& opened) {
  const KnownComponent* known = FindKnown(name);
  std::string text = "component '" + name + "' cannot be loaded (" + opened.problem + ")";
  if (known == nullptr) return text;
  if (!opened.file_exists && known->build != nullptr) return text + ": " + NotBuilt(*known);
  text += "; install what it needs: ";
  text += known->install;
  if (!opened.file_exists) text += ", and reinstall bluefog if the file itself is missing";
  return text;
}

}  // namespace

StatusOr<void*> LoadComponentSymbol(const std::string& name, const std::string& factory,
                                    const std::string& directory) {
  const Opened opened = Open(name, directory);
  if (opened.handle == nullptr) return absl::NotFoundError(Explain(name, opened));
  void* symbol = dlsym(opened.handle, factory.c_str());
  if (symbol == nullptr) {
    return absl::NotFoundError("component '" + name + "' (" + opened.path + ") has no symbol '" +
                               factory +
                               "': it belongs to another version of bluefog; reinstall it");
  }
  return symbol;
}

std::vector<ComponentInfo> DescribeComponents(const std::string& directory) {
  std::vector<ComponentInfo> result;
  for (const KnownComponent& known : kKnown) {
    const Opened opened = Open(known.name, directory);
    ComponentInfo info;
    info.name = known.name;
    info.path = opened.path;
    info.found = opened.handle != nullptr;
    if (!info.found) {
      info.problem = opened.file_exists || known.build == nullptr ? Explain(known.name, opened)
                                                                  : NotBuilt(known);
    }
    result.push_back(std::move(info));
  }
  return result;
}

}  // namespace bluefog
