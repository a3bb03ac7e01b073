// The C structs of the DLPack exchange protocol, written down from its public ABI description
// (https://dmlc.github.io/dlpack/latest/c_api.html), so that no framework's header is needed to
// build. Layout and numbers are fixed by that ABI; the names are ours.
#pragma once

#include <cstdint>

namespace bluefog::python::dlpack {

enum DeviceCode : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t code;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  ///< In elements; null means contiguous.
  uint64_t byte_offset;
};

/// Capsule "dltensor"; the consumer renames it "used_dltensor" and calls the deleter when done.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

/// Capsule "dltensor_versioned", since version 1.0.
struct ManagedTensorVersioned {
  uint32_t major;
  uint32_t minor;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};
inline constexpr uint64_t kReadOnlyFlag = 1;

/// C functions of a framework, in a capsule at the attribute kExchangeAttribute of its tensor type,
/// since version 1.2. All need the GIL; -1 is a Python exception.
struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* previous;  ///< For consumers of an older major version.
  int (*allocate)(Tensor* prototype, ManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*export_managed)(void* object, ManagedTensorVersioned** out);
  int (*import_managed)(ManagedTensorVersioned* tensor, void** out_object);  ///< Takes `tensor`.
  int (*export_borrowed)(void* object, Tensor* out);  ///< Valid while `object` is not touched.
  int (*current_stream)(int32_t device_code, int32_t device_index, void** out_stream);
};

inline constexpr char kName[] = "dltensor";
inline constexpr char kUsedName[] = "used_dltensor";
inline constexpr char kVersionedName[] = "dltensor_versioned";
inline constexpr char kUsedVersionedName[] = "used_dltensor_versioned";
inline constexpr char kExchangeName[] = "dlpack_exchange_api";
inline constexpr char kExchangeAttribute[] = "__dlpack_c_exchange_api__";

}  // namespace bluefog::python::dlpack
