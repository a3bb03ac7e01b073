// Communicator and Work for Python.
#include "communicator.h"

#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "border.h"
#include "support.h"

namespace bluefog::python {
namespace {

using Weights = std::vector<std::pair<int, double>>;

std::vector<Edge> ToEdges(const Weights& weights) {
  std::vector<Edge> edges;
  for (const auto& [rank, weight] : weights) edges.push_back({rank, weight});
  return edges;
}

class PyWork {
 public:
  PyWork(std::shared_ptr<Communicator> communicator, std::shared_ptr<Work> work)
      : communicator_(std::move(communicator)), work_(std::move(work)) {}
  PyWork(PyWork&&) = default;
  ~PyWork() {
    // In a forked child the engine's locks may be held for ever: let it be.
    if (InForkedChild()) new std::shared_ptr<Work>(std::move(work_));
  }

  bool Done() const {
    ThrowIfForked();
    return work_->done();
  }

  void Wait() const {
    ThrowIfForked();
    Status status;
    if (work_->done()) {
      const py::gil_scoped_release release;
      status = work_->Wait();
    } else {
      status = WaitInSlices([this](auto slice) -> std::optional<Status> {
        Status s = work_->Wait(slice);
        if (!absl::IsDeadlineExceeded(s)) return s;
        if (!work_->done()) return std::nullopt;
        return work_->Wait();  // Its own.
      });
    }
    DropReleased();
    ThrowIfError(status);
  }

  py::array Numpy() const { return ToNumpy(work_->output(), work_->output_memory()); }
  py::capsule Dlpack() const { return ToDlpack(work_->output(), work_->output_memory()); }
  py::object Tensor(const py::type& type) const {
    return ToTensor(work_->output(), work_->output_memory(), type);
  }

