// Tensors in and out: NumPy arrays by their buffers, everything else by DLPack. No framework is
// known.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <bluefog/tensor.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace bluefog::python {

namespace py = pybind11;

/// A tensor of the caller, borrowed for as long as `owner` lives.
struct Imported {
  TensorView view;
  py::object owner;  ///< The array, or a capsule that gives the DLPack tensor back.
  bool writable = true;
  bool dense = true;  ///< False: `view` has a pointer and a shape, but gaps or overlaps.
};

/// What a tensor is called in errors: "tensor 'x' of allreduce". Asked for only when there is one.
using Naming = std::function<std::string()>;

/// `object`: a numpy.ndarray, a DLPack capsule or anything with __dlpack__. TypeError: not a
/// tensor, or of a dtype that does not exist here; ValueError: not on the CPU.
///
/// With an `owner`, which keeps its memory alive, `object` is only read: its type must have
/// DLPack's C exchange API, which costs a tenth of a capsule.
Imported Import(const py::handle& object, const Naming& what, const py::object& owner = py::none());

/// The memory as a writable NumPy array, as a DLPack capsule, or as a tensor of a type that has
/// DLPack's C exchange API. `memory` lives as long as the result.
py::array ToNumpy(const TensorView& view, std::shared_ptr<void> memory);
py::capsule ToDlpack(const TensorView& view, std::shared_ptr<void> memory);
py::object ToTensor(const TensorView& view, std::shared_ptr<void> memory, const py::type& type);

/// "float32" and so on; TypeError lists the names.
DType DTypeFromName(const std::string& name);
/// A contiguous view; more than kMaxDims dimensions are merged into the last.
TensorView ContiguousView(void* data, DType dtype, const std::vector<int64_t>& shape);

}  // namespace bluefog::python
