#include "border.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include <absl/container/inlined_vector.h>

#include "dlpack.h"
#include "support.h"

namespace bluefog::python {
namespace {

std::string TypeName(const py::handle& object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

// Fills count, shape and strides (in elements). False if more than kMaxDims dimensions cannot be
// merged, or if there cannot be so many elements.
bool SetShape(TensorView* view, int ndim, const int64_t* shape, const int64_t* strides) {
  view->count = 1;
  absl::InlinedVector<int64_t, kMaxDims> steps(static_cast<size_t>(ndim));
  int64_t step = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    steps[static_cast<size_t>(d)] = strides != nullptr ? strides[d] : step;
    if (shape[d] < 0 || __builtin_mul_overflow(step, std::max<int64_t>(shape[d], 1), &step)) {
      return false;
    }
  }
  for (int d = 0; d < ndim; ++d) view->count *= shape[d];
  absl::InlinedVector<int64_t, kMaxDims> sizes(shape, shape + ndim);
  while (sizes.size() > static_cast<size_t>(kMaxDims)) {
    const size_t last = sizes.size() - 1;
    if (view->count > 0 && sizes[last - 1] != 1 && steps[last - 1] != sizes[last] * steps[last]) {
      return false;
    }
    sizes[last - 1] *= sizes[last];
    steps[last - 1] = steps[last];
    sizes.pop_back();
    steps.pop_back();
  }
  view->ndim = static_cast<int8_t>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), view->shape.begin());
  std::copy(steps.begin(), steps.end(), view->strides.begin());
  return true;
}

std::optional<DType> DTypeOf(char kind, int64_t bytes) {
  switch (kind) {
    case 'f':
      if (bytes == 4) return DType::kFloat32;
      if (bytes == 8) return DType::kFloat64;
      if (bytes == 2) return DType::kFloat16;
      break;
    case 'i':
      if (bytes == 8) return DType::kInt64;
      if (bytes == 4) return DType::kInt32;
      if (bytes == 2) return DType::kInt16;
      if (bytes == 1) return DType::kInt8;
      break;
    case 'u':
      if (bytes == 1) return DType::kUInt8;
      break;
    case 'b':
      return DType::kBool;
    case 'B':  // Ours: bfloat16, which NumPy has no letter for.
      if (bytes == 2) return DType::kBFloat16;
      break;
    default:
      break;
  }
  return std::nullopt;
}

[[noreturn]] void ThrowDType(const std::string& what, const std::string& dtype) {
  throw py::type_error(
      what + " has dtype " + dtype +
      "; supported are float32, float64, float16, bfloat16, int8, uint8, int16, int32, "
      "int64 and bool");
}

// The order of the bytes is this machine's, or does not matter.
bool IsNative(const py::dtype& dtype) {
  constexpr char kForeign = std::endian::native == std::endian::little ? '>' : '<';
  return dtype.byteorder() != kForeign;
}

Imported ImportNumpy(py::array array, const Naming& what) {
  Imported result;
  const py::dtype dtype = array.dtype();
  const std::optional<DType> known = DTypeOf(dtype.kind(), dtype.itemsize());
  if (!known || !IsNative(dtype)) ThrowDType(what(), py::str(py::object(dtype)));
  result.view.dtype = *known;
  result.view.data = const_cast<void*>(array.data());
  result.writable = array.writeable();
  const auto ndim = static_cast<int>(array.ndim());
  absl::InlinedVector<int64_t, kMaxDims> strides(static_cast<size_t>(ndim));
  const int64_t item = dtype.itemsize();
  for (int d = 0; d < ndim; ++d) {
    if (array.strides(d) % item != 0) result.dense = false;
    strides[static_cast<size_t>(d)] = array.strides(d) / item;
  }
  result.dense = SetShape(&result.view, ndim, array.shape(), strides.data()) && result.dense &&
                 result.view.CheckDense().ok();
  result.owner = std::move(array);
  return result;
}