 private:
  std::shared_ptr<Communicator> communicator_;  // A wait outlives bf.shutdown() in another thread.
  std::shared_ptr<Work> work_;
};

// Joins the job. Ctrl-C while it waits for the other ranks gives up.
Session Create() {
  ThrowIfForked();
  std::exception_ptr signal;
  CommunicatorOptions options;
  options.config = ValueOrThrow(Config::FromEnvironment());
  options.interrupted = [&signal] {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() == 0) return false;
    signal = std::make_exception_ptr(py::error_already_set());
    return true;
  };
  StatusOr<std::unique_ptr<Communicator>> communicator = nullptr;
  {
    const py::gil_scoped_release release;
    communicator = Communicator::Create(options);
  }
  if (signal) std::rethrow_exception(signal);
  return Session(ValueOrThrow(std::move(communicator)));
}

// What an operation works on, checked as far as one rank can. Nullopt: the input has gaps or
// overlaps and the caller should pass a contiguous copy.
std::optional<Imported> ImportInput(Op op, const std::string& name, const py::object& input,
                                    const py::object& owner, bool in_place, bool average) {
  const auto what = [&] {
    return "tensor " + (name.empty() ? std::string() : "'" + name + "' ") + "of " + NameOf(op);
  };
  Imported tensor = Import(input, what, owner);
  if (in_place && !tensor.writable) {
    Throw(absl::InvalidArgumentError(what() + "_ is read-only memory (" + tensor.view.ToString() +
                                     "): pass a copy, or use the call that returns its result"));
  }
  // Blocks are gathered along the first dimension, which must be the outermost in memory.
  if (op == Op::kAllgather && !tensor.view.IsContiguous()) return std::nullopt;
  if (op == Op::kAllreduce && average && !IsFloating(tensor.view.dtype)) {
    py::set_error(PyExc_AssertionError,
                  (what() + " is " + tensor.view.ToString() +
                   ": an average of integers is not an integer; use average=False")
                      .c_str());
    throw py::error_already_set();
  }
  if (!tensor.dense) {
    if (!in_place) return std::nullopt;
    Throw(absl::InvalidArgumentError(
        what() + "_ is not dense in memory (" + tensor.view.ToString() +
        "): in place works on tensors without gaps; pass a contiguous tensor, or use the call "
        "that returns its result"));
  }
  return tensor;
}

std::optional<PyWork> Submit(const Session& session, Op op, const std::string& name,
                             const py::object& input, const py::object& owner, bool in_place,
                             bool average, int root, std::optional<double> self_weight,
                             const Weights& src, const std::optional<Weights>& dst,
                             const std::optional<std::string>& message_dtype, bool local) {
  Communicator& communicator = session.get();
  DropReleased();
  OpSpec spec;
  spec.op = op;
  spec.name = name;
  spec.average = average;
  spec.root = root;
  spec.local = local;
  spec.input = TensorView::Of(nullptr, 0, DType::kFloat32);  // Of a barrier.
  if (!input.is_none()) {
    std::optional<Imported> tensor = ImportInput(op, name, input, owner, in_place, average);
    if (!tensor) return std::nullopt;
    spec.input = tensor->view;
    if (in_place) spec.output = tensor->view;
    spec.keep_alive = KeepAlive(std::move(tensor->owner));
  }
  if (message_dtype) spec.message_dtype = DTypeFromName(*message_dtype);
  if (self_weight) {
    spec.weights = MixingWeights{*self_weight, ToEdges(src), std::nullopt};
    if (dst) spec.weights->dst = ToEdges(*dst);
  }
  StatusOr<std::shared_ptr<Work>> work = absl::UnknownError("");
  {
    const py::gil_scoped_release release;
    work = communicator.Submit(std::move(spec));
  }
  return PyWork(session.shared(), ValueOrThrow(std::move(work)));
}

void SetTopology(const Session& session, const TopologySequence& topology,
                 Status (Communicator::*set)(TopologySequence)) {
  Communicator& communicator = session.get();
  Status status;
  {
    const py::gil_scoped_release release;
    status = (communicator.*set)(topology);
  }
  ThrowIfError(status);
}

py::dict Stats(const Session& session) {
  const Communicator& communicator = session.get();
  EngineStats s;
  {
    // Whoever drives holds the engine's lock, without the GIL.
    const py::gil_scoped_release release;
    s = communicator.stats();
  }
  return py::dict(py::arg("ops_submitted") = s.ops_submitted, py::arg("ops_done") = s.ops_done,
                  py::arg("ops_failed") = s.ops_failed, py::arg("messages_sent") = s.messages_sent,
                  py::arg("bytes_sent") = s.bytes_sent, py::arg("posts_sent") = s.posts_sent,
                  py::arg("nacks_sent") = s.nacks_sent, py::arg("allocations") = s.allocations,
                  py::arg("bytes_pinned") = s.bytes_pinned,
                  py::arg("control_messages") = s.control_messages,
                  py::arg("nonfinite_gradients") = s.nonfinite_gradients,
                  py::arg("busy_ns") = s.busy_ns, py::arg("blocked_ns") = s.blocked_ns);
}

std::pair<TensorView, std::shared_ptr<void>> Allocate(const Session& session,
                                                      const std::vector<int64_t>& shape,
                                                      const std::string& dtype) {
  TensorView view = ContiguousView(nullptr, DTypeFromName(dtype), shape);
  std::shared_ptr<std::byte> memory = ValueOrThrow(session.get().Allocate(view.bytes()));
  view.data = memory.get();
  return {view, std::move(memory)};
}

}  // namespace

Session::Session(std::unique_ptr<Communicator> communicator)
    : communicator_(communicator.release(), [](Communicator* pointer) {
        if (InForkedChild()) return;
        if (PyGILState_Check() != 0) {
          const py::gil_scoped_release release;
          delete pointer;
        } else {
          delete pointer;
        }
      }) {
  MarkForksFromNowOn();
}

Communicator& Session::get() const {
  ThrowIfForked();
  return *communicator_;
}

