// The communicator as Python holds it: shared by the module, its works and its optimizers.
#pragma once

#include <memory>

#include <bluefog/communicator.h>
#include <pybind11/pybind11.h>

namespace bluefog::python {

namespace py = pybind11;

/// Raises in a forked child; otherwise the communicator.
class Session {
 public:
  explicit Session(std::unique_ptr<Communicator> communicator);
  Communicator& get() const;
  /// For who needs the communicator to outlive this object.
  const std::shared_ptr<Communicator>& shared() const { return communicator_; }

 private:
  std::shared_ptr<Communicator> communicator_;
};

void BindCommunicator(py::module_& module);
void BindOptimizer(py::module_& module);
void BindTopology(py::module_& module);

}  // namespace bluefog::python
