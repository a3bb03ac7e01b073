// DistributedOptimizer for Python: tensors come as DLPack capsules, so that pointer, dtype and
// strides of each are read and compared anew at every step.
#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <bluefog/distributed_optimizer.h>
#include <pybind11/stl.h>

#include "border.h"
#include "communicator.h"
#include "support.h"

namespace bluefog::python {
namespace {

using Parameter = std::tuple<std::string, py::object, int>;  // name, tensor, group
// By group: lr, momentum, weight_decay and the plugin's own.
using Hypers = std::vector<std::vector<double>>;

// What Bind found to differ from the registration; the Python side knows what to do about it. An
// int for Python, because it is returned for every parameter in every step.
enum Mismatch : int { kNone = 0, kParameter = 1, kGradient = 2, kState = 3 };

class PyOptimizer {
 public:
  PyOptimizer(const Session& session, const std::string& plugin,
              const std::vector<Parameter>& parameters, std::shared_ptr<TopologySequence> topology,
              bool allow_unstable, int64_t step, const std::string& agreed, const std::string& name,
              const std::optional<std::string>& message_dtype, bool delayed, bool over_machines)
      : communicator_(session.shared()) {
    Communicator* communicator = &session.get();
    DistributedOptimizerOptions options;
    options.plugin = plugin;
    options.topology = std::move(topology);
    options.allow_unstable = allow_unstable;
    options.step = step;
    options.agreed = agreed;
    options.name = name;
    if (message_dtype) options.message_dtype = DTypeFromName(*message_dtype);
    options.delayed = delayed;
    if (over_machines) options.communication = Collective::kHierarchicalNeighborAllreduce;
    try {
      for (const auto& [param, tensor, group] : parameters) {
        Register(param, tensor, group, &options);
      }
    } catch (const py::error_already_set& error) {
      DistributedOptimizer::NotCreated(communicator, py::str(error.value()), name);
      throw;
    } catch (const std::exception& error) {
      DistributedOptimizer::NotCreated(communicator, error.what(), name);
      throw;
    }
    bindings_.resize(views_.size());
    // The engine's side of Create belongs to whoever still runs it after a Ctrl-C.
    auto shared_options = std::make_shared<DistributedOptimizerOptions>(std::move(options));
    optimizer_ =
        ValueOrThrow(RunInterruptibly([communicator, shared_options, hold = session.shared()] {
          return DistributedOptimizer::Create(communicator, std::move(*shared_options));
        }));
  }

  PyOptimizer(const PyOptimizer&) = delete;
  PyOptimizer& operator=(const PyOptimizer&) = delete;

  ~PyOptimizer() {
    if (optimizer_ == nullptr) return;
    if (InForkedChild() || optimizer_->in_step()) {
      // The engine may still read the tensors: they stay, and so does it.
      (void)optimizer_.release();
      new std::shared_ptr<Communicator>(communicator_);
      for (py::object& object : keep_) (void)object.release();
      return;
    }
    const py::gil_scoped_release release;
    optimizer_.reset();
  }

  /// Step and Ready use these hyper-parameters until the next call.
  void SetHypers(const Hypers& hypers) {
    hypers_.clear();
    for (const std::vector<double>& group : hypers) {
      Hyper h{.lr = group.at(0), .momentum = group.at(1), .weight_decay = group.at(2)};
      if (group.size() > 3 + h.own.size()) throw py::value_error("too many hyper-parameters");
      std::copy(group.begin() + 3, group.end(), h.own.begin());
      hypers_.push_back(h);
    }
  }

  /// Binds parameter `index` for this step. Nothing is bound where the result is not kNone.
  int Bind(int index, const py::object& x, const py::object& gradient, const py::args& states) {
    ThrowIfForked();
    const auto i = static_cast<size_t>(index);
    const TensorView& expected = views_.at(i);
    ParameterBinding binding;
    Imported tensor = Import(x, What);
    if (!SameLayout(tensor, expected)) return kParameter;
    binding.x = tensor.view.data;
    std::array<py::object, 2 + kMaxStates> keep;
    keep[0] = std::move(tensor.owner);
    if (!gradient.is_none()) {
      tensor = Import(gradient, What);
      if (!SameLayout(tensor, expected)) return kGradient;
      binding.g = tensor.view.data;
      keep[1] = std::move(tensor.owner);
    }
    for (size_t k = 0; k < states.size() && k < kMaxStates; ++k) {
      tensor = Import(states[k], What);
      if (!SameLayout(tensor, expected)) return kState;
      binding.state[k] = tensor.view.data;
      keep[2 + k] = std::move(tensor.owner);
    }
    bindings_[i] = binding;
    for (py::object& object : keep) {
      if (object) keep_.push_back(std::move(object));
    }
    return kNone;
  }

  int Ready(int index, const py::object& x, const py::object& gradient, const py::args& states) {
    const int mismatch = Bind(index, x, gradient, states);
    if (mismatch == kNone) {
      ThrowIfError(optimizer_->Ready(index, bindings_[static_cast<size_t>(index)], hypers_));
    }
    return mismatch;
  }

  /// Opens the gates and waits. After a Ctrl-C in it the next call goes on waiting.
  void Step() {
    ThrowIfForked();
    if (!begun_) {
      Status status;
      {
        const py::gil_scoped_release release;
        status = optimizer_->BeginStep(bindings_, hypers_);
      }
      ThrowIfError(status);
      begun_ = true;
    }
    const Status status = WaitInSlices([this](auto slice) -> std::optional<Status> {
      Status s = optimizer_->WaitStep(slice);
      if (absl::IsDeadlineExceeded(s) && optimizer_->in_step()) return std::nullopt;
      return s;
    });
    begun_ = false;
    if (!optimizer_->in_step()) keep_.clear();
    DropReleased();
    ThrowIfError(status);
  }

