#include "support.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace bluefog::python {
namespace {

std::atomic<bool> g_mark_forks{false};
std::atomic<bool> g_forked{false};

void AfterForkInChild() {
  if (g_mark_forks.load(std::memory_order_relaxed)) g_forked.store(true, std::memory_order_relaxed);
}

// Never destroyed: the engine's thread may put something aside while the interpreter goes down.
struct Released {
  std::mutex mu;
  std::vector<PyObject*> objects;  // Guarded by mu.
  std::atomic<bool> any{false};
};
Released& GetReleased() {
  static auto* released = new Released;
  return *released;
}

}  // namespace

void Throw(const Status& status) {
  const py::module_ errors = py::module_::import("bluefog._errors");
  const bool invalid = status.code() == absl::StatusCode::kInvalidArgument ||
                       status.code() == absl::StatusCode::kNotFound ||
                       status.code() == absl::StatusCode::kOutOfRange;
  const py::object type = errors.attr(invalid ? "BluefogValueError" : "BluefogError");
  const py::object error =
      type(std::string(status.message()), absl::StatusCodeToString(status.code()));
  PyErr_SetObject(type.ptr(), error.ptr());
  throw py::error_already_set();
}

bool InForkedChild() { return g_forked.load(std::memory_order_relaxed); }

void ThrowIfForked() {
  if (!InForkedChild()) return;
  Throw(absl::FailedPreconditionError(
      "this process was forked from one that uses bluefog, or has used it, and the engine does not "
      "live on in a forked child: call bluefog in the parent, or start the child with the "
      "\"spawn\" "
      "method"));
}

void MarkForksFromNowOn() {
  static const int registered = pthread_atfork(nullptr, nullptr, &AfterForkInChild);
  (void)registered;
  g_mark_forks.store(true, std::memory_order_relaxed);
}

std::shared_ptr<void> KeepAlive(py::object object) {
  return std::shared_ptr<void>(object.release().ptr(), [](void* pointer) {
    if (InForkedChild()) return;
    Released& released = GetReleased();
    const std::lock_guard lock(released.mu);
    released.objects.push_back(static_cast<PyObject*>(pointer));
    released.any.store(true, std::memory_order_release);
  });
}

void DropReleased() {
  Released& released = GetReleased();
  if (!released.any.load(std::memory_order_acquire)) return;
  std::vector<PyObject*> objects;
  {
    const std::lock_guard lock(released.mu);
    objects.swap(released.objects);
    released.any.store(false, std::memory_order_relaxed);
  }
  for (PyObject* object : objects) Py_DECREF(object);
}

}  // namespace bluefog::python
