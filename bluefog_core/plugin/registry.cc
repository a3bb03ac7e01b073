// The optimizers by name. Filled while static objects are constructed; read from any thread.
#include <map>
#include <utility>

#include <bluefog/optimizer.h>

#include "base/log.h"
#include "base/mutex.h"

namespace bluefog {
namespace {

class Registry {
 public:
  // Never destroyed: static objects elsewhere may outlive this file's.
  static Registry& Get() {
    static Registry* const registry = new Registry;
    return *registry;
  }

  bool Add(const std::string& name, OptimizerFactory factory) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    return factories_.emplace(name, std::move(factory)).second;
  }

  OptimizerFactory Find(const std::string& name) EXCLUDES(mu_) {
    MutexLock lock(mu_);
    const auto it = factories_.find(name);
    return it == factories_.end() ? nullptr : it->second;
  }

  std::vector<std::string> Names() EXCLUDES(mu_) {
    MutexLock lock(mu_);
    std::vector<std::string> names;
    for (const auto& [name, factory] : factories_) names.push_back(name);
    return names;
  }

 private:
  Mutex mu_;
  std::map<std::string, OptimizerFactory> factories_ GUARDED_BY(mu_);
};

}  // namespace

bool RegisterOptimizer(const std::string& name, OptimizerFactory factory) {
  if (name.empty() || factory == nullptr) {
    BLUEFOG_LOG(kError) << "an optimizer plugin needs a name and a factory; got name '" << name
                        << "'";
    return false;
  }
  if (!Registry::Get().Add(name, std::move(factory))) {
    BLUEFOG_LOG(kError) << "optimizer '" << name
                        << "' is registered already; the later one is ignored";
    return false;
  }
  return true;
}

StatusOr<std::unique_ptr<Optimizer>> MakeOptimizer(const std::string& name) {
  // The factory runs outside the lock, so that it may register or make others.
  const OptimizerFactory factory = Registry::Get().Find(name);
  if (factory == nullptr) {
    std::string known;
    for (const std::string& other : OptimizerNames()) known += (known.empty() ? "" : ", ") + other;
    return absl::NotFoundError("no optimizer '" + name +
                               "'; there are: " + (known.empty() ? "none" : known));
  }
  std::unique_ptr<Optimizer> optimizer = factory();
  if (optimizer == nullptr) {
    return absl::InternalError("the factory of optimizer '" + name + "' returned nothing");
  }
  return optimizer;
}

std::vector<std::string> OptimizerNames() { return Registry::Get().Names(); }

}  // namespace bluefog
