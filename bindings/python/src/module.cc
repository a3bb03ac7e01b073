// bluefog._core: the engine for Python. Private; the package `bluefog` is what users see.
#include <pybind11/pybind11.h>

#include "communicator.h"

PYBIND11_MODULE(_core, module) {
  module.attr("__version__") = BLUEFOG_VERSION;
  bluefog::python::BindTopology(module);
  bluefog::python::BindCommunicator(module);
  bluefog::python::BindOptimizer(module);
}