void FromDlTensor(const dlpack::Tensor& tensor, const Naming& what, Imported* result) {
  if (tensor.device.code != dlpack::kCpu && tensor.device.code != dlpack::kCudaHost) {
    const bool cuda =
        tensor.device.code == dlpack::kCuda || tensor.device.code == dlpack::kCudaManaged;
    Throw(absl::InvalidArgumentError(
        what() + " lies on " +
        (cuda ? "cuda:" + std::to_string(tensor.device.index)
              : "a device of DLPack type " + std::to_string(tensor.device.code)) +
        ": only tensors in host memory can be exchanged; move it there first (tensor.cpu())"));
  }
  const char kind = tensor.dtype.code == dlpack::kFloat    ? 'f'
                    : tensor.dtype.code == dlpack::kInt    ? 'i'
                    : tensor.dtype.code == dlpack::kUInt   ? 'u'
                    : tensor.dtype.code == dlpack::kBool   ? 'b'
                    : tensor.dtype.code == dlpack::kBfloat ? 'B'
                                                           : '?';
  const std::optional<DType> dtype = DTypeOf(kind, tensor.dtype.bits / 8);
  if (!dtype || tensor.dtype.lanes != 1) {
    ThrowDType(what(), "of DLPack type " + std::to_string(tensor.dtype.code) + " with " +
                           std::to_string(tensor.dtype.bits) + " bits");
  }
  result->view.dtype = *dtype;
  result->view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  result->dense = SetShape(&result->view, tensor.ndim, tensor.shape, tensor.strides) &&
                  result->view.CheckDense().ok();
}

// Takes the tensor out of the capsule; the result gives it back when it is destroyed.
template <typename Managed>
py::object Adopt(const py::handle& capsule, Managed* managed, const char* used_name) {
  if (PyCapsule_SetName(capsule.ptr(), used_name) != 0) throw py::error_already_set();
  return py::capsule(managed, [](void* pointer) {
    auto* tensor = static_cast<Managed*>(pointer);
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  });
}

Imported ImportCapsule(const py::handle& capsule, const Naming& what) {
  Imported result;
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kName)) {
    auto* managed =
        static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kName));
    result.owner = Adopt(capsule, managed, dlpack::kUsedName);
    FromDlTensor(managed->tensor, what, &result);
  } else if (PyCapsule_IsValid(capsule.ptr(), dlpack::kVersionedName)) {
    auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kVersionedName));
    if (managed->major != 1) {
      throw py::type_error(what() + " uses DLPack version " + std::to_string(managed->major) +
                           "; versions 0 and 1 are known here");
    }
    result.owner = Adopt(capsule, managed, dlpack::kUsedVersionedName);
    result.writable = (managed->flags & dlpack::kReadOnlyFlag) == 0;
    FromDlTensor(managed->tensor, what, &result);
  } else {
    throw py::type_error(what() + " is a capsule, but not an unused DLPack one");
  }
  return result;
}

// TypeError without one that is known here.
const dlpack::ExchangeApi& ApiOf(const py::handle& type) {
  static PyObject* const attribute = PyUnicode_InternFromString(dlpack::kExchangeAttribute);
  const auto capsule = py::reinterpret_steal<py::object>(PyObject_GetAttr(type.ptr(), attribute));
  if (!capsule) throw py::error_already_set();
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeName));
  if (api == nullptr) throw py::error_already_set();
  while (api->major != 1 && api->previous != nullptr) api = api->previous;
  if (api->major != 1) {
    throw py::type_error("the exchange API of " + std::string(py::str(type)) +
                         " has DLPack version " + std::to_string(api->major) +
                         "; version 1 is known here");
  }
  return *api;
}

}  // namespace

Imported Import(const py::handle& object, const Naming& what, const py::object& owner) {
  if (!owner.is_none()) {
    Imported result;
    dlpack::Tensor tensor;
    if (ApiOf(py::type::handle_of(object)).export_borrowed(object.ptr(), &tensor) != 0) {
      throw py::error_already_set();
    }
    FromDlTensor(tensor, what, &result);
    result.owner = owner;
    return result;
  }
  if (PyCapsule_CheckExact(object.ptr())) return ImportCapsule(object, what);
  if (py::isinstance<py::array>(object)) {
    return ImportNumpy(py::reinterpret_borrow<py::array>(object), what);
  }
  if (py::hasattr(object, "__dlpack__")) {
    const py::object capsule = object.attr("__dlpack__")();
    return ImportCapsule(capsule, what);
  }
  throw py::type_error(what() + " is a " + TypeName(object) +
                       "; expected a NumPy array or an object with __dlpack__");
}

