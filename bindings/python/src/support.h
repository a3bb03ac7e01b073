// What every part of the Python module needs: Status to exception, the mark of a forked child,
// objects that the engine may let go of on any thread, and waits that answer Ctrl-C.
#pragma once

#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include <bluefog/status.h>
#include <pybind11/pybind11.h>

namespace bluefog::python {

namespace py = pybind11;

/// Longest time between two looks at pending signals.
inline constexpr std::chrono::milliseconds kSignalSlice{100};

/// Raises bluefog.BluefogError, or its subclass that is also a ValueError for InvalidArgument.
/// Needs the GIL.
[[noreturn]] void Throw(const Status& status);
inline void ThrowIfError(const Status& status) {
  if (!status.ok()) Throw(status);
}
template <typename T>
T ValueOrThrow(StatusOr<T> value) {
  if (!value.ok()) Throw(value.status());
  return *std::move(value);
}

/// True in a child forked since this process made its first communicator: the engine's threads are
/// gone, and after shutdown() still what the control plane (gRPC) had of them.
bool InForkedChild();
/// Raises in such a child.
void ThrowIfForked();
/// From now on a fork marks the child.
void MarkForksFromNowOn();

/// A reference that may be dropped on any thread, with or without the GIL: the object is put aside
/// and let go of by the next DropReleased.
std::shared_ptr<void> KeepAlive(py::object object);
/// Lets go of what was put aside. Needs the GIL.
void DropReleased();

/// Raises KeyboardInterrupt (or what the handler raises) when a signal is pending. Needs the GIL.
inline void CheckSignals() {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

/// Calls wait(slice) without the GIL until it returns a Status or a signal's handler raises;
/// nullopt means that the slice ran out. (A status would not do: an operation's own may be
/// DeadlineExceeded, and it may end just after its slice.)
template <typename Wait>
Status WaitInSlices(Wait wait) {
  for (;;) {
    std::optional<Status> status;
    {
      py::gil_scoped_release release;
      status = wait(kSignalSlice);
    }
    if (status) return *std::move(status);
    CheckSignals();
  }
}

/// Runs `function`, which may block long and cannot be cut short, on a thread of its own while this
/// one watches for signals. After Ctrl-C the result is discarded when it comes.
template <typename Function>
auto RunInterruptibly(Function function) -> decltype(function()) {
  using Result = decltype(function());
  std::packaged_task<Result()> task(std::move(function));
  std::future<Result> future = task.get_future();
  std::thread(std::move(task)).detach();
  for (;;) {
    {
      py::gil_scoped_release release;
      if (future.wait_for(kSignalSlice) == std::future_status::ready) return future.get();
    }
    CheckSignals();
  }
}

}  // namespace bluefog::python