  /// Takes what is under way, in delayed mode; parameters must be bound. Answers Ctrl-C, and may
  /// then be called again.
  void Synchronize() {
    ThrowIfForked();
    const Status status = WaitInSlices([this](auto slice) -> std::optional<Status> {
      Status s = optimizer_->Synchronize(bindings_, slice);
      if (absl::IsDeadlineExceeded(s)) return std::nullopt;
      return s;
    });
    keep_.clear();
    DropReleased();
    ThrowIfError(status);
  }

  DistributedOptimizer& get() const {
    ThrowIfForked();
    return *optimizer_;
  }
  const Traits& traits() const { return optimizer_->traits(); }
  bool begun() const { return begun_; }

 private:
  void Register(const std::string& name, const py::object& tensor, int group,
                DistributedOptimizerOptions* options) {
    const auto what = [&] { return "parameter '" + name + "'"; };
    const Imported imported = Import(tensor, what);
    if (!imported.dense) {
      Throw(absl::InvalidArgumentError(what() + " is not dense in memory (" +
                                       imported.view.ToString() +
                                       "): make it contiguous before the optimizer is made"));
    }
    if (imported.view.dtype != DType::kFloat32 && imported.view.dtype != DType::kFloat64) {
      Throw(absl::InvalidArgumentError(
          what() + " is " + imported.view.ToString() +
          ": parameters must be float32 or float64; keep the model in float32 and compute in "
          "lower precision under autocast"));
    }
    views_.push_back(imported.view);
    options->params.push_back({.name = name,
                               .count = imported.view.count,
                               .dtype = imported.view.dtype,
                               .group = group,
                               .layout_hash = imported.view.LayoutHash(),
                               .layout = imported.view.ToString()});
  }
  static bool SameLayout(const Imported& tensor, const TensorView& expected) {
    return tensor.dense && tensor.view.dtype == expected.dtype &&
           tensor.view.ndim == expected.ndim && tensor.view.shape == expected.shape &&
           (tensor.view.strides == expected.strides ||
            tensor.view.LayoutHash() == expected.LayoutHash());
  }

  static std::string What() { return "a tensor of the optimizer"; }

  // Destroyed in reverse: the optimizer first, what it reads and who runs it later.
  std::shared_ptr<Communicator> communicator_;
  std::vector<py::object> keep_;
  std::vector<TensorView> views_;
  std::vector<ParameterBinding> bindings_;
  std::vector<Hyper> hypers_;
  bool begun_ = false;
  std::unique_ptr<DistributedOptimizer> optimizer_;
};

}  // namespace

void BindOptimizer(py::module_& module) {
  py::class_<PyOptimizer>(module, "DistributedOptimizer")
      .def(py::init<const Session&, const std::string&, const std::vector<Parameter>&,
                    std::shared_ptr<TopologySequence>, bool, int64_t, const std::string&,
                    const std::string&, const std::optional<std::string>&, bool, bool>(),
           py::arg("communicator"), py::arg("plugin"), py::arg("params"), py::arg("topology"),
           py::arg("allow_unstable"), py::arg("step"), py::arg("agreed"), py::arg("name"),
           py::arg("message_dtype") = py::none(), py::arg("delayed") = false,
           py::arg("over_machines") = false)
      .def("retire",
           [](const PyOptimizer& o, const std::string& why) {
             DistributedOptimizer& optimizer = o.get();
             const py::gil_scoped_release release;
             optimizer.Retire(why);
           })
      .def_property_readonly("name", [](const PyOptimizer& o) { return o.get().name(); })
      .def_property_readonly(
          "failure", [](const PyOptimizer& o) { return std::string(o.get().status().message()); })
      .def("set_hypers", &PyOptimizer::SetHypers)
      .def("bind", &PyOptimizer::Bind)
      .def("ready", &PyOptimizer::Ready)
      .def("run_step", &PyOptimizer::Step)
      .def("synchronize", &PyOptimizer::Synchronize)
      .def("set_topology",
           [](const PyOptimizer& o, std::shared_ptr<TopologySequence> topology, int64_t from_step) {
             ThrowIfError(o.get().SetTopology(std::move(topology), from_step));
           })
      .def_property(
          "step", [](const PyOptimizer& o) { return o.get().step(); },
          [](const PyOptimizer& o, int64_t step) { ThrowIfError(o.get().SetStep(step)); })
      .def_property_readonly("begun", &PyOptimizer::begun)
      .def_property_readonly("bytes_pinned",
                             [](const PyOptimizer& o) { return o.get().bytes_pinned(); });

  module.def("optimizer_not_created",
             [](const Session& session, const std::string& why, const std::string& name) {
               Communicator* const communicator = &session.get();
               const py::gil_scoped_release release;
               DistributedOptimizer::NotCreated(communicator, why, name);
             });
  module.def("optimizer_traits", [](const std::string& name) {
    const std::unique_ptr<Optimizer> optimizer = ValueOrThrow(MakeOptimizer(name));
    const Traits& t = optimizer->traits();
    py::list hypers;
    for (const HyperInfo& h : t.hypers) {
      hypers.append(py::make_tuple(h.name, h.initial, h.lowest, h.highest));
    }
    return py::dict(
        py::arg("name") = t.name, py::arg("summary") = t.summary, py::arg("source") = t.source,
        py::arg("payloads") = t.payloads, py::arg("states") = t.states, py::arg("hypers") = hypers,
        py::arg("delayed") = t.delayed, py::arg("uses_topology") = t.uses_topology,
        py::arg("needs_symmetric") = t.needs_symmetric, py::arg("needs_static") = t.needs_static);
  });
}

}  // namespace bluefog::python