namespace {

// By number: by name it would be parsed each time.
py::dtype NumpyType(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return py::dtype::of<float>();
    case DType::kFloat64:
      return py::dtype::of<double>();
    case DType::kInt32:
      return py::dtype::of<int32_t>();
    case DType::kInt64:
      return py::dtype::of<int64_t>();
    default:
      return py::dtype(NameOf(dtype));
  }
}

}  // namespace

py::array ToNumpy(const TensorView& view, std::shared_ptr<void> memory) {
  if (view.dtype == DType::kBFloat16) {
    throw py::type_error("NumPy has no bfloat16; use bluefog.torch, or send float32");
  }
  std::vector<py::ssize_t> shape(view.shape.begin(), view.shape.begin() + view.ndim);
  std::vector<py::ssize_t> strides(view.strides.begin(), view.strides.begin() + view.ndim);
  for (py::ssize_t& stride : strides) stride *= SizeOf(view.dtype);
  const py::dtype dtype = NumpyType(view.dtype);
  if (view.data == nullptr) return py::array(dtype, std::move(shape));
  const py::capsule base(new std::shared_ptr<void>(std::move(memory)), [](void* pointer) {
    if (!InForkedChild()) delete static_cast<std::shared_ptr<void>*>(pointer);
  });
  return py::array(dtype, std::move(shape), std::move(strides), view.data, base);
}

namespace {

dlpack::TypeCode TypeCodeOf(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return dlpack::kBfloat;
    case DType::kInt8:
    case DType::kInt16:
    case DType::kInt32:
    case DType::kInt64:
      return dlpack::kInt;
    case DType::kUInt8:
      return dlpack::kUInt;
    case DType::kBool:
      return dlpack::kBool;
    case DType::kFloat16:
    case DType::kFloat32:
    case DType::kFloat64:
      break;
  }
  return dlpack::kFloat;
}

// `Managed`: either version's struct; lives until its deleter is called.
template <typename Managed>
Managed* NewManaged(const TensorView& view, std::shared_ptr<void> memory) {
  struct Owner {
    Managed managed;
    std::array<int64_t, kMaxDims> shape, strides;
    std::shared_ptr<void> memory;
  };
  auto* owner = new Owner{{}, view.shape, view.strides, std::move(memory)};
  owner->managed.tensor = {
      view.data,
      {dlpack::kCpu, 0},
      view.ndim,
      {TypeCodeOf(view.dtype), static_cast<uint8_t>(8 * SizeOf(view.dtype)), 1},
      owner->shape.data(),
      owner->strides.data(),
      0};
  owner->managed.context = owner;
  owner->managed.deleter = [](Managed* managed) {
    if (!InForkedChild()) delete static_cast<Owner*>(managed->context);
  };
  return &owner->managed;
}

}  // namespace

py::capsule ToDlpack(const TensorView& view, std::shared_ptr<void> memory) {
  auto* managed = NewManaged<dlpack::ManagedTensor>(view, std::move(memory));
  return py::capsule(managed, dlpack::kName, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, dlpack::kName)) return;  // A consumer took it.
    auto* unused =
        static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kName));
    unused->deleter(unused);
  });
}

py::object ToTensor(const TensorView& view, std::shared_ptr<void> memory, const py::type& type) {
  const dlpack::ExchangeApi& api = ApiOf(type);
  auto* managed = NewManaged<dlpack::ManagedTensorVersioned>(view, std::move(memory));
  managed->major = 1;
  void* tensor = nullptr;
  // It takes `managed`, and may have freed it when it fails.
  if (api.import_managed(managed, &tensor) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
}

DType DTypeFromName(const std::string& name) {
  for (int i = 0; i < kDTypeCount; ++i) {
    if (name == NameOf(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  ThrowDType("the tensor", "'" + name + "'");
}

TensorView ContiguousView(void* data, DType dtype, const std::vector<int64_t>& shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  int64_t bytes;
  if (!SetShape(&view, static_cast<int>(shape.size()), shape.data(), nullptr) ||
      __builtin_mul_overflow(view.count, SizeOf(dtype), &bytes)) {
    std::string text;
    for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    Throw(absl::InvalidArgumentError("there can be no tensor of shape (" + text + ")"));
  }
  return view;
}

}  // namespace bluefog::python