void BindCommunicator(py::module_& module) {
  py::enum_<Op>(module, "Op")
      .value("neighbor_allreduce", Op::kNeighborAllreduce)
      .value("hierarchical_neighbor_allreduce", Op::kHierarchicalNeighborAllreduce)
      .value("allreduce", Op::kAllreduce)
      .value("broadcast", Op::kBroadcast)
      .value("allgather", Op::kAllgather)
      .value("barrier", Op::kBarrier);

  py::class_<PyWork>(module, "Work")
      .def("done", &PyWork::Done)
      .def("wait", &PyWork::Wait)
      .def("to_numpy", &PyWork::Numpy)
      .def("to_dlpack", &PyWork::Dlpack)
      .def("to_tensor", &PyWork::Tensor);

  py::class_<Session>(module, "Communicator")
      .def_static("create", &Create)
      .def_property_readonly("rank", [](const Session& s) { return s.get().rank(); })
      .def_property_readonly("size", [](const Session& s) { return s.get().size(); })
      .def_property_readonly("local_rank", [](const Session& s) { return s.get().local_rank(); })
      .def_property_readonly("local_size", [](const Session& s) { return s.get().local_size(); })
      .def_property_readonly("machine_rank",
                             [](const Session& s) { return s.get().machine_rank(); })
      .def_property_readonly("machine_size",
                             [](const Session& s) { return s.get().machine_size(); })
      .def_property_readonly("is_homogeneous",
                             [](const Session& s) { return s.get().is_homogeneous(); })
      .def_property_readonly("launched_by", [](const Session& s) { return s.get().launched_by(); })
      .def("set_topology",
           [](const Session& session, const TopologySequence& topology) {
             SetTopology(session, topology, &Communicator::SetTopology);
           })
      .def("set_machine_topology",
           [](const Session& session, const TopologySequence& topology) {
             SetTopology(session, topology, &Communicator::SetMachineTopology);
           })
      .def("topology",
           [](const Session& s) {
             return std::const_pointer_cast<TopologySequence>(s.get().topology());
           })
      .def("machine_topology",
           [](const Session& s) {
             return std::const_pointer_cast<TopologySequence>(s.get().machine_topology());
           })
      .def("submit", &Submit, py::arg("op"), py::arg("name") = "", py::arg("input") = py::none(),
           py::arg("owner") = py::none(), py::arg("in_place") = false, py::arg("average") = true,
           py::arg("root") = 0, py::arg("self_weight") = py::none(), py::arg("src") = Weights{},
           py::arg("dst") = py::none(), py::arg("message_dtype") = py::none(),
           py::arg("local") = false)
      .def(
          "check_in_place",
          [](const Session&, Op op, const py::object& input, const py::object& owner,
             bool average) { ImportInput(op, "", input, owner, /*in_place=*/true, average); },
          py::arg("op"), py::arg("input"), py::arg("owner") = py::none(), py::arg("average") = true)
      .def("empty_numpy",
           [](const Session& session, const std::vector<int64_t>& shape, const std::string& dtype) {
             auto [view, memory] = Allocate(session, shape, dtype);
             return ToNumpy(view, std::move(memory));
           })
      .def("empty_dlpack",
           [](const Session& session, const std::vector<int64_t>& shape, const std::string& dtype) {
             auto [view, memory] = Allocate(session, shape, dtype);
             return ToDlpack(view, std::move(memory));
           })
      .def("stats", &Stats)
      .def("shutdown", [](const Session& session) {
        Communicator& communicator = session.get();
        std::exception_ptr signal;
        {
          const py::gil_scoped_release release;
          communicator.Shutdown([&signal] {
            const py::gil_scoped_acquire acquire;
            if (PyErr_CheckSignals() == 0) return false;
            signal = std::make_exception_ptr(py::error_already_set());
            return true;
          });
        }
        DropReleased();
        if (signal) std::rethrow_exception(signal);
      });
  module.def("in_forked_child", &InForkedChild);
}

}  // namespace bluefog::python
